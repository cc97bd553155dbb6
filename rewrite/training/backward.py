"""What backward does not do, and what it keeps: parts of a graph that run without gradients, and the bytes that wait for backward.

    no_grad("y")   every node that y is computed from   -->   with torch.no_grad(): …   in the printed source

A tensor that trains inside such a part, or behind a `detach` of a pass alone, would get no gradient without a word: it is refused.
"""

import contextlib

import torch

from ..graph import parameters_of, reached

REGION = "region"  # node.meta: the kind of region that the node lies in
NO_GRAD = "no_grad"
REVERSIBLE = "reversible"  # node.meta: a value that goes from block to block, in a pass that asks for reversible blocks


def without_grad(node):
    """Mark a node, and all that it is computed from, as run without gradients."""
    todo = [node]
    while todo:
        node = todo.pop()
        if node.op in ("call_function", "call_module") and node.meta.get(REGION) != NO_GRAD:
            node.meta[REGION] = NO_GRAD
            todo += node.all_input_nodes


def lost_gradient(graph, trains):
    """The path of a tensor that trains (`trains(path)`) and is read in a part without gradients, with the node there; None where all is well."""
    source = {}  # node -> the trained tensor that it depends on in a way that backward could follow
    for node in graph.nodes:
        if node.op == "get_attr":
            if trains(node.target):
                source[node] = node.target
            continue
        if node.op == "call_module":
            inner = next((path for path in parameters_of(graph.root, node.target) if trains(path)), None)
            if inner is not None:
                source[node] = inner
        before = next((source[n] for n in node.all_input_nodes if n in source), source.get(node))
        if before is None or node.op == "output" or not _is_differentiable(node):
            continue
        if node.meta.get(REGION) == NO_GRAD:
            return before, node
        source[node] = before
    return None


def cut_off(graph, trains):
    """The path of a tensor that trains (`trains(path)`) and gets no gradient because of what a pass has made, with the node that lets none through; None where all is well."""
    found, before = _with_gradient(graph, _is_differentiable), None
    for node in graph.nodes:
        if node.op != "get_attr" or node in found or not node.users or not trains(node.target):
            continue
        before = before or _with_gradient(graph, lambda user: _is_differentiable(user) or "made" in user.meta)
        if node in before:  # else the model itself asks nothing of it
            return node.target, _barrier(node, before)
    return None


def _with_gradient(graph, passes):
    """The nodes to which backward comes, where it goes through those that `passes(node)`."""
    found = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(user in found and (user.op == "output" or passes(user)) for user in node.users):
            found.add(node)
    return found


def _barrier(node, within):
    """The first node of a pass behind a node, among those of `within`, that lets no gradient through."""
    return min(user for at in reached(node, lambda n: n.users) for user in at.users if user in within and "made" in user.meta and not _is_differentiable(user))


def _is_differentiable(node):
    """Does a gradient pass through the node's value? Not through `detach`, nor through what is no floating number."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return node.target is not torch.ops.aten.detach.default and any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


class Kept:
    """Bytes that wait for backward: `bytes` of all tensors that autograd has saved, each storage once, parameters and buffers left out."""

    def __init__(self):
        self.tensors = {}

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage, _ in self.tensors.values())

    @property
    def shapes(self):
        """The shapes of the tensors, largest first."""
        return sorted((shape for _, shape in self.tensors.values()), key=lambda shape: -torch.Size(shape).numel())


@contextlib.contextmanager
def kept(model):
    """Count what a forward pass of `model` keeps for backward: `with kept(live) as saved: live(**batch)`, then `saved.bytes`.

    Tensors of the model itself (parameters, buffers) do not count: they are there anyway.
    """
    saved = Kept()
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved.tensors.setdefault(storage._cdata, (storage, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
