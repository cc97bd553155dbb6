"""Several named adapters in one live model: added, switched, combined, taken away; the weights stay where they are.

    a = adapters(live)         the steps of a spec that have one name are one adapter ("default" where none is given)
    a.add("fr", [{"pass": "lora", "rank": 8}])
    a.use("fr")   a.use("fr", "de")   a.use()      one, several in that order, none: the model without them, bit for bit
    a.combine("mix", {"fr": 0.7, "de": 0.3})

The captured graph is kept: switching runs the passes of the adapters in use on it once more, over the tensors that are there, and prints anew.
What has no name (unfreeze, freeze) is always in use. Not to be confused with transformers' own `model.add_adapter`, which knows nothing of graphs.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import graph as g
from .contract import Pass
from .edit.batch import Batch, alone
from .emit.live import make_live
from .errors import Refused, RewriteError
from .pipeline import run_again
from .report import Report
from .spec.forms import Form
from .spec.parse import Spec, Step
from .store.folder import ADAPTER, put_tensors, read_folder, unwrapped, write


def adapters(live):
    """The Adapters of a live model. Raises Refused for a model that did not come from `rewrite`."""
    return Adapters(unwrapped(live, "adapters"))


@dataclass
class Known:
    """What a live model remembers of its adapters: steps that are always in use, those of each adapter, and which are in use."""

    ground: tuple
    steps: dict[str, tuple]
    active: tuple[str, ...]
    made: set = field(default_factory=set)

    @staticmethod
    def of(live):
        ground, steps = [], {}
        for step in live.spec.passes:
            named = isinstance(step, Step) and not hasattr(step.options, "apply")
            (steps.setdefault(step.name, []) if named else ground).append(step)
        return Known(tuple(ground), {name: tuple(own) for name, own in steps.items()}, tuple(steps), {*live.report.made, *live.report.memory})


class Adapters:
    """The adapters of a live model by name; those of a batch too, which are all in use and can be saved and loaded one by one."""

    def __init__(self, live):
        self.live = live
        self.known = live.__dict__.get("_adapters") or Known.of(live)

    # ---- looking ------------------------------------------------------------------------------------------------------------
    @property
    def names(self):
        """The names of all adapters, in the order in which they came."""
        return (*self.known.steps, *self._batch())

    @property
    def active(self):
        """The names of the adapters in use, in the order in which they run."""
        return (*self.known.active, *self._batch())

    def steps_of(self, name):
        """The steps of an adapter."""
        self._require((name,))
        return self.known.steps[name] if name in self.known.steps else dict(next(step for step in self.live.spec.passes if isinstance(step, Batch)).adapters)[name]

    def _batch(self):
        return next((step.names for step in self.live.spec.passes if isinstance(step, Batch)), ())

    # ---- changing -----------------------------------------------------------------------------------------------------------
    def add(self, name, passes):
        """A new adapter of these steps (as in a spec, without names), in use behind the others."""
        if name in self.names:
            raise Refused(f'adapters: "{name}" is there already. Delete it first, or choose another name.')
        steps = Spec.parse({"passes": [{**step, "name": name} if isinstance(step, dict) else step for step in passes]}).passes
        self._refuse_strange(name, steps)
        self._run(dataclasses.replace(self.known, steps={**self.known.steps, name: steps}, active=(*self.known.active, name)))

    def use(self, *names):
        """Use these adapters, in this order, and no others."""
        self._require(names)
        if names != self.known.active:
            self._run(dataclasses.replace(self.known, active=names))

    def delete(self, name):
        """Take an adapter away, with its tensors."""
        self._require((name,))
        mine = self._owned(name)
        steps = {other: own for other, own in self.known.steps.items() if other != name}
        self._run(dataclasses.replace(self.known, steps=steps, active=tuple(other for other in self.known.active if other != name)))
        for path in mine:
            g.remove(self.live, path)
        self.known.made -= set(mine)

    def combine(self, name, weights):
        """A new adapter, the weighted sum of others: of what they do where a pass can say that (`combined`, as lora does), else of their tensors."""
        self._require(tuple(weights))
        first, *others = (self.known.steps[other] for other in weights)
        for steps in others:
            if [(step.method, step.where) for step in steps] != [(step.method, step.where) for step in first]:
                raise Refused("adapters: only adapters of the same passes at the same places can be combined.")
        steps, values = [], {}
        for at, step in enumerate(first):
            parts = [(self.known.steps[other][at].options, float(weight), self._by_site(other, step)) for other, weight in weights.items()]
            found = [step.options.combined([(options, weight, sites[place]) for options, weight, sites in parts]) for place in parts[0][2]]
            if any(one is None for one in found):
                raise Refused(f"adapters: {step.method} of other options cannot be combined.")
            steps.append(dataclasses.replace(step, name=name, options=found[0][0]))
            for place, (_, tensors) in zip(parts[0][2], found):
                values |= {".".join(filter(None, (place[0], step.method.rpartition(".")[2], name, place[1], key))): value for key, value in tensors.items()}
        self.add(name, [one.to_dict() for one in steps])
        with torch.no_grad():
            for path, value in values.items():
                g.attribute(self.live, path).copy_(value)

    # ---- on disk ------------------------------------------------------------------------------------------------------------
    def save(self, folder, *names):
        """Write adapters as folders that `rewrite.load` reads, each as if it were alone: one name into `folder` itself, more (or all) into folders of their names in it."""
        self._require(names or self.names)
        for name in names or self.names:
            write(self.live, Path(folder) if len(names) == 1 else Path(folder) / name, *self._alone(name))
        return Path(folder)

    def load(self, folder, name):
        """Read a folder that `save` wrote into the adapter `name`; one that is not there yet is added."""
        spec, tensors = read_folder(Path(folder), self.live._base)
        steps = [step for step in spec.passes if isinstance(step, Step) and not hasattr(step.options, "apply")]
        own = {step.name for step in steps}
        if len(own) > 1:
            raise Refused(f"{folder}: holds several adapters ({', '.join(sorted(own))}). Save them one by one.")
        if name not in self.names:
            self.add(name, [step.to_dict() for step in steps])
        wanted, mine = self._alone(name)
        bare = lambda spec: [dataclasses.replace(step, name="") for step in spec.passes if isinstance(step, Step) and not hasattr(step.options, "apply")]  # noqa: E731
        if bare(spec) != bare(wanted):
            raise Refused(f"{folder}: its steps are not those of the adapter {name!r} here.")
        old = next(iter(own))
        renamed = {_renamed(path, steps, old, name) if name in self.known.steps else path: value for path, value in tensors.items()}
        put_tensors(mine, renamed, Path(folder) / ADAPTER)

    # ---- how ----------------------------------------------------------------------------------------------------------------
    def _require(self, names):
        for name in names:
            if name not in self.names:
                raise Refused(f'adapters: there is no "{name}". There are: {", ".join(self.names) or "none"}.')

    def _refuse_strange(self, name, steps):
        for step in steps:
            if isinstance(step, Form | Batch) or hasattr(step.options, "apply"):
                raise Refused(f"adapters: {step.place} of {name!r} is no step with sites of its own; it belongs into the spec of the whole model.")

    def _markers(self, name):
        return [f".{step.method.rpartition('.')[2]}.{name}." for step in self.known.steps.get(name, ())]

    def _owned(self, name):
        """The paths of an adapter's tensors."""
        return [path for path in sorted(self.known.made) if any(marker in f".{path}." for marker in self._markers(name))]

    def _by_site(self, name, step):
        """(path before the adapter's name, label behind it) → {tensor's name: tensor} of one step of an adapter."""
        marker, found = f"{step.method.rpartition('.')[2]}.{name}", {}
        for path in self._owned(name):
            before, _, behind = f".{path}".partition(f".{marker}.")
            if behind:
                label, _, tensor = behind.rpartition(".")
                found.setdefault((before.removeprefix("."), label), {})[tensor] = g.attribute(self.live, path).detach()
        return found

    def _alone(self, name):
        """(spec, path → tensor) of one adapter as if it were alone with what is always in use."""
        live = self.live
        if name in self._batch():
            tensors = {of[name]: g.attribute(live, path)[list(of).index(name)] for path, of in live.report.stacked.items() if name in of}
            return alone(live.spec, name), tensors
        spec = dataclasses.replace(live.spec, passes=_placed((*self.known.ground, *self.known.steps[name])), source=None)
        return spec, {path: g.attribute(live, path) for path in (*self._owned(name), *live.report.trains)}

    def _run(self, known):
        """Rewrite the kept graph with the adapters of `known` in use; the live model stays as it is where that is refused."""
        live = self.live
        self._refuse_unfit(known)
        passes = _placed((*known.ground, *(step for name in known.active for step in known.steps[name])))
        graph = live.graph.bare.over(live)
        flags = {id(p): (p, p.requires_grad) for p in live.parameters()}
        fresh = Report(opaque=dict(graph.opaque), notes=list(graph.notes))
        try:
            run_again(graph, passes, live.spec.seed, fresh, self.known.made)
        except RewriteError:
            for path in {*fresh.made, *fresh.memory} - self.known.made:
                if g.has_attribute(live, path):
                    g.remove(live, path)
            for parameter, flag in flags.values():
                parameter.requires_grad_(flag)
            raise
        known.made = {*self.known.made, *fresh.made, *fresh.memory}
        graph.bare = live.graph.bare
        make_live(graph)
        self.known = known
        live.__dict__.update(graph=graph, spec=dataclasses.replace(live.spec, passes=passes), report=fresh, _adapters=known)

    def _refuse_unfit(self, known):
        live, report = self.live, self.live.report
        if live.graph is None or live.graph.bare is None:
            raise Refused("adapters: this live model has left its captured graph behind (it was unpickled, or donated). Save it, and load it on its base.")
        if report.folded or report.derived or report.released:
            raise Refused("adapters: a pass has changed the base weights themselves, so the passes cannot be run on them once more. Rewrite the base with the adapters wanted.")
        for name, steps in known.steps.items():
            for step in steps:
                if type(step.options).trains is not Pass.trains or type(step.options).writes is not Pass.writes:
                    raise Refused(f'adapters: {step.method} of "{name}" trains tensors of the model itself, which all adapters share. Use lora and the like, or a batch, where each has copies.')


def _placed(steps):
    return tuple(dataclasses.replace(step, place=f"passes[{number}]") for number, step in enumerate(steps))


def _renamed(path, steps, old, new):
    """A tensor's path under another adapter's name."""
    for step in steps:
        marker = f".{step.method.rpartition('.')[2]}."
        path = f".{path}".replace(f"{marker}{old}.", f"{marker}{new}.").removeprefix(".")
    return path
