"""A linear whose weight is in codes, one op for each format that they are stored in: what `linear_int8`, `linear_nf4` and the others share.

    y = x dequant(codes, …)' + b

Few rows, as in decoding, are multiplied with the codes as they are: by `few_rows` on a GPU, by PyTorch's own products on a CPU. More rows, or what those
do not take, make the weight first; `reason` says why. Up to how many rows: `chips`.
Backward makes the weight once more where it needs it, so that nothing is kept but codes, where the plain ops keep the weight that they have made.
"""

import torch
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from rewrite.kernels import chips
from rewrite.kernels.op import Op, cast_once


class QuantLinear(Op):
    """`dequant(*codes, dtype)` makes the weight; `unsuited(x, *codes)` says why codes cannot be taken as they are, `fast(x, *codes, b)` takes them so;
    `plain(x, *codes, b)` is what else is done."""

    def __init__(self, reference, launch, dequant, unsuited, fast, plain=None):
        super().__init__(reference, launch)
        self.dequant, self.unsuited, self.fast, self.plain = dequant, unsuited, fast, plain or self._plain
        self.definition.register_kernel(("cpu", "cuda"))(self.forward)
        self.differentiates(_keep, self._backward)

    def reason(self, x, *codes):
        """Why the weight is made first here, or None."""
        most = chips.few_rows(self.name, x.device)
        if x.numel() > most * x.shape[-1]:
            return f"more rows than the {most} up to which codes are known to be faster as they are on this {x.device.type}"
        return self.unsuited(x, *codes)

    def forward(self, x, *given):
        *codes, b = given
        if not x.numel() or self.reason(x, *codes):
            return self.plain(x, *codes, b)
        return self.fast(x, *codes, b)

    def _plain(self, x, *given):
        *codes, b = given
        return F.linear(x, self.dequant.launch(*codes, x.dtype), b)

    def run(self, x, *given):
        """What `launch` of each format does."""
        *codes, b = given
        compiling = torch.compiler.is_compiling()
        if torch.compiler.is_exporting() or (isinstance(x, FakeTensor) and not compiling):  # what is exported must be readable without us
            return self.reference(x, *given)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return cast_once(self.run, kind, x, *codes, b)
        if compiling:
            return self.overload(x, *given)
        if torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad)):
            return _Linear.apply(x, b, self, codes)
        return self.forward(x, *given)

    def _backward(self, ctx, grad):
        codes = [t if i is None else ctx.saved_tensors[i] for i, t in ctx.given]
        dx, db = gradients(grad, self.dequant, codes, ctx.needs_input_grad[0], ctx.needs_input_grad[-1])
        return dx, *[None] * len(ctx.given), db


def gradients(grad, dequant, codes, needs_x, needs_b):
    return grad @ dequant(*codes, grad.dtype) if needs_x else None, grad.flatten(0, -2).sum(0) if needs_b else None


def _keep(ctx, inputs, output):
    """Tensors are saved, sizes kept."""
    codes = inputs[1:-1]
    tensors = [t for t in codes if isinstance(t, torch.Tensor)]
    ctx.save_for_backward(*tensors)
    places = iter(range(len(tensors)))
    ctx.given = [(next(places), None) if isinstance(t, torch.Tensor) else (None, t) for t in codes]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b, op, codes):
        ctx.op, ctx.codes = op, codes
        return op.forward(x, *codes, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *gradients(grad, ctx.op.dequant.launch, ctx.codes, *ctx.needs_input_grad[:2]), None, None


def scaled_after(x, numbers, scales, b):
    """x @ numbers' * scales + b: a scale for each output is cheaper on the result than on the weight."""
    y = F.linear(x, numbers.to(x.dtype)).mul_(scales.view(torch.float32).view(-1))
    return y if b is None else y.add_(b)
