"""The norm of each output row of a weight with a low-rank update, without making their sum.

    |w + s up down|^2 = |w|^2 + 2 s <w, up down> + s^2 |up down|^2        per row:  <w, up down> = sum(up * (w down'));  |up down|^2 = sum(up * (up (down down')))

Shapes: w (N, K), down (R, K), up (N, R), out (N) in float32 (float64 for float64); it has no gradient, as DoRA means it.
Bytes: w is read once, N·K, where the sum first reads and writes N·K four times; operations 2·N·K·R.
Sums are made in float32 from the numbers as they are, nothing in between is rounded to bfloat16. Where w and its update cancel, c being
(|w| + |s up down|) over the norm of their sum, the identity is off by up to 2^-22 c^2 of it; in bfloat16 the sum itself is further off (at c = 60 by 3e-2,
the identity by 3e-5), in float32 it is not.

|w|^2 of a weight that does not train is made once, in float64. In eval the norm itself is kept while w, down, up and s stand still; what trains,
or is captured in a CUDA graph, whose replays must see what the tensors are by then, makes it anew.
Liu et al. 2024, arXiv:2402.09353, section 4.3.
"""

from dataclasses import dataclass
from typing import Callable

import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensor

from rewrite.kernels.once import give_up, once
from rewrite.kernels.op import Op

#: tiles that every chip from sm_80 on holds, by the bytes of an entry
CONFIGS = {2: {"BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}, 4: {"BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}}
MOST = 128  # the greatest rank for which a body was compiled
WIDENED = 2**18  # entries of a weight that are float32 at a time: what the cache of a core holds


def reference(w: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.linalg.vector_norm(w + scale * torch.matmul(up, down), dim=1, dtype=wide(w.dtype)).detach()


def wide(dtype):
    """What sums are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def norms(
    W, DOWN, UP, GRAM, OUT, scale, N, K, w_n, w_k, down_r, down_k, up_n, up_r,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """OUT (N) of W (N, K), DOWN (R, K), UP (N, R) and GRAM (R, R) = DOWN DOWN'."""
    row, rank = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    inner, squares = tl.zeros((BLOCK_N, BLOCK_R), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(W + row[:, None] * w_n + k[None, :] * w_k, mask=(row[:, None] < N) & (k[None, :] < K), other=0.0)
        down = tl.load(DOWN + rank[None, :] * down_r + k[:, None] * down_k, mask=(rank[None, :] < R) & (k[:, None] < K), other=0.0)
        numbers = w.to(tl.float32)
        squares += tl.sum(numbers * numbers, 1)
        if BY_HAND:  # the interpreter multiplies the bits of bfloat16
            w, down = numbers, down.to(tl.float32)
        inner = tl.dot(w, down, inner, input_precision="ieee")
    up = tl.load(UP + row[:, None] * up_n + rank[None, :] * up_r, mask=(row[:, None] < N) & (rank[None, :] < R), other=0.0).to(tl.float32)
    total = squares + 2.0 * scale * tl.sum(inner * up, 1)
    for start in range(0, R, 16):  # all at once, rank 64 spills
        j = start + tl.arange(0, 16)
        gram = tl.load(GRAM + rank[:, None] * R + j[None, :], mask=(rank[:, None] < R) & (j[None, :] < R), other=0.0)
        part = tl.load(UP + row[:, None] * up_n + j[None, :] * up_r, mask=(row[:, None] < N) & (j[None, :] < R), other=0.0).to(tl.float32)
        total += scale * scale * tl.sum(tl.dot(up, gram, input_precision="ieee") * part, 1)
    tl.store(OUT + row, tl.sqrt(tl.maximum(total, 0.0)), mask=row < N)


def by_triton(w, down, up, scale, config=None):
    """By the Triton body; matrices of any strides."""
    (n, k), rank = w.shape, len(down)
    out = torch.empty(n, device=w.device, dtype=torch.float32)
    if not n:
        return out
    config, exact = config or CONFIGS[w.element_size()], down.double()  # float32 products may be set to be made in less
    norms[(triton.cdiv(n, config["BLOCK_N"]),)](
        w, down, up, (exact @ exact.mT).float(), out, scale, n, k, *w.stride(), *down.stride(), *up.stride(),
        R=rank, BLOCK_R=max(16, triton.next_power_of_2(rank)), BY_HAND=w.dtype == torch.bfloat16 and triton.knobs.runtime.interpret, enable_fp_fusion=True, **config,
    )  # fmt: skip
    return out


def by_library(w, squares, down, up, scale):
    """By the library's products; `squares`: |w|^2."""
    dtype = wide(w.dtype)
    down, up = down.to(dtype), up.to(dtype)
    if w.dtype == dtype:
        inner = torch.mm(w, down.t())
    else:  # a product of two bytes with a sum of four is not in every library: the weight is widened a piece at a time
        step = max(1, WIDENED // max(1, w.shape[1]))
        inner = torch.cat([torch.mm(part.to(dtype), down.t()) for part in w.split(step)])
    inner = torch.addmm(inner, up, torch.mm(down, down.t()), alpha=0.5 * scale)
    return torch.add(squares, inner.mul_(up).sum(1, dtype=torch.float64), alpha=2.0 * scale).clamp_(min=0.0).sqrt_().to(dtype)


def unsuited(w, down, up):
    """Why the Triton body does not take this, or None. It has not been timed on a GPU yet."""
    if not w.is_cuda:
        return f"no body for a {w.device.type}"
    if w.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not w.dtype == down.dtype == up.dtype:
        return f"{w.dtype} with {down.dtype} and {up.dtype} has no tile"
    return f"a tile of rank {len(down)} does not fit a chip" if len(down) > MOST else None


@dataclass(frozen=True)
class Norms:
    """Those of weights which `read(*stored)` makes of what they are stored as. What is kept is kept under the methods of one of these."""

    read: Callable

    def __call__(self, stored, down, up, scale):
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (down, up, *stored) if isinstance(t, torch.Tensor))
        with torch.no_grad():
            if trains or _is_captured(up):
                give_up(self.anew, up)
                return self.anew(up, down, scale, *stored)
            return once(self.anew, up, down, scale, *stored)

    def anew(self, up, down, scale, *stored):
        w = self.read(*stored)
        if unsuited(w, down, up) is None:
            return by_triton(w, down, up, scale)
        still = not stored[0].requires_grad and not _is_captured(up)
        return by_library(w, once(self.squares, *stored) if still else self.squares(*stored), down, up, scale)

    def squares(self, *stored):
        return torch.linalg.vector_norm(self.read(*stored), dim=1, dtype=torch.float64).square_()


def _is_captured(t):
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


numbers = Norms(lambda w: w)


def launch(w, down, up, scale):
    if torch.compiler.is_compiling() or isinstance(w, FakeTensor):
        return (reference if torch.compiler.is_exporting() or isinstance(w, FakeTensor) else dora_norm)(w, down, up, scale)
    return numbers((w,), down, up, scale)


def fake(w, down, up, scale):
    return w.new_empty(len(w), dtype=wide(w.dtype))


def registered(w, down, up, scale):
    """What the registered op runs; below it nobody knows what trains, so that nothing is kept."""
    return by_triton(w, down, up, scale) if unsuited(w, down, up) is None else by_library(w, numbers.squares(w), down, up, scale)


dora_norm = Op(reference, launch, fake).differentiates(lambda ctx, inputs, output: None, lambda ctx, grad: (None,) * 4)
dora_norm.definition.register_kernel(("cpu", "cuda"))(registered)
