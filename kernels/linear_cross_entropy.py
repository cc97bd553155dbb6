"""The loss of a language model's head, without all of its logits at once; forward and backward in one op.

    logits = x w' + b        loss = sum over tokens of (log sum exp(logits) - logits[label]) / items        labels of -100 count nothing

Shapes: x (…, K), w (N, K), b (N) or None, labels (…) already shifted, items () the number that the sum is divided by; M tokens in all. The softmax
and all sums are in float32 (float64 stays what it is), as transformers' loss has them.
Bytes: the separate ops keep M·N float32 (log softmax), x too where w trains, and while they run hold M·N of the model's dtype and up to 2·M·N float32 beside
it. Here tokens go in chunks whose logits take about as much room as x; the gradient of x is made while a chunk's logits are at hand and is all that
backward keeps: M·K, and N·K more where w trains. To make the logits again in backward instead would keep x, as many bytes, and cost a product more. Where
a compiler traces, an op cannot keep what it does not return: there they are made again.
Where nothing but -100 is labelled the loss is 0/0 and the gradient 0, as in PyTorch.
Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989.
"""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from rewrite.kernels.op import Op, cast_once
from rewrite.kernels.rounding import by_hand, rounded

IGNORED = -100
CONFIG = {"BLOCK": 4096, "num_warps": 8, "num_stages": 1}
LEAST = 256  # tokens of a chunk: each chunk reads w once more


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def reference(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, labels: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, w, b).flatten(0, -2)
    return F.cross_entropy(logits.to(wide(logits.dtype)), labels.flatten(), ignore_index=IGNORED, reduction="sum") / items


@triton.jit
def softmax_gradient(
    LOGITS, LABELS, LOSSES, N, logits_m,
    IGNORED: tl.constexpr, WANTED: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LOSSES (M) of LOGITS (M, N), which become softmax(LOGITS) - one(LABELS) where WANTED; rows without a label give 0 and become 0."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * logits_m
    label = tl.load(LABELS + row)
    if label == IGNORED:
        tl.store(LOSSES + row, 0.0)
        if WANTED:
            for start in range(0, N, BLOCK):
                column = start + tl.arange(0, BLOCK)
                tl.store(LOGITS + column, tl.zeros((BLOCK,), LOGITS.dtype.element_ty), mask=column < N)
    else:
        # before the first sum, at which all warps wait for each other: afterwards one of them may have written there; no such class: the loss is nan
        picked = tl.load(LOGITS + label, mask=(label >= 0) & (label < N), other=float("nan")).to(tl.float32)
        most, total = float("-inf"), 0.0
        for start in range(0, N, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(LOGITS + column, mask=column < N, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(most, tl.max(z, 0))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(most - shift) + tl.sum(tl.exp(z - shift), 0)
            most = higher
        above = tl.log(total)
        tl.store(LOSSES + row, above - (picked - most))
        if WANTED:
            for start in range(0, N, BLOCK):
                column = start + tl.arange(0, BLOCK)
                z = tl.load(LOGITS + column, mask=column < N, other=float("-inf")).to(tl.float32)
                p = tl.exp(z - most - above) - tl.where(column == label, 1.0, 0.0)  # what is near comes off first
                tl.store(LOGITS + column, rounded(p, LOGITS.dtype.element_ty, BY_HAND), mask=column < N)


def by_triton(logits, labels, wanted, config=None):
    """(the losses of a chunk's rows, their gradients in the place of its logits, or None)."""
    losses = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    softmax_gradient[(len(logits),)](
        logits, labels, losses, logits.shape[1], logits.stride(0), IGNORED=IGNORED, WANTED=wanted, BY_HAND=by_hand(logits.dtype), enable_fp_fusion=True, **(config or CONFIG)
    )
    return losses, logits if wanted else None


def by_library(logits, labels, wanted):
    """The same; float32 logits are written over too."""
    z, counts = logits.to(wide(logits.dtype)), labels != IGNORED
    at = torch.where(counts, labels, 0)[:, None]
    z.sub_(z.amax(1, keepdim=True))
    above = z.exp().sum(1, keepdim=True).log_()
    losses = (above - z.gather(1, at)).squeeze(1).masked_fill_(~counts, 0)
    if not wanted:
        return losses, None
    z.sub_(above).exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=z.dtype)).masked_fill_(~counts[:, None], 0)
    return losses, z.to(logits.dtype)


def rows_of(m, n, k):
    """Tokens of a chunk: as many as have logits of about the size of x."""
    return max(LEAST, triton.next_power_of_2(triton.cdiv(m * k, n)))


def in_chunks(x, w, b, labels, wants=(False, False, False), way=None, rows=None):
    """(sum of the losses, gradients of x, w, b that are wanted, for rows x): chunk by chunk. The gradient of w is summed in float32, and stays so for float16, whose range it may leave."""
    way = way or (by_triton if x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) else by_library)
    (m, k), n = x.shape, len(w)
    full, rows = wide(x.dtype), rows or rows_of(m, n, k)
    losses = torch.zeros(m, device=x.device, dtype=full)
    dx = torch.empty_like(x) if wants[0] else None
    dw = torch.zeros(n, k, device=x.device, dtype=full) if wants[1] else None
    db = torch.zeros(n, device=x.device, dtype=full) if wants[2] else None
    for start in range(0, m, rows):
        part = slice(start, start + rows)
        losses[part], p = way(F.linear(x[part], w, b), labels[part], any(wants))
        if wants[0]:
            torch.mm(p, w, out=dx[part])
        if wants[1]:
            dw.addmm_(p.t(), x[part]) if p.dtype == full else dw.add_(p.t() @ x[part])
        if wants[2]:
            db.add_(p.sum(0, dtype=full))
    narrow = lambda t: t if t is None or x.dtype == torch.float16 else t.to(x.dtype)  # noqa: E731
    return losses.sum(), dx, narrow(dw), narrow(db)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b, labels, items, way, rows):
        total, *found = in_chunks(x, w, b, labels, ctx.needs_input_grad[:3], way, rows)
        ctx.save_for_backward(*found, _share(labels, items))
        ctx.dtype = x.dtype
        return total / items

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *found, share = ctx.saved_tensors
        grad = grad * share
        return *(None if t is None else (t * grad).to(ctx.dtype) for t in found), None, None, None, None


def _share(labels, items):
    """What a token has in the loss: nothing where no token has a label."""
    return torch.where((labels != IGNORED).any(), 1 / items, 0)


def launch(x, w, b, labels, items, way=None, rows=None):
    if torch.compiler.is_compiling():
        return (reference if torch.compiler.is_exporting() else linear_cross_entropy.overload)(x, w, b, labels, items)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return cast_once(lambda x, w, b: launch(x, w, b, labels, items, way, rows), kind, x, w, b)
    x, labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    if len(x) != len(labels):
        raise ValueError(f"{len(x)} tokens and {len(labels)} labels: there must be a label for each.")
    if not torch.is_grad_enabled():
        return in_chunks(x, w, b, labels, way=way, rows=rows)[0] / items
    return _Loss.apply(x, w, b, labels, items, way, rows)


def all_gradients(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, labels: torch.Tensor, wants: list[bool]) -> list[torch.Tensor]:
    """For a compiler: the gradients of the sum, an empty tensor for one that is not wanted."""
    _, dx, *rest = in_chunks(x.reshape(-1, x.shape[-1]), w, b, labels.reshape(-1), wants)
    return [x.new_empty(0) if t is None else t for t in (dx if dx is None else dx.view(x.shape), *rest)]


def _kept(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, w, b, labels, items = ctx.saved_tensors
    needs, grad = ctx.needs_input_grad[:3], grad * _share(labels, items)
    found = gradients.overload(x, w, b, labels, list(needs))
    return *((t * grad).to(x.dtype) if needed else None for t, needed in zip(found, needs)), None, None


def _fake_gradients(x, w, b, labels, wants):
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    shapes = ((x.shape, x.dtype), (w.shape, dtype), (w.shape[:1], dtype))
    return [x.new_empty(shape, dtype=kind) if wanted else x.new_empty(0) for (shape, kind), wanted in zip(shapes, wants)]


gradients = Op(all_gradients, all_gradients, _fake_gradients, "linear_cross_entropy_gradients")
linear_cross_entropy = Op(reference, launch, lambda x, w, b, labels, items: x.new_empty((), dtype=wide(x.dtype))).differentiates(_kept, _backward)


@linear_cross_entropy.definition.register_kernel(("cpu", "cuda"))
def registered(x, w, b, labels, items):
    return in_chunks(x.reshape(-1, x.shape[-1]), w, b, labels.reshape(-1))[0] / items
