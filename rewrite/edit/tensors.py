"""New tensors of a pass: made from what it says in `params` and `shared`, under a seed of their place, and put on the module tree."""

import contextlib
import hashlib

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .. import graph as g
from ..contract import FACTS, FUNCTIONS, OUTER, REPLACES, Frozen, wants
from ..errors import Refused
from ..training.hooks import COUNTER, Base, Held, Hooked
from .derive import BASE, set_base

#: what the code of a pass may raise when a site is not what it expected
FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)


class NewTensors:
    """What one step makes: `of(site)` for each site, `shared(sites)` once. Both give name → path on the tree.

    `edit` is the Edit of one graph; its memo makes all variants of a model, and all calls of one module, find the same tensors.
    """

    def __init__(self, edit):
        self.edit, self.step, self.kind, self.memo = edit, edit.step, edit.kind, edit.memo
        self.taken = {}  # the site of each place; several calls of one module, and several uses of one weight, share theirs

    def base(self, site):
        """Where the new tensors of a site live: `….v_proj.lora.default`, with the site's label behind where it has one."""
        return ".".join(part for part in (site.owner, self.kind, self.step.name, site.label) if part)

    def of(self, site):
        """The new tensors of a site; made under a generator seeded by (spec seed, place), or found there. Refused for a place taken by another site."""
        base = self.base(site)
        known = self.memo.get(("names", self.step.place, base))
        if known is None:
            known = self.memo["names", self.step.place, base] = self._made(site, base)
        if known:  # made for this site, for another variant, or for another call of the same module
            self._claim(site, base)
        self._hold(site, base, known)
        return known

    def copies(self, site, region):
        """Tensors of their own for a site's body, path in the model → path of the copy; they start as the base's values, and train.

        Refused where the body reads none that could train, or codes of quantised ones.
        """
        base = f"{self.base(site)}.copy"
        known = self.memo.setdefault(("copies", self.step.place, base), {})
        within = f"{site.owner}." if site.owner else ""
        for node in region.reads:
            value = g.attribute(self.edit.graph.root, node.target) if node.op == "get_attr" else None
            if node.target in self.edit.made and not value.is_floating_point() and value.dim():
                raise Refused(f"{self.step.place}: {self.kind} at {site}: its weights are quantised (@{node.target}), and a copy could not train them.")
            if isinstance(value, nn.Parameter) and value.is_floating_point() and node.target not in known:
                known[node.target] = self._install(f"{base}.{node.target.removeprefix(within)}", value.detach().clone())
        if not known:
            raise Refused(f"{self.step.place}: {self.kind} at {site}: its body reads no tensor that a copy could train.")
        self._claim(site, base)
        return known

    def _claim(self, site, base):
        other = self.taken.setdefault((base, site.call), site)
        if other is not site and (site.weight is None or (other.weight, other.layout.rows) != (site.weight, site.layout.rows)):
            what = f"the tensors @{base} would be those of {other} too"
            raise Refused(f'{self.step.place}: {self.kind}: {site}: {what}. Name the two in two passes, each with a "name" of its own.')

    def _made(self, site, base):
        given = self.edit.given(site, self.step.options.params)
        tensors = [v for v in pytree.tree_leaves(given) if isinstance(v, torch.Tensor)]
        new = self._alike(site, given) if tensors and all(v.is_meta for v in tensors) else None
        if new is None:
            with self._seeded(base):
                new = self._new(site, given)
        new = {name: self._stored(f"{base}.{name}", value) for name, value in self._own(new, tensors).items()}
        paths = {name: self._install(f"{base}.{name}", value) for name, value in new.items()}
        return paths | self._derived(site, base, new)

    def _stored(self, path, value):
        """A frozen tensor as it was saved, when a model is loaded: what is derived from it must come out the same on any machine."""
        saved = self.memo["stored"].get(path)
        if saved is None or not isinstance(value, Frozen) or (saved.shape, saved.dtype) != (value.tensor.shape, value.tensor.dtype):
            return value
        return Frozen(saved.to(value.tensor.device))

    def _derived(self, site, base, new):
        """What follows from the base: base tensors get their new values, new tensors are installed (name → path), figures go to the report."""
        options, place, report = self.step.options, f"{self.kind} at {site.path}: derive()", self.edit.report
        asked, known = dict.fromkeys((*wants(options.derive), *wants(options.measure))), {name: _tensor(value) for name, value in new.items()}
        trained = next((name for name in wants(options.derive) if name in new and not isinstance(new[name], Frozen)), None)
        if trained is not None:
            raise Refused(f"{place} asks for {trained!r}, which trains: what follows from it would be another thing then. Give a frozen copy of its start in `params`.")
        given = {name: known[name] if name in known else self.edit.value(site, name) for name in asked if name in known or name in (*REPLACES.values(), *FACTS)}
        with torch.no_grad():
            found = self._answer(site, {name: given[name] for name in wants(options.derive) if name in given}, options.derive, place)
            if not any(isinstance(value, torch.Tensor) and value.is_meta for value in given.values()):
                values = given | {name: _tensor(value) for name, value in found.items() if name not in BASE}
                with _told(place.replace("derive", "measure")):
                    figures = options.measure(**{name: values[name] for name in wants(options.measure) if name in values})
                if figures:
                    report.figures.setdefault(self.step.place, {})[site.name] = figures
        for name in [name for name in found if name in BASE]:
            set_base(self.edit, site, name, _tensor(found.pop(name)))
        paths = {name: self._install(f"{base}.{name}", value) for name, value in found.items()}
        report.derived.update(dict.fromkeys(paths.values()))
        return paths

    def shared(self, sites):
        """The tensors that all sites of the step share: made once, on the root of the tree. `sites` are pairs of an Edit and its site."""
        options, base = self.step.options, f"{self.kind}.{self.step.name}"
        key = ("shared", self.step.place, base)
        if key not in self.memo:
            seen, place = [Seen(edit, site) for edit, site in sites], f"{self.kind}: shared()"
            with self._seeded(base), _told(place):
                new = self._checked(options.shared(seen), place)
            tensors = [v for one in seen for v in one.given if isinstance(v, torch.Tensor)]
            self.memo[key] = {name: self._install(f"{base}.{name}", value) for name, value in self._own(new, tensors).items()}
            if self.step.options.hooks():
                self.hooked(self.step).shared = self.memo[key]
        return self.memo[key]

    def hooked(self, step):
        """What the report keeps for the hooks of a step; with the first that runs in each step comes the counter."""
        report = self.edit.report
        if COUNTER not in report.memory and set(step.options.hooks()) - {"groups", "prepare", "choose"}:
            self._remember(COUNTER, torch.zeros((), dtype=torch.int64))
        return report.hooked.setdefault(step.place, Hooked(step, self.edit.seed))

    def _hold(self, site, base, paths):
        options, root = self.step.options, self.edit.graph.root
        if not options.hooks() or base in self.hooked(self.step).sites:
            return
        own = {name: g.attribute(root, path).detach() for name, path in paths.items()}
        given = {name: own[name] if name in own else self.edit.value(site, name) for name in wants(options.remembers)}
        kept = {name: self._remember(f"{base}.{name}", value) for name, value in options.remembers(**given).items()}
        self.hooked(self.step).sites[base] = Held(site.path, site.role, {**paths, **kept}, self._base(site))

    def _base(self, site):
        operation = self.edit.operation(site)
        return operation and Base(operation.weight, operation.axes, site.layout.rows, self.edit._dim(operation, "w"))

    def _remember(self, path, value):
        if path not in self.memo["kept"]:
            self._free(path)
            g.install(self.edit.graph.root, path, value)
        self.edit.report.memory.add(path)
        return path

    def _alike(self, site, given):
        """Without values to make, the shapes of one site serve all alike; None where a pass makes values from nothing."""
        operation = self.edit.operation(site)
        facts = tuple((tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else v for v in pytree.tree_leaves(given))
        key = ("params", self.step.place, operation and operation.kind, facts)
        if key not in self.memo:
            self.memo[key] = self._new(site, given)
        template = self.memo[key]
        if not all(_tensor(v).is_meta for v in template.values()):
            return None
        return {name: Frozen(torch.empty_like(v.tensor)) if isinstance(v, Frozen) else torch.empty_like(v) for name, v in template.items()}

    def _new(self, site, given):
        """What `params` gives."""
        return self._answer(site, given, self.step.options.params, f"{self.kind} at {site.path}: params()")

    def _answer(self, site, given, method, place):
        """What a method of the pass gives; where the site has experts it is asked once for each, and the answers are stacked."""
        operation, is_derived = self.edit.operation(site), method.__name__ == "derive"

        def asked(given):
            new = method(**given)
            return self._checked({name: Frozen(value) for name, value in new.items()} if is_derived and isinstance(new, dict) else new, place, BASE if is_derived else ())

        with _told(place):
            if operation is None or operation.kind != "experts" or given.get("w") is None:
                return asked(given)
            stacked = [name for name, value in given.items() if isinstance(value, torch.Tensor) and (name == "w" or name not in REPLACES.values())]
            each = [asked({**given, **{name: given[name][i] for name in stacked}}) for i in range(len(given["w"]))]
            stack = lambda v: Frozen(torch.stack([one.tensor for one in v])) if isinstance(v[0], Frozen) else torch.stack(v)  # noqa: E731
            return {name: stack([one[name] for one in each]) for name in each[0]}

    def _checked(self, new, place, handles=()):
        """The answer of a pass, name → new tensor; Refused in words for anything else."""
        options, nouns = self.step.options, self.step.options.bodies()
        asked = {name for noun in nouns for name in wants(getattr(options, noun))} | {*wants(options.derive), *handles}
        if not isinstance(new, dict):
            raise Refused(f"{place} must return a dict of names and tensors, not {type(new).__name__}.")
        for name, value in new.items():
            tensor = _tensor(value)
            if not isinstance(tensor, torch.Tensor):
                raise Refused(f"{place} gives {type(tensor).__name__} for {name!r}: give a tensor, or frozen(tensor).")
            if tensor is value and not (tensor.is_floating_point() or tensor.is_complex()):
                raise Refused(f"{place} gives {name!r} as {tensor.dtype}, which cannot be trained: give frozen(tensor).")
            if nouns and name not in asked:
                raise Refused(f"{place} gives {name!r}, and no noun asks for it.")
            if name not in handles and name in (*REPLACES.values(), *FUNCTIONS, *FACTS, *OUTER, "choices", "carry", *self.step.options.inputs) or hasattr(nn.Module, name) or name in vars(nn.Module()):
                raise Refused(f"{place} gives {name!r}, a name that already means something at a site or on a module. Choose another.")
        return new

    @staticmethod
    def _own(new, given):
        """The tensors, each in memory of its own: one that is (a part of) a handle, or of another, is copied, for training would change both."""
        taken, result = {_memory(v) for v in given if not v.is_meta}, {}
        for name, value in new.items():
            tensor = _tensor(value)
            if not tensor.is_meta:
                tensor = tensor.contiguous()  # as a file has it: another layout rounds otherwise
                if _memory(tensor) in taken:
                    tensor = tensor.detach().clone()
                taken.add(_memory(tensor))
            result[name] = Frozen(tensor) if isinstance(value, Frozen) else tensor
        return result

    def _install(self, path, value):
        if path in self.memo["kept"]:  # an earlier run over this tree has made it
            if not isinstance(value, Frozen):
                g.attribute(self.edit.graph.root, path).requires_grad_(True)
        else:
            self._free(path)
            g.install(self.edit.graph.root, path, value.tensor if isinstance(value, Frozen) else nn.Parameter(value))
        self.edit.made[path] = self.kind
        return path

    def _free(self, path):
        module = self.edit.graph.root
        for name in path.split("."):
            child = getattr(module, name, None)
            if child is None:
                return
            if not isinstance(child, nn.Module):
                raise Refused(f'{self.kind} at {path}: the model has a tensor or attribute of that name. Give the pass another "name".')
            module = child

    @contextlib.contextmanager
    def _seeded(self, place):
        """A generator of its own for each place, so that a spec gives the same tensors whatever else is in it; the caller's stay as they are."""
        number = int.from_bytes(hashlib.blake2b(f"{self.edit.seed}/{place}".encode(), digest_size=8).digest(), "little") >> 1
        with torch.random.fork_rng(devices=[device for device in self.edit.devices if device.type == "cuda"]):
            torch.manual_seed(number)
            yield


class Seen:
    """A site as `shared` sees it: `.path`, and `.w`, `.x`, `.index`, … as `params` would be given them."""

    def __init__(self, edit, site):
        self._edit, self._site, self.path, self.given = edit, site, site.path, []

    def __getattr__(self, name):
        self.given.append(self._edit.value(self._site, name))
        return self.given[-1]


def _tensor(value):
    return value.tensor if isinstance(value, Frozen) else value


def _memory(tensor):
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def _told(place):
    """A failure in the code of a pass, with its place."""
    try:
        yield
    except FAILURES as error:
        raise Refused(f"{place} fails here: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
