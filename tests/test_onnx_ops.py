"""Single ops and small functions: each level of the writer, in-place changes, sizes, kernels that carry a reference."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from rewrite.emit import agree
from rewrite.emit.onnx import export_onnx
from rewrite.graph import Graph, has_attribute, install


class Function(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, *args):
        return self.body(*args)


def graph_of(body, *args, static=()):
    """A small Graph of a function of tensors; dimensions 0 and 1 of each argument are dynamic (but those of `static` positions)."""
    module = body if isinstance(body, nn.Module) else Function(body)
    dynamic = [{i: torch.export.Dim.DYNAMIC for i in range(min(2, a.dim()))} if position not in static else None for position, a in enumerate(args)]
    inputs = dict(dynamic_shapes=tuple(dynamic) if isinstance(body, nn.Module) else (tuple(dynamic),))
    with torch.no_grad():
        program = torch.export.export(module, args, strict=False, prefer_deferred_runtime_asserts_over_guards=True, **inputs)
    signature = program.graph_signature
    where = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    for name, constant in program.constants.items():
        if not has_attribute(module, name):
            install(module, name, constant, persistent=False)
    graph, new = fx.Graph(), {}
    for node in program.graph.nodes:
        new[node] = graph.create_node("get_attr", where[node.name]) if node.name in where else graph.node_copy(node, new.get)
        new[node].meta = {"val": node.meta.get("val"), "path": "toy", "source": node.meta.get("stack_trace")}
    names = tuple(node.name for node in graph.nodes if node.op == "placeholder")
    return Graph(graph, module, inputs=names, outputs=tuple(f"y{i}" for i in range(len(signature.user_outputs))))


def run(path, *args):
    session = agree.session(path)
    return session.run(None, {item.name: a.numpy() for item, a in zip(session.get_inputs(), args)})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def x(*shape, seed=0):
    return torch.randn(shape or (3, 5), generator=generator(seed))


def n(*shape, high=7, seed=0):
    return torch.randint(0, high, shape or (3, 5), generator=generator(seed))


OWN = {
    "add alpha": (lambda a, b: torch.add(a, b, alpha=2), x(), x(seed=1)),
    "add int and float": (lambda a, b: a + b, n(), x()),
    "add bool": (lambda a, b: (a > 0) + (b > 0), x(), x(seed=1)),
    "rsub": (lambda a: torch.rsub(a, 2.5), x()),
    "int by int": (lambda a, b: a / (b + 1), n(), n(seed=1)),
    "floor of negatives": (lambda a: (a - 4) // 3, n()),
    "floor of floats": (lambda a: torch.div(a * 5, 2, rounding_mode="floor"), x()),
    "truncated": (lambda a: torch.div(a - 4, 3, rounding_mode="trunc"), n()),
    "remainder": (lambda a: ((a - 4) % 3, (a * 1.5 - 4) % 2), n()),
    "powers": (lambda a: (a**2, a.abs() ** 0.5, 2**a, a.abs() ** a), x()),
    "power of ints": (lambda a: (a**2, a**0.5), n()),
    "compare with a number": (lambda a: (a > 2.5, a == 3, a != 3, a <= 2), n()),
    "compare bools": (lambda a: ((a > 0) == (a > 1), (a > 0) < (a > 1)), x()),
    "logic": (lambda a, b: (a.bool() & b.bool(), a | b, torch.logical_xor(a, b), ~(a > 1), ~a, torch.logical_not(a)), n(), n(seed=1)),
    "where": (lambda a: (torch.where(a > 0, a, 0.0), torch.where(a > 0, 1, 0), torch.where(a > 0, a, torch.tensor(2.0))), x()),
    "masked_fill": (lambda a: (a.masked_fill(a > 0, float("-inf")), a.masked_fill(a > 0, torch.tensor(3.0))), x()),
    "clamp": (lambda a: (a.clamp(-0.5, 0.5), a.clamp(min=0.1), a.clamp_max(0.2), torch.clamp(a, max=a.mean())), x()),
    "clamp ints": (lambda a: a.clamp(1, 3), n()),
    "unary": (lambda a: (a.abs(), -a, a.exp(), a.abs().log(), a.abs().sqrt(), a.cos(), a.sin(), a.tanh(), a.sigmoid(), a.relu(), a.erf()), x()),
    "unary, more": (lambda a: (a.ceil(), a.floor(), a.round(), a.sign(), a.reciprocal(), a.abs().rsqrt(), a.isnan(), a.isinf()), x()),
    "sqrt of ints": (lambda a: a.sqrt(), n()),
    "activations": (lambda a: (F.gelu(a), F.gelu(a, approximate="tanh"), F.silu(a), F.softplus(a), a.softmax(-1), a.log_softmax(0)), x()),
    "softmax in float32": (lambda a: F.softmax(a, -1, dtype=torch.float32), n().double()),
    "sums": (lambda a: (a.sum(), a.sum(-1), a.sum((0, 1), keepdim=True), a.mean(0), a.amax(-1), a.amin((0,), keepdim=True), a.logsumexp(-1)), x()),
    "sum of bools": (lambda a: ((a > 0).sum(-1), (a > 0).any(), (a > 0).all(-1), (a > 0).cumsum(-1)), x()),
    "extremes": (lambda a, b: (a.max(), torch.max(a, b), *a.max(-1), *a.min(0, keepdim=True), a.argmax(), a.argmax(-1), a.argmin(0)), x(), x(seed=1)),
    "cumsum": (lambda a: (a.cumsum(0), a.cumsum(-1)), n()),
    "topk and sort": (lambda a: (*a.topk(2), *a.sort(-1), *a.sort(0, descending=True), *torch.sort(a, stable=True, dim=-1), a.argsort(-1)), x(4, 6)),
    "diff": (lambda a: (a.diff(), torch.diff(a, dim=0), torch.diff(a, prepend=torch.ones_like(a[:, :1]))), x()),
    "histc": (lambda a: torch.histc(a.float(), 4, 0, 3), n()),
    "ranges": (lambda a: (torch.arange(a.shape[0]), torch.arange(1, a.shape[1]), torch.arange(0, a.shape[1], 2, dtype=torch.float32)), x()),
    "fills": (lambda a: (torch.zeros(a.shape[0], 3), torch.full_like(a, 2), a.new_ones(2, a.shape[1]), torch.ones_like(a, dtype=torch.bool)), x()),
    "triangles": (lambda a: (a.tril(), a.triu(1), torch.tril(a, -1)), x()),
    "views": (lambda a: (a.view(-1), a.reshape(a.shape[0], 1, -1), a.flatten(), a.unsqueeze(-1), a.unsqueeze(0).squeeze(0), a.t(), a.mT), x()),
    "four dimensions": (lambda a: (a.transpose(1, 2).reshape(a.shape[0], -1, 20), a.permute(3, 0, 1, 2), a.unflatten(-1, (2, 5))), x(3, 5, 4, 10)),
    "repeat": (lambda a: (a.repeat(2, 1), a.repeat(3, 1, 2), a.repeat(a.shape[0], 1)), x()),
    "expand": (lambda a: (a[:, None].expand(-1, 4, -1), a.unsqueeze(1).expand(a.shape[0], a.shape[1], -1)), x()),
    "cat": (lambda a, b: (torch.cat([a, b]), torch.cat([a, b], -1), torch.stack([a, b], 1)), x(), n()),
    "parts": (lambda a: (*a.split(2, -1), *a.chunk(3, -1), *a.split([1, 4, 1], -1), *a.unbind(-1)), x(3, 5, 6)),
    "slices": (lambda a: (a[:, 1:], a[:, :-1], a[1:3, ::2], a[:, -1], a[0], a[..., 1], a[-2:], a.narrow(1, 1, 2)), x(4, 6)),
    "indices": (lambda a, i: (a[i[0]], a[:, i], a[i, i], torch.index_select(a, 1, i[0]), a.gather(1, i)), x(8, 9), n(3, 2)),
    "indices in the middle": (lambda a, i: a[:, :, i[0], i[1]], x(3, 5, 7, 7), n(3, 2)),
    "index_put": (lambda a, i: (a.index_put((i[0],), a.new_ones(i.shape[1], 1)), a.index_put((i, i), torch.tensor(5.0))), x(8, 9), n(3, 2)),
    "index_put, added": (lambda a, i: a.index_put((i[0],), a.new_ones(()), accumulate=True), x(8, 9), n(3, 2)),
    "scatter": (lambda a, i: (a.scatter(1, i, 2.0), a.scatter(0, i, i.float()), a.scatter_add(1, i, i.float())), x(8, 9), torch.arange(6).view(3, 2)),
    "slice_scatter": (lambda a, b: (a.slice_scatter(a[:, :2] + 1, 1, 1, 3), a.select_scatter(b, 1, -1)), x(3, 5), x(5)[:3]),
    "products": (lambda a, b: (a @ b, torch.bmm(a, b), torch.baddbmm(a @ b, a, b, beta=0.5, alpha=2)), x(3, 5, 4), x(3, 4, 6, seed=1), (0, 1)),
    "pools": (lambda a: F.adaptive_avg_pool2d(a, 1), x(3, 5, 8, 8)),
    "sizes": (lambda a: a * a.shape[0] + a.shape[1] // 2 - (a.shape[0] * a.shape[1]) % 3, x()),
    "a size below zero": (lambda a: a + (3 - a.shape[1]) // 2, x()),
    "the root of a size": (lambda a: a * a.shape[1] ** 0.5 / a.shape[0], x()),
    "max of sizes": (lambda a: torch.zeros(max(a.shape[0], 4), 2) + torch.sym_max(a.shape[0], a.shape[1]), x()),
}  # fmt: skip

STILL_MORE = {
    "torchlib": (lambda a: (a.var(-1), F.elu(a), a.prod(-1), F.hardswish(a), F.leaky_relu(a, 0.2), a.atan(), F.pad(a, (1, 2)), a.flip(0)), x()),
    "torchlib einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), x(3, 5, 4), x(3, 4, 6, seed=1), (0, 1)),
    "decomposed": (lambda a: (F.one_hot(a, 7), torch.diff(a, n=2), torch.logit(a / 7, eps=0.1)), n()),
    "complex": (lambda a: torch.view_as_real(torch.view_as_complex(a) * torch.polar(torch.ones(5, 2), torch.ones(5, 2))), x(3, 5, 2, 2), (0,)),
}

IN_PLACE = {
    "add_": (lambda a: (a + 0).add_(2.0).mul_(3), x()),
    "later readers see it": (lambda a: _in_place(a), x()),
    "through a select": (lambda a: _through(a, lambda v: v[:, 0]), x()),
    "through a slice": (lambda a: _through(a, lambda v: v[:, 1:3]), x()),
    "through steps": (lambda a: _through(a, lambda v: v[:, ::2]), x()),
    "through a transpose and a view": (lambda a: _through(a, lambda v: v.t()[1:].unsqueeze(0)), x()),
    "through one of several parts": (lambda a: _through(a, lambda v: v.chunk(2, -1)[1]), x(3, 5, 6)),
    "through one of its rows": (lambda a: _through(a, lambda v: v.unbind(-1)[1]), x(3, 5, 6)),
    "a copy keeps the old": (lambda a: _old(a), x()),
    "setitem": (lambda a: _setitem(a), x()),
    "setitem with a mask": (lambda a: _masked(a), x()),
}  # fmt: skip


def _in_place(a):
    b = a + 1
    view, copy = b.view(-1), b.clone()
    b.mul_(2)
    return b, view, copy, b.sum()


def _through(a, view):
    b = a * 1
    other = b.reshape(-1)
    part = view(b)
    part.mul_(3).sub_(1)
    return b, part, other


def _old(a):
    b = a + 1
    turned, same = b.t().clone(), b.contiguous()
    b.zero_()
    return turned, same


def _setitem(a):
    b = torch.zeros_like(a)
    b[:, 1] = a[:, 0]
    b[1:, :2] = 7
    b[0] += 1
    return b


def _masked(a):
    b = a.clone()
    b[b > 0] = 0.5
    return b


ALL = {**OWN, **STILL_MORE, **IN_PLACE}


@pytest.mark.parametrize("name", ALL)
def test_an_op_at_three_sizes(name, tmp_path):
    body, *args = ALL[name]
    static = args.pop() if isinstance(args[-1], tuple) else ()
    graph = graph_of(body, *args, static=static)
    report = export_onnx(graph, tmp_path / "op.onnx")
    assert report.error < 2e-5
    with torch.no_grad():
        wanted = body(*args)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    got = run(tmp_path / "op.onnx", *args)
    assert max(agree.difference(w.numpy(), g) for w, g in zip(wanted, got, strict=True)) < 2e-5
    if name in OWN:
        assert not report.notes, "an op of the own table went to another level"
