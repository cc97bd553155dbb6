"""What an alignment found, written into the graph: flags, dtypes, numbers and devices become reads of what is at hand."""

import operator
from collections import deque

import torch
from torch import fx

from ..graph import HOST, count, device_of, drops, dtype_of, least, select, shape, unless
from .align import Cast, Misaligned
from .tidy import named_arguments, set_argument

aten = torch.ops.aten
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Merge:
    """Writes an alignment's differences into our graph, as reads of what is at hand."""

    def __init__(self, alignment, training, other_dtype, notes, called):
        self.called = called
        self.other_dtype = other_dtype
        self.graph, self.alignment, self.training, self.notes = alignment.ours, alignment, training, notes
        self.partner = {ours: theirs for theirs, ours in alignment.pairs.items() if not isinstance(ours, Cast)}
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.made = {}

    def apply(self):
        for cast in self.alignment.pairs.values():  # in the order of their run, which is that of the draws
            if isinstance(cast, Cast) and cast.theirs.target is aten.dropout.default:
                self._cast(cast)
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

        for first, draw in self.alignment.drops:
            self._drop(first, draw)

    def _drop(self, first, draw):
        """The module that begins at a node of ours is left out where their draw says so; what it was given is its value then."""
        owner, path = draw.meta.get("path", ""), first.meta.get("path", "")
        parts = path.split(".")
        around = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
        block = next((p for p in around if p in self.called and len(p) > len(owner)), None) if path.startswith(owner) else None
        if block is None:
            raise Misaligned(owner, f"a draw decides here what {path or 'the model'} does")
        inside = {n: None for n in self.graph.nodes if n.op != "get_attr" and f"{n.meta.get('path', '')}.".startswith(f"{block}.")}
        given = [n for n in dict.fromkeys(s for node in inside for s in node.all_input_nodes) if n not in inside and n.op != "get_attr"]
        made = [n for n in inside if isinstance(n.meta.get("val"), torch.Tensor) and any(user not in inside for user in n.users)]
        like = [n for n in given if made and isinstance(n.meta.get("val"), torch.Tensor) and shape(n) == shape(made[0]) and n.meta["val"].dtype == made[0].meta["val"].dtype]
        if len(made) != 1 or len(like) != 1:
            raise Misaligned(owner, f"a draw decides whether {block} runs, which gives {len(made)} values and takes {len(like)} like its own")
        flag = self._flag(first, owner)
        dropped = self._before(first, "call_function", drops, (flag, draw.args[1]))
        dropped.meta |= {key: draw.meta[key] for key in ("path", "source") if key in draw.meta} | {"val": False}
        last = next(n for n in reversed(self.graph.nodes) if n in inside)
        with self.graph.inserting_after(last):
            value = self.graph.call_function(unless, (made[0], dropped, like[0]))
        value.meta = dict(dropped.meta) | {"val": made[0].meta["val"]}
        made[0].replace_all_uses_with(value, delete_user_cb=lambda user: user is not value and user not in inside)

    def _before(self, node, op, target, args=()):
        with self.graph.inserting_before(node):
            made = self.graph.create_node(op, target, args)
        made.meta = {key: node.meta[key] for key in ("path", "call", "source") if key in node.meta}
        self.order[made] = self.order[node] - 0.5 + 1e-6 * len(self.made)
        return made

    def _cast(self, cast):
        """Our node for a cast, or a dropout, that the other run alone made."""
        if isinstance(cast, fx.Node):
            return cast
        if cast not in self.made and cast.theirs.target is aten.dropout.default:
            source, path = self._cast(cast.source), cast.theirs.meta.get("path", "")
            made = self._before(cast.before, "call_function", aten.dropout.default, (source, cast.theirs.args[1], self._flag(cast.before, path)))
            made.meta = {key: cast.theirs.meta[key] for key in ("path", "call", "source") if key in cast.theirs.meta} | {"val": source.meta["val"]}
            self.made[cast], self.partner[made] = made, cast.theirs
        if cast not in self.made:
            source = self._cast(cast.source)
            ours, theirs = source.meta["val"].dtype, cast.theirs.meta["val"].dtype
            made = self._before(cast.before, "call_function", aten.to.dtype, (source, ours))
            placed = {key: cast.theirs.meta[key] for key in ("path", "call", "source") if key in cast.theirs.meta}
            made.meta = {**placed, "read": {ours: cast.theirs.meta.get("read", {}).get(theirs)}, "val": source.meta["val"]}
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
        words = f"argument {difference.name} of {node.format_node()} is {ours} in one run and {theirs} in the other"
        raise Misaligned(node.meta.get("path", ""), words)

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
        """The nearest value before `node` that fits: upstream, else the latest in its module, else the latest, last a tensor of the tree."""

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
        values = [n for n in self.graph.nodes if n.op in ("call_function", "call_module", "placeholder")]
        before = [n for n in values if self.order[n] < self.order[node] and good(n)]
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
    """Write every device as that of a value at hand: the nearest upstream tensor, or the latest one made before."""
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
        is_made = node.op == "call_function" and node.target not in HOST
        if isinstance(node.meta.get("val"), torch.Tensor) and (is_made or (node.op == "placeholder" and last is None)):  # not the labels, which may be left out
            last = node


def _device_source(graph, node, last):
    queue, seen = deque(node.all_input_nodes), set(node.all_input_nodes)
    moved = set()
    if node.target in _CASTS and last is not None:  # the value that is moved does not say where to
        moved = {node.args[0]}
        if (asked := next((source for source in queue if source.target is dtype_of), None)) is not None:
            return asked.args[0]  # who says in which dtype says where
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
