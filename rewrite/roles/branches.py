"""Residual streams and what hangs on them: MLPs, experts with their router, mixers.

    residual  y = stream + branch, where the stream's value reaches the branch through at least one affine op
    mlp       a branch of position-wise ops: up [gate], an activation, down
    experts   the same on weights with an expert axis, or on tokens picked by a router; shared ones take every token
    mixer     a branch that mixes positions without attention: state space, convolution, linear attention
"""

from dataclasses import dataclass, field

from torch import fx

from .affine import rows_in
from .dataflow import is_float, value

_ADDS = frozenset({"add", "add_", "sub", "index_add"})
_PICKS = frozenset({"topk", "argmax", "max", "argsort", "sort"})
_INDEXING = frozenset("index index_select gather index_add index_add_ scatter scatter_ scatter_add scatter_add_ one_hot where eq".split())


@dataclass(eq=False)
class Residual:
    stream: fx.Node
    branch: fx.Node
    y: fx.Node
    origin: fx.Node  # the value that the branch starts from


@dataclass(eq=False)
class Mlp:
    """`parts`: "up" "gate" "down" → list of (affine op, rows); `x`: what enters, `y`: what leaves towards the residual.

    `weights`: ops beside a router that scale an expert which takes every token.
    """

    x: fx.Node
    y: fx.Node
    parts: dict = field(default_factory=dict)
    weights: list = field(default_factory=list)


@dataclass(eq=False)
class Mixer:
    """`parts`: "in" "conv" "inner" "out" → list of (affine op, rows)."""

    x: fx.Node
    y: fx.Node
    parts: dict = field(default_factory=dict)


def find_residuals(flow):
    """The residual adds, in order; `flow.stream` is filled with the values on the streams."""
    residuals = {}
    for node in flow.nodes:
        if flow.name[node] not in _ADDS or len(node.args) < 2 or node not in flow.content or not is_float(node):
            continue
        a, b = node.args[:2]
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node) and a in flow.content and b in flow.content and a is not b):
            continue
        if value(node).dim() < 2 or not flow.same_shape(a, b, node):
            continue
        found = next((found for s, t in ((a, b), (b, a)) if (found := _residual(flow, residuals, node, s, t)) is not None), None)
        if found is not None:
            residuals[node] = found
            flow.stream |= {node, flow.strip(found.stream)}
    return list(residuals.values())


def _residual(flow, residuals, node, stream, branch):
    origin = _before_shortcut(flow, flow.strip(stream))
    for _ in range(3):
        if flow.place[origin] < flow.place[flow.strip(branch)] and flow.reaches(origin, branch)[1]:
            return Residual(stream, branch, node, origin)
        if origin not in residuals:  # a second branch from the same stream: x + f(x) + g(x)
            return None
        origin = residuals[origin].origin
    return None


def _before_shortcut(flow, node):
    """The value behind a convolution (and its norm) on the way around a branch: the stream changes its width there."""
    norm = node
    for _ in range(2):
        if norm in flow.affine and flow.affine[norm].kind == "conv":
            return flow.strip(flow.affine[norm].x)
        if "norm" not in flow.name[norm]:
            break
        norm = norm.args[0]
    return node


def branches(flow, residual, attention_of):
    """The summands of a branch: one, or several where parallel branches were added up before they met the stream."""
    found, queue = [], [residual.branch]
    for node in queue:
        core = flow.strip(node)
        if flow.name[core] in _ADDS and core not in flow.stream and len(flow.parents(core)) == 2 and flow.same_shape(*core.args[:2]):
            sides = [_kinds(flow, side, attention_of) for side in core.args[:2]]
            if sides[0] != sides[1] and all(sides):
                queue += core.args[:2]
                continue
        found.append(node)
    return found


def _kinds(flow, node, attention_of):
    ends = [end for end in flow.cone(node, floats=True)[1] if end in flow.affine]
    return {"attention" if end in attention_of else "other" for end in ends}


def find_routers(flow):
    """Affine ops whose output decides by `topk` (or the like) which experts a token takes: op → the picks."""
    routers = {}
    for node in flow.nodes:
        if flow.name[node] not in _PICKS or node not in flow.content or not is_float(node.args[0]):
            continue
        if not _picks_rows(flow, node):
            continue
        inside, ends = flow.cone(node.args[0], floats=True)
        if any(flow.is_mixing(n) for n in inside):
            continue
        for end in ends:
            if end in flow.affine and flow.affine[end].kind == "linear":
                routers.setdefault(end, []).append(node)
    return routers


def find_routed(flow, routers):
    """The values that depend on what a router decided, up to where they join the stream."""
    found = set(routers)
    for node in flow.nodes:
        if node not in flow.stream and any(n in found for n in flow.reads[node]):
            found.add(node)
    return found


def is_shared(flow, op, routed):
    """Whether an expert's op takes every token: nothing picked its rows, and nothing of the router's scales what becomes of them."""
    if flow.affine[op].kind == "experts" or flow.affine[op].x in routed:
        return False
    queue, seen = [op], {op}
    for node in queue:
        for user in node.users:
            if user in routed and flow.name[user] not in _ADDS:
                return False
            if user not in routed and user not in flow.stream and user not in seen:
                seen.add(user)
                queue.append(user)
    return True


def _picks_rows(flow, node):
    """Whether the indices of a pick select tokens or experts later on."""
    queue, seen = list(node.users), set(node.users)
    for current in queue:
        if flow.name[current] in _INDEXING or "grouped_mm" in flow.name[current] or flow.is_opaque(current):
            return True
        if current.op == "output" or current in flow.affine:
            continue
        fresh = [user for user in current.users if user not in seen]
        seen.update(fresh)
        if len(queue) < 256:
            queue += fresh
    return False


def read_branch(flow, y, routers, taken, results):
    """What a branch is: an Mlp, a Mixer or None. `taken` are affine ops that belong to attention, `results` the attentions' values."""
    inside, ends = flow.sources(y, results)
    opaque = next((n for n in inside if flow.is_opaque(n) and flow.parents(n)), None)
    if opaque is not None and not ends:
        return Mixer(flow.strip(flow.parents(opaque)[0], drops=False, scales=False), y)
    downs = [end for end in ends if end not in routers]
    if not downs or any(end in taken for end in ends) or any(node in results for node in flow.cone(y, results, floats=True)[1]):
        return None
    behind, mixing = region(flow, downs, routers, results)
    if mixing or _mixes(flow, inside, ends, routers):
        return _mixer(flow, y, downs, behind) if len(behind) > 1 else None
    found = Mlp(None, y, {"up": [], "gate": [], "down": []})
    for down in downs:
        up, gate = _gating(flow, flow.affine[down].x, routers, results)
        if up is None:
            if len(downs) < len(ends) and value(down).shape[-1] == 1:
                found.weights.append(down)
            continue
        found.parts["down"].append((down, rows_in(flow, down, inside)))
        found.parts["up"] += up
        found.parts["gate"] += gate
    if not found.parts["down"]:
        return None
    entry = next((router for router in routers if router in ends), found.parts["up"][0][0])
    found.x = flow.strip(flow.affine[entry].x, drops=False, scales=False)
    return found


def region(flow, downs, routers, results):
    """All affine ops of a branch behind its last ones, and whether positions are mixed on the way to the last ones."""
    queue, seen, mixing = list(downs), set(downs), any(flow.has_window(op) for op in downs)
    for op in queue:
        if op in routers:
            continue
        inside, ops = flow.sources(flow.affine[op].x, results)
        mixing = mixing or _mixes(flow, inside, ops, routers)
        mixing = mixing or op in downs and any(flow.has_window(source) for source in ops)
        fresh = [source for source in ops if source not in seen]
        seen.update(fresh)
        queue += fresh
    return queue, mixing


def _mixes(flow, inside, ops, routers):
    """Whether positions are mixed between some affine ops and what they make: a product, or weights that sum up to one and are no router's."""
    return any(flow.is_mixing(n) or flow.is_softmax(n) and not any(op in routers for op in ops) for n in inside)


def mixer_part(flow, op):
    """The part that an affine op before the last ones has in a mixer."""
    return "conv" if flow.has_window(op) else "inner" if flow.sources(flow.affine[op].x)[1] else "in"


def _mixer(flow, y, outs, behind):
    found = Mixer(None, y, {"in": [], "inner": [], "conv": [], "out": [(op, None) for op in outs]})
    for op in behind:
        if op not in outs:
            found.parts[mixer_part(flow, op)].append((op, None))
    first = (found.parts["in"] or found.parts["conv"] or found.parts["inner"] or found.parts["out"])[0][0]
    found.x = flow.strip(flow.affine[first].x, drops=False, scales=False)
    return found


def _gating(flow, x, routers, results):
    """`(up, gate)` behind the input of a down projection; `(None, None)` where no activation lies between."""
    inside, ops = flow.sources(x, results)
    if not any(op not in routers for op in ops) or not any(flow.is_nonlinear(n) for n in inside):
        return None, None
    for node in inside:
        if flow.name[node] in ("mul", "mul_") and len(set(flow.parents(node))) == 2:
            (left, bent_left), (right, bent_right) = (_made_of(flow, side, routers, results) for side in node.args[:2])
            if left and right and set(left) != set(right) and (bent_left or bent_right):
                return (right, left) if bent_left else (left, right)
    return _made_of(flow, x, routers, results)[0], []


def _made_of(flow, node, routers, results):
    """`([(affine op, rows)], whether an activation lies on the way)` of a value; routers do not count."""
    inside, ops = flow.sources(node, results)
    return [(op, rows_in(flow, op, inside)) for op in ops if op not in routers], any(flow.is_nonlinear(n) for n in inside)
