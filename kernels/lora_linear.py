"""A linear with a low-rank adapter beside it, forward and backward in one op.

    y = x w' + b + scale * (x down') up'

Shapes: x (…, K), w (N, K), b (N) or None, down (R, K), up (N, R), y (…, N); M rows in all.
Bytes, in elements, beside those of the plain linear: forward reads M·K + M·R and writes M·R, where the separate ops also read and write M·N
three times over (product, scaling, sum). For a frozen w backward keeps x and x down' alone (x down' alone where down is frozen too), never the
base's output; it reads w once.

Eager code runs the library's products, the second added to the first in place, with the library's own gradients: what Python does between them is
all that such an op costs beside its products (4 rows of 64, rank 16, forward and backward on one core of an EPYC, on top of the plain linear's 20 µs: 32 µs, the
separate ops 43, an autograd function of our own 57). The function is for the Triton body.
"""

import functools

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from rewrite.kernels import chips
from rewrite.kernels.op import Op, cast_once

#: tiles that every chip from sm_80 on holds (float32 at rank 64 spills in the wider one); what was tuned on a chip is in its file (`chips`)
CONFIGS = {
    "default": {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    "float32": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
}


def reference(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    return F.linear(x, w, b) + scale * F.linear(F.linear(x, down), up)


def turned(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """As Conv1D writes it: rows of x, w stored in × out."""
    return torch.addmm(b, x, w) + scale * F.linear(torch.mm(x, down.permute(1, 0)), up)


def traced(x, w, b, down, up, scale):
    """For a compiler that fuses sums: scaled where it is narrow, so that backward scales no gradient of all M·N."""
    return F.linear(x, w, b) + F.linear(scale * F.linear(x, down), up)


@triton.jit
def product_plus_low_rank(
    A, B, P, Q, BIAS, OUT, scale, M, N, K,
    a_m, a_k, b_k, b_n, p_m, p_r, q_r, q_n, out_m,
    R: tl.constexpr, BLOCK_R: tl.constexpr, HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """OUT (M, N) = A (M, K) B (K, N) + scale * P (M, R) Q (R, N) + BIAS (N), summed in float32 and rounded once. WIDEN: multiply in float32 too."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner, rank = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    p = tl.load(P + row[:, None] * p_m + rank[None, :] * p_r, mask=(row[:, None] < M) & (rank[None, :] < R), other=0.0)
    q = tl.load(Q + rank[:, None] * q_r + column[None, :] * q_n, mask=(rank[:, None] < R) & (column[None, :] < N), other=0.0)
    if WIDEN:
        p, q = p.to(tl.float32), q.to(tl.float32)
    total = tl.dot(p, q, input_precision="ieee") * scale
    for start in range(0, K, BLOCK_K):
        k = start + inner
        a = tl.load(A + row[:, None] * a_m + k[None, :] * a_k, mask=(row[:, None] < M) & (k[None, :] < K), other=0.0)
        b = tl.load(B + k[:, None] * b_k + column[None, :] * b_n, mask=(k[:, None] < K) & (column[None, :] < N), other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(BIAS + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + row[:, None] * out_m + column[None, :], total.to(OUT.dtype.element_ty), mask=(row[:, None] < M) & (column[None, :] < N))


def fused_product(a, b, p, q, bias, scale, config=None):
    """a @ b + scale * p @ q + bias by the Triton body; matrices of any strides."""
    (m, k), n, rank = a.shape, b.shape[1], p.shape[1]
    out = a.new_empty(m, n)
    if not out.numel():
        return out
    config = config or CONFIGS["float32" if a.dtype == torch.float32 else "default"]
    grid = (triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_N"]))
    widen = a.dtype == torch.bfloat16 and triton.knobs.runtime.interpret  # the interpreter multiplies the bits of bfloat16
    strides = (*a.stride(), *b.stride(), *p.stride(), *q.stride(), out.stride(0))
    product_plus_low_rank[grid](a, b, p, q, bias if bias is not None else out, out, scale, m, n, k, *strides, R=rank, BLOCK_R=block_of(rank), HAS_BIAS=bias is not None, WIDEN=widen, enable_fp_fusion=True, **config)
    return out


def block_of(rank):
    """The ranks that a tile holds: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(rank))


def plain_product(a, b, p, q, bias, scale):
    """The same by the library's products; the second adds to the first in place."""
    out = a @ b if bias is None else torch.addmm(bias, a, b)
    return out.addmm_(p, q, alpha=scale)


class _LoRALinear(torch.autograd.Function):
    """The op by the Triton body, both ways."""

    @staticmethod
    def forward(ctx, x, w, b, down, up, scale, product):
        rows = x.reshape(-1, x.shape[-1])
        h = rows @ down.mT
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(rows if needs_x else None, h, w, down, up)
        ctx.scale, ctx.product, ctx.lead = scale, product, x.shape[:-1]
        return product(rows, w.mT, h, up.mT, b, scale).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, h, w, down, up = ctx.saved_tensors
        found = gradients(grad.reshape(-1, grad.shape[-1]), rows, h, w, down, up, ctx.scale, ctx.needs_input_grad, ctx.product)
        dx = found[0] if found[0] is None else found[0].view(*ctx.lead, w.shape[1])
        return dx, *found[1:], None, None


def gradients(g, x, h, w, down, up, scale, needs, product=plain_product):
    """Gradients of x, w, b, down, up for rows g, those that are needed: scale * (g up) is made once for x and down."""
    dx = dw = db = ddown = dup = None
    if needs[0] or needs[3]:
        back = (g @ up).mul_(scale)
        dx = product(g, w, back, down, None, 1.0) if needs[0] else None
        ddown = back.mT @ x if needs[3] else None
    if needs[1]:
        dw = g.mT @ x
    if needs[2]:
        db = g.sum(0)
    if needs[4]:
        dup = (g.mT @ h).mul_(scale)
    return dx, dw, db, ddown, dup


def launch(x, w, b, down, up, scale, product=None):
    if torch.compiler.is_compiling():  # what is exported must be readable without us; a registered op could not keep x down', which a compiler does by itself
        return (reference if torch.compiler.is_exporting() else traced)(x, w, b, down, up, scale)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return cast_once(launch, kind, x, w, b, down, up, scale, product)
    if product is None and x.is_cuda and x.element_size() == 2 and len(down) <= 64 and (config := chips.config("lora_linear", x.device)):
        product = functools.partial(fused_product, config=config)
    if product is not None:
        return _LoRALinear.apply(x, w, b, down, up, scale, product)
    rows = x.reshape(-1, x.shape[-1])
    y = F.linear(rows, w, b).addmm_(torch.mm(rows, down.t()), up.t(), alpha=scale)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], w.shape[0])


def _keep(ctx, inputs, output):
    x, w, _, down, up, ctx.scale = inputs
    ctx.save_for_backward(x, w, down, up)


def _backward(ctx, grad):
    x, w, down, up = ctx.saved_tensors
    rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    found = gradients(g, rows, rows @ down.mT, w, down, up, ctx.scale, ctx.needs_input_grad)
    return found[0] if found[0] is None else found[0].view(x.shape), *found[1:], None


lora_linear = Op(reference, launch).differentiates(_keep, _backward)
lora_linear.turned = turned
