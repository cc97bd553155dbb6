"""How nouns become nodes: the graph while one pass works on it."""

import functools

import torch
from torch import fx, nn

from .. import graph as g
from ..calls import added
from ..calls.slots import CACHE
from ..contract import FACTS, FUNCTIONS, OUTER, REPLACES, has_default, wants
from ..errors import Refused
from ..training.backward import REVERSIBLE, without_grad
from .body import Body, signature
from .derive import let_go
from .lengthen import growth, lengthen, made_of
from .operation import Again
from .prompts import insert, stands_in_front
from .reading import Reading, names_of
from .region import Copied, between
from .tensors import NewTensors


class Edit(Reading):
    """The graph while one pass works on it: reads live handles, pastes bodies, lets tensors train. One per graph and step.

    sites: its Roles. graphs: all variants, the main one first. step: `Step` of the spec. seed: of the spec. report: what the passes made and let
    train, shared by all variants of a model. memo: traced bodies and what steps remember from one variant to the next, shared likewise.
    aside: nodes that steps beside this one have made, which are none of its business. `restructured` is set by a pass that takes nodes away,
    `choices` for a mixing pass: (site, target) → the values to choose from; `replaced` is what was put in place, in order.
    """

    def __init__(self, graph, sites, graphs, step, seed, report, memo, aside=frozenset()):
        self.graph, self.sites, self.step, self.seed, self.report, self.made, self.memo = graph, sites, step, seed, report, report.made, memo
        self.graphs, self.main, self.restructured, self.bodies = graphs, graph is graphs[0], False, graphs[0].known
        self.declined = []  # (site, reason) of what a pass over the whole graph left as it is
        self.aside, self.choices, self.replaced = aside, {}, []
        self.carried, self.beside = None, set()  # the value that goes from site to site with the site that it comes from; the nodes that make it
        self.front = None  # the model's own tokens behind those that the step has put in front of them
        self.counted, self.grown = False, {}  # whether the step has replaced the model's positions; masks that it has made longer
        self.operations = {}  # node of a site → its arguments, and how it reads them
        self.kind = step.method.rpartition(".")[2]
        self.by_name = {node.name: node for node in graph.nodes}
        self.attributes = {node.target: node for node in graph.nodes if node.op == "get_attr"}
        self.fake_mode, self._top = graph.fake_mode, None
        # the graph's fake values stand for the real ones under another dtype (capture's marker) and, for models on meta, another device
        self.dtypes, self.devices = {}, {}
        for path, node in self.attributes.items():
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                real = g.attribute(graph.root, path)
                self.dtypes.setdefault(real.dtype, value.dtype)
                self.devices.setdefault(real.device, value.device)
        self.new, self._evaluated = NewTensors(self), (None, None)
        self.caches = [node for name, node in zip(graph.inputs, graph.placeholders) if name.startswith(f"{CACHE}.")]

    seeing = None  # the rows of a batch that see places put in front of keys and values; None: all
    lengths, choosing = None, frozenset()  # how many tokens stand in front of each row's own; None: as many in all. The nodes that pick each row's

    @property
    def top(self):
        """The first node that computes; found anew when a merge has taken it away."""
        if self._top is None or self._top._erased:
            self._top = next(n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr"))
        return self._top

    def attribute(self, path):
        """The get_attr node of a path, at the top of the graph; made where there is none."""
        node = self.attributes.get(path)
        if node is not None and self.top < node:  # what was pasted before the top already may read one that stands there
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

    def input(self, name, place):
        """The placeholder of an input of the pass's own; what another pass calls by that name must be the same."""
        wanted = self.step.options.inputs[name]
        known = self.report.inputs.setdefault(name, wanted)
        if known != wanted:
            raise Refused(f"{place}: another pass has an input {name!r} of its own, which is {known}; this one's is {wanted}.")
        node = added.add(self.graph, self.graphs, name, wanted, place)
        self.by_name[node.name] = node
        return node

    # ---- nouns ----------------------------------------------------------------------------------------------------------
    def apply(self, site, shared, last=False):
        """All nouns of the pass at one site; `shared` is what `share` gave. `last`: no other site of the step comes after it."""
        options = self.step.options
        own = self.new.of(site)
        paths = {**shared, **own}
        for name in self._trained(site):
            self.train(self._stored(site, name))
        for name in options.writes(**self.given(site, options.writes)):
            self.own(self._stored(site, name))
        for name in options.no_grad:
            if self.handle(site, name) is None:
                raise Refused(f"{self.step.place}: {self.kind} at {site.name}: it has no {name}, above which backward would end.")
            without_grad(self.handle(site, name))
        if hasattr(options, "carry") and self.carried is None:
            self.carried = self.make(site, "start", paths), site
        if options.lengthens and "ids" in site.handles:
            insert(self, site, paths)
            return
        if options.lengthens and not stands_in_front(self, site):
            return
        longer = {noun: self._noun(site, noun, paths) for noun in options.nouns() if not self.choices or (site, REPLACES[noun]) in self.choices}
        if any(longer.values()):
            lengthen(self, site, longer)
        if self.carried is not None:
            self._carry(site, paths, last)
        let_go(self, site)
        fed = set(wants(options.derive))
        for name, path in own.items():
            if name in fed:
                self.report.feeds.add(path)
            elif not (path in self.attributes and self.attributes[path].users):
                raise Refused(f"{self.kind} at {site.name}: params() gives {name!r}, and no noun reads it at this site.")

    def train(self, path):
        """Let a base tensor train: on a copy of its own, so that the model given stays as it is (unless it was donated)."""
        parameter = g.attribute(self.graph.root, path)
        if parameter is None:
            raise Refused(f"{self.kind} at {path}: this weight is stored in codes, which cannot be trained. Leave it out, or train it before it is quantised.")
        if not parameter.is_floating_point():
            raise Refused(f"{self.kind} at {path}: a tensor of {parameter.dtype} cannot be trained")
        self.own(path)
        self.report.trains.update(names_of(self.graph.root, parameter))
        parameter.requires_grad_(True)

    def own(self, path):
        """Give the live model a copy of a base tensor of its own (unless it was donated): a hook, or training, will write it."""
        parameter = g.attribute(self.graph.root, path)
        for name in names_of(self.graph.root, parameter):
            self.report.trainers.setdefault(name, set()).add(self.step.place)
        if path in self.report.trains or path in self.report.written:
            return
        if not parameter.is_floating_point():
            raise Refused(f"{self.kind} at {path}: a tensor of {parameter.dtype} cannot be written while training")
        if self.memo["donated"] is None and path not in self.report.derived:
            parameter.data = parameter.data.clone()
        self.report.written.update(names_of(self.graph.root, parameter))

    def _stored(self, site, name):
        """The path of the base tensor behind a handle."""
        operation = self.operation(site)
        return operation.weight if operation and name == "w" else operation.bias if operation and name == "b" else site.handles[name].target

    def freeze(self, path):
        """Keep a tensor, base or new, from training."""
        parameter = g.attribute(self.graph.root, path)
        parameter.requires_grad_(False)
        self.report.trains.difference_update(names_of(self.graph.root, parameter))

    def names_of(self, parameter):
        """Every name under which a (tied) parameter stands on the tree."""
        return names_of(self.graph.root, parameter)

    def tensors(self, site, sites):
        """The paths of the parameters that a site reads, base and new: of a region, all that its nodes read.

        Refused for a part of a fused projection whose other parts are not among `sites`: its weight is one tensor.
        """
        rows = site.layout.rows or site.layout.stored
        if rows is not None and self._covered(site, sites) < rows.total:
            raise Refused(f"{self.step.place}: {self.kind} at {site.name}: its weight is one tensor for the whole fused projection. Name all of its parts, for example attention.{{q,k,v}}.")
        operation = self.operation(site)
        if operation is not None and g.attribute(self.graph.root, operation.weight) is None:
            raise Refused(f"{self.step.place}: {self.kind} at {site.name}: its weight is stored in codes, which do not train. Name sites that were not quantised.")
        if site.role == "model":
            return [name for name, _ in self.graph.root.named_parameters()]
        starts = [self.handle(site, name) for name in site.handles if name not in ("w", "b", "y")]
        inside = between([n for n in starts if n is not None], self.handle(site, "y"))
        read = {n for node in inside for n in (node, *node.all_input_nodes) if n.op == "get_attr"}
        paths = [n.target for n in self.graph.nodes if n in read]
        paths = [path for path in paths if isinstance(g.attribute(self.graph.root, path), nn.Parameter)]
        for node in inside:
            if node.op == "call_module":
                paths += g.parameters_of(self.graph.root, node.target)
        if not paths:
            raise Refused(f"{self.step.place}: {self.kind} at {site.name}: no parameter lies between its inputs and its output. Name the sites that have some.")
        return paths

    def _noun(self, site, noun, paths):
        """One noun at one site: its value made, and put in the place of the one that it replaces. Returns by how many places it is longer."""
        if noun == "positions" and self.counted:
            return 0
        made = self.make(site, noun, paths)
        if made is None:
            return 0
        self._replace(site, _target(noun), *made)
        self.counted |= noun == "positions"
        return growth(site, _target(noun), *made[:2])

    def _carry(self, site, paths, last):
        """The value that goes from site to site, one site on."""
        before, options = self.carried[1], self.step.options
        lists = [other.block.rpartition(".")[0] if other.block else None for other in (before, site)]
        if lists[0] != lists[1]:
            raise Refused(f'{self.step.place}: {self.kind}: {before.name} and {site.name} lie in different lists of blocks, and no value goes from one to the other. Narrow "where" to one of them.')
        self.carried = self.make(site, "carry", paths), site
        self.carried[0].meta |= {"carried": True, **({REVERSIBLE: options.reversible} if options.reversible else {})}
        if last and hasattr(options, "end"):
            self._noun(site, "end", paths)

    def make(self, site, noun, paths):
        """The nodes of a noun's new value, which nothing reads yet: (value that it would replace, its new value, all new nodes).

        None where the site has no such value, and where the body gives back what it was given. `start` and `carry` replace nothing: the one
        node of their value.
        """
        options, place, target = self.step.options, f"{self.kind} at {site.path}", _target(noun)
        function = getattr(options, noun)
        asked = wants(function)
        if target is not None and self.handle(site, target) is None:
            return None
        nodes, functions, absent = {}, {}, set()
        for name in dict.fromkeys((target, *asked) if target is not None else asked):
            if name == "carry" and self.carried is not None:
                nodes[name] = self.carried[0]
            elif name in paths:
                nodes[name] = self.attribute(paths[name])
            elif name in options.inputs:
                nodes[name] = self.input(name, place)
            elif name in FUNCTIONS:
                functions[name] = self.function(site, name)
            elif name in ("training", *FACTS):
                continue
            elif name == "choices":
                nodes |= {f"choices[{i}]": node for i, node in enumerate(self.choices[site, target])}
            elif name not in REPLACES.values() and name not in site.handles and has_default(function, name) and (name not in OUTER or self.outer(site, name) is None):
                absent.add(name)
            else:
                nodes[name] = self.handle(site, name)
                if nodes[name] is None and name in OUTER:
                    raise Refused(f"{place}: {noun}() asks for {name!r}, which there is not at this site.")
                if nodes[name] is None and name not in {*site.handles, "x", "w", "b", "y"}:
                    raise Refused(f"{place}: {noun}() asks for {name!r}; this site has {', '.join(site.handles)} and the new tensors {', '.join(paths) or 'none'}.")
        functions = {name: f for name, f in functions.items() if f is not None}
        extras = tuple(dict.fromkeys(self.attribute(node.target) if node.op == "get_attr" else node for f in functions.values() for node in f.reads))
        facts = {name: self.value(site, name) for name in FACTS if name in asked}
        names = [name for name, node in nodes.items() if node is not None]
        inputs = [*(nodes[name] for name in names), *extras]
        values = [node.meta["val"] for node in inputs]
        operation = self.operation(site)
        fixed = (operation and operation.static, *((name, f.static) for name, f in functions.items()), *facts.items())
        key = self.key(noun, function, site, tuple(names), tuple(absent), fixed)
        sized = (key, self.fake_mode, tuple(map(signature, values)))
        body = self.bodies.get(sized)
        if body is None:
            alike = (key, tuple((v.dim(), v.dtype, v.device) if isinstance(v, torch.Tensor) else None for v in values))
            general = self.bodies.get(alike)
            body = general.at(values, self.fake_mode, place) if general is not None else None
            if body is None:
                body = self._trace(site, function, [name for name in asked if name not in absent], target, names, extras, values, facts, functions, place)
                if body.is_general:
                    self.bodies[alike] = body
            self.bodies[sized] = body
        current = nodes.get(target)
        if current is not None and not current.users:
            raise Refused(f"{place}: nothing reads the value that {noun}() would replace.")
        flag = lambda: self.attribute(".".join(p for p in (site.owner, "training") if p))  # noqa: E731
        anchor = max([n for n in inputs if n.op not in ("get_attr", "placeholder")], default=None)
        # a weight's new value goes right before what reads it there, anything else right after the last thing that it needs
        reader = operation is not None and target in ("w", "b") and (operation.chain or (operation.node,))[0]
        if reader and anchor is not None and reader < anchor:  # experts turn their weight before the x is there that its new value asks the dtype of
            for step in operation.chain:
                operation.node.prepend(step)
        following = anchor.next if anchor is not None else min(current.users) if current is not None else self.handle(site, "y")
        while following in self.aside:  # steps side by side stand in the order of the spec
            following = following.next
        with self.graph.fx.inserting_before(reader or following):
            new, own = body.paste(self.graph.fx, inputs, flag, {"path": site.owner, "made": self.kind, "role": f"made.{self.kind}", "site": site.path})
        self.by_name.update((n.name, n) for n in own)
        if current is not None and new is current:
            return None
        if not isinstance(new, fx.Node):
            raise Refused(f"{place}: {noun}() must return one tensor")
        if current is None:
            self.beside |= own
            return new
        if signature(new.meta["val"]) != signature(current.meta["val"]) and not growth(site, target, current, new) and not (options.lengthens and "ids" in site.handles):
            raise Refused(f"{place}: {noun}() gives {_words(new)} where the model has {_words(current)}.")
        return current, new, own

    def function(self, site, name):
        """What of the site a body may run again (FUNCTIONS): something with `reads`, `static` and `run`; None where the site has none."""
        operation = self.operation(site)
        if name == "norm":
            return self.norm_after(site)
        if name == "f":
            return self.body(site)
        if name in ("key_of", "value_of"):
            return made_of(self, site, name)
        if name == "copy":
            body = self.body(site, weights=True)
            copies = self.new.copies(site, body)
            return Copied(body, {n: self.attribute(copies[n.target]) for n in body.reads if n.target in copies})
        return operation and Again(operation, name)

    def _trace(self, site, function, asked, target, names, extras, values, facts, functions, place):
        operation = self.operation(site)

        def read(name, value):
            if name in site.layout.turned:
                return value.transpose(-1, -2)
            if operation is None or name not in ("w", "b", "y"):
                return value
            if name == "w":
                value = operation.standard(value)
            return self._part(site, value, self._dim(operation, name))

        def again(name, f, known, training):
            if name in ("key_of", "value_of"):
                return functools.partial(f.run, known=known, training=training)
            if name not in ("f", "copy"):
                return functools.partial(f.run, known=known)
            return lambda value: self._part(site, f.run(value, known, training), self._dim(operation, "y"))

        def run(*tensors, training):
            raw = dict(zip(names, tensors))
            given = {name: read(name, raw[name]) if name in raw else None for name in asked if name not in ("training", *FUNCTIONS, *FACTS)} | facts
            known = dict(zip(extras, tensors[len(names) :]))
            given |= {name: again(name, f, known, training) for name, f in functions.items()}
            given |= {"choices": tuple(read(target, value) for name, value in raw.items() if name.startswith("choices["))} if "choices" in asked else {}
            given |= {name: training if name == "training" else None for name in asked if name not in given}
            new = function(**given)
            if target in site.layout.turned:
                return new.transpose(-1, -2)
            if operation is None or target not in ("w", "b", "y"):
                return new
            whole = operation.standard(raw["w"]) if target == "w" else raw[target]
            new = new if site.layout.rows is None else site.layout.rows.put(whole, new, self._dim(operation, target))
            return operation.stored(new) if target == "w" else new

        with self.fake_mode:
            fresh = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in values]
        return Body(run, fresh, self.fake_mode, training="training" in asked or any(f.flagged for f in functions.values()), marker=self.marker, place=place)

    def key(self, noun, function, site, *more):
        """What the body of a noun depends on, whatever rewrite of this capture it was traced for."""
        options, layout = self.step.options, site.layout
        return (type(options), repr(options), noun, getattr(function, "__func__", None), self.marker, layout.rows, tuple(layout.turned), *more)

    @property
    def marker(self):
        """The dtype that stands for the model's own in the graph, or None."""
        return next((new for old, new in self.dtypes.items() if old != new), None) or next(iter(self.dtypes.values()), None)

    def _replace(self, site, target, current, new, own):
        operation, inside = self.operation(site), None
        if target not in ("y", "positions"):
            inside = {operation.node, *operation.chain} if operation is not None and target != "x" else between([current], self.handle(site, "y"))
        users = [user for user in current.users if user not in own and user not in self.aside and user not in self.beside and (inside is None or user in inside)]
        if growth(site, target, current, new):  # how many places the model has itself is what it counts its positions and biases by
            users = [user for user in users if isinstance(user.meta.get("val"), torch.Tensor)]
        if any(user < new for user in users):
            raise Refused(f"{self.kind} at {site.path}: the new {target} reads what the site computes only after its {target}.")
        if target in ("y", "positions"):
            current.meta["live"] = new.name
        elif operation is None:  # by role: the result of a sub-layer is also that of its last linear
            site.node.meta["handles"] = {**site.node.meta.get("handles", {}), (site.role, target): new.name}
        elif target in ("w", "b"):
            new.meta["stands_for"] = operation.weight if target == "w" else operation.bias
        for user in users:
            user.replace_input_with(current, new)
        self.replaced.append((site, target, current, new, users))


def _target(noun):
    """The name of the value that a noun replaces; None for a value that is made beside the model's."""
    return "y" if noun == "end" else REPLACES.get(noun)


def _words(node):
    value = node.meta["val"]
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)
