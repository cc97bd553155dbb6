"""Where a graph says what a kernel's reference says.

    reference, traced:  y = linear(x, w, b) + scale * linear(linear(x, down), up)
    graph:              %add = add(%linear, %mul)  …                                 -->  Occurrence(%add, (x, w, b, down, up, 8.0))

No language of patterns: a reference is traced once for each variant (with a bias and without), its literals stand for whatever number or list of
sizes the graph has there, its dtype for that of its x, the sizes of views for whatever sizes stand there throughout, sums and products are tried both ways. A part may not hold a value that is used outside of
it. One look at each node, in graph order.
"""

import inspect
import itertools
import typing
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from .graph import dtype_of, expression

COMMUTES = {torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor}
#: what they make of their first argument is said by the two shapes
SHAPES = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.expand.default, torch.ops.aten.reshape.default}

#: stands among the literals of a pattern for its argument that is true or false, whatever says so in the graph
FLAG = ("flag",)


@dataclass(frozen=True, eq=False)
class Pattern:
    """A traced variant of a reference: `root` gives its result, `names` maps placeholders to arguments, `literals` numbers and sizes to the arguments that they stand for,
    `turned` the arguments that it has in × out where the op has them out × in."""

    op: object
    root: fx.Node
    names: dict
    literals: dict
    arguments: tuple[str, ...]
    turned: tuple[str, ...] = ()

    @property
    def size(self):
        return len(self.root.graph.nodes)


@dataclass(frozen=True, eq=False)
class Occurrence:
    """A pattern found: `root` is the node whose value it gives, `inner` the nodes that only it reads, `args` those of the op; those at `turned` are to be transposed."""

    op: object
    root: fx.Node
    inner: tuple[fx.Node, ...]
    args: tuple
    turned: tuple[int, ...] = ()


class Differs(Exception):
    """The graph says something else; the message says what, `depth` how much was alike before."""

    def __init__(self, message, depth):
        super().__init__(message)
        self.depth = depth


def patterns(op, values):
    """The variants of an op's reference: `values` gives a small tensor for each tensor argument, a list for each list of sizes and an integer that nothing else
    in the trace is for each integer; what may be None is left out in one of them.

    `op.turned` is the reference as it reads with w stored in × out. Where an op has `over`, the op that makes its w from codes, its patterns are
    those of `op.uncoded`, which takes w itself, with that op in the place of w.
    """
    over = getattr(op, "over", None)
    plain = op if over is None else op.uncoded
    found = [_traced(plain, getattr(plain, "pattern", plain.reference), values, absent) for absent in _absent(plain.reference)]
    if hasattr(plain, "turned"):
        found.append(_traced(plain, plain.turned, values | {"w": values["w"].mT}, (), ("w",)))
    if over is None:
        return found
    names = tuple(inspect.signature(op.reference).parameters)
    return [_coded(pattern, op, names, absent) for pattern in found for absent in _absent(over.reference)]


def _absent(reference):
    """Each choice of the arguments that may be None."""
    optional = [name for name, p in inspect.signature(reference, eval_str=True).parameters.items() if type(None) in typing.get_args(p.annotation)]
    return [some for n in range(len(optional) + 1) for some in itertools.combinations(optional, n)]


def _traced(op, reference, values, absent, turned=()):
    parameters = inspect.signature(op.reference, eval_str=True).parameters
    numbers = {name: 0.8125 + i / 4096 for i, (name, p) in enumerate(parameters.items()) if p.annotation is float}
    numbers |= {name: value for name, value in values.items() if isinstance(value, int)}
    sizes = {name: value for name, value in values.items() if isinstance(value, list)}
    literals = {value: name for name, value in numbers.items()} | {tuple(value): name for name, value in sizes.items()}
    tensors = {name: values[name] for name in parameters if isinstance(values.get(name), torch.Tensor) and name not in absent}
    flags = [name for name, p in parameters.items() if p.annotation is bool]
    literals |= {FLAG: name for name in flags}
    fixed = {**dict.fromkeys(absent), **numbers, **sizes, **dict.fromkeys(flags, True)}

    def call(*given):
        known = dict(zip(tensors, given)) | fixed
        return reference(*(known[name] for name in parameters))

    batched = reference is getattr(op, "pattern", None)  # a pattern of its own says what a batch says, whose bodies are traced after dispatch
    graph = make_fx(call, pre_dispatch=not batched)(*tensors.values()).graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    root = next(iter(reversed(graph.nodes))).args[0]
    return Pattern(op, root, dict(zip(placeholders, tensors)), literals, tuple(parameters), turned)


def _coded(pattern, op, names, absent):
    """A pattern with the op that makes w in the place of w."""
    copy = fx.Graph()
    env = {}
    root = copy.graph_copy(pattern.root.graph, env)
    copy.output(root)
    w = next(env[p] for p, name in pattern.names.items() if name == "w")
    known, literals, args = {env[p]: name for p, name in pattern.names.items() if name != "w"}, dict(pattern.literals), []
    with copy.inserting_before(w):
        for name, p in inspect.signature(op.over.reference, eval_str=True).parameters.items():
            if p.annotation is torch.dtype:
                args.append(torch.float32)
            elif name in absent:
                args.append(None)
            elif p.annotation in (torch.Tensor, torch.Tensor | None):
                args.append(copy.placeholder(name))
                known[args[-1]] = name
            else:
                args.append([-1])  # sizes: whatever stands there
                literals[-1,] = name
        made = copy.call_function(op.over.overload, tuple(args))
        if "w" in pattern.turned:
            made = copy.call_function(torch.ops.aten.permute.default, (made, [1, 0]))
    w.replace_all_uses_with(made)
    copy.erase_node(w)
    return Pattern(op, root, known, literals, names)


def occurrences(graph, found_patterns, declines=lambda occurrence: None, claimed=()):
    """(occurrences in graph order, larger patterns first; node → why the nearest pattern is not there, for each node that ends like one).

    declines(occurrence): why one is not to be taken, or None. What it holds may then be part of another. claimed: nodes that are part of others.
    """
    claimed, found, reasons = set(claimed), [], {}
    at = {}
    for node in graph.nodes:
        at.setdefault(node.target, []).append(node)
    for pattern in sorted(found_patterns, key=lambda p: -p.size):
        for node in at.get(pattern.root.target, ()):
            if node in claimed:
                continue
            try:
                occurrence = _match(pattern, node)
                taken = next((n for n in (node, *occurrence.inner) if n in claimed), None)
                if taken is not None:
                    raise Differs(f"%{taken.name} is part of another one", pattern.size)
                if (reason := declines(occurrence)) is not None:
                    raise Differs(reason, pattern.size)
            except Differs as reason:
                if node not in reasons or reason.depth > reasons[node].depth:
                    reasons[node] = reason
                continue
            claimed.update((node, *occurrence.inner))
            found.append(occurrence)
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda o: order[o.root]), {node: str(reason) for node, reason in reasons.items() if node not in claimed}


def _match(pattern, root):
    bound = _agree(pattern, pattern.root, root, {})
    values = {pattern.names[p]: node for p, node in bound.items() if p in pattern.names} | {name: bound[number] for number, name in pattern.literals.items() if number in bound}
    inner = tuple(node for p, node in bound.items() if isinstance(p, fx.Node) and p not in pattern.names and node is not root)
    inside = {root, *inner}
    sizes = tuple(user for node in inner for user in node.users if user.target in (torch.ops.aten.sym_size.int, dtype_of) and inside.issuperset(user.users))
    inner, inside = (*inner, *sizes), inside.union(sizes)
    for node in inner:
        other = next((user for user in node.users if user not in inside), None)
        if other is not None:
            raise Differs(f"%{node.name} is read by %{other.name} too", len(bound))
    outer = next((node for name, node in values.items() if isinstance(node, fx.Node) and node in inside), None)
    if outer is not None:
        raise Differs(f"%{outer.name} is both made and read by it", len(bound))
    return Occurrence(pattern.op, root, inner, tuple(values.get(name) for name in pattern.arguments), tuple(map(pattern.arguments.index, pattern.turned)))


def _agree(pattern, wanted, node, bound):
    """`bound` with what makes a node of the pattern and one of the graph the same."""
    if isinstance(wanted, float) and wanted in pattern.literals:
        if not isinstance(node, (int, float)) or isinstance(node, bool):
            raise Differs(f"{node} stands where a number should", len(bound))
        if bound.setdefault(wanted, float(node)) != float(node):
            raise Differs(f"{node} and {bound[wanted]} should be one number", len(bound))
        return bound
    if type(wanted) is int and wanted in pattern.literals:
        if type(node) is not int or bound.setdefault(wanted, node) != node:
            raise Differs(f"{node} stands where another whole number should", len(bound))
        return bound
    if isinstance(wanted, list) and tuple(wanted) in pattern.literals:
        if not isinstance(node, (list, tuple)) or bound.setdefault(tuple(wanted), list(node)) != list(node):
            raise Differs(f"{node} stands where other sizes should", len(bound))
        return bound
    if isinstance(wanted, list) and any(isinstance(each, fx.Node) for each in wanted):
        if not isinstance(node, list) or len(node) != len(wanted):
            raise Differs(f"{node} stands where {len(wanted)} tensors should", len(bound))
        for ours, given in zip(wanted, node):
            bound = _agree(pattern, ours, given, bound)
        return bound
    if isinstance(wanted, torch.dtype) and isinstance(node, fx.Node) and node.target is dtype_of:
        ours, x = next(((p, n) for p, n in bound.items() if p in pattern.names), (None, node.args[0]))
        if x.meta["val"].dtype != node.args[0].meta["val"].dtype or (ours is not None and ours.meta["val"].dtype != wanted):
            raise Differs(f"%{node.name} is not the dtype of %{x.name}", len(bound))
        return bound
    if isinstance(wanted, bool) and FLAG in pattern.literals:
        if not isinstance(node, (bool, fx.Node)):
            raise Differs(f"{node} stands where a truth should", len(bound))
        return {**bound, FLAG: node}
    if not isinstance(wanted, fx.Node):
        if type(wanted) is not type(node) or wanted != node:
            raise Differs(f"{node} stands in place of {wanted}", len(bound))
        return bound
    if not isinstance(node, fx.Node):
        raise Differs(f"{node} stands in place of a tensor", len(bound))
    if wanted in bound:
        if bound[wanted] is not node:
            raise Differs(f"%{node.name} and %{bound[wanted].name} should be one value", len(bound))
        return bound
    if wanted in pattern.names:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise Differs(f"%{node.name} is not a tensor", len(bound))
        return {**bound, wanted: node}
    if node.op != "call_function" or node.target is not wanted.target:
        raise Differs(f"%{node.name} stands in place of {wanted.target}", len(bound))
    if wanted.target in SHAPES:
        return _same_sizes(wanted, node, _agree(pattern, wanted.args[0], node.args[0], {**bound, wanted: node}))
    args, kwargs = _bare(node)
    theirs, named = _bare(wanted)
    if len(args) != len(theirs) or kwargs != named:
        raise Differs(f"%{node.name} has other arguments than {wanted.target}", len(bound))
    nearest = None
    for order in (args, args[::-1]) if wanted.target in COMMUTES and len(args) == 2 else (args,):
        try:
            now = {**bound, wanted: node}
            for ours, given in zip(theirs, order):
                now = _agree(pattern, ours, given, now)
            return now
        except Differs as reason:
            nearest = reason if nearest is None or reason.depth > nearest.depth else nearest
    raise nearest


def _same_sizes(wanted, node, bound):
    """A view is the same where each size of the pattern, before and after it, stands for one size of the graph throughout; 1 for itself."""
    for ours, given in ((wanted.args[0], node.args[0]), (wanted, node)):
        shape, other = ours.meta["val"].shape, given.meta["val"].shape
        for size, found in zip(shape, other):
            known = bound.setdefault(("size", int(size)), 1 if size == 1 else expression(found))
            if len(shape) != len(other) or known != expression(found):
                raise Differs(f"%{node.name} lays its numbers out in another way", len(bound))
    return bound


def _bare(node):
    """Arguments without what says nothing: None at the end."""
    args, kwargs = list(node.args), {k: v for k, v in node.kwargs.items() if v is not None}
    while args and args[-1] is None:
        args.pop()
    return args, kwargs
