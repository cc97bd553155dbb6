"""Low-rank adapters of many owners in one batch: each row of the batch has one of the stacked adapters, or none.

    out[b] = y[b] + scale * (x[b] down[slot[b]]') up[slot[b]]'      where mask[b], else y[b]

    grouped_lora             adapters of one rank
    grouped_loras(3)         those of three ranks, or scales, each a group with down, up, slot, mask and scale of its own; a row is of one group, or of none

Shapes: x (B, L, K), y (B, L, N), down (A, R, K), up (A, N, R), slot (B) in 0 … A - 1, mask (B). A is as large as memory allows; a row touches its own adapter alone, also where another one is not finite.
Bytes, in elements: forward reads B·L·(K + N) and R·(K + N) for each adapter in use, and writes B·L·(N + R), whatever the number of adapters; with the body
run by vmap, the adapters of all rows are copied first, and y is gone through four times.
Two launches on a GPU, x to its rank and back, for all groups; which group and which adapter is read on the device, so that a captured graph stays right when the rows of the adapters change.
For few rows of x the first one splits K into parts, which the second adds up in order. Backward: the same two, and one for the gradients of
all `down`, one for those of all `up`.
Chen et al. 2023 (Punica), arXiv:2310.18547.
"""

import functools
import inspect
import itertools

import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensor

from rewrite.kernels.op import Op, cast_once
from rewrite.kernels.rounding import by_hand, rounded

#: tiles that every chip from sm_80 on holds, by the bytes of an entry
CONFIGS = {2: {"BLOCK_L": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}, 4: {"BLOCK_L": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}}
PROGRAMS, PARTS = 264, 16  # programs that fill a chip, the most parts that K is split into
#: the greatest rank, by the bytes of an entry: above it registers are spilled
MOST = {2: 128, 4: 64}
WIDTH = 5  # arguments of a group


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


@triton.jit
def shrink(
    X, SLOTS, MASKS, WS, H, B, L, K, x_b, x_l, x_k, w_a, w_r, w_k, steps, tiles,
    RANKS: tl.constexpr, BLOCKS: tl.constexpr, STARTS: tl.constexpr, R: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """H (parts, B, L, R) = X (B, L, K) W[slot]' (K, rank) of each group, side by side, part p of K having the steps p * steps …; zeros for rows without an adapter."""
    row = tl.program_id(0).to(tl.int64) // tiles
    place = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    part = tl.program_id(1)
    for g in tl.static_range(len(RANKS)):
        rank = tl.arange(0, BLOCKS[g])
        total = tl.zeros((BLOCK_L, BLOCKS[g]), tl.float32)
        if tl.load(MASKS[g] + row) != 0:
            adapter = tl.load(SLOTS[g] + row).to(tl.int64)
            for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(K, BLOCK_K))):
                k = step * BLOCK_K + tl.arange(0, BLOCK_K)
                x = tl.load(X + row * x_b + place[:, None] * x_l + k[None, :] * x_k, mask=(place[:, None] < L) & (k[None, :] < K), other=0.0)
                w = tl.load(WS[g] + adapter * w_a[g] + rank[None, :] * w_r[g] + k[:, None] * w_k[g], mask=(rank[None, :] < RANKS[g]) & (k[:, None] < K), other=0.0)
                if BY_HAND:  # the interpreter multiplies the bits of bfloat16
                    x, w = x.to(tl.float32), w.to(tl.float32)
                total = tl.dot(x, w, total, input_precision="ieee")
        out = H + ((part.to(tl.int64) * B + row) * L + place[:, None]) * R + STARTS[g] + rank[None, :]
        tl.store(out, total, mask=(place[:, None] < L) & (rank[None, :] < RANKS[g]))


@triton.jit
def expand(
    Y, H, SLOTS, MASKS, WS, OUT, SCALES, B, L, N, y_b, y_l, w_a, w_r, w_n, tiles, parts,
    RANKS: tl.constexpr, BLOCKS: tl.constexpr, STARTS: tl.constexpr, R: tl.constexpr, HAS_Y: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT (B, L, N) = Y + scale * (the sum of the parts of H) (L, rank) W[slot] (rank, N) of each group."""
    row = tl.program_id(0).to(tl.int64) // tiles
    place = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (place[:, None] < L) & (column[None, :] < N)
    total = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    for g in tl.static_range(len(RANKS)):
        rank = tl.arange(0, BLOCKS[g])
        if tl.load(MASKS[g] + row) != 0:
            adapter = tl.load(SLOTS[g] + row).to(tl.int64)
            h = tl.zeros((BLOCK_L, BLOCKS[g]), tl.float32)
            for part in range(parts):
                h += tl.load(H + STARTS[g] + ((row + part * B) * L + place[:, None]) * R + rank[None, :], mask=(place[:, None] < L) & (rank[None, :] < RANKS[g]), other=0.0)
            w = tl.load(WS[g] + adapter * w_a[g] + rank[:, None] * w_r[g] + column[None, :] * w_n[g], mask=(rank[:, None] < RANKS[g]) & (column[None, :] < N), other=0.0)
            if BY_HAND:
                w = w.to(tl.float32)
            total += tl.dot(h.to(w.dtype), w, input_precision="ieee") * SCALES[g]
    if HAS_Y:
        total += tl.load(Y + row * y_b + place[:, None] * y_l + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + (row * L + place[:, None]) * N + column[None, :], rounded(total, OUT.dtype.element_ty, BY_HAND), mask=inside)


@triton.jit
def gradient(
    PS, QS, SLOTS, MASKS, OUTS, SCALES, B, L, FIRST, I, J, p_b, p_l, p_i, q_b, q_l, q_j,
    BY_HAND: tl.constexpr, BLOCK_L: tl.constexpr, BLOCKS_I: tl.constexpr, BLOCKS_J: tl.constexpr,
):  # fmt: skip
    """OUT (A, I, J)[a] = scale * the sum of P[b]' (I, L) Q[b] (L, J) over the rows b of adapter a, of each group; the adapters of a group begin at FIRST."""
    number = tl.program_id(2)
    for g in tl.static_range(len(BLOCKS_I)):
        adapter = number - FIRST[g]
        i, j = tl.program_id(0) * BLOCKS_I[g] + tl.arange(0, BLOCKS_I[g]), tl.program_id(1) * BLOCKS_J[g] + tl.arange(0, BLOCKS_J[g])
        if (adapter >= 0) & (number < FIRST[g + 1]) & (tl.program_id(0) * BLOCKS_I[g] < I[g]) & (tl.program_id(1) * BLOCKS_J[g] < J[g]):
            total = tl.zeros((BLOCKS_I[g], BLOCKS_J[g]), tl.float32)
            row = tl.full((), 0, tl.int64)  # what it is times a stride may lie beyond what 32 bits hold
            for _ in range(B):
                if (tl.load(SLOTS[g] + row) == adapter) & (tl.load(MASKS[g] + row) != 0):
                    for start in range(0, L, BLOCK_L):
                        place = start + tl.arange(0, BLOCK_L)
                        p = tl.load(PS[g] + row * p_b[g] + place[None, :] * p_l[g] + i[:, None] * p_i[g], mask=(place[None, :] < L) & (i[:, None] < I[g]), other=0.0)
                        q = tl.load(QS[g] + row * q_b[g] + place[:, None] * q_l[g] + j[None, :] * q_j[g], mask=(place[:, None] < L) & (j[None, :] < J[g]), other=0.0)
                        if BY_HAND:
                            p, q = p.to(tl.float32), q.to(tl.float32)
                        total = tl.dot(p, q, total, input_precision="ieee")
                row += 1
            out = OUTS[g] + (adapter.to(tl.int64) * I[g] + i[:, None]) * J[g] + j[None, :]
            tl.store(out, rounded(total * SCALES[g], OUTS[g].dtype.element_ty, BY_HAND), mask=(i[:, None] < I[g]) & (j[None, :] < J[g]))


def block_of(rank):
    """The ranks that a tile holds: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(rank))


class ByTriton:
    """The three launches, each for all groups; `ws` of the first two as (A, rank, long) of any strides."""

    def __init__(self, groups, config=None, parts=None):
        """`groups`: (slot, mask) of each."""
        self.slots, self.config, self.parts = tuple(slot for slot, _ in groups), config, parts
        self.masks = tuple(mask.view(torch.uint8) if mask.dtype == torch.bool else mask for _, mask in groups)

    def _sizes(self, x):
        config = dict(self.config or CONFIGS[x.element_size()])
        options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
        block = min(config["BLOCK_L"], max(16, triton.next_power_of_2(x.shape[1])))
        return block, triton.cdiv(x.shape[1], block), config, {**options, "enable_fp_fusion": True, "BY_HAND": by_hand(x.dtype)}

    def shrink(self, x, ws):
        """(parts, B, L, ranks) in float32, the ranks of the groups side by side."""
        (batch, length, inner), side = x.shape, side_by_side(ws)
        block, tiles, config, options = self._sizes(x)
        steps = triton.cdiv(inner, config["BLOCK_K"])
        parts = self.parts or max(1, min(PROGRAMS // (batch * tiles), steps // 4, PARTS))
        h = torch.empty(parts, batch, length, side["R"], device=x.device, dtype=torch.float32)
        shrink[batch * tiles, parts](
            x, self.slots, self.masks, ws, h, batch, length, inner, *x.stride(), *strides(ws), triton.cdiv(steps, parts), tiles,
            **side, BLOCK_L=block, BLOCK_K=config["BLOCK_K"], **options,
        )  # fmt: skip
        return h

    def expand(self, y, h, ws, scales, like):
        """y + scale * h w[slot] of each group; without y, zeros where there is no adapter."""
        (_, batch, length, _), out_dim = h.shape, ws[0].shape[2]
        out = torch.empty(batch, length, out_dim, device=like.device, dtype=like.dtype)
        y = y if y is None or y.stride(2) == 1 else y.contiguous()
        block, tiles, config, options = self._sizes(out)
        expand[batch * tiles, triton.cdiv(out_dim, config["BLOCK_N"])](
            out if y is None else y, h, self.slots, self.masks, ws, out, scales, batch, length, out_dim, *(out if y is None else y).stride()[:2], *strides(ws), tiles, h.shape[0],
            **side_by_side(ws), HAS_Y=y is not None, BLOCK_L=block, BLOCK_N=config["BLOCK_N"], **options,
        )  # fmt: skip
        return out

    def gradient(self, ps, qs, adapters, scales):
        """(A, I, J) of each group: scale * p' q, summed over the rows of each adapter."""
        (batch, length, _), like = ps[0].shape, ps[0]
        outs = tuple(torch.empty(count, p.shape[2], q.shape[2], device=like.device, dtype=like.dtype) for p, q, count in zip(ps, qs, adapters))
        block, _, config, options = self._sizes(like)
        tall, wide = ([block_of(t.shape[2]) if t.shape[2] <= 64 else config["BLOCK_N"] for t in given] for given in (ps, qs))
        cover = lambda given, tiles: max(triton.cdiv(t.shape[2], tile) for t, tile in zip(given, tiles))  # noqa: E731
        first = tuple(itertools.accumulate(adapters, initial=0))
        gradient[cover(ps, tall), cover(qs, wide), first[-1]](
            ps, qs, self.slots, self.masks, outs, scales, batch, length, first, tuple(p.shape[2] for p in ps), tuple(q.shape[2] for q in qs), *strides(ps), *strides(qs),
            BLOCK_L=block, BLOCKS_I=tuple(tall), BLOCKS_J=tuple(wide), **options,
        )  # fmt: skip
        return outs


def side_by_side(ws):
    """The ranks of groups as the bodies are told of them."""
    ranks = tuple(w.shape[1] for w in ws)
    return {"RANKS": ranks, "BLOCKS": tuple(map(block_of, ranks)), "STARTS": tuple(itertools.accumulate(ranks[:-1], initial=0)), "R": sum(ranks)}


def strides(tensors):
    """A tuple for each dimension."""
    return zip(*(t.stride() for t in tensors))


class ByLibrary:
    """The same by batched products over the adapters of each row, a group after the other."""

    def __init__(self, groups, look=False):
        """`look`: at the masks, which costs nothing on a CPU; a traced one cannot be looked at."""
        self.slots, self.masks = [slot for slot, _ in groups], [mask.view(-1, 1, 1) for _, mask in groups]
        self.everyone = [look and mask.device.type == "cpu" and bool(mask.all()) for _, mask in groups]

    def own(self, g, w):
        """The adapter of each row; copied as it lies."""
        return w.index_select(0, self.slots[g]) if w.is_contiguous() else w.mT.index_select(0, self.slots[g]).mT

    def shrink(self, x, ws):
        found = [torch.bmm(x, self.own(g, w).mT) for g, w in enumerate(ws)]
        return (found[0] if len(found) == 1 else torch.cat(found, 2)).unsqueeze(0)

    def expand(self, y, h, ws, scales, like):
        for g, (w, part, scale) in enumerate(zip(ws, h[0].split([w.shape[1] for w in ws], 2), scales)):
            own = self.own(g, w)
            new = torch.bmm(part, own).mul_(scale) if y is None else torch.baddbmm(y, part, own, alpha=scale)
            y = new if self.everyone[g] else torch.where(self.masks[g], new, torch.zeros_like(new) if y is None else y)
        return y

    def gradient(self, ps, qs, adapters, scales):
        found = []
        for g, (p, q, count, scale) in enumerate(zip(ps, qs, adapters, scales)):
            own = torch.where(self.masks[g], torch.bmm(p.mT, q), 0.0)
            found.append(own.new_zeros(count, *own.shape[1:]).index_add_(0, self.slots[g], own, alpha=scale))
        return found


def way_of(x, ranks, groups):
    """Which of the two runs here."""
    return ByLibrary(groups, look=True) if any(unsuited(x, rank) for rank in ranks) else ByTriton(groups)


def unsuited(x, rank):
    """Why the Triton bodies do not take this, or None. They have not been timed on a GPU yet."""
    if not x.is_cuda:
        return f"no body for a {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} has no tile"
    return f"a tile of rank {rank} does not fit a chip" if rank > MOST[x.element_size()] else None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, scales, way, *pairs):
        downs, ups = pairs[::2], pairs[1::2]
        h = way.shrink(x, downs)
        ctx.save_for_backward(x, h, *pairs)
        ctx.scales, ctx.way = scales, way
        return way.expand(y, h, tuple(up.mT for up in ups), scales, y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, h, *pairs = ctx.saved_tensors
        needs_y, needs_x, _, _, *needs = ctx.needs_input_grad
        dx, found = gradients(grad, x, h, pairs, ctx.scales, ctx.way, needs_x, needs)
        return grad if needs_y else None, dx, None, None, *found


def gradients(grad, x, h, pairs, scales, way, needs_x, needs):
    """Gradients of x and of down, up of each group, those that are needed."""
    downs, ups, dx, ddowns, dups = tuple(pairs[::2]), tuple(pairs[1::2]), None, [None] * len(scales), [None] * len(scales)
    ranks = [down.shape[1] for down in downs]
    adapters = [len(down) for down in downs]
    if needs_x or any(needs[::2]):
        back = way.shrink(grad, tuple(up.mT for up in ups))
        dx = way.expand(None, back, downs, scales, x) if needs_x else None
        if any(needs[::2]):
            ddowns = way.gradient(back.sum(0).to(x.dtype).split(ranks, 2), (x,) * len(ranks), adapters, scales)
    if any(needs[1::2]):
        dups = way.gradient((grad,) * len(ranks), h.sum(0).to(grad.dtype).split(ranks, 2), adapters, scales)
    found = [part for both in zip(ddowns, dups) for part in both]
    return dx, [part if needed else None for part, needed in zip(found, needs)]


def grouped_loras(count):
    """The op of so many groups, in each of which the adapters have one rank and scale: y, x, then down, up, slot, mask and scale of each group."""
    return _made(count)


@functools.cache
def _made(count):
    def several(y, x, *given):
        for g in range(0, len(given), WIDTH):
            y = reference(y, x, *given[g : g + WIDTH])
        return y

    def launch(y, x, *given, way=None):
        if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
            plain = torch.compiler.is_exporting() or not x.is_cuda  # what is exported must be readable without us, and on a CPU the compiler fuses better
            return (op.reference if plain else op)(y, x, *given)

        def added(x, *given):
            """The products are cast, the sum is not."""
            if y.dtype == x.dtype:
                return launch(y, x, *given, way=way)
            return y + launch(y.new_zeros(y.shape, dtype=x.dtype), x, *given, way=way)

        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return cast_once(added, kind, x, *given)
        if not y.numel():
            return op.reference(y, x, *given)
        pairs, groups, scales = _parted(given)
        way = way or way_of(x, [down.shape[1] for down in pairs[::2]], groups)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, *pairs)):
            return _Grouped.apply(y, x, scales, way, *pairs)
        return way.expand(y, way.shrink(x, pairs[::2]), tuple(up.mT for up in pairs[1::2]), scales, y)

    def keep(ctx, inputs, output):
        _, x, *given = inputs
        pairs, groups, ctx.scales = _parted(given)
        ctx.save_for_backward(x, *pairs, *(t for group in groups for t in group))

    def backward(ctx, grad):
        x, *rest = ctx.saved_tensors
        pairs, rows = rest[: 2 * count], rest[2 * count :]
        way, needs = ByLibrary(list(zip(rows[::2], rows[1::2]))), ctx.needs_input_grad
        wanted = [needs[2 + WIDTH * g + i] for g in range(count) for i in range(2)]
        dx, found = gradients(grad, x, way.shrink(x, tuple(pairs[::2])), pairs, ctx.scales, way, needs[1], wanted)
        each = [part for g in range(count) for part in (*found[2 * g : 2 * g + 2], None, None, None)]
        return grad if needs[0] else None, dx, *each

    def fake(y, x, *given):
        return y.new_empty(y.shape)

    def registered(y, x, *given):
        """What the registered op runs."""
        pairs, groups, scales = _parted(given)
        way = way_of(x, [down.shape[1] for down in pairs[::2]], groups)
        return way.expand(y, way.shrink(x, pairs[::2]), tuple(up.mT for up in pairs[1::2]), scales, y).contiguous()

    if count > 1:
        asked = [(f"{p.name}_{g}", p.annotation) for g in range(count) for p in list(inspect.signature(reference, eval_str=True).parameters.values())[2:]]
        named = [("y", torch.Tensor), ("x", torch.Tensor), *asked]
        several.__signature__ = inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in named], return_annotation=torch.Tensor)
    launch.__qualname__ = f"grouped_loras({count}).launch"  # where it is found
    op = Op(reference if count == 1 else several, launch, fake, "grouped_lora" if count == 1 else f"grouped_loras_{count}")
    op.groups = count
    op.definition.register_kernel(("cpu", "cuda"))(registered)
    return op.differentiates(keep, backward)


def _parted(given):
    """((down, up, down, up, …), [(slot, mask), …], scales) of the arguments behind x."""
    each = [given[g : g + WIDTH] for g in range(0, len(given), WIDTH)]
    return tuple(t for down, up, *_ in each for t in (down, up)), [(slot, mask) for _, _, slot, mask, _ in each], tuple(scale for *_, scale in each)


grouped_lora = grouped_loras(1)
grouped_lora.pattern = in_a_batch
launch = grouped_lora.launch
