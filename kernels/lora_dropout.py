"""A linear with a low-rank adapter that drops out entries of its x: the mask is not kept, but drawn again from its seed.

    y = x w' + b + scale * (dropout(x, p) down') up'

    lora_dropout()         w in numbers
    lora_dropout("nf4")    w = dequant_nf4(codes, scales, nested, shape, x's dtype)

Shapes as in lora_linear, which this is where nothing is dropped out: in eval, and at p = 0. Backward keeps x, dropout(x) down' and a number; the separate ops keep
the mask and dropout(x) beside, 2·M·K entries. It pays with drawing the mask twice.

In training, the seed is the next number of torch's default generator: `torch.manual_seed`, and a checkpoint that restores it, reproduce the mask. It has the distribution of the
separate ops' but is another draw; on a CPU it is, bit by bit, what F.dropout draws after `torch.manual_seed(seed)`. Compiled and captured in a CUDA graph, where a
number would stand still, it is the separate ops.
"""

import functools
import importlib
import inspect

import torch
from torch.nn import functional as F

from rewrite.kernels.lora_linears import lora_linears, over_codes
from rewrite.kernels.op import Op, cast_once


def mask(rows, p, seed):
    """What F.dropout multiplies with: 0, or 1 / (1 - p)."""
    generator = torch.Generator(rows.device).manual_seed(seed)
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device).bernoulli_(1 - p, generator=generator).div_(1 - p)


class Shrunk(torch.autograd.Function):
    """dropout(rows, p) down'"""

    @staticmethod
    def forward(ctx, rows, down, p, seed):
        ctx.save_for_backward(rows, down)
        ctx.drawn = p, seed
        return torch.mm(mask(rows, p, seed).mul_(rows), down.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, down = ctx.saved_tensors
        scaled = mask(rows, *ctx.drawn)
        drows = torch.mm(grad, down).mul_(scaled) if ctx.needs_input_grad[0] else None
        return drows, torch.mm(grad.t(), scaled.mul_(rows)) if ctx.needs_input_grad[1] else None, None, None


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
        return y.addmm_(Shrunk.apply(rows, down, p, seed), up.t(), alpha=scale).view(*x.shape[:-1], len(up))

    asked = [("x", torch.Tensor), *named, ("b", torch.Tensor | None), ("down", torch.Tensor), ("up", torch.Tensor), ("scale", float), ("p", float), ("training", bool)]
    reference.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in asked], return_annotation=torch.Tensor
    )
    launch.__qualname__ = f"lora_dropout({format!r}).launch"  # where it is found
    op = Op(reference, launch, lambda x, *given: x.new_empty(*x.shape[:-1], len(given[width + 2])), "lora_dropout" if format is None else f"lora_dropout_{format}")
    if over is not None:
        op.over, op.uncoded = over, lora_dropout()
    return op
