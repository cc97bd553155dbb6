"""What the sweep asks of one model: captured, equal, trains alike, roles, adapters, generation. One dict of plain values comes back.

Every check says "ok", or what is wrong in words. All random generators are seeded before each call that may draw.
"""

import copy
import functools
import random
import time

import numpy
import torch

from rewrite.calls.inputs import Examples, Sizes, takes_use_cache
from rewrite.calls.leaves import leaves
from rewrite.calls.variants import is_hugging_face
from rewrite.capture.model import capture
from rewrite.errors import Refused, RewriteError
from rewrite.pipeline import apply, live_of
from rewrite.report import Report
from rewrite.roles.find import roles
from rewrite.spec.parse import Spec

from .agreement import agreement

SHAPES = ((2, 10), (1, 4))
TOKENS = 5
KEPT = {"past_key_values", "cache_params", "mems", "state", "past_buckets_states"}


def seed(number=0):
    torch.manual_seed(number)
    numpy.random.seed(number)
    random.seed(number)


def inputs_at(model, batch, length, refused=None):
    """Inputs of these sizes, as the engine makes them from the config: the fullest that the model takes; the text alone where more was refused."""
    examples = Examples(model)
    examples.sizes = Sizes(batch, length, 2, length + 2)
    return _accepted(model, examples, refused)


def accepts(model):
    """The engine's own example, or the reason why the model takes none."""
    return _accepted(model, Examples(model))


def _accepted(model, examples, refused=None):
    reasons = []
    for inputs, _ in examples.candidates(refused):
        try:
            seed()
            with torch.no_grad():
                model(**copy.deepcopy(inputs))
            return inputs
        except Exception as failure:  # whatever a model says to inputs that it does not take
            reasons.append(failure)
    raise reasons[0]


def flat(output):
    """The tensors of an output by name, without what it keeps for the next call."""
    fields = dict(output) if isinstance(output, dict) else {"output": output}
    names, tensors, _ = leaves({name: value for name, value in fields.items() if name not in KEPT})
    return {name: tensor for name, tensor in zip(names, tensors) if not KEPT & set(name.split("."))}  # nor what a model inside it keeps


def difference(want, got):
    """The first output that is not the same, bit for bit; None where all are."""
    want, got = flat(want), flat(got)
    for name, value in want.items():
        if name not in got:
            return f"{name} is missing"
        other = got[name]
        if value.dtype != other.dtype or value.shape != other.shape:
            return f"{name} is {tuple(other.shape)} {other.dtype}, not {tuple(value.shape)} {value.dtype}"
        if not torch.equal(value.isnan(), other.isnan()):
            return f"{name} is not a number at other places"
        if not torch.equal(value.nan_to_num(), other.nan_to_num()):
            return f"{name} differs by {float((value.double() - other.double()).abs().nan_to_num().max()):.1e}"
    return None


def spread(want, got):
    """The largest difference of two outputs, beside their size."""
    want, got = flat(want), flat(got)
    found = [float((value - got[name]).abs().nan_to_num().max()) / (1 + float(value.abs().nan_to_num().max())) for name, value in want.items() if value.is_floating_point() and value.numel()]
    return max(found, default=0.0)


def gradients(model, output):
    """Gradients by name of all weights that have one, of the loss, or of all outputs where there is none."""
    output = flat(output)
    outputs = [output["loss"]] if "loss" in output else [value.square().mean() for value in output.values() if value.is_floating_point() and value.requires_grad]
    weights = dict(model.named_parameters())
    for weight in weights.values():
        weight.grad = None
    sum(outputs).backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def is_close(own, found, relative, absolute):
    """Whether each gradient is the other's, within a share of its own largest entry and one of the largest of all."""
    largest = max((float(gradient.abs().nan_to_num().max()) for gradient in own.values()), default=0.0)
    for name, gradient in own.items():
        apart = (gradient - found.get(name, torch.zeros_like(gradient))).abs().nan_to_num()
        if float(apart.max()) > relative * float(gradient.abs().nan_to_num().max()) + absolute * largest:
            return False
    return True


def words(failure):
    lines = [line for line in str(failure).strip().splitlines() if line.strip()]
    return f"{type(failure).__name__}: {' '.join(lines[:2])[:300]}"


class Judged:
    """One model under the checks; `found` fills as they go, `keep` is called after each."""

    def __init__(self, model, keep, example=None, at=inputs_at):
        self.model, self.keep, self.example, self.at = model, keep, example, at
        self.found = {"parameters": sum(p.numel() for p in model.parameters()), "seconds": {}}
        self.caching = getattr(model, "can_generate", lambda: False)()
        self.uncached = {"use_cache": False} if is_hugging_face(model) and takes_use_cache(model) else {}

    def run(self):
        steps = (self.captured, self.equal, self.trains, self.roles, self.adapted, self.generates)
        for step in steps:
            start = time.perf_counter()
            self.found["at"] = step.__name__
            self.keep(self.found)
            try:
                self.found[step.__name__] = step()
            except Exception as failure:  # the sweep goes on whatever a model does
                self.found[step.__name__] = words(failure)
            self.found["seconds"][step.__name__] = round(time.perf_counter() - start, 2)
            if step == self.captured and self.found["captured"] != "ok":
                break
        self.found.pop("at")
        return self.found

    def captured(self):
        seed()
        self.graph = capture(self.model, self.example)
        self.found["nodes"] = len(self.graph.nodes)
        self.found["variants"] = [graph.name for graph in self.graph.all() if not graph.is_inner]
        self.found["opaque"] = {path: reason[:300] for path, reason in self.graph.opaque.items()}
        self.found["notes"] = [note[:300] for note in self.graph.notes]
        refused = next((note for note in self.graph.notes if note.startswith("captured without ")), None)
        if refused is not None:
            self.at = functools.partial(self.at, refused=refused)
        graph = self.graph.copy()
        self.live = live_of(graph, Spec.parse({"passes": []}), Report(), None)
        return "ok"

    def _both(self, inputs, number=0, live=None):
        seed(number)
        want = self.model(**copy.deepcopy(inputs))
        seed(number)
        return want, (live or self.live)(**copy.deepcopy(inputs))

    def _apart(self, inputs, number=0, live=None):
        """Where live model and original differ; None where they do not, or by the order of sums alone, which is noted.

        Products round by how their arguments lie in memory, so a difference counts where it is there each time and in float64 too; where a
        model computes in float32 whatever it is given, where it is more than the last place of the weights makes.
        """
        wrong = difference(*self._both(inputs, number, live))
        if wrong is None or "differs by" not in wrong or not any(difference(*self._both(inputs, number, live)) is not None for _ in range(2)):
            return wrong if wrong and "differs by" not in wrong else None
        own, self.model = self.model, copy.deepcopy(self.model).double()
        try:
            exact = copy.deepcopy(live or self.live).double()
            wide = {name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for name, value in inputs.items()}
            far = spread(*self._both(wide, number, exact))
        except Exception:  # some kernels have no float64
            far = float("inf")
        finally:
            self.model = own
        if far > 1e-11 and spread(*self._both(inputs, number, live)) > self._last_place(inputs, number):
            return wrong
        self.found.setdefault("rounding", []).append(wrong)
        return None

    def _last_place(self, inputs, number):
        """How far the original's own outputs move, beside their size, when every weight moves by its last place, up or down at random."""
        generator, moved = torch.Generator().manual_seed(0), copy.deepcopy(self.model)
        with torch.no_grad():
            for weight in moved.parameters():
                weight.mul_(1 + torch.finfo(weight.dtype).eps * (torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1).to(weight.dtype))
        seed(number)
        want = self.model(**copy.deepcopy(inputs))
        seed(number)
        return spread(want, moved(**copy.deepcopy(inputs)))

    def equal(self):
        """In eval mode at two other shapes, once without a cache and once as it is called by default; a head that keeps none, without."""
        narrowed = []
        with torch.no_grad():
            for number, (batch, length) in enumerate(SHAPES):
                inputs = self.at(self.model, batch, length)
                if number == 0 or not self.caching:  # keys that went through a cache lie otherwise in memory, and sums round otherwise
                    inputs |= self.uncached
                try:
                    seed()
                    self.model(**copy.deepcopy(inputs))
                except Exception as failure:  # not a size of this model's
                    narrowed.append(f"{batch}×{length}: upstream refuses it: {words(failure)}")
                    continue
                try:
                    wrong = self._apart(inputs)
                except Refused as refusal:
                    narrowed.append(f"{batch}×{length}: {words(refusal)}")
                    continue
                if wrong:
                    return f"{batch}×{length}: {wrong}"
        if narrowed:
            self.found["narrowed"] = narrowed
        if len(narrowed) == len(SHAPES):
            inputs = self.example or self.at(self.model, *_own(self.model))
            with torch.no_grad():
                wrong = self._apart(inputs)
            return f"at the shape of the example: {wrong}" if wrong else "ok"
        return "ok"

    def _labelled(self):
        """Inputs at the example's own shape, with labels where the captured call takes them."""
        inputs = self.example or self.at(self.model, *_own(self.model))
        inputs = dict(inputs)
        signature = self.graph.signature
        names = list(getattr(signature, "labels", ()))
        if names:
            with torch.no_grad():
                output = self.model(**inputs)
                labels = Examples(self.model).labels(names, output)
                try:
                    self.model(**copy.deepcopy(inputs | labels))
                    inputs |= labels
                except (ValueError, RuntimeError) as failure:  # its logits have places that its labels have not
                    self.found["unlabelled"] = words(failure)
        return inputs | self.uncached

    def trains(self):
        """The same loss (all outputs, where there is none) and gradients in training mode from the same seed; running averages alike."""
        inputs = self._labelled()
        model = copy.deepcopy(self.model)
        own, self.model = self.model, model
        live = copy.deepcopy(self.live)
        try:
            model.train(), live.train()
            trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
            for name, weight in live.named_parameters():
                weight.requires_grad_(name in trained)
            try:
                seed(7)
                copy.deepcopy(model)(**copy.deepcopy(inputs))
            except Exception as failure:  # the original does not train at this shape
                return f"upstream: {words(failure)}"
            want, got = self._both(inputs, 7, live)
            self.found["loss"] = "loss" in flat(want)
            wrong = difference(want, got) and self._apart(inputs, 8, live)
            wrong = wrong or self._gradients_apart(inputs, want, got, live)
        finally:
            self.model = own
        if wrong:
            return wrong
        buffers = dict(live.named_buffers())
        for name, value in model.named_buffers():
            if name in buffers and not torch.equal(value, buffers[name]):
                return f"buffer {name} differs"
        return "ok"

    def _gradients_apart(self, inputs, want, got, live):
        """Where the gradient of a weight is not the original's; None where all are.

        Bit for bit; else in float64, where only the order of sums may differ; else, for a model that computes in float32 whatever it is given,
        within what that rounds.
        """
        try:
            own = gradients(self.model, want)
        except Exception as failure:  # the original has no gradient here
            self.found["gradients"] = f"upstream: {words(failure)}"
            return None
        found = gradients(live, got)
        alone = [name for name, gradient in found.items() if name not in own and gradient.any()]
        if alone:
            return f"{alone[0]} has a gradient, unlike in the original"
        apart = [name for name, gradient in own.items() if not torch.equal(gradient, found.get(name, torch.zeros_like(gradient)))]
        self.found["gradients"] = {"of": len(own), "rounded": len(apart)}
        if not apart or is_close(own, found, 1e-4, 1e-6) and self._is_close_in_float64(inputs, live):
            return None
        worst = max(apart, key=lambda name: float((own[name] - found.get(name, 0)).abs().max() / own[name].abs().max().clamp(min=1e-30)))
        return f"the gradient of {worst} differs"

    def _is_close_in_float64(self, inputs, live):
        own, self.model = self.model, copy.deepcopy(self.model).double()
        try:
            exact = copy.deepcopy(live).double()
            wide = {name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for name, value in inputs.items()}
            want, got = self._both(wide, 7, exact)
            if spread(want, got) > 1e-11:
                return True  # float32 all the same
            return is_close(gradients(self.model, want), gradients(exact, got), 1e-9, 1e-12)
        except Exception:  # some kernels have no float64
            return True
        finally:
            self.model = own

    def roles(self):
        found = [site for graph in self.graph.all() if graph.name == "forward" or graph.is_inner for site in roles(graph)]
        self.sites = found
        self.found["summary"] = roles(self.graph).summary()
        table = agreement(self.model, found)
        if table:
            self.found["peft"] = table
        return "ok" if any(site.layout.kind for site in found) else "no weight has a role"

    def adapted(self):
        results = {}
        names = {role for site in self.sites for role in site.roles}
        widest = next((role for role in ("linear", "conv", "head") if role in names), "linear")
        for where in ("attention.{q,v}", widest):
            found = where in names or {"attention.q", "attention.v"} & names
            results[where] = self._adapted(where) if found else "no site"
        self.found["adapters"] = results
        wrong = {name: text for name, text in results.items() if not text.startswith(("ok", "no site"))}
        return "; ".join(f"{name}: {text}" for name, text in wrong.items()) or "ok"

    def _adapted(self, where):
        graph = self.graph.copy()
        spec = Spec.parse({"passes": [{"pass": "lora", "where": where, "rank": 2, "allow_refusals": True}]})
        try:
            report = apply(graph, spec)
        except Refused as refusal:
            self.found.setdefault("refused", []).append(f"lora at {where}: {words(refusal)}")
            return f"ok: {words(refusal)}"
        except RewriteError as failure:
            return words(failure)
        if not report.applied[0].sites:
            return "no site"
        live = live_of(graph, spec, report, None).eval()
        sites, refused = len(report.applied[0].sites), len(report.applied[0].refused)
        inputs = self._labelled()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)  # a product with a frozen weight may take another kernel
        try:
            with torch.no_grad():
                wrong = self._apart(inputs, 3, live)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        if wrong:
            return f"not the same at init: {wrong}"
        if where == "attention.{q,v}" or not hasattr(self, "adapter"):
            self.adapter = copy.deepcopy(live)
        adapters = {name: p for name, p in live.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        try:
            if not self._goes_back(live, inputs):
                return "no output needs a gradient"
        except AssertionError:  # reversible layers (Reformer) go back in training mode alone
            try:
                self._goes_back(live.train(), inputs)
            except (AssertionError, ValueError) as failure:
                return f"ok: upstream trains at no such shape: {words(failure)}"
        idle = self._idle(inputs)
        without = [name for name, p in adapters.items() if p.grad is None and name.split(".lora.")[0] not in idle]
        if without:
            return f"{len(without)} of {len(adapters)} adapter tensors get no gradient: {without[0]}"
        frozen = [name for name, p in live.named_parameters() if not p.requires_grad and p.grad is not None]
        if frozen:
            return f"frozen {frozen[0]} gets a gradient"
        zero = sum(p.grad is None or not p.grad.any() for p in adapters.values())
        return f"ok: {sites} sites" + (f", {refused} refused" if refused else "") + (f", {zero} of {len(adapters)} gradients are zero" if zero else "")

    @staticmethod
    def _goes_back(live, inputs):
        """Run it and go back from all its outputs; whether any of them needs a gradient."""
        seed(3)
        output = flat(live(**copy.deepcopy(inputs)))
        total = sum(value.double().square().mean() for value in output.values() if value.is_floating_point() and value.requires_grad)
        if isinstance(total, torch.Tensor):
            total.backward()
        return isinstance(total, torch.Tensor)

    def _idle(self, inputs):
        """Paths of modules whose own weights get no gradient in the original either: nothing that it returns depends on them smoothly."""
        model = copy.deepcopy(self.model).requires_grad_(True)
        seed(3)
        try:
            sum(value.double().square().mean() for value in flat(model(**copy.deepcopy(inputs))).values() if value.requires_grad).backward()
        except AssertionError:  # reversible layers (Reformer) go back in training mode alone: nothing is excused
            return set()
        return {path for path, module in model.named_modules() if all(p.grad is None for p in module.parameters())}

    def generates(self):
        if not self.caching:
            return "no generator"
        sizes = _own(self.model) if len(self.found.get("narrowed", ())) == len(SHAPES) else (2, 6)
        inputs = {name: value for name, value in self.at(self.model, *sizes).items() if not name.startswith("decoder_")}
        options = dict(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        cacheless = not {"past", "next"} & set(self.found["variants"])
        if cacheless:
            options["use_cache"] = False
        with torch.no_grad():
            seed()
            try:
                want = self.model.generate(**copy.deepcopy(inputs), **options)
            except Exception as failure:
                return f"upstream: {words(failure)}"
            seed()
            try:
                got = getattr(self, "adapter", self.live).generate(**copy.deepcopy(inputs), **options)
            except Refused as refusal:
                self.found.setdefault("refused", []).append(f"generate: {words(refusal)}")
                return f"ok: {words(refusal)}"
        want, got = (value if isinstance(value, torch.Tensor) else value.sequences for value in (want, got))
        if want.shape != got.shape or not torch.equal(want, got):
            return f"other tokens: {want.tolist()} and {got.tolist()}"[:200]
        return "ok without a cache" if cacheless else "ok"


def _own(model):
    sizes = Examples(model).sizes
    return sizes.batch, sizes.length
