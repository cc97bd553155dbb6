"""Eight-bit integer weights with a scale for each output channel, or for each group of its entries.

    w[o, k] = codes[o, k] * scales[o, k // group]

Shapes: codes int8 as the weight, (out, …) or (experts, out, …), what follows out being one row of entries k; scales (out, groups) or
(experts, out, groups), where groups = 1 is a scale for the channel: float32 stored by its bits, as int32 (casting a model must not round them).
Bytes read: 1 a weight and 4 a group, where bfloat16 has 2 a weight.
"""

import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensor

from rewrite.kernels.op import Op
from rewrite.kernels.pieces import by_rows
from rewrite.kernels.rounding import by_hand, rounded


@by_rows
def quantize(w, group=None):
    """(codes, scales) of a weight; the largest entry of a group becomes ±127. Without a group, a row is one."""
    rows = w.flatten(1).unflatten(1, (-1, group or w[0].numel()))
    scales = rows.abs().amax(2, keepdim=True).float().clamp(min=1e-36) / 127
    return (rows.float() / scales).round_().clamp_(-127, 127).to(torch.int8).view(w.shape), scales[..., 0].view(torch.int32)


def reference(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows = codes.flatten(scales.dim() - 1).unflatten(-1, (scales.shape[-1], -1))
    return (rows.float() * scales.view(torch.float32).unsqueeze(-1)).view(codes.shape).to(dtype)


@triton.jit
def numbers_of_int8(CODES, SCALES, OUT, K, group, groups, BY_HAND: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (rows, K): a program makes BLOCK entries of a row."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(CODES + row * K + k, mask=k < K, other=0).to(tl.float32)
    scale = tl.load(SCALES + row * groups + k // group, mask=k < K, other=0.0)
    tl.store(OUT + row * K + k, rounded(code * scale, OUT.dtype.element_ty, BY_HAND), mask=k < K)


def by_triton(codes, scales, dtype):
    """The same by the Triton body."""
    out, groups = torch.empty(codes.shape, device=codes.device, dtype=dtype), scales.shape[-1]
    if not out.numel():
        return out
    rows = scales.numel() // groups
    length = codes.numel() // rows
    grid = (rows, triton.cdiv(length, 1024))
    numbers_of_int8[grid](
        codes.contiguous(), scales.contiguous().view(torch.float32), out, length, length // groups, groups, BY_HAND=by_hand(dtype), BLOCK=1024, enable_fp_fusion=False
    )
    return out


def launch(codes, scales, dtype):
    if not codes.is_cuda or torch.compiler.is_compiling() or isinstance(codes, FakeTensor):
        return reference(codes, scales, dtype)
    return by_triton(codes, scales, dtype)


def fake(codes, scales, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)


dequant_int8 = Op(reference, launch, fake)
