"""A linear, with its low-rank adapters, of what a gate lets through: the second half of a gated MLP, forward and backward in one op.

    y = h w' + b + scale * (h down') up'        h = act(e) * g, act silu, gelu or gelu_tanh

    gated_linear("silu", 1)           one adapter, w in numbers
    gated_linear("gelu", 0, "nf4")    none, w = dequant_nf4(codes, scales, nested, shape, e's dtype)

Shapes: e, g (…, K), w (N, K), b (N) or None, down (R, K), up (N, R), y (…, N); M rows in all. The first half, e and g of one x, is `lora_linears`.
Backward keeps e, g and h down'; h is made again there, and no float copy of a weight in codes is kept. The separate ops keep e, act(e), g and h, so that of an MLP with
LoRA, M·K_x + 4·M·K elements become M·K_x + 2·M·K.
Bytes of what is not a product, in elements: forward reads 2·M·K and writes M·K (separate ops: 3 and 2); backward reads 3·M·K and writes 3·M·K, h among them
(separate ops: 5 and 3), in one pass each by the Triton bodies. Products are the library's.
Shazeer 2020, arXiv:2002.05202.
"""

import functools
import importlib
import inspect

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from rewrite.kernels.op import Op, cast_once
from rewrite.kernels.rounding import by_hand, rounded

CONFIG = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda e: F.gelu(e, approximate="tanh")}
_aten = torch.ops.aten
_BACKWARD = {
    "silu": _aten.silu_backward.default,
    "gelu": _aten.gelu_backward.default,
    "gelu_tanh": functools.partial(_aten.gelu_backward.default, approximate="tanh"),
}


@triton.jit
def activated(e, ACT: tl.constexpr):
    """(act(e), its derivative), in float32."""
    if ACT == "silu":
        gate = 1 / (1 + tl.exp(-e))
        return e * gate, gate * (1 + e * (1 - gate))
    if ACT == "gelu":
        below = 0.5 * (1 + tl.erf(e * 0.7071067811865476))
        return e * below, below + e * 0.3989422804014327 * tl.exp(-0.5 * e * e)
    below = 1 / (1 + tl.exp(-1.5957691216057308 * (e + 0.044715 * e * e * e)))  # (1 + tanh) / 2, exact where tanh is near -1
    return e * below, below + e * below * (1 - below) * 1.5957691216057308 * (1 + 0.134145 * e * e)


@triton.jit
def gated_forward(E, G, H, K, e_m, g_m, ACT: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr):
    """H (M, K) = act(E) * G, rounded once."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    e = tl.load(E + row * e_m + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G + row * g_m + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = activated(e, ACT)
    tl.store(H + row * K + column, rounded(value * g, H.dtype.element_ty, BY_HAND), mask=inside)


@triton.jit
def gated_backward(DH, E, G, DG, H, K, e_m, g_m, ACT: tl.constexpr, HAS_H: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr):
    """DG (M, K) = DH * act(E), H = act(E) * G, and DH becomes DH * G * act'(E), the gradient of E."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    e = tl.load(E + row * e_m + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(G + row * g_m + column, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(DH + row * K + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = activated(e, ACT)
    tl.store(DG + row * K + column, rounded(dh * value, DG.dtype.element_ty, BY_HAND), mask=inside)
    tl.store(DH + row * K + column, rounded(dh * g * slope, DH.dtype.element_ty, BY_HAND), mask=inside)
    if HAS_H:
        tl.store(H + row * K + column, rounded(value * g, H.dtype.element_ty, BY_HAND), mask=inside)


class ByTriton:
    """The two passes by the Triton bodies; rows of any stride."""

    def __init__(self, config=None):
        self.config = config or CONFIG

    def forward(self, e, g, act):
        h = torch.empty(e.shape, device=e.device, dtype=e.dtype)
        self.run(gated_forward, e, g, (h,), act)
        return h

    def backward(self, dh, e, g, act, wants_h):
        """(de, dg, h or None); dh becomes de."""
        dg = torch.empty_like(dh)
        h = torch.empty_like(dh) if wants_h else None
        self.run(gated_backward, e, g, (dg, dg if h is None else h), act, dh, HAS_H=wants_h)
        return dh, dg, h

    def run(self, body, e, g, out, act, *first, **fixed):
        (m, k), block = e.shape, self.config["BLOCK"]
        e, g = (t if t.stride(1) == 1 else t.contiguous() for t in (e, g))
        if m and k:
            body[m, triton.cdiv(k, block)](*first, e, g, *out, k, e.stride(0), g.stride(0), ACT=act, BY_HAND=by_hand(e.dtype), enable_fp_fusion=True, **fixed, **self.config)


class ByLibrary:
    @staticmethod
    def forward(e, g, act):
        return ACTIVATIONS[act](e).mul_(g)

    @staticmethod
    def backward(dh, e, g, act, wants_h):
        value = ACTIVATIONS[act](e)
        dg = dh * value
        de = _BACKWARD[act](dh.mul_(g), e)
        return de, dg, value.mul_(g) if wants_h else None


def _way(e):
    return ByTriton() if e.is_cuda and e.dtype in (torch.float32, torch.bfloat16, torch.float16) else ByLibrary


class _Gated(torch.autograd.Function):
    """`w` is a tensor, or a function that makes it from codes; the adapters are one: `down` (R, K), `up` (N, R) of all, each scaled."""

    @staticmethod
    def forward(ctx, e, g, w, b, down, up, scale, act, way):
        lead, e, g = e.shape[:-1], e.reshape(-1, e.shape[-1]), g.reshape(-1, g.shape[-1])
        h = way.forward(e, g, act)
        y = F.linear(h, w() if callable(w) else w, b)
        shrunk = None
        if down is not None:
            shrunk = torch.mm(h, down.t())
            y.addmm_(shrunk, up.t(), alpha=scale)
        ctx.save_for_backward(e, g, None if callable(w) else w, down, up, shrunk)
        ctx.lead, ctx.read, ctx.rest = lead, w if callable(w) else None, (scale, act, way)
        return y.view(*lead, y.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        e, g, w, down, up, shrunk = ctx.saved_tensors
        scale, act, way = ctx.rest
        de, dg, *rest = _gradients(grad.reshape(-1, grad.shape[-1]), e, g, ctx.read() if w is None else w, down, up, shrunk, scale, act, way, ctx.needs_input_grad)
        shaped = (t if t is None else t.view(*ctx.lead, e.shape[1]) for t in (de, dg))
        return *shaped, *rest, None, None, None


def _gradients(grad, e, g, w, down, up, shrunk, scale, act, way, needs):
    """Gradients of e, g, w, b, down, up for rows."""
    back = torch.mm(grad, up).mul_(scale) if down is not None else None
    de, dg, wants_h = None, None, needs[2] or needs[4]
    if needs[0] or needs[1]:
        dh = torch.mm(grad, w)
        if back is not None:
            dh.addmm_(back, down)
        de, dg, h = way.backward(dh, e, g, act, wants_h)
    elif wants_h:
        h = way.forward(e, g, act)
    dw = torch.mm(grad.t(), h) if needs[2] else None
    ddown = torch.mm(back.t(), h) if needs[4] else None
    dup = torch.mm(grad.t(), shrunk).mul_(scale) if needs[5] else None
    return de, dg, dw, grad.sum(0) if needs[3] else None, ddown, dup


def gated_linear(act, count, format=None):
    """The op for an activation and a number of adapters. Over codes it has `over`, the op that makes its weight, and `uncoded`, the op over numbers."""
    return _made(act, count, format)


@functools.cache
def _made(act, count, format):
    over = None if format is None else getattr(importlib.import_module(f"rewrite.kernels.dequant_{format}"), f"dequant_{format}")
    named = [("w", torch.Tensor)]
    if over is not None:
        named = [(p.name, p.annotation) for p in inspect.signature(over.reference, eval_str=True).parameters.values() if p.annotation is not torch.dtype]
    width = len(named)

    def reference(e, g, *given):
        h = ACTIVATIONS[act](e) * g
        y = F.linear(h, given[0] if over is None else over(*given[:width], h.dtype), given[width])
        for i in range(width + 1, len(given), 3):
            down, up, scale = given[i : i + 3]
            y = y + scale * F.linear(F.linear(h, down), up)
        return y

    def launch(e, g, *given, way=None):
        if torch.compiler.is_compiling():  # as lora_linear has it
            return reference(e, g, *given) if torch.compiler.is_exporting() or not e.is_cuda else op.overload(e, g, *given)
        kind = e.device.type
        if torch.is_autocast_enabled(kind):
            return cast_once(functools.partial(launch, way=way), kind, e, g, *given)
        if e.shape != g.shape or e.dtype != g.dtype:  # what broadcasts or is promoted
            return reference(e, g, *given)
        w = given[0] if over is None else functools.partial(over.launch, *given[:width], e.dtype)
        return _Gated.apply(e, g, w, given[width], *_one(given[width + 1 :]), act, way or _way(e))

    def registered(e, g, *given):
        """What the registered op runs, below which nobody asks for gradients."""
        if e.shape != g.shape or e.dtype != g.dtype:
            return reference(e, g, *given)
        w = given[0] if over is None else over.launch(*given[:width], e.dtype)
        with torch.no_grad():
            return _Gated.apply(e, g, w, given[width], *_one(given[width + 1 :]), act, _way(e))

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, torch.Tensor)))
        ctx.rest = tuple(None if isinstance(a, torch.Tensor) else (a,) for a in inputs)

    def backward(ctx, grad):
        """What is shrunk is made again too."""
        tensors = iter(ctx.saved_tensors)
        e, g, *given = [next(tensors) if a is None else a[0] for a in ctx.rest]
        w, needs, lead = given[0] if over is None else over(*given[:width], e.dtype), ctx.needs_input_grad, e.shape
        down, up, scale = _one(given[width + 1 :])
        e, g, grad = (t.reshape(-1, t.shape[-1]) for t in (e, g, grad))
        some = [any(needs[i::3]) for i in (width + 3, width + 4)]
        shrunk = ByLibrary.forward(e, g, act) @ down.mT if some[1] else None  # a compiler fuses what is not a product
        wanted = (needs[0], needs[1], over is None and needs[2], needs[width + 2], *some)
        de, dg, dw, db, ddown, dup = _gradients(grad, e, g, w, down, up, shrunk, scale, act, ByLibrary, wanted)
        found, column = [*([dw] if over is None else [None] * width), db], 0
        for i in range(width + 1, len(given), 3):
            place = slice(column, column := column + len(given[i]))
            alone = count == 1
            found += [None if ddown is None else ddown[place], None if dup is None else dup[:, place] if alone else dup[:, place] * given[i + 2], None]
        return *(t if t is None else t.view(lead) for t in (de, dg)), *found

    asked = [("e", torch.Tensor), ("g", torch.Tensor), *named, ("b", torch.Tensor | None)]
    for j in range(count):
        one = "" if count == 1 else f"_{j}"
        asked += [(f"down{one}", torch.Tensor), (f"up{one}", torch.Tensor), (f"scale{one}", float)]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in asked]
    reference.__signature__ = inspect.Signature(parameters, return_annotation=torch.Tensor)
    launch.__qualname__ = f"gated_linear({act!r}, {count}, {format!r}).launch"  # where it is found

    op = Op(reference, launch, name="_".join(map(str, ("gated_linear", act, count, *([format] if format else ())))))
    op.format = format
    if over is not None:
        op.over, op.uncoded = over, gated_linear(act, count)
    op.definition.register_kernel(("cpu", "cuda"))(registered)
    return op.differentiates(keep, backward)


def _one(adapters):
    """(down, up, scale) of all adapters as one."""
    if not adapters:
        return None, None, 1.0
    if len(adapters) == 3:
        return tuple(adapters)
    return torch.cat(adapters[::3]), torch.cat([scale * up for up, scale in zip(adapters[1::3], adapters[2::3])], 1), 1.0
