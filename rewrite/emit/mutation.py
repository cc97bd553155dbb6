"""Ops that work in place, written as values: `x.add_(y)` is `x.add(y)`, and a new name for x and for every view of it.

A view that was changed (`x[:, 0].copy_(y)`) is scattered back into what it is a view of, as far up as there are views.
"""

import operator

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from . import shapes

HARMLESS = {"detach_": "detach", "requires_grad_": "alias", "set_data": "alias"}
DROPOUT = {"dropout", "feature_dropout", "alpha_dropout"}
MAYBE = {"reshape", "contiguous", "flatten", "unflatten", "reshape_as", "to", "type_as", "ravel", "conj", "resolve_conj"} | DROPOUT
SAME = {"alias", "contiguous", "to", "type_as", "detach", "lift"} | DROPOUT
RESHAPED = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as", "ravel"}


class Unwritable(Exception):
    """A change in place that has no functional form here."""


def short_name(target):
    return target.name().split("::")[1].split(".")[0] if isinstance(target, torch._ops.OpOverload) else ""


def is_mutating(node):
    """Whether a node changes one of its arguments."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and short_name(target) not in HARMLESS


def functional(target):
    """The overload without the change: `add_.Tensor` -> `add.Tensor`."""
    name = short_name(target)
    packet = getattr(getattr(torch.ops, target.namespace), HARMLESS.get(name, name.rstrip("_")), None)
    twin = getattr(packet, target._overloadname, None)
    if twin is None or twin._schema.is_mutable:
        raise Unwritable(f"{target.name()} works in place and has no functional twin")
    return twin


def source(node):
    """The node whose memory a node's value shares, or None."""
    if node.op != "call_function" or not node.args:
        return None
    base = node.args[0]
    if node.target is operator.getitem:
        return base if isinstance(base, fx.Node) and base.op == "call_function" and source(base) is not None else None
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(base, fx.Node):
        return None
    name = short_name(node.target)
    if name in MAYBE:
        return base if _share(base.meta.get("val"), node.meta.get("val")) else None
    if node.target._schema.is_mutable or any(result.alias_info for result in node.target._schema.returns):
        return base
    return None


def _share(a, b):
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.dtype != b.dtype:
        return False
    return StorageWeakRef(a.untyped_storage()) == StorageWeakRef(b.untyped_storage())


def enter(writer, node, out):
    """Record the value of a node; where it changed a tensor in place, also what every other name of that memory means from here on."""
    writer.values[node] = out
    if not is_mutating(node):
        return
    view, top = node, source(node)
    while True:
        writer.values[top] = out
        view, above = top, source(top)
        if above is None:
            break
        out = _scatter(writer, view, above, out)
        top = above
    if top.op == "get_attr":
        raise Unwritable(f"it changes the model's own {top.target!r}")
    _renew(writer, top, done={node})


def _renew(writer, changed, done):
    """Write the views of a changed value again, so that later readers see the change."""
    for user in list(changed.users):
        if user in done or user not in writer.values or source(user) is not changed or not user.users:
            continue
        done.add(user)
        writer.values[user] = writer.values[changed] if is_mutating(user) else writer.node(user, user.target)
        _renew(writer, user, done)


def _scatter(writer, view, above, value):
    """The value of `above` once its view `view` has become `value`."""
    name, like = short_name(view.target), above.meta["val"]
    if is_mutating(view) or name in SAME or name in HARMLESS:
        return value
    if name in RESHAPED:
        return shapes.reshape(writer, value, view.meta["val"], like)
    if name in ("transpose", "t", "numpy_T", "permute", "swapaxes", "mT"):
        order = permutation(view)
        return writer.op("Transpose", value, perm=[order.index(i) for i in range(len(order))], dtype=value.dtype)
    whole = writer.argument(above)
    if view.target is operator.getitem:
        return [value if i == view.args[1] else part for i, part in enumerate(whole)]
    if name in ("split", "split_with_sizes", "chunk", "unsafe_chunk", "tensor_split"):
        axis = (view.args[2] if len(view.args) > 2 else view.kwargs.get("dim", 0)) % like.ndim
        return writer.op("Concat", *value, axis=axis, dtype=value[0].dtype)
    if name == "unbind":
        axis = (view.args[1] if len(view.args) > 1 else 0) % like.ndim
        return writer.op("Concat", *(writer.op("Unsqueeze", part, [axis], dtype=part.dtype) for part in value), axis=axis, dtype=value[0].dtype)
    if name == "select":
        axis, index = view.args[1] % like.ndim, writer.argument(view.args[2])
        span = index, index + 1 if index != -1 else None, 1
        value = writer.op("Unsqueeze", value, [axis], dtype=value.dtype)
    elif name == "slice":
        axis, span = (view.args[1] if len(view.args) > 1 else 0) % like.ndim, _span(writer, view)
    else:
        raise Unwritable(f"a change in place through a view by {name}")
    return shapes.scatter_slice(writer, whole, value, like, axis, *span)


def _span(writer, view):
    args = [writer.argument(item) for item in view.args[2:]]
    start, stop, step = (args + [None] * 3)[:3]
    return 0 if start is None else start, stop, 1 if step is None else step


def permutation(node):
    """The order of dimensions that a transposing node gives, for each of its own dimensions the one that it reads."""
    rank, name, args = node.meta["val"].ndim, short_name(node.target), node.args[1:]
    if name == "permute":
        return [axis % rank for axis in args[0]]
    order = list(range(rank))
    if name in ("numpy_T",):
        return order[::-1]
    if rank >= 2:
        first, second = (args[0] % rank, args[1] % rank) if len(args) == 2 else (rank - 2, rank - 1)
        order[first], order[second] = order[second], order[first]
    return order
