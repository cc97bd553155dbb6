"""Parts of a graph between two values: what lies on the ways, and a part as a function that can be run again.

    h = up(x); y = down(silu(h))   -->   f(x), and copy(x): the same code on tensors of its own

Sizes follow the value that is handed in: a body that views `(batch, length, …)` serves another length too, one of a fixed number of tokens too.
"""

import torch
from torch import fx

from ..graph import count, expression

_SIZE = torch.ops.aten.sym_size.int
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default}


class Region:
    """Some nodes of the graph in order, as a function of one value (`start`) that can be run again on another.

    `reads` are the tensors that it takes from the graph; sizes and dtypes are reckoned anew, flags of modules follow `training`.
    """

    def __init__(self, nodes, start):
        self.nodes, self.start = _with_sizes(nodes, start), start
        inside = {start, *self.nodes}
        given = dict.fromkeys(n for node in self.nodes for n in node.all_input_nodes if n not in inside)
        self.reads = tuple(n for n in given if not _is_flag(n))
        self.flagged = len(self.reads) < len(given)
        own = {expression(size): dim for dim, size in reversed(list(enumerate(start.meta["val"].shape))) if not isinstance(expression(size), int)}
        self.sizes = {n: own[e] for n in self.nodes if n.target is _SIZE and n.args[0] not in inside and (e := expression(n.meta["val"])) in own}

        self.fixed = {n for n in self.nodes if n.target in _VIEWS and self._repeats_length(n)}

    def _repeats_length(self, node):
        """Does a view say a fixed number of tokens again, which stands behind the batch in what it views?"""
        length = [expression(size) for size in self.start.meta["val"].shape[1:2]]
        viewed = [expression(size) for size in node.args[0].meta["val"].shape[1:2]]
        return self.start.meta["val"].dim() == 3 and isinstance(length[0], int) and viewed == length == list(node.args[1][1:2])

    @property
    def static(self):
        """What a traced body holds of it as constants, hashable."""
        at = {n: f"%{i}" for i, n in enumerate((self.start, *self.reads, *self.nodes))}
        return tuple((n.target, self.sizes.get(n), repr(fx.node.map_arg((n.args, n.kwargs), lambda a: at.get(a, "training")))) for n in self.nodes)

    def run(self, value, known, training=False):
        """The last node's value at `value`; `known` gives each node of `reads`."""
        env = {**known, self.start: value}
        for node in self.nodes:
            if node in self.sizes:
                env[node] = value.shape[self.sizes[node]]
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: training if _is_flag(n) else env[n])
            if node in self.fixed:
                args = (args[0], [args[1][0], value.shape[1], *args[1][2:]])
            env[node] = node.target(*args, **kwargs)
        return env[self.nodes[-1]]

    def reason(self, caches=()):
        """Why it cannot be run a second time, or None. `caches`: the inputs of the graph that hold keys and values of earlier calls."""
        for node in self.nodes:
            if node.op == "call_module":
                return f"its body calls {node.target}, which could not be captured"
            if node.target is count or (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
                return f"its body writes into a tensor ({node.name}), and a second run would write once more"
        if set(self.reads) & set(caches):
            return "its body attends to a cache that holds the keys and values of one run of it; a second run would need a cache of its own"
        return None


class Copied:
    """A region on tensors of its own: `own` maps the nodes of its base tensors to those of the copies."""

    def __init__(self, region, own):
        self.region, self.own, self.flagged = region, own, region.flagged
        self.reads = tuple(own.get(n, n) for n in region.reads)

    @property
    def static(self):
        return self.region.static

    def run(self, value, known, training=False):
        return self.region.run(value, {n: known[self.own.get(n, n)] for n in self.region.reads}, training)


def body_of(start, end, weights=False):
    """The Region from a value to one that is computed from it; None where there is none.

    `weights`: what is computed from the model's tensors alone (a weight that an earlier pass has replaced) is part of it, not read.
    """
    if start is None or end is None or start is end:
        return None
    ahead = {start}
    for node in sorted(between([start], end)):
        if any(source in ahead for source in node.all_input_nodes):
            ahead.add(node)
    if end not in ahead:
        return None
    todo = [source for node in ahead - {start} for source in node.all_input_nodes] if weights else []
    while todo:
        node = todo.pop()
        if node not in ahead and node.op == "call_function" and not _depends_on_inputs(node):
            ahead.add(node)
            todo += node.all_input_nodes
    return Region(sorted(ahead - {start}), start)


def _depends_on_inputs(node):
    """Is a value computed from the model's inputs, or their sizes, rather than from its tensors alone?"""
    todo, seen = [node], set()
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        todo += fresh
    return False


def between(starts, end):
    """The nodes on the ways from `starts` to `end`, and what else `end` needs that comes after the first of them."""
    found, todo, first = set(), [end], min(starts, default=end)
    while todo:
        node = todo.pop()
        if node in starts or node in found or node < first:
            continue
        found.add(node)
        todo += node.all_input_nodes
    return found


def _with_sizes(nodes, start):
    """The nodes, and those before them that give no tensor (sizes, dtypes): these are reckoned where they are needed."""
    found, todo = set(nodes), list(nodes)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found and source is not start and source.op == "call_function" and not isinstance(source.meta.get("val"), torch.Tensor):
                found.add(source)
                todo.append(source)
    return tuple(sorted(found))


def _is_flag(node):
    return node.op == "get_attr" and node.target.rpartition(".")[2] == "training"
