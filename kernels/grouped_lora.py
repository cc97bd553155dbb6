"""Low-rank adapters of many owners in one batch: each row of the batch has one of the stacked adapters, or none.

    out[b] = y[b] + scale * (x[b] down[slot[b]]') up[slot[b]]'      where mask[b], else y[b]

Shapes: x (B, L, K), y (B, L, N), down (A, R, K), up (A, N, R), slot (B) in 0 … A - 1, mask (B). Adapters of different ranks are stacked to the greatest,
with zeros behind (`stack`). A is as large as memory allows; a row touches its own adapter alone, also where another one is not finite.
Bytes, in elements: forward reads B·L·(K + N) and R·(K + N) for each adapter in use, and writes B·L·(N + R), whatever the number of adapters; with the body
run by vmap, the adapters of all rows are copied first, and y is gone through four times.
Two launches on a GPU, x to its rank and back; which adapter is read on the device, so that a captured graph stays right when the rows of the adapters change.
For few rows of x the first one splits K into parts, which the second adds up in order. Backward: the same two, and one for the gradients of each adapter.
Chen et al. 2023 (Punica), arXiv:2310.18547.
"""

import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensor

from rewrite.kernels.op import Op
from rewrite.kernels.rounding import by_hand, rounded

#: tiles that every chip from sm_80 on holds, by the bytes of an entry
CONFIGS = {2: {"BLOCK_L": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}, 4: {"BLOCK_L": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}}
PROGRAMS, PARTS = 264, 16  # programs that fill a chip, the most parts that K is split into
#: the greatest rank, by the bytes of an entry: above it registers are spilled
MOST = {2: 128, 4: 64}


def reference(y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, slot: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    h = torch.bmm(x, down.index_select(0, slot).mT)
    return torch.where(mask.view(-1, 1, 1), y + scale * torch.bmm(h, up.index_select(0, slot).mT), y)


def in_a_batch(y, x, down, up, slot, mask, scale):
    """The same as a batch says it, which runs the body of lora by vmap: what `fuse` looks for."""
    y, x = y.unsqueeze(1), x.unsqueeze(1)

    def row(y, x, down, up):
        return y + scale * torch.matmul(torch.matmul(x, down.mT), up.mT)

    new = torch.vmap(row)(y, x, down.index_select(0, slot), up.index_select(0, slot))
    return torch.where(mask.view(-1, 1, 1, 1), new, y).squeeze(1)


def stack(adapters):
    """(down, up) of pairs (down (R, K), up (N, R)) whose ranks may differ."""
    rank = max(down.shape[0] for down, _ in adapters)
    pad = torch.nn.functional.pad
    return torch.stack([pad(d, (0, 0, 0, rank - d.shape[0])) for d, _ in adapters]), torch.stack([pad(u, (0, rank - u.shape[1])) for _, u in adapters])


@triton.jit
def shrink(
    X, SLOT, MASK, W, H, B, L, K, x_b, x_l, x_k, w_a, w_r, w_k, steps, tiles,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """H (parts, B, L, R) = X (B, L, K) W[slot]' (K, R), part p of K having the steps p * steps …; zeros for rows without an adapter."""
    row = tl.program_id(0).to(tl.int64) // tiles
    place = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    part, rank = tl.program_id(1), tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    if tl.load(MASK + row) != 0:
        adapter = tl.load(SLOT + row).to(tl.int64)
        for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(K, BLOCK_K))):
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            x = tl.load(X + row * x_b + place[:, None] * x_l + k[None, :] * x_k, mask=(place[:, None] < L) & (k[None, :] < K), other=0.0)
            w = tl.load(W + adapter * w_a + rank[None, :] * w_r + k[:, None] * w_k, mask=(rank[None, :] < R) & (k[:, None] < K), other=0.0)
            if BY_HAND:  # the interpreter multiplies the bits of bfloat16
                x, w = x.to(tl.float32), w.to(tl.float32)
            total = tl.dot(x, w, total, input_precision="ieee")
    tl.store(H + ((part.to(tl.int64) * B + row) * L + place[:, None]) * R + rank[None, :], total, mask=(place[:, None] < L) & (rank[None, :] < R))


@triton.jit
def expand(
    Y, H, SLOT, MASK, W, OUT, scale, B, L, N, y_b, y_l, w_a, w_r, w_n, tiles, parts,
    R: tl.constexpr, BLOCK_R: tl.constexpr, HAS_Y: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT (B, L, N) = Y + scale * (the sum of the parts of H) (L, R) W[slot] (R, N)."""
    row = tl.program_id(0).to(tl.int64) // tiles
    place = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    column, rank = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    inside = (place[:, None] < L) & (column[None, :] < N)
    total = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    if tl.load(MASK + row) != 0:
        adapter = tl.load(SLOT + row).to(tl.int64)
        h = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
        for part in range(parts):
            h += tl.load(H + ((row + part * B) * L + place[:, None]) * R + rank[None, :], mask=(place[:, None] < L) & (rank[None, :] < R), other=0.0)
        w = tl.load(W + adapter * w_a + rank[:, None] * w_r + column[None, :] * w_n, mask=(rank[:, None] < R) & (column[None, :] < N), other=0.0)
        if BY_HAND:
            w = w.to(tl.float32)
        total = tl.dot(h.to(w.dtype), w, input_precision="ieee") * scale
    if HAS_Y:
        total += tl.load(Y + row * y_b + place[:, None] * y_l + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + (row * L + place[:, None]) * N + column[None, :], rounded(total, OUT.dtype.element_ty, BY_HAND), mask=inside)


@triton.jit
def gradient(
    P, Q, SLOT, MASK, OUT, scale, B, L, I, J, p_b, p_l, p_i, q_b, q_l, q_j,
    BY_HAND: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """OUT (A, I, J)[a] = scale * the sum of P[b]' (I, L) Q[b] (L, J) over the rows b of adapter a."""
    adapter = tl.program_id(2)
    i, j = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for b in range(B):
        if (tl.load(SLOT + b) == adapter) & (tl.load(MASK + b) != 0):
            for start in range(0, L, BLOCK_L):
                place = start + tl.arange(0, BLOCK_L)
                p = tl.load(P + place[None, :] * p_l + i[:, None] * p_i, mask=(place[None, :] < L) & (i[:, None] < I), other=0.0)
                q = tl.load(Q + place[:, None] * q_l + j[None, :] * q_j, mask=(place[:, None] < L) & (j[None, :] < J), other=0.0)
                if BY_HAND:
                    p, q = p.to(tl.float32), q.to(tl.float32)
                total = tl.dot(p, q, total, input_precision="ieee")
        P += p_b  # a row and its stride may lie beyond what 32 bits hold
        Q += q_b
    out = OUT + (adapter.to(tl.int64) * I + i[:, None]) * J + j[None, :]
    tl.store(out, rounded(total * scale, OUT.dtype.element_ty, BY_HAND), mask=(i[:, None] < I) & (j[None, :] < J))


def block_of(rank):
    """The ranks that a tile holds: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(rank))


class ByTriton:
    """The three launches; `w` of the first two as (A, rank, long) of any strides."""

    def __init__(self, slot, mask, config=None, parts=None):
        self.slot, self.mask, self.config, self.parts = slot, mask.view(torch.uint8) if mask.dtype == torch.bool else mask, config, parts

    def _sizes(self, x):
        config = dict(self.config or CONFIGS[x.element_size()])
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        block = min(config["BLOCK_L"], max(16, triton.next_power_of_2(x.shape[1])))
        return block, triton.cdiv(x.shape[1], block), config, {**options, "enable_fp_fusion": True, "BY_HAND": by_hand(x.dtype)}

    def shrink(self, x, w):
        """(parts, B, L, R) in float32."""
        (batch, length, inner), rank = x.shape, w.shape[1]
        block, tiles, config, options = self._sizes(x)
        steps = triton.cdiv(inner, config["BLOCK_K"])
        parts = self.parts or max(1, min(PROGRAMS // (batch * tiles), steps // 4, PARTS))
        h = torch.empty(parts, batch, length, rank, device=x.device, dtype=torch.float32)
        shrink[batch * tiles, parts](
            x, self.slot, self.mask, w, h, batch, length, inner, *x.stride(), *w.stride(), triton.cdiv(steps, parts), tiles,
            R=rank, BLOCK_R=block_of(rank), BLOCK_L=block, BLOCK_K=config["BLOCK_K"], **options,
        )  # fmt: skip
        return h

    def expand(self, y, h, w, scale, like):
        """y + scale * h w[slot]; without y, zeros where there is no adapter."""
        batch, length, out_dim = h.shape[1], h.shape[2], w.shape[2]
        out = torch.empty(batch, length, out_dim, device=like.device, dtype=like.dtype)
        y = y if y is None or y.stride(2) == 1 else y.contiguous()
        block, tiles, config, options = self._sizes(out)
        expand[batch * tiles, triton.cdiv(out_dim, config["BLOCK_N"])](
            out if y is None else y, h, self.slot, self.mask, w, out, scale, batch, length, out_dim, *(out if y is None else y).stride()[:2], *w.stride(), tiles, h.shape[0],
            R=h.shape[3], BLOCK_R=block_of(h.shape[3]), HAS_Y=y is not None, BLOCK_L=block, BLOCK_N=config["BLOCK_N"], **options,
        )  # fmt: skip
        return out

    def gradient(self, p, q, adapters, scale):
        """(A, I, J): scale * p' q, summed over the rows of each adapter."""
        (batch, length, i), j = p.shape, q.shape[2]
        out = torch.empty(adapters, i, j, device=p.device, dtype=p.dtype)
        block, _, config, options = self._sizes(p)
        tall, wide = (block_of(size) if size <= 64 else config["BLOCK_N"] for size in (i, j))
        gradient[triton.cdiv(i, tall), triton.cdiv(j, wide), adapters](
            p, q, self.slot, self.mask, out, scale, batch, length, i, j, *p.stride(), *q.stride(), BLOCK_L=block, BLOCK_I=tall, BLOCK_J=wide, **options
        )
        return out


class ByLibrary:
    """The same by batched products over the adapters of each row."""

    def __init__(self, slot, mask, look=False):
        """`look`: at the mask, which costs nothing on a CPU; a traced one cannot be looked at."""
        self.slot, self.mask = slot, mask.view(-1, 1, 1)
        self.everyone = look and mask.device.type == "cpu" and bool(mask.all())

    def own(self, w):
        """The adapter of each row; copied as it lies."""
        return w.index_select(0, self.slot) if w.is_contiguous() else w.mT.index_select(0, self.slot).mT

    def shrink(self, x, w):
        return torch.bmm(x, self.own(w).mT).unsqueeze(0)

    def expand(self, y, h, w, scale, like):
        own = self.own(w)
        new = torch.bmm(h[0], own).mul_(scale) if y is None else torch.baddbmm(y, h[0], own, alpha=scale)
        if self.everyone:
            return new
        return torch.where(self.mask, new, torch.zeros_like(new) if y is None else y)

    def gradient(self, p, q, adapters, scale):
        own = torch.where(self.mask, torch.bmm(p.mT, q), 0.0)
        return own.new_zeros(adapters, *own.shape[1:]).index_add_(0, self.slot, own, alpha=scale)


def way_of(x, rank, slot, mask):
    """Which of the two runs here."""
    return ByLibrary(slot, mask, look=True) if unsuited(x, rank) else ByTriton(slot, mask)


def unsuited(x, rank):
    """Why the Triton bodies do not take this, or None. They have not been timed on a GPU yet."""
    if not x.is_cuda:
        return f"no body for a {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} has no tile"
    return f"a tile of rank {rank} does not fit a chip" if rank > MOST[x.element_size()] else None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, down, up, scale, way):
        h = way.shrink(x, down)
        ctx.save_for_backward(x, h, down, up)
        ctx.scale, ctx.way = scale, way
        return way.expand(y, h, up.mT, scale, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *gradients(grad, *ctx.saved_tensors, ctx.scale, ctx.way, ctx.needs_input_grad[:4]), None, None


def gradients(grad, x, h, down, up, scale, way, needs):
    """Gradients of y, x, down, up, those that are needed."""
    dx = ddown = dup = None
    if needs[1] or needs[2]:
        back = way.shrink(grad, up.mT)
        dx = way.expand(None, back, down, scale, x) if needs[1] else None
        ddown = way.gradient(back.sum(0).to(x.dtype), x, down.shape[0], scale) if needs[2] else None
    if needs[3]:
        dup = way.gradient(grad, h.sum(0).to(grad.dtype), up.shape[0], scale)
    return grad if needs[0] else None, dx, ddown, dup


def launch(y, x, down, up, slot, mask, scale, way=None):
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        plain = torch.compiler.is_exporting() or not x.is_cuda  # what is exported must be readable without us, and on a CPU the compiler fuses better
        return (reference if plain else grouped_lora)(y, x, down, up, slot, mask, scale)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, down, up = (t.to(dtype) for t in (x, down, up))
        with torch.autocast(kind, enabled=False):
            if y.dtype == dtype:
                return launch(y, x, down, up, slot, mask, scale, way)
            return y + launch(y.new_zeros(y.shape, dtype=dtype), x, down, up, slot, mask, scale, way)  # the products are cast, the sum is not
    if not y.numel():
        return reference(y, x, down, up, slot, mask, scale)
    way = way or way_of(x, down.shape[1], slot, mask)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, down, up)):
        return _Grouped.apply(y, x, down, up, scale, way)
    return way.expand(y, way.shrink(x, down), up.mT, scale, y)


def _keep(ctx, inputs, output):
    _, x, down, up, slot, mask, ctx.scale = inputs
    ctx.save_for_backward(x, down, up, slot, mask)


def _backward(ctx, grad):
    x, down, up, slot, mask = ctx.saved_tensors
    way = ByLibrary(slot, mask)
    return *gradients(grad, x, way.shrink(x, down), down, up, ctx.scale, way, ctx.needs_input_grad[:4]), None, None, None


def fake(y, x, down, up, slot, mask, scale):
    return y.new_empty(y.shape)


def registered(y, x, down, up, slot, mask, scale):
    """What the registered op runs."""
    way = way_of(x, down.shape[1], slot, mask)
    return way.expand(y, way.shrink(x, down), up.mT, scale, y).contiguous()


grouped_lora = Op(reference, launch, fake).differentiates(_keep, _backward)
grouped_lora.pattern = in_a_batch
grouped_lora.definition.register_kernel(("cpu", "cuda"))(registered)
