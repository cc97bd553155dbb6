"""Every affine op on a weight, whatever its form: which argument is x, which the weight, how the weight is stored.

`linear`, `addmm`, `mm`, `matmul`, `bmm`, `baddbmm`, `einsum`, grouped products over experts, convolutions, embeddings.
"""

from dataclasses import dataclass

import torch
from torch import fx, nn

from ..graph import attribute, expression
from .dataflow import is_float, tensors, value
from .site import Rows

# op → (x, w, b) positions in args; None where the op has none
_FIXED = {"linear": (0, 1, 2), "embedding": (1, 0, None), "embedding_bag": (1, 0, None)}
_FIXED |= {name: (0, 1, 2) for name in ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")}
_PRODUCT = {"mm": (0, 1, None), "matmul": (0, 1, None), "bmm": (0, 1, None), "addmm": (1, 2, 0), "baddbmm": (1, 2, 0), "addbmm": (1, 2, 0)}


@dataclass(frozen=True, eq=False)
class Affine:
    """An affine op: `kind` and `transposed` as in Layout, `w` the parameter's get_attr (or the expression that makes the weight)."""

    node: fx.Node
    x: fx.Node
    w: fx.Node
    b: fx.Node | None
    kind: str
    transposed: bool
    axis: int
    arguments: dict[str, int]
    stored: Rows | None = None


def find_affine(flow):
    """Fill `flow.affine` and `flow.embeddings`, each a dict of operation → Affine."""
    for node in flow.nodes:
        if "made" in node.meta:
            continue  # what passes added is no site
        found = _affine(flow, node)
        if found is None:
            continue
        if found.kind == "embedding":
            flow.embeddings[node] = found
        else:
            flow.affine[node] = found
    flow.add_learned()


def _affine(flow, node):
    name = flow.name[node]
    if name in _FIXED:
        x, w, b = _FIXED[name]
        stored = _stored(flow, node.args[w], made=not name.startswith("embedding"))
        if stored is None:
            return None
        root, flipped = stored
        kind = "linear" if name == "linear" else "embedding" if name.startswith("embedding") else "conv"
        if kind == "embedding":
            return Affine(node, node.args[x], root, None, kind, False, -1, {"ids": x, "w": w})
        transposed = flipped if kind == "linear" else "transpose" in name or (name == "convolution" and bool(node.args[6]))
        axis = -1 if kind == "linear" else 1 - value(node).dim()  # channels stand before the window
        return _made(flow, node, x, w, b, root, kind, transposed, axis)
    if name == "index" and len(node.args[1]) == 1 and isinstance(node.args[1][0], fx.Node):
        stored = _stored(flow, node.args[0])  # a table read by position: table[ids]
        ids = node.args[1][0]
        if stored is None or is_float(ids) or value(ids).dtype == torch.bool or value(stored[0]).dim() != 2:
            return None
        if any(end in flow.affine for end in flow.cone(ids)[1]):
            return None  # picked by a router: one bias per expert
        return Affine(node, ids, stored[0], None, "embedding", False, -1, {"w": 0})
    if name in _PRODUCT:
        x, w, b = _PRODUCT[name]
        return _product(flow, node, x, w, b)
    if "grouped_mm" in name:
        stored = _stored(flow, node.args[1])
        return stored and _made(flow, node, 0, 1, None, stored[0], "experts", not stored[1], -1)
    if name == "einsum":
        return _einsum(flow, node)
    return None


def _product(flow, node, x, w, b):
    right, left = _stored(flow, node.args[w]), _stored(flow, node.args[x])
    if (right is None) == (left is None):
        return None
    if right is not None:
        if value(node.args[w]).dim() < 2:
            return None
        root, flipped = right
        kind = "experts" if value(root).dim() > 2 else "linear"
        return _made(flow, node, x, w, b, root, kind, not flipped, -1)
    if value(node.args[x]).dim() < 2:
        return None
    root, flipped = left  # w @ x: features stand before the last axis
    return _made(flow, node, w, x, None, root, "experts" if value(root).dim() > 2 else "linear", flipped, -2)


def _einsum(flow, node):
    equation, operands = node.args[0], node.args[1]
    if len(operands) != 2 or "->" not in equation:
        return None
    stored = [_stored(flow, operand) for operand in operands]
    if (stored[0] is None) == (stored[1] is None):
        return None
    w = 0 if stored[0] is not None else 1
    (terms, out) = equation.replace(" ", "").split("->")
    letters, other = terms.split(",")[w], terms.split(",")[1 - w]
    inner = [c for c in letters if c in other and c not in out]
    outer = [c for c in letters if c in out and c not in other]
    if not inner or not outer:
        return None
    kind = "linear" if len(letters) == 2 and out.endswith(outer[0]) and other.endswith(inner[0]) else "einsum"
    return Affine(node, operands[1 - w], stored[w][0], None, kind, letters.index(inner[0]) < letters.index(outer[0]), -1, {})


def _made(flow, node, x, w, b, root, kind, transposed, axis):
    bias = node.args[b] if b is not None and len(node.args) > b and isinstance(node.args[b], fx.Node) else None
    arguments = {"x": x, "w": w} | ({"b": b} if b is not None else {})
    return Affine(node, node.args[x], root, bias, kind, transposed, axis, arguments, _stored_rows(flow, node.args[w], root))


def _stored_rows(flow, node, root):
    """The rows of a stored weight that remain at `node` after slices and splits (`nn.MultiheadAttention` on three inputs); None for all."""
    chain = []
    while node is not root and len(tensors(node)) == 1:
        chain.append(node)
        node = tensors(node)[0]
    if node is not root or not any(flow.narrows(n) for n in chain):
        return None
    total, *rest = value(root).shape
    numbers = {root: torch.arange(total).view([-1] + [1] * len(rest)).expand(total, *rest)}
    for n in reversed(chain):
        numbers[n] = _send(flow, n, numbers)
    return Rows.of(torch.unique(numbers[chain[0]]), total) if isinstance(numbers[chain[0]], torch.Tensor) else None


def _stored(flow, node, made=False):
    """`(get_attr of the parameter, whether its last two axes are swapped on the way)`; None where the value is no weight.

    With `made`, a weight that is made from several parameters (weight norm) gives the expression itself; so does one that is made of codes.
    """
    if not isinstance(node, fx.Node) or node in flow.content or not is_float(node):
        return None
    top, swaps = node, False
    while node.op != "get_attr":
        if "stands_for" in node.meta:
            return node, swaps
        name = flow.name[node]
        if name in ("t", "mT", "numpy_T") or (name == "transpose" and _are_last(node)) or (name == "permute" and _swaps_last(node)):
            swaps = not swaps
        parents = tensors(node)
        if len(parents) != 1 or not (flow.is_view(node) or name in ("mul", "add", "div", "neg")):
            return (top, False) if made and _is_made(flow, top) else None
        node = parents[0]
    tensor = _tensor(flow, node)
    if not isinstance(tensor, nn.Parameter) or tensor.dim() < 2:
        return None
    return node, swaps


def _are_last(node):
    rank = value(node).dim()
    return {d % rank for d in node.args[1:3]} == {rank - 2, rank - 1}


def _swaps_last(node):
    dims = [d % len(node.args[1]) for d in node.args[1]]
    rank = len(dims)
    return dims[:-2] == list(range(rank - 2)) and dims[-2:] == [rank - 1, rank - 2]


def _tensor(flow, node):
    try:
        return attribute(flow.graph.root, node.target)
    except AttributeError:
        return None


def _is_made(flow, node, limit=32):
    """Whether a value without content is made from parameters of two or more axes by a few ops (weight norm and the like)."""
    queue, seen, found = [node], {node}, False
    for current in queue:
        if current in flow.affine or current in flow.embeddings:
            return False
        if current.op == "get_attr":
            tensor = _tensor(flow, current)
            found = found or (isinstance(tensor, nn.Parameter) and tensor.dim() >= 2)
        for parent in tensors(current):
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)
        if len(queue) > limit:
            return False
    return found


def rows_in(flow, operation, inside):
    """The OUT rows of an affine op that reach a value: Rows, None for all of them, empty Rows where it cannot be told.

    `inside`: the nodes between (`Flow.cone`). Row numbers are sent through the very ops of the graph that only move numbers, or change
    each by itself; where several are mixed (rotary, a norm) all rows that come so far count.
    """
    members = set(inside)
    axis = flow.affine[operation].axis
    total = expression(value(operation).shape[axis])
    if not isinstance(total, int):
        return None
    way, narrowed = [operation], False  # the nodes through which rows can be followed one by one
    followed = {operation}
    for node in way:
        for user in node.users:
            if user not in members or user in followed or node not in flow.reads[user]:
                continue
            if flow.is_view(user) or _keeps_rows(flow, user, node, followed):
                followed.add(user)
                way.append(user)
                narrowed = narrowed or flow.narrows(user)
    if not narrowed:
        return None
    form = _form(flow, way, members, inside[0])
    if form is None:
        return _followed(flow, operation, way, followed, members, inside[0], total, axis)
    if form not in flow.rows:
        flow.rows[form] = _followed(flow, operation, way, followed, members, inside[0], total, axis)
    return flow.rows[form]


def _form(flow, way, members, end):
    """What the rows depend on that come by a way, equal for the copies of a block; None where it goes by values."""
    number = {node: i for i, node in enumerate(sorted(way, key=flow.place.__getitem__))}

    def sizes(node):
        return None if value(node) is None else tuple(map(expression, value(node).shape))

    def described(arg):
        if isinstance(arg, fx.Node):
            if arg in number:
                return "way", number[arg]
            if value(arg) is not None:
                if arg not in flow.content:
                    raise LookupError("a tensor whose values may count")
                return "beside", sizes(arg)
            return "size", expression(arg.meta.get("val"))
        if isinstance(arg, (list, tuple)):
            return tuple(map(described, arg))
        return type(arg), arg

    try:
        facts = []
        for node in number:
            own = (flow.affine[node].axis,) if node in flow.affine else (node.target, described(node.args), tuple((key, described(arg)) for key, arg in node.kwargs.items()))
            users = tuple(number.get(user, -1) for user in node.users if user in members and node in flow.reads[user])
            facts.append((own, sizes(node), users, node is end))
        hash(form := tuple(facts))
    except (LookupError, TypeError):
        return None
    return form


def _followed(flow, operation, way, followed, members, end, total, axis):
    shape = [_number(size) for size in value(operation).shape]
    numbers, rows = {operation: torch.arange(total).view([-1] + [1] * (-axis - 1)).expand(shape)}, []
    for node in sorted(way, key=flow.place.__getitem__):
        if node is not operation:
            numbers[node] = _send(flow, node, numbers)
        users = [user for user in node.users if user in members and node in flow.reads[user]]
        last = node is end or any(user not in followed for user in users)
        if numbers[node] is None and (last or users):
            return Rows(0, 0, total, total)
        if last and isinstance(numbers[node], torch.Tensor):
            rows.append(numbers[node].reshape(-1))
    if not rows:
        return None
    found = torch.bincount(torch.cat(rows).clamp(min=-1) + 1, minlength=total + 1)[1:]  # counted, not sorted: there is one for each element
    return Rows.of(found.nonzero().flatten(), total)


def union(claims, total):
    """The rows of several claims on one op together; None for all of them."""
    if any(rows is None for rows in claims):
        return None
    return Rows.of(torch.unique(torch.cat([rows.index() for rows in claims])), total)


def _keeps_rows(flow, user, node, followed):
    """An elementwise op on one followed value (a bias, a scale, an activation) leaves each row where it is."""
    if not flow.is_elementwise(user) or not flow.same_shape(user, node):
        return False
    return all(parent is node or parent not in followed for parent in tensors(user))


def _send(flow, node, numbers):
    """The row numbers after one op, or None where they cannot be had at these sizes."""
    name = flow.name[node]
    if name in ("to", "_to_copy", "type_as", "contiguous", "dropout", "native_dropout", "detach", "alias", "clone") or flow.is_elementwise(node):
        return next(numbers[n] for n in tensors(node) if n in numbers)

    def argument(a):
        if a in numbers:
            return numbers[a]
        if (constant := flow.constant(a)) is not None:
            return constant
        return _number(a.meta.get("val"))

    try:
        if name in ("view", "_unsafe_view"):  # the numbers may lie in memory otherwise than the values
            return torch.reshape(numbers[node.args[0]], fx.node.map_arg(node.args[1], argument))
        return node.target(*fx.node.map_arg(node.args, argument), **fx.node.map_arg(node.kwargs, argument))
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None


def _number(val):
    """A size as a number: each symbol counts as 2; a tensor beside the row numbers is −1 everywhere."""
    if isinstance(val, torch.Tensor):
        return torch.full([_number(size) for size in val.shape], -1)
    size = expression(val) if val is not None else None
    if hasattr(size, "free_symbols"):
        return int(size.subs({symbol: 2 for symbol in size.free_symbols}))
    return size
