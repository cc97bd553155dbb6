"""The rows of a batch, each with an adapter of its own: a body run for every row on its adapter's tensors, in one stroke.

    y = f(x, y, down)     -->     y = where(mask, vmap(f)(x, y, down[slot]), y)        down: adapters × rank × in

`slot` and `mask` come from `adapter_ids`, once for each step: which of the stacked tensors a row takes, and whether the step is for it at all.
Bodies are traced after dispatch, so that products with a matrix for each row become batched ones and cost does not grow with the adapters.
"""

import functools

import torch
from torch import fx

from .. import graph as g
from ..calls import added
from ..contract import FACTS, FUNCTIONS, REPLACES, Frozen, Input, has_default, wants
from ..errors import Refused
from ..training.hooks import Held
from .batch import IDS
from .body import Body, signature
from .edit import Edit
from .lengthen import growth, lengthen, paste
from .operation import _SAME
from .prompts import insert
from .reading import names_of
from .rowwise import Rows
from .tensors import NewTensors, Seen, _tensor

aten = torch.ops.aten
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
_HANDLES = (*dict.fromkeys(REPLACES.values()), "ids", "mask")


class RowsEdit(Edit):
    """The Edit of a step that serves some adapters of a batch (`step.members`)."""

    def __init__(self, *given):
        super().__init__(*given)
        self.members = self.step.members
        self.new = Stacked(self)
        self.batch = added.batch_of(self.graph)
        self._chosen = self._parts = None

    # ---- which rows ---------------------------------------------------------------------------------------------------------
    @property
    def chosen(self):
        """The nodes of `slot` and `mask`, at the top of the graph."""
        if self._chosen is None:
            values = range(-1, len(self.members.names))
            wanted = Input(values=values)
            if self.report.inputs.setdefault(IDS, wanted) != wanted:
                raise Refused(f"{self.step.place}: another pass has an input {IDS!r} of its own.")
            ids = added.add(self.graph, self.graphs, IDS, wanted, self.step.place)
            key = (self.step.place, IDS, self.members.numbers, self.fake_mode, signature(ids.meta["val"]))
            if key not in self.memo:
                self.memo[key] = self._body(lambda ids, training: _slot_and_mask(ids, self.members), [ids.meta["val"]], self.step.place)
            with self.graph.fx.inserting_before(self.top):
                self._chosen, own = self.memo[key].paste(self.graph.fx, [ids], None, {"path": "", "made": self.kind, "role": f"made.{self.kind}"})
            self.by_name.update((n.name, n) for n in (ids, *own))
        return self._chosen

    @property
    def seeing(self):
        """The rows that see places put in front of keys and values: those of the step's adapters."""
        return self.chosen[1]

    # ---- tokens in front ----------------------------------------------------------------------------------------------------
    @property
    def parts(self):
        """An Edit for the members of each set of options: how many tokens stand in front may differ."""
        if self._parts is None:
            self._parts = [RowsEdit(self.graph, self.sites, self.graphs, step, self.seed, self.report, self.memo, self.aside) for step in self.members.parted(self.step)]
            for part in self._parts:
                part.by_name, part.attributes = self.by_name, self.attributes
        return self._parts

    @property
    def choosing(self):
        return {node for part in self.parts for node in part.chosen}

    @property
    def lengths(self):
        """How many tokens stand in front of each row's own."""
        masks, each = [part.chosen[1] for part in self.parts], self.memo["in front", self.step.place]
        return paste(self, max(masks), ("lengths", each), lambda *masks: sum(mask * length for mask, length in zip(masks, each)), masks, ("", ""), self.step.place)

    def make(self, site, noun, paths):
        """As for all rows alike, of a noun that puts tokens in front: as many as the longest of the adapters has, zeros in front of shorter ones."""
        place, current, before = f"{self.kind} at {site.path}", self.handle(site, "y"), set(self.graph.nodes)
        made = []
        for part in self.parts:
            own = part.new.of(site)
            made.append(part._row_value(site, noun, getattr(part.step.options, noun), {**paths, **own})[1])
        each = tuple(int(g.shape(value)[1] - g.shape(current)[1]) for value in made)
        self.memo["in front", self.step.place] = each

        def joined(current, *given):
            longest = max(each)
            whole = _padded(current, longest)
            for value, mask, length in zip(given, given[len(each) :], each):
                whole = torch.where(mask.view(-1, 1, 1), _padded(value, longest - length), whole)
            return whole

        new = made[0]
        if len(each) > 1:
            new = paste(self, max(made), ("joined", each), joined, [current, *made, *(part.chosen[1] for part in self.parts)], (site.owner, site.path), place)
        return current, new, {n for n in self.graph.nodes if n not in before and n.op == "call_function" and not self._picks(n)}

    def _picks(self, node):
        """Is a node one of those that make `slot` and `mask`?"""
        return "site" not in node.meta

    # ---- which rows a value has -----------------------------------------------------------------------------------------------
    def rows(self, node):
        """ "rows" where the first axis of a node's value is the batch, "flat" where it is batch × something, row after row; None else."""
        value = node.meta.get("val") if node is not None else None
        if not isinstance(value, torch.Tensor) or not value.dim() or self.batch is None:
            return None
        batch, size = g.expression(self.batch), g.expression(value.shape[0])
        if size == batch:
            return "rows"
        if isinstance(size, int) or not (size / batch).is_polynomial(*size.free_symbols) or batch in (size / batch).free_symbols:
            return None
        return "flat" if self._is_flattened(node, size) else None

    def _is_flattened(self, node, size):
        """Was a value batch × something laid out by a plain reshape, and only worked on row by row since?"""
        while isinstance(node, fx.Node) and node.op == "call_function":
            source = next((a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor) and a.op != "get_attr"), None)
            if node.target in _RESHAPES and source is not None and g.shape(source)[0] == g.expression(self.batch):
                return True
            rowwise = node.target in _SAME | _RESHAPES or torch.Tag.pointwise in getattr(node.target, "tags", ()) or self._reads_weight(node)
            if source is None or not rowwise or not g.shape(source) or g.shape(source)[0] != size:
                return False
            node = source
        return False

    @staticmethod
    def _reads_weight(node):
        return node.target in (aten.linear.default, aten.addmm.default, aten.mm.default)

    def reason(self, site, sites):
        """Why the pass declines a site here, or None."""
        operation = self.operation(site)
        if self.step.options.lengthens and "ids" not in site.handles:
            return "tokens that stand in front and are changed further on are those of all rows. Write the pass before or after the batch"
        if self.step.options.lengthens and len(self.parts) > 1:
            return next((why for part in self.parts if (why := part.reason(site, sites)) is not None), None)
        if operation is not None and operation.kind == "experts":
            return "its rows are tokens sorted by expert, not those of the batch"
        why = super().reason(site, sites)
        if why is not None:
            return why
        if self.batch is None:
            return "it lies inside an opaque module, whose rows are not known" if self.graph.is_inner else "the batch size is not free in this capture"
        options = self.step.options
        asked = {name for noun in options.nouns() for name in wants(getattr(options, noun))}
        if operation is not None and operation.kind == "conv" and ({"op", "mix"} & asked or hasattr(options, "weight")):
            return "a convolution with other weights for each row cannot be followed while the batch size is free"
        if operation is not None and operation.kind == "embedding" and hasattr(options, "weight"):
            return "a whole table for each row would be made, of which a few entries are read. Take a method that adds to the output, such as lora"
        if {"f", "copy", "key_of", "value_of"} & asked:
            return "its body is run again, which is not done for each row of a batch"
        if hasattr(options, "carry") or options.no_grad:
            return "what it hands from site to site, or keeps backward out of, is one for all rows of a batch"
        for target in dict.fromkeys(REPLACES[noun] for noun in options.nouns() if noun != "positions"):
            current = self.handle(site, target if target not in ("w", "b") else "y")
            if current is not None and self.rows(current) is None:
                return f"the rows of its {target if target not in ('w', 'b') else 'y'}, {g.shape(current)}, are not those of the batch"
        if hasattr(options, "weight") and operation is None:
            return "a weight of its own for each row is defined where the weight is that of an operation that can be run again"
        return None

    # ---- nouns --------------------------------------------------------------------------------------------------------------
    def apply(self, site, shared, last=False):
        own = self.new.of(site) if not self.step.options.lengthens else {}
        paths = {**shared, **own}
        for name in self._trained(site):
            self._copied(site, name)
        if self.step.options.lengthens:
            insert(self, site, shared)
            return
        longer = {noun: self._rowwise(site, noun, getattr(self.step.options, noun), paths) for noun in self.step.options.nouns()}
        if any(longer.values()):
            lengthen(self, site, longer)
        for name, path in own.items():
            if not (path in self.attributes and self.attributes[path].users):
                raise Refused(f"{self.kind} at {site.name}: params() gives {name!r}, and no noun reads it at this site.")

    def _copied(self, site, name):
        """A base tensor that the pass lets train: a copy for each adapter."""
        operation = self.operation(site)
        stored = operation.weight if operation and name == "w" else operation.bias if operation and name == "b" else site.handles[name].target
        done = (self.step.place, "copied", self.graph.name, stored, site.call)
        if done in self.memo:
            return  # by another part of a fused projection
        self.memo[done] = True
        noun = next(noun for noun, target in REPLACES.items() if target == name)
        self._rowwise(site, noun, None, {"copy": self.new.own_copies(site, stored, name)})

    def _rowwise(self, site, noun, function, paths):
        """One noun at one site for the rows of its adapters; `function` None: the value is the tensor `copy`. Returns by how many places it is longer."""
        target = REPLACES[noun]
        if self.handle(site, target) is None or (noun == "positions" and self.counted):
            return 0
        current, new, own = self._row_value(site, noun, function, paths)
        if new is current:
            return 0
        if target not in ("w", "b"):
            self._replace(site, target, current, new, own)
            self.counted |= noun == "positions"
            return growth(site, target, current, new)
        for user in [user for user in current.users if user not in own]:
            user.replace_input_with(current, new)
        base = self._operation_node(site)
        base.meta["rows"] = new.name
        base.meta.setdefault("live", new.name)
        if base.meta["live"] == current.name:
            base.meta["live"] = new.name
        return 0

    def _row_value(self, site, noun, function, paths):
        """(the value that a noun replaces, its new one, the nodes that make it)."""
        target, place = REPLACES[noun], f"{self.kind} at {site.path}"
        deep = target in ("w", "b")  # then it is the operation's own value that is replaced, beneath what earlier steps made of it
        self._refuse_stale_weight(site, target, function, place)
        current = self._own_value(site) if deep else self.handle(site, target)
        asked = wants(function) if function is not None else ("copy",)
        nodes, functions = {}, {}
        for name in dict.fromkeys((target, *(("x", "b") if target == "w" else ()), *asked)):
            if name in paths:
                nodes[name] = self.attribute(paths[name])
            elif name in self.step.options.inputs:
                nodes[name] = self.input(name, place)
            elif name in FUNCTIONS:
                functions[name] = self.function(site, name)
            elif name not in ("training", *FACTS) and not (function is not None and name not in (*_HANDLES, *site.handles) and has_default(function, name)):
                nodes[name] = self.handle(site, name)
                if nodes[name] is None and name not in _HANDLES:
                    raise Refused(f"{place}: {noun}() asks for {name!r}, which a body in a batch cannot have.")
        functions = {name: f for name, f in functions.items() if f is not None}
        if target == "w":
            functions["op"] = self.function(site, "op")
        nodes = {name: node for name, node in nodes.items() if node is not None}
        nodes |= {" current": current} if deep else {}
        extras = tuple(dict.fromkeys(self.attribute(node.target) if node.op == "get_attr" else node for f in functions.values() for node in f.reads))
        inputs = [*nodes.values(), *extras, *self.chosen]
        facts = {name: self.value(site, name) for name in FACTS if name in asked}
        kinds = tuple("stack" if name in paths else self.rows(node) for name, node in (*nodes.items(), *((None, node) for node in extras)))
        operation = self.operation(site)
        fixed = (operation and operation.static, *((name, f.static) for name, f in functions.items()), *facts.items())
        values = [node.meta["val"] for node in inputs]
        key = self.key(noun, function, site, self.fake_mode, tuple(nodes), kinds, tuple(map(signature, values)), fixed)
        if key not in self.bodies:
            run = Rows(self, site, target, function, asked, tuple(nodes), extras, kinds, facts, functions, place).run
            self.bodies[key] = self._body(run, values, place, "training" in asked)
        flag = lambda: self.attribute(".".join(p for p in (site.owner, "training") if p))  # noqa: E731
        anchor = max(n for n in (current, *inputs) if n.op not in ("get_attr", "placeholder"))
        before = self.top if anchor < self.top else anchor.next  # new tensors stand right before the top
        with self.graph.fx.inserting_before(before):
            new, own = self.bodies[key].paste(self.graph.fx, inputs, flag, {"path": site.owner, "made": self.kind, "role": f"made.{self.kind}", "site": site.path})
        self.by_name.update((n.name, n) for n in own)
        return current, new, own

    def _operation_node(self, site):
        operation = self.operation(site)
        return operation.node if operation is not None else site.node

    def _own_value(self, site):
        """What the site's operation gives for its rows, before any step that works on its output."""
        base = self._operation_node(site)
        return self.by_name[base.meta["rows"]] if "rows" in base.meta else base

    def _refuse_stale_weight(self, site, target, function, place):
        """A weight of its own for each row stands nowhere in the graph: what one step has made of it, no later one of that adapter may read."""
        reads = target == "w" or (function is not None and "w" in wants(function))
        for adapter in self.members.adapters:
            key = ("weight by row", adapter, self.graph.name, self._operation_node(site), site.layout.rows)
            if reads and key in self.memo:
                raise Refused(f"{place}: an earlier step of {adapter!r} has replaced the weight, and in a batch a second one cannot read what became of it. Give one of the two.")
            if target == "w":
                self.memo[key] = True

    def _body(self, run, values, place, training=False):
        with self.fake_mode:
            fresh = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in values]
        marker = next((new for old, new in self.dtypes.items() if old != new), None) or next(iter(self.dtypes.values()), None)
        return Body(run, fresh, self.fake_mode, training=training, marker=marker, place=place, dispatched=True)


def _slot_and_mask(ids, members):
    """Which of the stacked tensors each row takes, and whether it is one of theirs; a number that no adapter has is an error of the lookup."""
    known = torch.arange(-1, len(members.names), device=ids.device).index_select(0, ids.clamp(min=-1) + 1)
    first, *others = members.numbers
    if members.numbers == tuple(range(first, first + len(members.numbers))):
        return (known - first).clamp(0, len(others)), (known >= first) & (known <= first + len(others))
    slot, mask = torch.zeros_like(known), known == first
    for number in others:
        slot, mask = slot + (known >= number), mask | (known == number)
    return slot, mask


def _padded(value, places):
    """Zeros in front of (batch, length, features)."""
    return torch.cat([value.new_zeros(value.shape[0], places, value.shape[2]), value], 1) if places else value


class Stacked(NewTensors):
    """New tensors of a step that serves several adapters: those that each one's own step would make, under its own seed, stacked."""

    def _made(self, site, base):
        given = self.edit.given(site, self.step.options.params)
        tensors = [v for v in given.values() if isinstance(v, torch.Tensor)]
        return self._stacked(base, functools.partial(self._alone, site), lambda: self._own(self._new(site, given), tensors))

    def shared(self, sites):
        base = f"{self.kind}.{self.step.name}"
        key = ("shared", self.step.place, base)
        if key not in self.memo:
            self.memo[key] = self._stacked(base, lambda step: f"{self.kind}.{step.name}", lambda: self._shared_new(sites))
        return self.memo[key]

    def _shared_new(self, sites):
        seen = [Seen(edit, site) for edit, site in sites]
        new = self._checked(self.step.options.shared(seen), f"{self.kind}: shared()")
        return self._own(new, [v for one in seen for v in one.given if isinstance(v, torch.Tensor)])

    def _hold(self, site, base, paths):
        """For its hooks each adapter's step is one of its own, as if it were alone."""
        if self.step.options.hooks():
            for row, step in enumerate(self.edit.members.steps):
                hooked, shared = self.hooked(step), self.memo.get(("shared", self.step.place, f"{self.kind}.{self.step.name}"), {})
                hooked.shared, hooked.row = shared, row
                hooked.sites.setdefault(self._alone(site, step), Held(site.path, site.role, paths, self._base(site), row))

    def _alone(self, site, step):
        """Where an adapter's own step would put the tensors of a site."""
        return ".".join(part for part in (site.owner, self.kind, step.name, site.label) if part)

    def _stacked(self, base, alone, make):
        """`alone(step)`: where an adapter's own step would put its tensors; `make()` gives them, name → tensor."""
        each = {}
        for adapter, step in zip(self.edit.members.adapters, self.edit.members.steps):
            with self._seeded(alone(step)):
                for name, value in make().items():
                    each.setdefault(name, []).append((adapter, f"{alone(step)}.{name}", value))
        return {name: self._stack(f"{base}.{name}", found) for name, found in each.items()}

    def own_copies(self, site, stored, name):
        """The path of a copy of a base tensor for each adapter."""
        parameter = g.attribute(self.edit.graph.root, stored)
        if len(names := names_of(self.edit.graph.root, parameter)) > 1:
            raise Refused(f"{self.step.place}: {self.kind} at {site}: {' and '.join(names)} are one tensor, and a copy for each adapter would part them.")
        base = ".".join(part for part in (site.owner, self.kind, self.step.name) if part)
        key = ("copies", self.step.place, base, stored)
        if key not in self.memo:
            self.memo[key] = self._stack(f"{base}.{name}", [(adapter, stored, parameter.detach()) for adapter in self.edit.members.adapters])
        return self.memo[key]

    def _stack(self, path, found):
        stacked = torch.stack([_tensor(value) for _, _, value in found])
        self.edit.report.stacked[path] = {adapter: own for adapter, own, _ in found}
        return self._install(path, Frozen(stacked) if isinstance(found[0][2], Frozen) else stacked)
