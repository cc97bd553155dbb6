"""Folding: what passes added around an affine op becomes part of its weight and bias.

The added nodes of one op are cut out with the op as a function of x, run in float64, and asked: are you affine in x? On an identity they then
give the weight that stands for all of them. Nothing is declared by a pass; a gate, an activation, another input, and it does not fold.
A weight in codes is what its codes stand for, and becomes numbers where that is asked for. What was fused is taken apart first.
"""

import hashlib

import torch
from torch import fx, nn

from . import graph as g
from .edit.body import signature
from .edit.derive import evaluated
from .edit.operation import Operation
from .edit.reading import names_of
from .errors import Refused
from .fuse import unfuse
from .training.hooks import forget

#: How far from affine float64 rounding may look, relative to the RMS of the values.
ROUNDING = 1e-9
_PRODUCTS = {torch.ops.aten.linear.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.matmul.default}


class _Region:
    """One affine node with the made nodes around it: from the original x to the value that its users see."""

    def __init__(self, edit, node, results):
        self.edit, self.operation = edit, Operation.of(node)
        self.node, self.y, self.codes = node, edit.live(node), _codes(edit, self.operation)
        self.x = _original(node.args[self.operation.x], results)
        self.nodes, self.reads, self.outside = self._cut()

    def _cut(self):
        inside, reads, outside, todo = set(), set(), [], [self.y]
        own = {self.node, *self.operation.chain}
        while todo:
            node = todo.pop()
            if node is self.x or node in inside or node in reads:
                continue
            if node.op == "get_attr" or node is self.codes:
                reads.add(node)
            elif node in own or ("made" in node.meta and node.op != "placeholder"):
                inside.add(node)
                todo += [a for a in node.all_input_nodes if a not in self.operation.extras] if node in own else node.all_input_nodes
            elif node not in self.operation.extras:
                outside.append(node)
        return [n for n in self.edit.graph.nodes if n in inside], reads, outside

    @property
    def made(self):
        return [n for n in self.nodes if "made" in n.meta]

    @property
    def path(self):
        return self.operation.weight

    def stored(self, path):
        """The tensor at a path; of a weight in codes, the numbers that they stand for. A flag of training is False."""
        value = evaluated(self.edit, self.codes) if self.codes is not None and path == self.path else g.attribute(self.edit.graph.root, path)
        return value.detach() if isinstance(value, torch.Tensor) else False

    def run(self, x, tensors, extras=None, is_identity=False):
        """The region's value at `x` (and, for experts, at other `extras`), with `tensors` by path, in eval mode.

        Where `x` is an identity the op's own product is its weight, turned: for a square weight of 4096 that spares 10¹¹ operations.
        """
        env = {self.x: x, **({self.codes: tensors(self.path)} if self.codes is not None else {}), **(extras or {})}
        read = lambda a: fx.node.map_arg(a, lambda n: env[n] if n in env else tensors(n.target))  # noqa: E731
        for node in self.nodes:
            args, kwargs = read(node.args), read(node.kwargs)
            if self.operation.kind == "conv" and "conv" in str(node.target):
                args = _valid(node.target, args)
                kwargs = {}
            spared = is_identity and node is self.node and args[self.operation.x] is x and not kwargs and node.target in _PRODUCTS
            env[node] = self._on_identity(args, x) if spared else node.target(*args, **kwargs)
        return env[self.y]

    def _on_identity(self, args, x):
        operation = self.operation
        product = args[operation.w].mT if self.node.target is torch.ops.aten.linear.default else args[operation.w]
        bias = args[operation.b] if operation.b is not None and len(args) > operation.b else None
        return (product if bias is None else product + bias).expand(*x.shape[:-1], product.shape[-1])

    def reason(self, dequantize=False):
        """Why this region does not fold, or None."""
        if "coded" in self.operation.source.meta:
            return "its weight came in codes, as the model given stores it: what is added stays beside it"
        if self.outside:
            return f"it also reads %{self.outside[0].name}, which is not its own x"
        if any("front" in node.meta for node in self.nodes):
            return "tokens stand in front of what it looks up, which no table of a vocabulary holds"
        if self.operation.kind == "experts" and not (len(self.operation.extras) == 1 and "grouped_mm" in str(self.node.target)):
            return "its experts are gathered token by token"
        if self.codes is not None and not dequantize:
            code = next(n for n in _above(self.codes) if n.op == "get_attr" and not n.meta["val"].is_floating_point())
            return f'@{code.target} is stored as {code.meta["val"].dtype}, not as numbers that a sum could be added to. Say "dequantize": true to have the weight as numbers again'
        values = {node.target: g.attribute(self.edit.graph.root, node.target) for node in self.reads if node is not self.codes}
        low = [path for path, value in values.items() if isinstance(value, torch.Tensor) and not value.is_floating_point()]
        if low:
            return f"@{low[0]} is stored as {values[low[0]].dtype}, not as numbers that a sum could be added to"
        others = [user for part in self.edit.graphs for user in self._readers(part) if not self._covers(part, user)]
        if others:
            return f"@{self.path} is tied: another operation reads it without these additions"
        return None if self._is_affine() else "what was added is not affine in x (an activation, a gate, a normalisation of x)"

    def _readers(self, part):
        """What reads the weight in a graph; of one in codes, the operations on what they stand for."""
        if self.codes is None:
            return [user for n in part.nodes if n.op == "get_attr" and n.target == self.path for user in n.users]
        return [node for node in part.nodes if (found := Operation.of(node)) is not None and found.weight == self.path]

    def _covers(self, part, user):
        """Does another reader of the same weight carry the same additions (a block that is used twice)?"""
        if part is self.edit.graph and (user is self.node or user in self.nodes):
            return True
        wanted = {a.target for n in self.made for a in n.all_input_nodes if a.op == "get_attr"} - {self.path}  # codes are none of them
        readings = [found for node in part.nodes if (found := Operation.of(node)) is not None and found.weight == self.path]
        own = {node for found in readings for node in (found.node, *found.chain)}
        seen, todo = {user}, [user]
        while todo:
            node = todo.pop()
            if node in own or "made" in node.meta:
                near = [n for n in (*node.users, *node.all_input_nodes) if n not in seen and n.op != "get_attr" and (n in own or "made" in n.meta)]
                seen.update(near)
                todo += near
        return wanted <= {a.target for n in seen for a in n.all_input_nodes if a.op == "get_attr"}

    def _random(self, path):
        """A tensor's value for the question whether the region is affine: new tensors at random, since one that starts at zero hides what it gates."""
        value = self.stored(path)
        if not isinstance(value, torch.Tensor):
            return False
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(path.encode(), digest_size=7).digest(), "little"))
        return torch.randn(value.shape, generator=generator, dtype=torch.float64) if path in self.edit.made or value.is_meta else value.double().cpu()

    def _is_affine(self):
        cache = {}
        tensors = lambda path: cache.setdefault(path, self._random(path))  # noqa: E731
        weight = self.operation.standard(tensors(self.path))
        if self.operation.kind == "embedding":
            ids = torch.arange(min(5, weight.shape[1]))
            whole = self.run(ids, tensors)
            return all(torch.allclose(self.run(ids[i : i + 1], tensors)[0], whole[i], rtol=ROUNDING, atol=ROUNDING) for i in range(len(ids)))
        x, extras = self._inputs(weight)
        x = x[..., :3, :] if self.operation.kind == "linear" else x  # a question about any rows
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2))
        f = lambda v: self.run(v, tensors, extras)  # noqa: E731
        # small values too: a softmax or a sigmoid that large ones have filled up stands still, and looks affine
        return all(_adds_up(f, scale * a, scale * b) for scale in (1.0, 0.01))

    def _inputs(self, weight):
        """The identity on which the weight is read: rows for each input feature, a tap each for a convolution, a copy per expert."""
        shape = weight.shape
        if self.operation.kind == "experts":
            eye = torch.eye(shape[2], dtype=torch.float64).repeat(shape[0], 1)
            ends = torch.arange(1, shape[0] + 1, dtype=torch.int32) * shape[2]
            return eye, {self.operation.extras[0]: ends}
        if self.operation.kind == "conv":
            dilation = _dilation(self.node, len(shape) - 2)
            window = [(k - 1) * d + 1 for k, d in zip(shape[2:], dilation)]
            taps = torch.cartesian_prod(*(torch.arange(k) * d for k, d in zip(shape[2:], dilation))).reshape(-1, len(window))
            x = torch.zeros(shape[1], len(taps), shape[1], *window, dtype=torch.float64)
            for c in range(shape[1]):
                for t, tap in enumerate(taps.tolist()):
                    x[(c, t, c, *tap)] = 1
            return x.flatten(0, 1), None
        lead = self.x.meta["val"].dim() - 2
        return torch.eye(shape[1], dtype=torch.float64).reshape(*[1] * lead, shape[1], shape[1]), None

    def evaluate(self):
        """(weight in standard orientation, bias or None), float64: what the op and all additions are together."""
        tensors = lambda path: value.double() if isinstance(value := self.stored(path), torch.Tensor) else False  # noqa: E731
        weight = self.operation.standard(tensors(self.path))
        if self.operation.kind == "embedding":
            return self.run(torch.arange(weight.shape[1], device=weight.device), tensors).mT, None
        x, extras = self._inputs(weight)
        x = x.to(weight.device)
        is_linear = self.operation.kind == "linear"
        zeros = torch.zeros_like(x[..., :1, :] if is_linear else x)
        whole, bias = self.run(x, tensors, extras, is_identity=is_linear), self.run(zeros, tensors, extras)
        delta = whole - bias
        if self.operation.kind == "experts":
            return delta.unflatten(0, (weight.shape[0], weight.shape[2])).mT, None
        if self.operation.kind == "conv":
            return delta.flatten(1).unflatten(0, weight.shape[1:]).movedim(-1, 0), bias.flatten(1)[0]
        return delta.reshape(weight.shape[1], -1).mT, bias.reshape(-1, bias.shape[-1])[0]


def _above(node):
    """A node and all that its value is computed from."""
    return g.reached(node, lambda n: n.all_input_nodes if n.target not in (g.dtype_of, g.device_of) else ())


def _codes(edit, operation):
    """The node that makes numbers of the codes in which an operation's weight is stored: what stands for it and comes from derived tensors alone. Or None."""
    standing = [node for node in _above(operation.source) if node.meta.get("stands_for") == operation.weight]
    reads = {node: {n.target for n in _above(node) if n.op == "get_attr"} for node in standing}
    return next((node for node in sorted(standing) if reads[node] and reads[node] <= edit.report.derived.keys()), None)


def _adds_up(f, a, b):
    """f(a + b) + f(0) = f(a) + f(b), to rounding."""
    left, right = f(a + b) + f(torch.zeros_like(a)), f(a) + f(b)
    return bool((left - right).abs().max() <= ROUNDING * right.square().mean().sqrt() * a.shape[-1])


def _original(node, results):
    """The value that a made node stands for at the entry of an op, where an `input` noun put it there; `results` of other ops stand for themselves.

    Of all that the noun reads it is the first one of the same shape; the node itself where there is none.
    """
    wanted, seen, todo = signature(node.meta.get("val")), set(), [node]
    while todo:
        found = todo.pop()
        if found in seen or found.op == "get_attr":
            continue
        seen.add(found)
        if "made" in found.meta and found not in results:
            todo += reversed(found.all_input_nodes)
        elif signature(found.meta.get("val")) == wanted:
            return found
    return node


def _dilation(node, n):
    given = node.args[5] if len(node.args) > 5 else node.kwargs.get("dilation", 1)
    given = [given] if isinstance(given, int) else list(given)
    return given * n if len(given) == 1 else given


def _valid(target, args):
    """A convolution's arguments with stride 1 and no padding: each tap is then read once."""
    n = args[1].dim() - 2
    dilation = args[5] if len(args) > 5 else [1] * n
    return (args[0], args[1], args[2] if len(args) > 2 else None, [1] * n, [0] * n if not str(target).endswith("padding") else "valid", dilation)


def fold(edit, *, partial=False, dequantize=False):
    """Fold every addition of the graph that folds. Returns [(path of the weight, "linear")]; sets the new values once for all variants.

    dequantize: a weight in codes that something was added to becomes numbers again. Raises Refused, before anything is changed, with each
    reason, unless `partial` and something folds.
    """
    graph = edit.graph
    unfuse(edit)
    results = {edit.live(node) for node in graph.nodes if "live" in node.meta}
    regions = [_Region(edit, node, results) for node in graph.nodes if Operation.of(node) is not None and "made" not in node.meta]
    regions = [region for region in regions if region.made]
    decides = edit.main or graph.is_inner
    folding = _decided(edit, regions, partial, dequantize) if decides else [r for r in regions if r.path in edit.memo["folding", edit.step.place]]
    if decides:
        edit.memo.setdefault(("folding", edit.step.place), set()).update(region.path for region in folding)
        values = {region.path: (region, *region.evaluate()) for region in folding}
        for region, weight, bias in values.values():
            _set(edit, region, weight, bias)
    bare = {region.y: region.node for region in folding}  # one op's result may be another's x
    for region in folding:
        _take_out(edit, region, bare.get(region.x, region.x))
    left = {n.target for part in edit.graphs for n in part.nodes if n.op == "get_attr"}
    for path in [p for p in edit.made if p not in left]:
        g.remove(graph.root, path)
        del edit.made[path]
        edit.report.feeds.discard(path)
        edit.report.derived.pop(path, None)
    forget(edit.report, graph.root)
    edit.restructured = True
    return [(region.path, "linear") for region in folding]


def _decided(edit, regions, partial, dequantize):
    """The regions that fold, found on the main graph; the other variants follow it."""
    reasons = {region: region.reason(dequantize) for region in regions}
    known = {id(n) for region in regions for n in region.made}
    known |= {id(n) for node in edit.graph.nodes if (found := Operation.of(node)) is not None and (codes := _codes(edit, found)) is not None for n in _above(codes)}
    loose = {n.meta["site"]: n.meta["made"] for n in edit.graph.nodes if "made" in n.meta and "site" in n.meta and id(n) not in known}
    refused = [f"{region.path}: {reason}" for region, reason in reasons.items() if reason]
    refused += [f"{path}: what {made} added there is not around an affine operation on a weight" for path, made in loose.items()]
    folding = [region for region, reason in reasons.items() if reason is None]
    elsewhere = edit.graph.is_inner or any("made" in n.meta for part in edit.graph.variants.values() if part.is_inner for n in part.nodes)
    if not regions and not refused and not elsewhere:
        raise Refused(f"{edit.step.place}: merge: nothing was added to a weight, so there is nothing to merge. Weights in codes alone stay in them.")
    if refused and not (partial and folding):
        more = f"\n… and {len(refused) - 5} more" if len(refused) > 5 else ""
        advice = 'Say "partial": true to merge the rest.' if folding else "There is nothing to merge."
        raise Refused("merge: cannot fold\n" + "\n".join(refused[:5]) + f"{more}\n{advice}")
    return folding


def _set(edit, region, weight, bias):
    root, operation = edit.graph.root, region.operation
    parameter = g.attribute(root, operation.weight)
    if parameter is None:
        parameter = nn.Parameter(weight.to(edit.report.released.pop(operation.weight)), requires_grad=False)
        g.install(root, operation.weight, parameter)
    parameter.data = operation.stored(weight).to(parameter.dtype).contiguous()
    edit.report.folded.update(names_of(root, parameter))
    for path in names_of(root, parameter):
        edit.report.derived.pop(path, None)
    if bias is None or (operation.bias is None and not bias.any()):
        return
    if operation.bias is None:
        path = operation.weight.rpartition(".")[0] + ".bias"
        g.install(root, path, nn.Parameter(bias.to(parameter.dtype), requires_grad=False))
        edit.report.made[path] = edit.kind
        edit.report.biases[operation.weight] = path
        return
    target = g.attribute(root, operation.bias)
    target.data = bias.to(target.dtype)
    edit.report.folded.update(names_of(root, target))


def _take_out(edit, region, x):
    graph, operation, node = edit.graph, region.operation, region.node
    weight = edit.attribute(operation.weight)
    if region.codes is not None:
        weight.meta.pop("made", None)
    region.y.replace_all_uses_with(node) if region.y is not node else None
    node.meta.pop("live", None)
    args = list(node.args)
    args[operation.x] = x
    if operation.chain:
        first = operation.chain[0]
        first.args = (weight, *first.args[1:])
    else:
        args[operation.w] = weight
    if operation.bias is not None:
        args[operation.b] = edit.attribute(operation.bias)
    elif operation.weight in edit.report.biases:
        args = [*args, *[None] * (operation.b + 1 - len(args))]
        args[operation.b] = edit.attribute(edit.report.biases[operation.weight])
    node.args = tuple(args)
    for made in reversed(region.made):
        if not made.users:
            graph.fx.erase_node(made)
    above = _above(region.codes) if region.codes is not None and not region.codes._erased else ()
    for read in (*sorted(above, reverse=True), *region.reads):
        if not read._erased and not read.users and "made" in read.meta:
            graph.fx.erase_node(read)
