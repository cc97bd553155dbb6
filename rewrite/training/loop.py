"""What passes do while training, offered to a plain loop in a few calls, and to transformers' Trainer as a callback.

    t = training(live)
    optimizer = t.optimizer(torch.optim.AdamW, lr=1e-3)
    for batch in batches:
        loss = t.step(optimizer, lambda: live(**batch))

A loop of one's own calls `before_forward`, `after_backward` and `after_step` where their names say. Nothing is kept here: choices, counters
and what passes remember are buffers of the live model, saved and resumed with it, and randomness is drawn anew from (seed, site, step).
"""

import hashlib

import torch

from .. import graph as g
from ..contract import wants
from ..errors import Refused
from ..store.folder import unwrapped
from .hooks import COUNTER, discard


def training(live):
    """The Training of a live model. Raises Refused for a model that did not come from `rewrite`."""
    return Training(unwrapped(live, "training"))


class Training:
    """The hooks of a live model's passes. `penalty` is the value of the penalties at the last step, None without any."""

    def __init__(self, live):
        self.live, self.penalty, self._calls = live, None, 0

    # ---- a plain loop -----------------------------------------------------------------------------------------------------
    def optimizer(self, cls, lr, **options):
        """An optimizer of class `cls` over everything that trains, with the learning rates that the passes ask for."""
        factors = self.factors()
        groups = {}
        for name, parameter in self.live.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(factors.get(name, 1.0), []).append(parameter)
        if not groups:
            raise Refused("training: nothing trains in this model. Add a pass that brings tensors, or unfreeze.")
        return cls([{"params": parameters, "lr": lr * factor} for factor, parameters in groups.items()], lr=lr, **options)

    def step(self, optimizer, *forwards):
        """One optimizer step over micro-batches: each of `forwards` runs the model and returns its loss, or an output with `.loss`.

        Runs backward, every hook in its place, the optimizer, and zero_grad. Returns the mean loss, without penalties, detached.
        """
        if not forwards:
            raise Refused("training: step() needs at least one function that runs the model: t.step(optimizer, lambda: live(**batch)).")
        self._refuse_eval()
        self.before_forward()
        own = self._only("step")
        if own is not None:
            hooked, method = own
            value = method(**self._given(hooked, method, "step", optimizer, loss=lambda: self._mean(forwards)))
        else:
            value = self._mean(forwards, backward=True)
            self.after_backward()
            optimizer.step()
        self.after_step(optimizer)
        optimizer.zero_grad()
        return value.detach()

    def _refuse_eval(self):
        chosen = [hooked.step.method for hooked in self.live.report.hooked.values() if hooked.step.options.drawn]
        if chosen and not self.live.training:
            raise Refused(f"training: {', '.join(chosen)} makes choices for each step, which the model reads in training mode alone, and it is in eval mode. Call live.train() first.")

    def loss(self, forward):
        """The loss of one micro-batch: what `forward` returns, or what a pass makes of it."""
        own = self._only("loss")
        if own is None:
            made = forward()
            return made if isinstance(made, torch.Tensor) else made.loss
        hooked, method = own
        self._calls += 1
        return method(**self._given(hooked, method, f"loss {self._calls}", forward=forward))

    def _mean(self, forwards, backward=False):
        total, self._calls = 0.0, 0  # the same choices each time that a step runs the model
        for forward in forwards:
            loss = self.loss(forward) / len(forwards)
            if backward:
                loss.backward()
            total = total + loss.detach()
        return total

    # ---- the moments of a step ------------------------------------------------------------------------------------------------
    def prepare(self, *forwards):
        """Before training: each of `forwards` runs the model on a batch."""
        self._call("prepare", forwards=forwards)

    @torch.no_grad()
    def before_forward(self):
        """At the start of each optimizer step: passes make their choices for it."""
        self._calls = 0
        self._call("before_forward")

    def after_backward(self):
        """When the step's gradients are there (not scaled), before the optimizer: those of the penalties are added, and passes change them."""
        penalties = self._call("penalty")
        self.penalty = sum(penalties) if penalties else None
        if penalties and self.penalty.requires_grad:
            parameters = [p for p in self.live.parameters() if p.requires_grad]
            for parameter, grad in zip(parameters, torch.autograd.grad(self.penalty, parameters, allow_unused=True)):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        if penalties:
            self.penalty = self.penalty.detach()
        with torch.no_grad():
            self._call("after_backward")

    @torch.no_grad()
    def after_step(self, optimizer):
        """When the optimizer has stepped, before zero_grad."""
        self._call("after_step", optimizer)
        if COUNTER in self.live.report.memory:
            g.attribute(self.live, COUNTER).add_(1)

    @property
    def done(self):
        """How many optimizer steps the model has seen."""
        return int(g.attribute(self.live, COUNTER)) if COUNTER in self.live.report.memory else 0

    # ---- by hand --------------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def choose(self, **choice):
        """A choice made by hand, for use outside of training: each pass that has it takes it (`rank=4` for dylora). Raises Refused where none has."""
        taken = False
        for hooked in self.live.report.hooked.values():
            method = getattr(hooked.step.options, "choose", None)
            if method is not None and set(choice) <= set(wants(method)):
                method(**self._given(hooked, method, "choose", **choice))
                taken = True
        if not taken:
            raise Refused(f"training: no pass of this model has a choice {', '.join(choice)}. Its passes with hooks: {self._names() or 'none'}.")

    def finish(self):
        """Training is over: take what hooks remember off the model, so that it is not saved. The passes' hooks are gone with it."""
        report = self.live.report
        report.hooked.clear()
        discard(report, self.live, set(report.memory))

    def factors(self):
        """name of a parameter → factor of its learning rate, where a pass asks for another than 1."""
        found = {}
        for hooked in self.live.report.hooked.values():
            factors = getattr(hooked.step.options, "groups", dict)()
            for tensors in (hooked.shared, *(held.tensors for held in hooked.sites.values())):
                found.update({path: factors[name] for name, path in tensors.items() if factors.get(name, 1.0) != 1.0})
        return found

    def callback(self):
        """A `transformers.TrainerCallback` that calls the hooks while Trainer trains."""
        from .trainer import callback  # transformers' Trainer takes a second to import

        return callback(self)

    # ---- calling hooks ----------------------------------------------------------------------------------------------------------
    def _call(self, hook, optimizer=None, **known):
        found = ((hooked, getattr(hooked.step.options, hook, None)) for hooked in self.live.report.hooked.values())
        return [method(**self._given(hooked, method, hook, optimizer, **known)) for hooked, method in found if method is not None]

    def _only(self, hook):
        """The step with a hook that one pass alone can have, and the hook; None without."""
        found = [(hooked, getattr(hooked.step.options, hook)) for hooked in self.live.report.hooked.values() if hasattr(hooked.step.options, hook)]
        if len(found) > 1:
            raise Refused(f"training: {' and '.join(one.step.method for one, _ in found)} each want a {hook} of their own. Keep one of them.")
        return found[0] if found else None

    def _given(self, hooked, method, hook, optimizer=None, **known):
        """What a hook asks for, by name."""
        given = {}
        for name in wants(method):
            if name in known:
                given[name] = known[name]
            elif name in hooked.shared:
                given[name] = hooked.common(self.live, name)
            elif name == "sites":
                given[name] = hooked.views(self.live)
            elif name == "done":
                given[name] = self.done
            elif name == "generator":
                given[name] = self._generator(hooked, hook)
            elif name == "optimizer" and optimizer is not None:
                given[name] = optimizer
            elif name == "lr" and optimizer is not None:
                given[name] = _rates(optimizer)
            else:
                has = ", ".join(dict.fromkeys(("sites", "done", "generator", *known, *(("optimizer", "lr") if optimizer is not None else ()), *hooked.shared)))
                raise Refused(f"{hooked.step.place}: {hooked.step.method}: {hook}() asks for {name!r}; it may ask for {has}.")
        return given

    def _generator(self, hooked, hook):
        """A generator on the CPU that depends on the spec's seed, the step's first site, the hook and the number of steps alone: nothing to save."""
        place = next(iter(hooked.sites), hooked.step.method)
        number = hashlib.blake2b(f"{hooked.seed}/{place}/{hook}/{self.done}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(number, "little") >> 1)

    def _names(self):
        return ", ".join(hooked.step.method for hooked in self.live.report.hooked.values())


def _rates(optimizer):
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return lambda tensor: rates[id(tensor)]
