"""Norms: the ops of that name, and those written out by `pow mean rsqrt mul` (RMSNorm) or `mean sub … sqrt div mul add` (LayerNorm)."""

from dataclasses import dataclass

from torch import fx, nn

from ..graph import attribute
from .dataflow import is_float, tensors, value

# op → (weight, bias) positions
_NORMS = {
    "layer_norm": (2, 3), "native_layer_norm": (2, 3), "group_norm": (2, 3), "native_group_norm": (1, 2), "instance_norm": (1, 2),
    "batch_norm": (1, 2), "native_batch_norm": (1, 2), "_native_batch_norm_legit": (1, 2), "_native_batch_norm_legit_no_training": (1, 2),
    "cudnn_batch_norm": (1, 2), "rms_norm": (2, None), "_fused_rms_norm": (2, None),
}  # fmt: skip
_SQUARES = frozenset({"pow", "square", "mul"})
_BETWEEN = frozenset({"to", "type_as", "_to_copy", "view", "_unsafe_view", "reshape", "flatten", "unflatten"})


@dataclass(frozen=True, eq=False)
class Norm:
    x: fx.Node
    w: fx.Node | None
    b: fx.Node | None
    y: fx.Node


def find_norms(flow):
    """All norms, by the node of their output."""
    norms = {}
    for node in flow.nodes:
        if node not in flow.content:
            continue
        if flow.name[node] in _NORMS:
            w, b = (_argument(node, i) for i in _NORMS[flow.name[node]])
            y = node if value(node) is not None else next((u for u in node.users if u.args[1:] == (0,)), node)
            norms[y] = Norm(node.args[0], _parameter(flow, w), _parameter(flow, b), y)
        elif flow.name[node] in ("rsqrt", "sqrt", "pow"):
            found = _written_out(flow, node)
            if found is not None:
                norms[found.y] = found
    return norms


def _argument(node, i):
    return node.args[i] if i is not None and i < len(node.args) else None


def _parameter(flow, node):
    """The parameter behind casts, reshapes and `1 + w`; None where there is none."""
    while isinstance(node, fx.Node) and node.op != "get_attr":
        parents = tensors(node)
        if len(parents) != 1 or node in flow.content:
            return None
        node = parents[0]
    if not isinstance(node, fx.Node):
        return None
    try:
        tensor = attribute(flow.graph.root, node.target)
    except AttributeError:
        return None
    return node if isinstance(tensor, nn.Parameter) else None


def _written_out(flow, root):
    """The norm around a `rsqrt` / `sqrt` / `pow(·, -0.5)` of a mean of squares, or None."""
    if flow.name[root] == "pow" and root.args[1] not in (-0.5, 0.5):
        return None
    mean = _back(flow, root.args[0], ("add", "to", "clamp", "clamp_min", "maximum"))
    if mean is None or flow.name[mean] not in ("mean", "var", "var_mean"):
        return None
    squared = mean.args[0]
    if flow.name[mean] == "mean":
        if flow.name[squared] not in _SQUARES or (flow.name[squared] == "pow" and squared.args[1] != 2) or len(set(tensors(squared))) != 1:
            return None
        squared = squared.args[0]
    x = squared
    if flow.name[squared] == "sub" and (inner := _back(flow, squared.args[1], ("to",))) is not None and flow.name[inner] == "mean":
        x = squared.args[0]
    origins = {flow.strip(x), flow.strip(squared)}
    y = _scaled(flow, root, origins)
    if y is None:
        return None
    y, w = _with_parameter(flow, y, ("mul", "mul_"))
    y, b = _with_parameter(flow, y, ("add", "add_")) if w is not None else (y, None)
    y = _cast_back(flow, y)
    return Norm(flow.strip(x, scales=False), w, b, y)


def _back(flow, node, through):
    for _ in range(4):
        if not isinstance(node, fx.Node) or flow.name[node] not in through:
            break
        node = next((a for a in node.args if isinstance(a, fx.Node) and a in flow.content), None)
    return node if isinstance(node, fx.Node) else None


def _scaled(flow, root, origins):
    """The product x * rsqrt(…) or x / sqrt(…) that reads `root`."""
    for user in root.users:
        name = flow.name[user]
        if name in ("reciprocal", "to"):
            found = _scaled(flow, user, origins)
            if found is not None:
                return found
        elif name in ("mul", "div", "mul_", "div_"):
            others = [a for a in tensors(user) if a is not root]
            if any(flow.strip(a) in origins or _centred(flow, a, origins) for a in others):
                return user
    return None


def _centred(flow, node, origins):
    return flow.name[node] == "sub" and flow.strip(node.args[0]) in origins


def _with_parameter(flow, y, ops):
    """`(result, parameter)` of the op that joins y with a parameter, casts allowed between, and reshapes after a norm of each head; `(y, None)` without one."""
    node = y
    for _ in range(4):
        if len(node.users) != 1:
            break
        user = next(iter(node.users))
        if flow.name[user] in ops:
            others = [a for a in user.args if isinstance(a, fx.Node) and a is not node]
            found = _parameter(flow, others[0]) if others else None
            return (user, found) if found is not None else (y, None)
        if flow.name[user] not in _BETWEEN or not is_float(user):
            break
        node = user
    return y, None


def _cast_back(flow, y):
    """The cast to the stream's dtype right after a norm belongs to it."""
    if len(y.users) == 1 and flow.name[next(iter(y.users))] in ("to", "type_as", "_to_copy"):
        return next(iter(y.users))
    return y
