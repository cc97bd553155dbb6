"""A linear with a low-rank adapter that drops out entries of its x: the mask is not kept, but drawn again from its seed.

    y = x w' + b + scale * (dropout(x, p) down') up'

    lora_dropout()         w in numbers
    lora_dropout("nf4")    w = dequant_nf4(codes, scales, nested, shape, x's dtype)

Shapes as in lora_linear, which this is where nothing is dropped out: in eval, and at p = 0. Backward keeps x, dropout(x) down' and a number; the separate ops keep
the mask and dropout(x) beside, 2·M·K entries. It pays with drawing the mask twice.

In training, the seed is the next number of torch's default generator: `torch.manual_seed`, and a checkpoint that restores it, reproduce the mask. It has the distribution of the
separate ops' but is another draw. On a CPU it is, bit by bit, what F.dropout draws after `torch.manual_seed(seed)`. On a GPU the Triton body draws it where it is used, forward and backward,
and it is nowhere in memory: entry (m, i·⌈K/4⌉ + j) stays where number i of Philox 4×32-10 with key `seed` and counter (j, m, 0, 0), without its last bit, is at least p · 2³¹.
Bytes beside the products, in elements: forward reads and writes M·K, backward 2·M·K (of x, and of its gradient in place); drawn by torch it is 4·M·K and 5·M·K.
Compiled and captured in a CUDA graph, where a number would stand still, it is the separate ops.
Salmon et al. 2011 (Philox), doi:10.1145/2063384.2063405.
"""

import functools
import importlib
import inspect

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from rewrite.kernels.lora_linears import lora_linears, over_codes
from rewrite.kernels.op import Op, cast_once
from rewrite.kernels.rounding import by_hand, rounded

CONFIG = {"BLOCK": 256, "num_warps": 4, "num_stages": 1}


def mask(rows, p, seed):
    """What F.dropout multiplies with: 0, or 1 / (1 - p)."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device).bernoulli_(1 - p, generator=generator).div_(1 - p)


@triton.jit
def drop_part(X, OUT, drawn, column, inside, least, scale, BY_HAND: tl.constexpr):
    x = tl.load(X + column, mask=inside, other=0.0).to(tl.float32)
    stays = (drawn >> 1).to(tl.int32) >= least
    tl.store(OUT + column, rounded(tl.where(stays, x * scale, 0.0), OUT.dtype.element_ty, BY_HAND), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def drop_entries(X, OUT, seed, least, scale, K, x_m, BY_HAND: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (M, K) = X * scale where an entry stays, else 0, rounded once; OUT may be X. A program has BLOCK columns of each fourth of a row, for four numbers are drawn at a time."""
    row, j = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    fourth, zero = tl.cdiv(K, 4), (j * 0).to(tl.uint32)
    first, second, third, last = tl.philox(seed, j.to(tl.uint32), zero + row.to(tl.uint32), zero, zero)
    X += row.to(tl.int64) * x_m
    OUT += row.to(tl.int64) * K
    here = j < fourth
    drop_part(X, OUT, first, j, here & (j < K), least, scale, BY_HAND)
    drop_part(X, OUT, second, j + fourth, here & (j + fourth < K), least, scale, BY_HAND)
    drop_part(X, OUT, third, j + 2 * fourth, here & (j + 2 * fourth < K), least, scale, BY_HAND)
    drop_part(X, OUT, last, j + 3 * fourth, here & (j + 3 * fourth < K), least, scale, BY_HAND)


class ByTriton:
    """By the Triton body; rows of any stride."""

    def __init__(self, config=None):
        self.config = config or CONFIG

    def dropped(self, rows, p, seed, out=None):
        """dropout(rows, p)"""
        (m, k), rows = rows.shape, rows if rows.stride(1) == 1 else rows.contiguous()
        out = torch.empty(m, k, device=rows.device, dtype=rows.dtype) if out is None else out
        if m and k:
            grid = (m, triton.cdiv(triton.cdiv(k, 4), self.config["BLOCK"]))
            drop_entries[grid](rows, out, seed, round(p * 2**31), 1 / (1 - p), k, rows.stride(0), BY_HAND=by_hand(rows.dtype), enable_fp_fusion=True, **self.config)
        return out

    def backward(self, rows, drows, p, seed):
        """(drows with the same entries dropped, in place, dropout(rows, p)), each where it is not None."""
        return tuple(t if t is None else self.dropped(t, p, seed, out) for t, out in ((drows, drows), (rows, None)))


class ByGenerator:
    """By torch's generator, which draws a mask."""

    @staticmethod
    def dropped(rows, p, seed):
        return mask(rows, p, seed).mul_(rows)

    @staticmethod
    def backward(rows, drows, p, seed):
        scaled = mask(drows if rows is None else rows, p, seed)
        return drows if drows is None else drows.mul_(scaled), rows if rows is None else scaled.mul_(rows)


def way_of(rows):
    return ByTriton() if rows.is_cuda and rows.dtype in (torch.float32, torch.bfloat16, torch.float16) else ByGenerator


class Shrunk(torch.autograd.Function):
    """dropout(rows, p) down'"""

    @staticmethod
    def forward(ctx, rows, down, p, seed, way):
        ctx.save_for_backward(rows, down)
        ctx.drawn = p, seed, way
        return torch.mm(way.dropped(rows, p, seed), down.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, down = ctx.saved_tensors
        p, seed, way = ctx.drawn
        needs = ctx.needs_input_grad
        drows, dropped = way.backward(rows if needs[1] else None, torch.mm(grad, down) if needs[0] else None, p, seed)
        return drows, torch.mm(grad.t(), dropped) if needs[1] else None, None, None, None


def lora_dropout(format=None):
    """The op over a weight in numbers, or in codes. Over codes it has `over`, the op that makes its weight, and `uncoded`, the op over numbers."""
    return _made(format)


@functools.cache
def _made(format):
    over = None if format is None else getattr(importlib.import_module(f"rewrite.kernels.dequant_{format}"), f"dequant_{format}")
    plain, named = lora_linears((1,), format), [("w", torch.Tensor)]
    if over is not None:
        named = [(p.name, p.annotation) for p in inspect.signature(over.reference, eval_str=True).parameters.values() if p.annotation is not torch.dtype]
    width, product = len(named), None if over is None else over_codes(format)

    def reference(x, *given):
        w, (b, down, up, scale, p, training) = given[0] if over is None else over(*given[:width], x.dtype), given[width:]
        return F.linear(x, w, b) + scale * F.linear(F.linear(F.dropout(x, p, training), down), up)

    def launch(x, *given):
        p, training = given[-2:]
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return reference(x, *given)
        if not training or not p:
            return plain.launch(x, *given[:-2])
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return cast_once(launch, kind, x, *given)
        stored, (b, down, up, scale) = given[:width], given[width:-2]
        rows, seed = x.reshape(-1, x.shape[-1]), int(torch.randint(2**63 - 1, ()))
        y = F.linear(rows, *stored, b) if over is None else product.launch(rows, *stored, b)
        return y.addmm_(Shrunk.apply(rows, down, p, seed, way_of(rows)), up.t(), alpha=scale).view(*x.shape[:-1], len(up))

    asked = [("x", torch.Tensor), *named, ("b", torch.Tensor | None), ("down", torch.Tensor), ("up", torch.Tensor), ("scale", float), ("p", float), ("training", bool)]
    reference.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in asked], return_annotation=torch.Tensor
    )
    launch.__qualname__ = f"lora_dropout({format!r}).launch"  # where it is found
    op = Op(reference, launch, lambda x, *given: x.new_empty(*x.shape[:-1], len(given[width + 2])), "lora_dropout" if format is None else f"lora_dropout_{format}")
    if over is not None:
        op.over, op.uncoded = over, lora_dropout()
    return op
