"""Two runs of one model that differ in everything that is not part of the computation, made one graph.

    eval,  own dtype,    example sizes, one seed       dropout(x, 0.1, False)    to(x, float32)    full(-3.4e38)
    train, other dtype,  least sizes,   another seed   dropout(x, 0.1, True)     to(x, bfloat16)   full(-3.39e38)
    -->
    dropout(x, 0.1, @….training)    to(x, dtype_of(y))    full(least(dtype_of(y)))

The runs agree node by node; where an argument differs, the difference says what the model's code had read there: its own training
flag, a dtype, the least number of a dtype. A constant stays only where both runs made it.
"""

import math
import operator
from collections import deque
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from .graph import HOST, count, device_of, dtype_of, expression, least, select

aten = torch.ops.aten
_ASSERTS = {
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.default, aten._assert_async.msg,
    aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
}  # fmt: skip
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}
_LAYOUT = aten.contiguous.default  # not even asked of a value that is contiguous already, as everything of size one is
_END = torch.iinfo(torch.int64).max


class Misaligned(Exception):
    """The runs differ in more than arguments, first in the module at `path`."""

    def __init__(self, path, words):
        self.path, self.words = path, words
        super().__init__(f"{path or 'the model'}: {words}")


def is_size(node):
    """Whether a node's value is a number or a condition on numbers, not a tensor."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def has_effect(node):
    """Whether a node does something besides giving its value."""
    return node.op == "call_module" or node.target in (count, aten._assert_scalar.default) or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)


def written(node):
    """The node whose value an in-place op changes; None for all others."""
    if not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
        return None
    arguments = named_arguments(node)
    return next((arguments[a.name] for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write and isinstance(arguments.get(a.name), fx.Node)), None)


def named_arguments(node):
    """An op's arguments by name, defaults filled in; positions for what has no schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**dict(enumerate(node.args)), **node.kwargs}
    given = {}
    for place, argument in enumerate(node.target._schema.arguments):
        if place < len(node.args):
            given[argument.name] = node.args[place]
        elif argument.name in node.kwargs:
            given[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            given[argument.name] = argument.default_value
    return given


def set_argument(node, name, value):
    """Set an op's argument by its name in the schema (or its position where there is no schema)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        if isinstance(name, int):
            node.update_arg(name, value)
        else:
            node.update_kwarg(name, value)
        return
    arguments = node.target._schema.arguments
    place = [a.name for a in arguments].index(name)
    if arguments[place].kwarg_only or name in node.kwargs:
        node.update_kwarg(name, value)
        return
    values = named_arguments(node)
    node.args = tuple(value if a.name == name else values[a.name] for a in arguments[: max(place + 1, len(node.args))])


def _is_noop(node):
    """Ops that hand their input through: aliases, whole slices, casts between equal integer dtypes."""
    if node.target is aten.alias.default:
        return True
    if node.target is aten.slice.Tensor:
        value = named_arguments(node)
        return value["start"] in (0, None) and value["end"] in (_END, None) and value["step"] == 1
    if node.target in (aten.to.dtype, aten.to.dtype_layout, aten.type_as.default):
        source = node.args[0].meta["val"]
        return source.dtype == node.meta["val"].dtype and not source.dtype.is_floating_point and source.device == node.meta["val"].device
    return False


def tidy(graph):
    """Take out what a run leaves behind, in place: asserts, dead nodes, size questions, whole slices, no-op integer casts."""
    writes = {id(node): written(node) for node in graph.nodes if node.op == "call_function"}
    for node in list(graph.nodes):
        if node.target in _ASSERTS:
            graph.erase_node(node)
        elif node.target is aten.detach_.default and node.args[0].target is aten.lift_fresh_copy.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and _is_noop(node) and not any(target is node for target in writes.values()):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    written_to = {id(target) for target in writes.values() if target is not None}
    for node in list(graph.nodes):
        if node.target is aten.lift_fresh_copy.default and id(node) not in written_to:
            node.args[0].meta["val"] = node.meta["val"]
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _regions(graph)
    drop_dead(graph)
    _sizes_once(graph)


def drop_dead(graph):
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not has_effect(node):
            graph.erase_node(node)


def _sizes_once(graph):
    """One node per size of one value: equal size reads and equal arithmetic become one."""
    seen = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_size(node):
            continue
        if isinstance(node.meta["val"], (int, float)) and node.target is not operator.getitem:
            node.replace_all_uses_with(node, delete_user_cb=lambda user: False)
            _inline(node)
            graph.erase_node(node)
            continue
        key = (node.target, fx.node.map_arg(node.args, lambda n: n.name).__repr__(), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def _inline(node):
    """Write a size that is a plain number into its users."""
    value = node.meta["val"]
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)


def _regions(graph):
    """`with torch.no_grad()` inside the model: what such a region computed from something trainable is detached where it leaves."""
    enabled, trainable, outside = [True], set(), {}
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            enabled[0] = node.args[0]
            graph.erase_node(node)
            continue
        value = node.meta.get("val")
        floating = not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype.is_complex
        if node.op == "placeholder" or (node.op == "get_attr" and isinstance(value, torch.nn.Parameter)) or node.op == "call_module":
            if floating:
                trainable.add(node)
        elif node.op == "call_function" and floating and not is_size(node):
            sources = [source for source in node.all_input_nodes if source in trainable]
            if sources and not enabled[0]:
                outside[node] = None
            elif sources:
                trainable.add(node)
    for node in outside:
        if isinstance(node.meta.get("val"), torch.Tensor) and any(user not in outside and not is_size(user) for user in node.users):
            with graph.inserting_after(node):
                cut = graph.call_function(aten.detach.default, (node,))
            cut.meta = dict(node.meta)
            node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut and user not in outside)


def _laid_out(node):
    while node.target is _LAYOUT:
        node = node.args[0]
    return node


def _expression(value):
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else sympy.sympify(value)


@dataclass(frozen=True)
class Difference:
    """One argument in which the runs differ: `where` is the way to it inside the node's argument `name`."""

    node: fx.Node
    name: object
    where: tuple
    ours: object
    theirs: object


@dataclass(eq=False)
class Cast:
    """A cast that their run alone made, as ours had that dtype already: of our node `source`, before our node `before`."""

    theirs: fx.Node
    source: object
    before: fx.Node


class Alignment:
    """The pairing of two tidied graphs, theirs → ours, and what it found.

    `pairs`: their node → our node or a Cast. `differences`; `reads`: Differences whose `theirs` is a Cast to be read instead.
    `counters`: (our node, path of the counter that theirs adds one to before it).
    """

    def __init__(self, ours, theirs, replacements, hints):
        self.ours, self.theirs, self.replacements, self.hints = ours, theirs, replacements, hints
        self.pairs, self.differences, self.reads, self.counters = {}, [], [], []
        self.own_casts = {}  # our casts, and slices that are whole at their sizes, that their run did not make -> what they read
        self._pair()

    def _pair(self):
        first, second = ([n for n in graph.nodes if n.op != "get_attr" and not is_size(n) and n.target is not _LAYOUT] for graph in (self.ours, self.theirs))
        tensors = {n.target: n for n in self.ours.nodes if n.op == "get_attr"}
        for node in self.theirs.nodes:
            if node.op == "get_attr" and node.target in tensors:
                self.pairs[node] = tensors[node.target]
        waiting, place = [], 0
        for node in second:
            other = first[place] if place < len(first) else None
            if self._is_counter(node) and not (other is not None and other.target is node.target):
                waiting.append(node)
                continue
            while other is not None and self._ours_alone(other, node):
                self.own_casts[other] = other.args[0]
                if self._is_cast(other):
                    self.differences.append(Difference(other, "dtype", (), other.meta["val"].dtype, None))
                place += 1
                other = first[place] if place < len(first) else None
            if other is not None and self._is_cast(node) and not self._same_cast(other, node):
                self.pairs[node] = Cast(node, self.pairs[_laid_out(node.args[0])], other)
                continue
            if other is None or node.op != other.op or (node.op not in ("placeholder", "output") and node.target is not other.target and node.target != other.target):
                raise Misaligned(self._odd_one(other, node, first[place:]).meta.get("path", ""), f"the two runs differ: {other.format_node() if other is not None else 'nothing'} / {node.format_node()}")
            self.counters += [(other, counter.args[0].target) for counter in waiting]
            waiting = []
            self.pairs[node] = other
            place += 1
            self._compare(other, node)
        if place != len(first):
            raise Misaligned(first[place].meta.get("path", ""), f"the two runs differ: {first[place].format_node()} / nothing")

    @staticmethod
    def _odd_one(ours, theirs, rest):
        """Of two nodes that do not match, the one to blame: theirs, if nothing like it follows in our run."""
        like = {(node.target, node.meta.get("path")) for node in rest}
        return theirs if ours is None or (theirs.op != "output" and (theirs.target, theirs.meta.get("path")) not in like) else ours

    def _ours_alone(self, ours, theirs):
        """Whether our node is one that their run passed over: a cast to the dtype at hand, a slice that is whole at their sizes."""
        if self._is_cast(ours):
            return theirs.target is not ours.target
        if ours.target is not aten.slice.Tensor or (theirs.target is ours.target and self._means(theirs.args[0], ours.args[0])):
            return False
        before, after = ([sympy.sympify(expression(size)).subs(self.hints) for size in node.meta["val"].shape] for node in (ours.args[0], ours))
        return before == after

    @staticmethod
    def _is_cast(node):
        return node.target is aten.to.dtype and node.args[0].meta["val"].dtype != node.meta["val"].dtype

    def _same_cast(self, ours, theirs):
        return ours.target is theirs.target and self._means(theirs.args[0], ours.args[0])

    def _means(self, theirs, ours):
        """Whether their node stands for our value, casts aside that only one run made."""
        ours, other = _laid_out(ours), self.pairs.get(_laid_out(theirs))
        while ours in self.own_casts and other is not ours:
            ours = _laid_out(self.own_casts[ours])
        while isinstance(other, Cast):
            other = other.source
        return other is ours

    @staticmethod
    def _is_counter(node):
        return node.target is aten.add_.Tensor and node.args[0].op == "get_attr" and not node.users and node.args[1] == 1 and not node.args[0].meta["val"].dtype.is_floating_point

    def _compare(self, ours, theirs):
        if ours.op == "call_module":
            first, second = {"args": ours.args, "kwargs": ours.kwargs}, {"args": theirs.args, "kwargs": theirs.kwargs}
        else:
            first, second = named_arguments(ours), named_arguments(theirs)
        for name in first.keys() | second.keys():
            self._compare_value(ours, name, (), first.get(name), second.get(name))

    def _compare_value(self, node, name, where, ours, theirs):
        if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
            for i, (a, b) in enumerate(zip(ours, theirs)):
                self._compare_value(node, name, (*where, i), a, b)
            return
        if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
            for key in ours:
                self._compare_value(node, name, (*where, key), ours[key], theirs[key])
            return
        tensors = [isinstance(value, fx.Node) and not is_size(value) for value in (ours, theirs)]
        if all(tensors):
            if not self._means(theirs, ours):
                raise Misaligned(node.meta.get("path", ""), f"{node.format_node()} reads {ours.name} in one run and {theirs.name} in the other")
            if isinstance(self.pairs[_laid_out(theirs)], Cast):
                self.reads.append(Difference(node, name, where, ours, self.pairs[_laid_out(theirs)]))
            return
        if any(tensors):
            raise Misaligned(node.meta.get("path", ""), f"argument {name} of {node.format_node()} is a tensor in one run alone")
        if any(isinstance(value, fx.Node) for value in (ours, theirs)):
            if not self._same_size(ours, theirs):
                raise Misaligned(node.meta.get("path", ""), f"argument {name} of {node.format_node()} is {_expression(ours)} in one run and {_expression(theirs)} in the other")
            return
        if ours != theirs and not (isinstance(ours, float) and isinstance(theirs, float) and math.isnan(ours) and math.isnan(theirs)):
            self.differences.append(Difference(node, name, where, ours, theirs))

    def _same_size(self, ours, theirs):
        a, b = (_expression(value).xreplace(self.replacements) for value in (ours, theirs))
        return a == b or sympy.expand(a - b) == 0 if not isinstance(a, sympy.logic.boolalg.Boolean) else a == b


class Merge:
    """Writes an alignment's differences into our graph, as reads of what is at hand."""

    def __init__(self, alignment, training, other_dtype, notes):
        self.other_dtype = other_dtype
        self.graph, self.alignment, self.training, self.notes = alignment.ours, alignment, training, notes
        self.partner = {ours: theirs for theirs, ours in alignment.pairs.items() if not isinstance(ours, Cast)}
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.made = {}

    def apply(self):
        for read in self.alignment.reads:
            self._write(read, self._cast(read.theirs))
        for difference in self.alignment.differences:
            value = self._value(difference)
            if value is not None:
                self._write(difference, value)
        for node, path in self.alignment.counters:
            flag = self._flag(node, path.rpartition(".")[0])
            counter = self._before(node, "get_attr", path)
            counter.meta["val"] = next((n.meta["val"] for n in self.alignment.theirs.nodes if n.target == path), None)
            self._before(node, "call_function", count, (flag, counter))

    def _before(self, node, op, target, args=()):
        with self.graph.inserting_before(node):
            made = self.graph.create_node(op, target, args)
        made.meta = {key: node.meta[key] for key in ("path", "call", "source") if key in node.meta}
        self.order[made] = self.order[node] - 0.5 + 1e-6 * len(self.made)
        return made

    def _cast(self, cast):
        """Our node for a cast that the other run alone made."""
        if isinstance(cast, fx.Node):
            return cast
        if cast not in self.made:
            source = self._cast(cast.source)
            ours, theirs = source.meta["val"].dtype, cast.theirs.meta["val"].dtype
            made = self._before(cast.before, "call_function", aten.to.dtype, (source, ours))
            made.meta = {**made.meta, **{key: cast.theirs.meta[key] for key in ("path", "call", "source") if key in cast.theirs.meta}, "read": {ours: cast.theirs.meta.get("read", {}).get(theirs)}, "val": source.meta["val"]}
            self.made[cast], self.partner[made] = made, cast.theirs
            if ours != theirs:
                dtype = self._dtype(made, ours, theirs)
                if dtype is not None:
                    made.args = (source, dtype)
        return self.made[cast]

    def _flag(self, node, path):
        """The training flag of the module at a path, read right before a node."""
        key = ("training", path, node)
        if key not in self.made:
            self.made[key] = self._before(node, "get_attr", f"{path}.training" if path else "training")
            self.made[key].meta["val"] = False
        return self.made[key]

    def _value(self, difference):
        node, ours, theirs = difference.node, difference.ours, difference.theirs
        if isinstance(ours, torch.dtype) and (isinstance(theirs, torch.dtype) or node in self.alignment.own_casts):
            return self._dtype(node, ours, theirs or self.other_dtype)
        if isinstance(ours, torch.device):
            return None
        pair = _least_of(ours, theirs)
        if pair is not None:
            dtypes, sign = pair
            dtype = self._dtype(node, *dtypes)
            if dtype is None:
                return None
            value = self._before(node, "call_function", least, (dtype,))
            value.meta["val"] = torch.finfo(dtypes[0]).min
            if sign > 0:
                value = self._before(node, "call_function", operator.neg, (value,))
                value.meta["val"] = ours
            return value
        if self.training and not isinstance(ours, (torch.layout, torch.memory_format)):
            flag = self._flag(node, node.meta.get("path", ""))
            if (ours, theirs) == (False, True) and ours is False:
                return flag
            value = self._before(node, "call_function", select, (flag, theirs, ours))
            value.meta["val"] = ours
            return value
        raise Misaligned(node.meta.get("path", ""), f"argument {difference.name} of {node.format_node()} is {ours} in one run and {theirs} in the other")

    def _dtype(self, node, ours, theirs):
        at_hand = self._read(node, ours) or self._at_hand(node, lambda value, other: value.dtype == ours and other.dtype == theirs)
        if at_hand is None:
            self.notes.append(f"{node.meta.get('path') or 'the model'}: no value at hand has the dtype that {node.name} asks for; it stays {ours}")
            return None
        key = (at_hand, "dtype", node)
        if key not in self.made:
            self.made[key] = self._before(node, "call_function", dtype_of, (at_hand,))
            self.made[key].meta["val"] = ours
        return self.made[key]

    def _read(self, node, dtype):
        """The tensor whose dtype the code read here: what `x.to(device)` moves, or a vector (a norm's weight) of this module.

        Not so for matrices: a pass may store them in other dtypes. There, and for activations, the nearest value says the same.
        """
        if node.target in (aten.to.device, aten.to.dtype_layout) and node.args[0].meta["val"].dtype == dtype:
            return node.args[0]
        path, own = node.meta.get("read", {}).get(dtype), node.meta.get("path", "")
        if path is None or not (path.startswith(f"{own}.") or not own):
            return None
        found = next((n for n in self.graph.nodes if n.op == "get_attr" and n.target == path and n.meta["val"].dim() == 1), None)
        if found is not None and self.order[found] > self.order[node]:
            node.prepend(found)
            self.order[found] = self.order[node] - 0.75
        return found

    def _at_hand(self, node, fits):
        """The nearest value before `node` that fits: upstream first, then the latest in its module, then the latest at all, last a tensor of the tree."""

        def good(candidate):
            value = candidate.meta.get("val")
            other = self.partner[candidate].meta.get("val") if candidate in self.partner else None
            return isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and fits(value, other)

        queue, seen, stored = deque(node.all_input_nodes), set(node.all_input_nodes), []
        while queue:
            candidate = queue.popleft()
            if good(candidate):
                if candidate.op != "get_attr":
                    return candidate
                stored.append(candidate)
            for source in candidate.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    queue.append(source)
        before = [n for n in self.graph.nodes if self.order[n] < self.order[node] and n.op in ("call_function", "call_module", "placeholder") and good(n)]
        path = node.meta.get("path", "")
        inside = [n for n in before if n.meta.get("path", "") == path]
        if inside or before:
            return (inside or before)[-1]
        if stored:
            return stored[0]
        tensors = [n for n in self.graph.nodes if n.op == "get_attr" and good(n)]
        tensors.sort(key=lambda n: n.meta["val"].dim() != 1)  # a norm's weight keeps its dtype whatever a pass does to matrices
        if not tensors:
            return None
        chosen = tensors[0]
        if self.order[chosen] > self.order[node]:
            node.prepend(chosen)
            self.order[chosen] = self.order[node] - 0.75
        return chosen

    def _write(self, difference, value):
        node = difference.node
        if node.op == "call_module":
            change(node, difference.name, difference.where, value)
            return
        old = named_arguments(node)[difference.name]
        set_argument(node, difference.name, _replaced(old, difference.where, value))


def change(node, name, where, value):
    """Replace one value inside the args or kwargs of a module call."""
    setattr(node, name, _replaced(getattr(node, name), where, value))


def _replaced(tree, where, value):
    if not where:
        return value
    if isinstance(tree, dict):
        return {key: _replaced(entry, where[1:], value) if key == where[0] else entry for key, entry in tree.items()}
    return type(tree)(_replaced(entry, where[1:], value) if i == where[0] else entry for i, entry in enumerate(tree))


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _least_of(ours, theirs):
    """((our dtype, their dtype), sign) where both numbers are the least (-1) or greatest (+1) of two dtypes; None otherwise."""
    if not isinstance(ours, (int, float)) or not isinstance(theirs, (int, float)) or isinstance(ours, bool):
        return None
    for sign in (-1, 1):
        found = [next((d for d in _FLOATS if number == sign * torch.finfo(d).max), None) for number in (ours, theirs)]
        if all(found):
            return tuple(found), sign
    return None


def read_devices(graph):
    """Write every device as that of a value at hand: the nearest upstream tensor, or the latest one before."""
    last, made = None, {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            arguments = named_arguments(node)
            for name, value in arguments.items():
                if isinstance(value, torch.device):
                    at_hand = _device_source(graph, node, last)
                    if at_hand is None:
                        continue
                    if (at_hand, node) not in made:
                        with graph.inserting_before(node):
                            read = graph.call_function(device_of, (at_hand,))
                        read.meta = {key: node.meta[key] for key in ("path", "call", "source") if key in node.meta} | {"val": value}
                        made[at_hand, node] = read
                    set_argument(node, name, made[at_hand, node])
        if node.op in ("call_function", "placeholder") and isinstance(node.meta.get("val"), torch.Tensor) and node.target not in HOST:
            last = node


def _device_source(graph, node, last):
    queue, seen = deque(node.all_input_nodes), set(node.all_input_nodes)
    moved = set()
    if node.target in _CASTS and last is not None:  # the value that is moved does not say where to
        moved = {node.args[0]}
    while queue:
        candidate = queue.popleft()
        if candidate.op != "get_attr" and isinstance(candidate.meta.get("val"), torch.Tensor) and candidate not in moved:
            if not moved:
                return candidate
        if not moved:
            for source in candidate.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    queue.append(source)
    if last is not None and last not in moved:
        return last
    return next((n for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)), None)
