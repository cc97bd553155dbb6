"""How nouns become nodes: the graph while one pass works on it."""

import contextlib
import hashlib
import math

import torch
from torch import fx, nn

from . import graph as g
from .body import Body, signature
from .contract import FACTS, FUNCTIONS, REPLACES, Frozen, has_default, wants
from .errors import Refused
from .operation import Operation


_ADDS = (torch.ops.aten.add.Tensor,)
_NORMS = (torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default)


class Edit:
    """The graph while one pass works on it: reads live handles, makes tensors, pastes bodies. One per graph and step.

    graphs: all variants, the main one first. step: `Step` of the spec. seed: of the spec. report: what the passes made and let train, shared by
    all variants of a model. memo: traced bodies and what steps remember from one variant to the next, shared likewise. `restructured` is set
    by a pass that takes nodes away.
    """

    def __init__(self, graph, graphs, step, seed, report, memo):
        self.graph, self.step, self.seed, self.report, self.made, self.memo = graph, step, seed, report, report.made, memo
        self.graphs, self.main, self.restructured = graphs, graph is graphs[0], False
        self.kind = step.method.rpartition(".")[2]
        self.by_name = {node.name: node for node in graph.nodes}
        self.attributes = {node.target: node for node in graph.nodes if node.op == "get_attr"}
        self.top = next((n for n in graph.nodes if n.op not in ("placeholder", "get_attr")), None)
        self.fake_mode = graph.fake_mode
        # the graph's fake values stand for the real ones under another dtype (capture's marker) and, for models on meta, another device
        self.dtypes, self.devices = {}, {}
        for path, node in self.attributes.items():
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                real = g.attribute(graph.root, path)
                self.dtypes.setdefault(real.dtype, value.dtype)
                self.devices.setdefault(real.device, value.device)

    # ---- reading ------------------------------------------------------------------------------------------------------
    def live(self, node):
        """The value that stands for a node after the passes so far."""
        while isinstance(node, fx.Node) and "live" in node.meta:
            node = self.by_name[node.meta["live"]]
        return node

    def handle(self, site, name):
        """The live node of a handle of a site, or None."""
        operation = self.operation(site)
        if operation is None or name not in ("x", "w", "b", "y"):
            replaced = site.node.meta.get("handles", {}).get(name)
            return self.live(self.by_name[replaced] if replaced else site.handles.get(name))
        if name == "y":
            return self.live(operation.node)
        if name == "w":
            return operation.source
        at = operation.x if name == "x" else operation.b
        return operation.node.args[at] if at is not None and len(operation.node.args) > at else None

    @staticmethod
    def operation(site):
        """How the site's operation reads its weight, or None for a site without one."""
        return Operation.of(site.operation) if site.operation is not None else None

    def given(self, site, method):
        """What a method of the pass (`refuse`, `params`, `trains`) asks to see of a site, by name.

        A weight or bias is the tensor itself in standard orientation; an activation is an empty prototype with its rank, dtype and device,
        sizes that vary being 1. `kind` is "linear", "conv", "embedding", "experts" or None, `fan_in` how many inputs make one output.
        """
        names, known = wants(method), (*dict.fromkeys((*site.handles, "x", "w", "b", "y")), *FACTS, "norm")
        for name in names:
            if name not in known:
                raise Refused(f"{self.kind} at {site.path}: {method.__name__}() asks for {name!r}; it may ask for {', '.join(known)}.")
        return {name: self._given(site, name) for name in names}

    def _given(self, site, name):
        operation = self.operation(site)
        if name == "norm":
            return self.norm_after(site)
        if name in ("index", "role"):
            return getattr(site, name)
        if name == "kind":
            return operation.kind if operation is not None else None
        if name == "fan_in":
            if operation is None:
                return None
            return 1 if operation.kind == "embedding" else math.prod(self._given(site, "w").shape[1 if operation.kind == "conv" else -1 :])
        if operation is not None and name in ("w", "b"):
            path = operation.weight if name == "w" else operation.bias
            if path is None:
                return None
            value = g.attribute(self.graph.root, path).detach()
            value = operation.standard(value) if name == "w" else value
            return self._part(site, value, self._dim(operation, name))
        node = site.handles.get(name)
        if node is None:
            return None
        if node.op == "get_attr":
            return g.attribute(self.graph.root, node.target).detach()
        fake = node.meta["val"]
        size = [s if isinstance(s, int) else 1 for s in g.shape(node)]
        dtype = {new: old for old, new in self.dtypes.items()}.get(fake.dtype, fake.dtype)
        device = {new: old for old, new in self.devices.items()}.get(fake.device, fake.device)
        return torch.empty(size, dtype=dtype, device=device)

    def norm_after(self, site):
        """The residual add and the norm that follow a sub-layer's output, as a region that can be run again; None where there are none."""
        start = site.handles.get("y")
        add = next((n for n in start.users if n.target in _ADDS and "made" not in n.meta), None) if start is not None else None
        norm = next((n for n in add.users if n.target in _NORMS), None) if add is not None and len(add.users) == 1 else None
        return Region((add, norm), start) if norm is not None else None

    def reason(self, site, sites):
        """Why the pass declines a site, or None."""
        options = self.step.options
        operation, rows = self.operation(site), site.layout.rows
        asked = {name for noun in options.nouns() for name in wants(getattr(options, noun))}
        if {"op", "mix"} & asked:
            if operation is None:
                return f"a {site.role} has no operation on a weight"
            if operation.is_grouped:
                return "its convolution has groups: the rows of another weight would not see all of x"
        if rows is not None and rows.listed is not None:
            return f"its {len(rows)} rows of the fused projection follow no regular pattern"
        if rows is not None and self._trained(site) and self._covered(site, sites) < rows.total:
            return "its bias is one tensor for the whole fused projection: name all of its parts, for example attention.{q,k,v}"
        return options.refuse(**self.given(site, options.refuse))

    def _trained(self, site):
        return self.step.options.trains(**self.given(site, self.step.options.trains))

    def _covered(self, site, sites):
        """How many rows of the site's fused projection the chosen sites cover together."""
        return sum(len(other.layout.rows) for other in sites if other.operation is site.operation and other.layout.rows is not None)

    # ---- new tensors ----------------------------------------------------------------------------------------------------
    def path(self, site, name):
        """Where a new tensor of this step lives: `….v_proj.lora.default.down`, with the site's label before the name where it has one."""
        return ".".join(part for part in (site.owner, self.kind, self.step.name, site.label, name) if part)

    def params(self, site):
        """The new tensors of a site, name → path on the tree; made under a generator seeded by (spec seed, site path), or found there."""
        base = self.path(site, "")
        known = self.memo.get(("names", self.step.place, base))
        if known is not None:
            return known  # made for another variant, or for another call of the same module
        operation = self.operation(site)
        given = self.given(site, self.step.options.params)
        if all(v.is_meta for v in given.values() if isinstance(v, torch.Tensor)):
            # no values to make: the shapes of one site serve all alike
            key = ("params", self.step.options, operation and operation.kind, tuple((n, tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else (n, v) for n, v in given.items()))
            template = self.memo.get(key) or self.memo.setdefault(key, self._new(site, given))
            new = {name: Frozen(torch.empty_like(v.tensor)) if isinstance(v, Frozen) else torch.empty_like(v) for name, v in template.items()}
        else:
            with self._seeded(base):
                new = self._new(site, given)
        paths = {}
        for name, value in new.items():
            paths[name] = self._install(f"{base}.{name}", value)
        self.memo["names", self.step.place, base] = paths
        return paths

    def share(self, sites):
        """The tensors that all sites of the step share, name → path: made once, on the root of the tree."""
        options, base = self.step.options, f"{self.kind}.{self.step.name}"
        key = ("shared", self.step.place, base)
        if key not in self.memo:
            with self._seeded(base):
                new = self._checked(options.shared([Seen(self, site) for site in sites]), f"{self.kind}: shared()")
            self.memo[key] = {name: self._install(f"{base}.{name}", value) for name, value in new.items()}
        return self.memo[key]

    def _install(self, path, value):
        self._free(path)
        g.install(self.graph.root, path, value.tensor if isinstance(value, Frozen) else nn.Parameter(value))
        self.made[path] = self.kind
        return path

    def _seeded(self, place):
        """A generator of its own for each place, so that a spec gives the same tensors whatever else is in it."""
        number = int.from_bytes(hashlib.blake2b(f"{self.seed}/{place}".encode(), digest_size=8).digest(), "little") >> 1
        stack = contextlib.ExitStack()
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(number)
        return stack

    def _new(self, site, given):
        """What `params` gives; where the site has experts it is asked once for each, and the answers are stacked."""
        operation, params = self.operation(site), self.step.options.params
        if operation is None or operation.kind != "experts" or given.get("w") is None:
            return self._checked(params(**given), f"{self.kind} at {site.path}: params()")
        each = [self._checked(params(**{**given, "w": w}), f"{self.kind} at {site.path}: params()") for w in given["w"]]
        stack = lambda v: Frozen(torch.stack([one.tensor for one in v])) if isinstance(v[0], Frozen) else torch.stack(v)  # noqa: E731
        return {name: stack([one[name] for one in each]) for name in each[0]}

    def _checked(self, new, place):
        """The answer of a pass, name → new tensor; Refused in words for anything else."""
        nouns = self.step.options.nouns()
        asked = {name for noun in nouns for name in wants(getattr(self.step.options, noun))}
        if not isinstance(new, dict):
            raise Refused(f"{place} must return a dict of names and tensors, not {type(new).__name__}.")
        for name, value in new.items():
            tensor = value.tensor if isinstance(value, Frozen) else value
            if not isinstance(tensor, torch.Tensor):
                raise Refused(f"{place} gives {type(tensor).__name__} for {name!r}: give a tensor, or frozen(tensor).")
            if tensor is value and not (tensor.is_floating_point() or tensor.is_complex()):
                raise Refused(f"{place} gives {name!r} as {tensor.dtype}, which cannot be trained: give frozen(tensor).")
            if nouns and name not in asked:
                raise Refused(f"{place} gives {name!r}, and no noun asks for it.")
        return new

    def _free(self, path):
        module = self.graph.root
        for name in path.split("."):
            child = getattr(module, name, None)
            if child is None:
                return
            if not isinstance(child, nn.Module):
                raise Refused(f"{self.kind} at {path}: the model has a tensor or attribute of that name. Give the pass another \"name\".")
            module = child

    def attribute(self, path):
        """The get_attr node of a path, at the top of the graph; made where there is none."""
        node = self.attributes.get(path)
        if node is not None:
            self.top.prepend(node)
        if node is None:
            with self.graph.fx.inserting_before(self.top):
                node = self.graph.fx.create_node("get_attr", path)
            value = g.attribute(self.graph.root, path)
            meta = {"path": path.rpartition(".")[0], "made": self.kind}
            if isinstance(value, torch.Tensor):
                kind = (self.fake_mode, value.shape, self.dtypes.get(value.dtype, value.dtype), self.devices.get(value.device, value.device))
                if kind not in self.memo:
                    with self.fake_mode:
                        self.memo[kind] = torch.empty(value.shape, dtype=kind[2], device=kind[3])
                meta["val"] = self.memo[kind]
            node.meta = meta
            self.attributes[path] = self.by_name[node.name] = node
        return node

    # ---- nouns ----------------------------------------------------------------------------------------------------------
    def apply(self, site, shared):
        """All nouns of the pass at one site; `shared` is what `share` gave."""
        options = self.step.options
        paths = {**shared, **self.params(site)}
        for name in self._trained(site):
            operation = self.operation(site)
            self.train(operation.weight if operation and name == "w" else operation.bias if operation and name == "b" else site.handles[name].target)
        for noun in options.nouns():
            self._noun(site, noun, paths)

    def train(self, path):
        """Let a base tensor train: on a copy of its own, so that the model given stays as it is (unless it was donated)."""
        parameter = g.attribute(self.graph.root, path)
        if not parameter.is_floating_point():
            raise Refused(f"{self.kind} at {path}: a tensor of {parameter.dtype} cannot be trained")
        if path not in self.report.trains:
            if not self.memo.get("donate"):
                parameter.data = parameter.data.clone()
            self.report.trains.update(names_of(self.graph.root, parameter))
        parameter.requires_grad_(True)

    def freeze(self, path):
        """Keep a tensor, base or new, from training."""
        parameter = g.attribute(self.graph.root, path)
        parameter.requires_grad_(False)
        self.report.trains.difference_update(names_of(self.graph.root, parameter))

    def tensors(self, site, sites):
        """The paths of the parameters that a site reads, base and new: of a region, all that its nodes read.

        Refused for a part of a fused projection whose other parts are not among `sites`: its weight is one tensor.
        """
        rows = site.layout.rows
        if rows is not None and self._covered(site, sites) < rows.total:
            raise Refused(f"{self.step.place}: {self.kind} at {site.name}: its weight is one tensor for the whole fused projection. Name all of its parts, for example attention.{{q,k,v}}.")
        if site.role == "model":
            return [name for name, _ in self.graph.root.named_parameters()]
        start, end = self.handle(site, "x"), self.handle(site, "y")
        read = {n for node in between(start, end) for n in (node, *node.all_input_nodes) if n.op == "get_attr"}
        paths = [n.target for n in self.graph.nodes if n in read]
        return [path for path in paths if isinstance(g.attribute(self.graph.root, path), nn.Parameter)]

    def _noun(self, site, noun, paths):
        options, place = self.step.options, f"{self.kind} at {site.path}"
        function = getattr(options, noun)
        target = REPLACES[noun]
        asked = wants(function)
        operation = self.operation(site)
        if self.handle(site, target) is None:
            return
        nodes, absent = {}, set()
        for name in dict.fromkeys((target, *asked)):
            if name in paths:
                nodes[name] = self.attribute(paths[name])
            elif name in ("training", *FUNCTIONS, *FACTS):
                continue
            elif name not in REPLACES.values() and name not in site.handles and has_default(function, name):
                absent.add(name)
            else:
                nodes[name] = self.handle(site, name)
                if nodes[name] is None and name not in {*site.handles, "x", "w", "b", "y"}:
                    raise Refused(f"{place}: {noun}() asks for {name!r}; this site has {', '.join(site.handles)} and the new tensors {', '.join(paths) or 'none'}.")
        extras = operation.extras if operation is not None and {"op", "mix"} & set(asked) else ()
        after = self.norm_after(site) if "norm" in asked else None
        extras += after.reads if after is not None else ()
        facts = {name: self._given(site, name) for name in FACTS if name in asked}
        names = [name for name, node in nodes.items() if node is not None]
        inputs = [*(nodes[name] for name in names), *extras]
        values = [node.meta["val"] for node in inputs]
        key = (options, noun, site.layout.rows, tuple(names), tuple(map(signature, values)), operation and operation.static, after and after.static, tuple(facts.items()))
        body = self.memo.get(key)
        if body is None:
            body = self.memo[key] = self._trace(site, function, [name for name in asked if name not in absent], target, names, extras, values, facts, after, place)
        current = nodes[target]
        flag = lambda: self.attribute(".".join(p for p in (site.owner, "training") if p))  # noqa: E731
        anchor = max([n for n in (current, *inputs) if n.op not in ("get_attr", "placeholder")], default=None)
        # a weight's new value goes right before what reads it there, anything else right after the last thing that it needs
        reader = operation is not None and target in ("w", "b") and (operation.chain or (operation.node,))[0]
        with self.graph.fx.inserting_before(reader or (min(current.users) if anchor is None else anchor.next)):
            new, own = body.paste(self.graph.fx, inputs, flag, {"path": site.owner, "made": self.kind, "role": f"made.{self.kind}", "site": site.path})
        self.by_name.update((n.name, n) for n in own)
        if new is current:
            return  # nothing to do at this site
        if not isinstance(new, fx.Node):
            raise Refused(f"{place}: {noun}() must return one tensor")
        if signature(new.meta["val"]) != signature(current.meta["val"]):
            raise Refused(f"{place}: {noun}() gives {_words(new)} where the model has {_words(current)}.")
        self._replace(site, target, current, new, own)

    def _trace(self, site, function, asked, target, names, extras, values, facts, after, place):
        operation = self.operation(site)

        def read(name, value):
            if operation is None or name not in ("w", "b", "y"):
                return value
            if name == "w":
                value = operation.standard(value)
            return self._part(site, value, self._dim(operation, name))

        def run(*tensors, training):
            raw = dict(zip(names, tensors))
            given = {name: read(name, raw[name]) if name in raw else None for name in asked if name not in ("training", *FUNCTIONS, *FACTS)} | facts
            known = dict(zip(extras, tensors[len(names) :]))
            functions = {
                "op": lambda x, w: operation.again(x, w, known),
                "mix": lambda h, m: operation.mix(h, m, known),
                "norm": lambda y: after.run(y, known),
                "training": training,
            }
            given |= {name: functions[name] for name in asked if name in functions}
            new = function(**given)
            if operation is None or target not in ("w", "b", "y"):
                return new
            whole = operation.standard(raw["w"]) if target == "w" else raw[target]
            new = new if site.layout.rows is None else site.layout.rows.put(whole, new, self._dim(operation, target))
            return operation.stored(new) if target == "w" else new

        with self.fake_mode:
            fresh = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in values]
        marker = next((new for old, new in self.dtypes.items() if old != new), None) or next(iter(self.dtypes.values()), None)
        return Body(run, fresh, self.fake_mode, training="training" in asked, marker=marker, place=place)

    @staticmethod
    def _part(site, value, dim):
        return value if site.layout.rows is None else site.layout.rows.take(value, dim)

    @staticmethod
    def _dim(operation, name):
        if name == "y":
            return operation.channel
        return -2 if operation is not None and operation.kind == "experts" and name == "w" else 0

    def _replace(self, site, target, current, new, own):
        if target == "y":
            inside = None
            current.meta["live"] = new.name
        else:
            operation = self.operation(site)
            inside = {operation.node, *operation.chain} if operation is not None and target != "x" else between(current, self.handle(site, "y"))
            site.node.meta["handles"] = {**site.node.meta.get("handles", {}), target: new.name}
            if operation is not None and target in ("w", "b"):
                new.meta["stands_for"] = operation.weight if target == "w" else operation.bias
        for user in list(current.users):
            if user not in own and (inside is None or user in inside):
                user.replace_input_with(current, new)


class Seen:
    """A site as `shared` sees it: `.path`, and `.w`, `.x`, `.index`, … as `params` would be given them."""

    def __init__(self, edit, site):
        self._edit, self._site, self.path = edit, site, site.path

    def __getattr__(self, name):
        return self._edit._given(self._site, name)


class Region:
    """Some nodes of the graph in order, as a function of one value (`start`) that can be run again on another."""

    def __init__(self, nodes, start):
        self.nodes, self.start = nodes, start
        self.reads = tuple(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes and n is not start))

    @property
    def static(self):
        """What a traced body holds of it as constants, hashable."""
        at = {n: f"%{i}" for i, n in enumerate((self.start, *self.reads, *self.nodes))}
        return tuple((n.target, repr(fx.node.map_arg((n.args, n.kwargs), lambda a: at[a]))) for n in self.nodes)

    def run(self, value, known):
        """The last node's value at `value`; `known` gives each node of `reads`."""
        env = {**known, self.start: value}
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = node.target(*args, **kwargs)
        return env[self.nodes[-1]]


def between(start, end):
    """The nodes on the ways from `start` to `end`, and what else `end` needs that comes after `start`."""
    found, todo = set(), [end]
    while todo:
        node = todo.pop()
        if node is start or node in found or node < start:
            continue
        found.add(node)
        todo += node.all_input_nodes
    return found


def names_of(root, parameter):
    """Every name under which a (tied) parameter stands on the tree."""
    return [name for name, other in root.named_parameters(remove_duplicate=False) if other is parameter]


def _words(node):
    value = node.meta["val"]
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
