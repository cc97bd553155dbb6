"""A linear whose weight is put together of a direction and a magnitude, its direction with a low-rank update; forward and backward in one op.

    y = x (v * magnitude / |v|)' + b        v = w + scale * up down, |v| per output row, without gradient

is, since what multiplies a row of the weight multiplies an output,

    y = (x w' + scale * (x down') up') * (magnitude / |v|) + b        |v| by `dora_norm`

    dora_linear()         w in numbers
    dora_linear("nf4")    w = dequant_nf4(codes, scales, nested, shape, x's dtype)

Shapes: x (…, K), w (N, K), b (N) or None, down (R, K), up (N, R), magnitude (N, 1), y (…, N); M rows in all.
Bytes, in elements, beside those of lora_linear: N·K for the norm, 2·M·N forward and 3·M·N backward for the magnitude, where the weight put together anew
reads and writes N·K eight times forward and as often backward. Backward keeps x, x down' and, for the magnitude, what it multiplies (M·N); no v, no weight.
Liu et al. 2024, arXiv:2402.09353.
"""

import functools
import importlib
import inspect

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from rewrite.kernels import dora_norm as norm
from rewrite.kernels.lora_linear import gradients
from rewrite.kernels.lora_linears import over_codes
from rewrite.kernels.op import Op, cast_once
from rewrite.kernels.rounding import by_hand, rounded

CONFIG = {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1}
TILES = 8  # of rows that a program goes through


@triton.jit
def gradients_of_scaling(
    GRAD, Z, GAIN, DZ, PARTS, M, N, grad_m, z_m,
    TILES: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DZ (M, N) = GRAD * GAIN (N); PARTS (parts, N): the sums of GRAD * Z over the rows of a part."""
    part, column = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    gain = tl.load(GAIN + column, mask=column < N, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(TILES):
        row = (part.to(tl.int64) * TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row[:, None] < M) & (column[None, :] < N)
        grad = tl.load(GRAD + row[:, None] * grad_m + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(grad * tl.load(Z + row[:, None] * z_m + column[None, :], mask=inside, other=0.0).to(tl.float32), 0)
        tl.store(DZ + row[:, None] * N + column[None, :], rounded(grad * gain[None, :], DZ.dtype.element_ty, BY_HAND), mask=inside)
    tl.store(PARTS + part.to(tl.int64) * N + column, total, mask=column < N)


def by_triton(grad, z, gain, config=None):
    """(grad * gain, the sum of grad * z over rows) in one pass."""
    grad, z = (t if t.stride(1) == 1 else t.contiguous() for t in (grad, z))
    (m, n), config = grad.shape, config or CONFIG
    parts = triton.cdiv(m, TILES * config["BLOCK_M"])
    dz, sums = torch.empty(m, n, device=grad.device, dtype=grad.dtype), torch.empty(parts, n, device=grad.device, dtype=torch.float32)
    if dz.numel():
        gradients_of_scaling[parts, triton.cdiv(n, config["BLOCK_N"])](
            grad, z, gain, dz, sums, m, n, grad.stride(0), z.stride(0), TILES=TILES, BY_HAND=by_hand(grad.dtype), enable_fp_fusion=True, **config
        )
    return dz, sums.sum(0).to(gain.dtype)


def by_library(grad, z, gain):
    return grad * gain, (grad * z).sum(0)


class _Scaled(torch.autograd.Function):
    """z * gain + b; backward goes through its gradient once where there is a body for that."""

    @staticmethod
    def forward(ctx, z, gain, b, way):
        ctx.save_for_backward(z, gain)
        ctx.way = way
        return z * gain if b is None else torch.addcmul(b, z, gain)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        z, gain = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            dz, dgain = ctx.way(grad, z, gain)
        else:
            dz, dgain = grad * gain, None
        return dz, dgain, grad.sum(0) if ctx.needs_input_grad[2] else None, None


def _scaled(z, gain, b, way):
    if not torch.is_grad_enabled():
        return z.mul_(gain) if b is None else z.mul_(gain).add_(b)
    way = way or (by_triton if z.is_cuda and z.dtype in (torch.float32, torch.bfloat16, torch.float16) else None)
    if way is not None:
        return _Scaled.apply(z, gain, b, way)
    return z * gain if b is None else torch.addcmul(b, z, gain)


def dora_linear(format=None):
    """The op over a weight in numbers, or in codes. It has `format`; over codes `over`, the op that makes its weight, and `uncoded`, the op over numbers."""
    return _made(format)


@functools.cache
def _made(format):
    over = None if format is None else getattr(importlib.import_module(f"rewrite.kernels.dequant_{format}"), f"dequant_{format}")
    named = [inspect.Parameter("w", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=torch.Tensor)]
    if over is not None:
        named = [p for p in inspect.signature(over.reference, eval_str=True).parameters.values() if p.annotation is not torch.dtype]
    width, norms = len(named), norm.numbers if over is None else norm.Norms(over.launch)
    product = None if over is None else over_codes(format)
    weight = (lambda dtype, w: w) if over is None else lambda dtype, *codes: over(*codes, dtype)

    def reference(x, *given):
        w, (b, down, up, magnitude, scale) = weight(x.dtype, *given[:width]), given[width:]
        v = w + scale * torch.matmul(up, down.flatten(1)).view(w.shape)
        return F.linear(x, v * (magnitude / torch.linalg.vector_norm(v, dim=(1,), keepdim=True).detach()), b)

    def composed(x, *given):
        """The second equation, for a compiler: the norm is one node."""
        w, (b, down, up, magnitude, scale) = weight(x.dtype, *given[:width]), given[width:]
        gain = (magnitude.view(-1) / norm.dora_norm(w, down, up, scale)).to(x.dtype)
        y = ((F.linear(x, w) if over is None else product.launch(x, *given[:width], None)) + scale * F.linear(F.linear(x, down), up)) * gain
        return y if b is None else y + b

    def launch(x, *given, way=None):
        if torch.compiler.is_compiling():
            return (reference if torch.compiler.is_exporting() else composed)(x, *given)
        stored, (b, down, up, magnitude, scale) = given[:width], given[width:]
        gain = (magnitude.view(-1) / norms(stored if over is None else (*stored, x.dtype), down, up, scale)).to(x.dtype)
        return multiplied(x, stored, b, down, up, gain, scale, way)

    def multiplied(x, stored, b, down, up, gain, scale, way):
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return cast_once(lambda x, b, down, up, gain, *stored: multiplied(x, stored, b, down, up, gain, scale, way), kind, x, b, down, up, gain, *stored)
        rows = x.reshape(-1, x.shape[-1])
        z = F.linear(rows, *stored) if over is None else product.launch(rows, *stored, None)
        z = z.addmm_(torch.mm(rows, down.t()), up.t(), alpha=scale)
        return _scaled(z, gain, b, way).view(*x.shape[:-1], len(up))

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, torch.Tensor)))
        ctx.rest = tuple(None if isinstance(a, torch.Tensor) else (a,) for a in inputs)

    def backward(ctx, grad):
        """By the second equation, whose products are made again."""
        tensors = iter(ctx.saved_tensors)
        x, *given = [next(tensors) if a is None else a[0] for a in ctx.rest]
        w, (b, down, up, magnitude, scale) = weight(x.dtype, *given[:width]), given[width:]
        needs, own = ctx.needs_input_grad, norm.dora_norm(w, down, up, scale)
        gain = (magnitude.view(-1) / own).to(x.dtype)
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        h, dz = rows @ down.mT, grad * gain
        found = gradients(dz, rows, h, w, down, up, scale, (needs[0], over is None and needs[1], False, needs[width + 2], needs[width + 3]))
        dmagnitude = None
        if needs[width + 4]:
            z = torch.addmm(rows @ w.mT, h, up.mT, alpha=scale)
            dmagnitude = ((grad * z).sum(0) / own).to(magnitude.dtype).view(magnitude.shape)
        dx = found[0] if found[0] is None else found[0].view(x.shape)
        return dx, *([None] * width if over is not None else [found[1]]), grad.sum(0) if b is not None and needs[width + 1] else None, *found[3:], dmagnitude, None

    asked = [("b", torch.Tensor | None), ("down", torch.Tensor), ("up", torch.Tensor), ("magnitude", torch.Tensor), ("scale", float)]
    parameters = [("x", torch.Tensor), *((p.name, p.annotation) for p in named), *asked]
    reference.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in parameters], return_annotation=torch.Tensor
    )
    launch.__qualname__ = f"dora_linear({format!r}).launch"  # where it is found

    def fake(x, *given):
        return x.new_empty(*x.shape[:-1], len(given[width + 2]))

    op = Op(reference, launch, fake, "dora_linear" if format is None else f"dora_linear_{format}")
    op.format = format
    if over is not None:
        op.over, op.uncoded = over, dora_linear()
    return op.differentiates(keep, backward)
