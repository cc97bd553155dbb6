"""Several named adapters in one live model: added, switched, combined, taken away; the weights stay where they are.

    a = adapters(live)         the steps of a spec that have one name are one adapter ("default" where none is given)
    a.add("fr", [{"pass": "lora", "rank": 8}])
    a.use("fr")   a.use("fr", "de")   a.use()      one, several in that order, none: the model without them, bit for bit
    a.combine("mix", {"fr": 0.7, "de": 0.3})

The captured graph is kept: the first time that some adapters are used, their passes run on it once more, over the tensors that are there, and
what comes out is kept too; after that switching puts classes and tensors in place. A base tensor that an adapter trains (a bias of bitfit) is a
Parameter of the adapter's own, which stands in the model while it is in use; so each Parameter is one object as long as its adapter is there,
and optimizers go on with it. What has no name (unfreeze, freeze) is always in use. Not to be confused with transformers' own
`model.add_adapter`, which knows nothing of graphs.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from . import graph as g
from .contract import Pass
from .edit.batch import Batch, alone
from .edit.reading import names_of
from .emit.live import Worn, make_live
from .errors import Refused, RewriteError
from .pipeline import run_again
from .report import Report
from .spec.forms import Form
from .spec.parse import Spec, Step
from .store.folder import ADAPTER, SPEC, put_tensors, read_folder, unwrapped, write

_SETTINGS = 64  # sets of adapters whose graph and source are kept


def adapters(live):
    """The Adapters of a live model. Raises Refused for a model that did not come from `rewrite`."""
    return Adapters(unwrapped(live, "adapters"))


@dataclass(frozen=True)
class Setting:
    """A live model with some adapters in use: what it wears, and the names of what trains."""

    graph: g.Graph
    spec: Spec
    report: Report
    worn: Worn
    trains: frozenset

    @staticmethod
    def of(live):
        trains = frozenset(name for name, p in live.named_parameters(remove_duplicate=False) if p.requires_grad)
        return Setting(live.graph, live.spec, live.report, Worn.of(live), trains)

    def fits(self, live):
        """Is everything that its source reads still there? What hooks remember goes when training is over."""
        return all(g.has_attribute(live, path) for path in (*self.report.made, *self.report.memory))

    def put(self, live):
        """Let the live model be as it was."""
        self.worn.put(live)
        for name, parameter in live.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name in self.trains)
        live.__dict__.update(graph=self.graph, spec=self.spec, report=self.report)


class Settings(dict):
    """names of the adapters in use → Setting, the last _SETTINGS of them. They belong to one tree: a copy of the model begins anew."""

    def keep(self, names, setting):
        self.pop(names, None)
        self[names] = setting
        while len(self) > _SETTINGS:
            del self[next(iter(self))]

    def __deepcopy__(self, memo):
        return Settings()

    def __reduce__(self):
        return Settings, ()


@dataclass
class Known:
    """What a live model remembers of its adapters: steps that are always in use, those of each adapter, and which are in use.

    first: those that came with the model's spec. own: adapter → path of a base tensor that it trains → its own Parameter; `base`: path → the
    model's. settings: what the sets of adapters that have been in use look like.
    """

    ground: tuple
    steps: dict[str, tuple]
    active: tuple[str, ...]
    first: frozenset
    made: set = field(default_factory=set)
    own: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    base: dict[str, nn.Parameter] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)

    @staticmethod
    def of(live):
        ground, steps = [], {}
        for step in live.spec.passes:
            named = isinstance(step, Step) and not hasattr(step.options, "apply")
            (steps.setdefault(step.name, []) if named else ground).append(step)
        return Known(tuple(ground), {name: tuple(own) for name, own in steps.items()}, tuple(steps), frozenset(steps), {*live.report.made, *live.report.memory})

    @property
    def passes(self):
        """The steps to run, in their places."""
        return _placed((*self.ground, *(step for name in self.active for step in self.steps[name])))

    @property
    def owners(self):
        """Place of a step → the adapter that it belongs to; None for what is always in use."""
        names = [*[None] * len(self.ground), *(name for name in self.active for _ in self.steps[name])]
        return {f"passes[{number}]": name for number, name in enumerate(names)}


class Adapters:
    """The adapters of a live model by name; those of a batch too, which are all in use and can be saved and loaded one by one."""

    def __init__(self, live):
        self.live = live
        live.__dict__.setdefault("_adapters", Known.of(live))

    @property
    def known(self):
        """The Known of the live model: one, however many ask for its adapters."""
        return self.live.__dict__["_adapters"]

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
        active = tuple(other for other in self.known.active if other != name)
        self._run(dataclasses.replace(self.known, steps=steps, active=active, first=self.known.first - {name}))
        for path in mine:
            g.remove(self.live, path)
        known = self.known
        known.made -= set(mine)
        known.own.pop(name, None)
        for names in [names for names in known.settings if name in names]:
            del known.settings[names]

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
            if not parts[0][2] and all(options == parts[0][0] for options, _, _ in parts):  # it trains what the base has, and brings nothing
                steps.append(dataclasses.replace(step, name=name))
                continue
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
            for path, parameter in self.known.own.get(name, {}).items():  # what they have made of the base's value
                base = self.known.base[path]
                parameter.copy_(base + sum(weight * (self.known.own[other][path] - base) for other, weight in weights.items()))

    # ---- on disk ------------------------------------------------------------------------------------------------------------
    def save(self, folder, *names):
        """Write adapters as folders that `rewrite.load` reads, each as if it were alone: one name into `folder` itself, more (or all) into folders of their names in it."""
        self._require(names or self.names)
        for name in names or self.names:
            write(self.live, Path(folder) if len(names) == 1 else Path(folder) / name, *self._alone(name))
        return Path(folder)

    def load(self, folder, name=None):
        """Read a folder that `save` wrote into the adapter `name`; one that is not there yet is added. Returns the names of what was read.

        Without a name: all adapters of a folder that holds several, and of one with folders of theirs in it, under the names that they have
        there. In use is then what was in use before.
        """
        folder = Path(folder)
        inside = [] if name is not None or (folder / SPEC).exists() or not folder.is_dir() else sorted(part for part in folder.iterdir() if (part / SPEC).is_file())
        read = [(part, *self._read(part, name)) for part in inside or [folder]]
        active = self.known.active
        for part, steps, tensors in read:
            if name is not None and len(steps) > 1:
                raise Refused(f"{part}: holds several adapters ({', '.join(steps)}). Leave out the name to load all, each under its own.")
            names = {old: name or (part.name if inside else old) for old in steps}
            if name is None and set(names.values()) - set(self.names):
                self.use()
            self._put(part, steps, names, tensors)
        if name is None:
            self.use(*active)
        return tuple(new for part, steps, _ in read for new in ([name] if name else [part.name] if inside else steps))

    def _read(self, folder, name):
        """(adapter → its steps, path → tensor) of a folder."""
        spec, tensors = read_folder(folder, self.live._base)
        if any(isinstance(step, Batch) for step in spec.passes):
            raise Refused(f"{folder}: holds a batch, whose tensors are stacked. Load it with load(model, folder), and save its adapters one by one with adapters(live).save.")
        steps = {}
        for step in spec.passes:
            if isinstance(step, Step) and not hasattr(step.options, "apply"):
                steps.setdefault(step.name, []).append(step)
        if not steps:
            raise Refused(f"{folder}: holds no adapter: none of its steps has sites of its own. Load it with load(model, folder).")
        return steps, tensors

    def _put(self, folder, steps, names, tensors):
        """The tensors of a folder into adapters of this model; `steps` are those of the folder, `names` old name → name here."""
        wanted, bare = {}, lambda steps: [dataclasses.replace(step, name="", place="") for step in steps]  # noqa: E731
        for old, name in names.items():
            if name not in self.names:
                self.add(name, [step.to_dict() for step in steps[old]])
                if len(names) > 1:
                    self.use()
            if bare(steps[old]) != bare(self.steps_of(name)):
                raise Refused(f"{folder}: its steps are not those of the adapter {name!r} here.")
            wanted |= self._alone(name)[1]
            if name in self.known.steps:
                tensors = {_renamed(path, steps[old], old, name): value for path, value in tensors.items()}
        put_tensors(wanted, tensors, folder / ADAPTER)

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
        known, owners = self.known, self.known.owners
        spec = dataclasses.replace(live.spec, passes=_placed((*known.ground, *known.steps[name])), source=None)
        trained = [path for path in live.report.trains if {owners[place] for place in live.report.trainers[path]} <= {None, *({name} & known.first)}]
        return spec, {path: g.attribute(live, path) for path in (*self._owned(name), *trained)} | known.own.get(name, {})

    def _run(self, known):
        """Use the adapters of `known`; the live model stays as it is where that is refused."""
        live, before = self.live, self.known
        self._refuse_unfit(known)
        before.settings.keep(before.active, Setting.of(live))
        found = known.settings.get(known.active)
        if found is not None and found.fits(live):
            self._place(known)
            found.put(live)
        else:
            held = [(parameter, parameter.data, parameter.requires_grad) for parameter in live.parameters()]
            self._place(known)
            fresh = Report(opaque=dict(live.graph.bare.opaque), notes=list(live.graph.bare.notes))
            try:
                self._rewrite(known, fresh)
            except RewriteError:
                for path in {*fresh.made, *fresh.memory} - before.made:
                    if g.has_attribute(live, path):
                        g.remove(live, path)
                self._place(before)
                for parameter, data, flag in held:
                    parameter.data = data
                    parameter.requires_grad_(flag)
                raise
        live.__dict__["_adapters"] = known

    def _rewrite(self, known, report):
        """Run the passes of the adapters in use on the kept graph, over the tensors that are there."""
        live = self.live
        graph, passes = live.graph.bare.over(live), known.passes
        data = {path: parameter.data for path, parameter in live.named_parameters(remove_duplicate=False)}
        run_again(graph, passes, live.spec.seed, report, [path for path in known.made if g.has_attribute(live, path)])
        self._part(known, report, data)
        known.made = {*known.made, *report.made, *report.memory}
        graph.bare = live.graph.bare
        make_live(graph)
        live.__dict__.update(graph=graph, spec=dataclasses.replace(live.spec, passes=passes), report=report)

    def _part(self, known, report, data):
        """Give each adapter that trains (or writes) base tensors Parameters of its own, and the model its own ones back; `data`: as it was before."""
        owners = known.owners
        found = {path: {owners[place] for place in places} for path, places in report.trainers.items() if path in report.trains or path in report.written}
        for path, names in found.items():
            if len(names) > 1:
                who = " and ".join(f'"{name}"' if name else "what is always in use" for name in sorted(names, key=str))
                raise Refused(f"adapters: {who} train @{path}, and the model can hold one value of it at a time. Use one of them; before another one is added, use() takes the first out of use.")
        for path, (name,) in found.items():
            if name is None or name in known.first or path in known.own.get(name, {}):
                continue
            base = g.attribute(self.live, path)
            own = nn.Parameter(base.data, base.requires_grad)
            for other in names_of(self.live, base):
                known.base[other] = base
                known.own.setdefault(name, {})[other] = own
                g.install(self.live, other, own)
            base.data = data[path]
            base.requires_grad_(False)

    def _place(self, known):
        """Let the base tensors be the model's own, but for those that an adapter in use has of its own."""
        wanted = dict(known.base)
        for name in known.active:
            wanted |= known.own.get(name, {})
        for path, parameter in wanted.items():
            there = g.attribute(self.live, path)
            if there is not parameter:
                parameter.data = parameter.data.to(there)  # the model may have been moved, or cast, since
                g.install(self.live, path, parameter)

    def _refuse_unfit(self, known):
        live, report = self.live, self.live.report
        if live.graph is None or live.graph.bare is None:
            raise Refused("adapters: this live model has left its captured graph behind (it was unpickled, or donated). Save it, and load it on its base.")
        if report.folded or report.derived or report.released:
            raise Refused("adapters: a pass has changed the base weights themselves, so the passes cannot be run on them once more. Rewrite the base with the adapters wanted.")
        for name in self.known.first - set(known.active):
            for step in self.known.steps[name]:
                if type(step.options).trains is not Pass.trains or type(step.options).writes is not Pass.writes:
                    raise Refused(
                        f'adapters: {step.method} of "{name}" trains tensors of the model itself, and what they were before is not kept of a spec that a model was made with. '
                        'Rewrite the base with {"passes": []} and add the adapter: then it has values of its own.'
                    )


def _placed(steps):
    return tuple(dataclasses.replace(step, place=f"passes[{number}]") for number, step in enumerate(steps))


def _renamed(path, steps, old, new):
    """A tensor's path under another adapter's name."""
    for step in steps:
        marker = f".{step.method.rpartition('.')[2]}."
        path = f".{path}".replace(f"{marker}{old}.", f"{marker}{new}.").removeprefix(".")
    return path
