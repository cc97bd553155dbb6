"""Eight-bit floating-point weights (a sign, four bits of exponent, three of mantissa) with a scale for each output channel, or each block of 128 × 128.

    w[o, k] = E4M3[codes[o, k]] * scales[o, 0]                      a scale for each channel
    w[o, k] = E4M3[codes[o, k]] * scales[o // 128, k // 128]        a scale for each block

Shapes: codes uint8 as the weight, (out, …) or (experts, out, …), what follows out being one row of entries k: the bits of torch.float8_e4m3fn,
which a cast of the model would otherwise touch; scales (out, 1) or (out/128, K/128), rounded up, the last blocks being smaller: float32
stored by its bits, as int32. A block scale for a weight of one row and at most 128 entries is a channel's.
Bytes read: 1 a weight and 4 a channel or a block, where bfloat16 has 2 a weight.
Micikevicius et al. 2022, arXiv:2209.05433.
"""

import functools

import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensor

from rewrite.kernels.op import Op
from rewrite.kernels.pieces import by_rows
from rewrite.kernels.rounding import by_hand, rounded

BLOCK, LARGEST = 128, 448.0
#: the number of each code: (8 + m)/8 * 2^(e - 7), m/8 * 2^-6 where e = 0; ±, and all ones are no number
E4M3 = tuple(
    sign * (float("nan") if (e, m) == (15, 7) else (8 * (e > 0) + m) / 8 * 2.0 ** (max(e, 1) - 7)) for sign in (1.0, -1.0) for e in range(16) for m in range(8)
)


@by_rows
def quantize(w, blocks=False):
    """(codes, scales) of a weight; the largest entry of a channel or block becomes ±448."""
    rows = w.flatten(1).float()
    if blocks:
        out_dim, length = rows.shape
        padded = torch.nn.functional.pad(rows, (0, -length % BLOCK, 0, -out_dim % BLOCK))
        scales = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).abs().amax((1, 3))
        scales = scales.clamp(min=1e-36) / LARGEST
        each = _spread(scales, out_dim, length)
    else:
        each = scales = rows.abs().amax(1, keepdim=True).clamp(min=1e-36) / LARGEST
    codes = (rows / each).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).view(w.shape), scales.view(torch.int32)


def _spread(scales, out_dim, length):
    """The scales of blocks, one for each entry."""
    return scales.repeat_interleave(BLOCK, -2)[..., :out_dim, :].repeat_interleave(BLOCK, -1)[..., :length]


def reference(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.tensor(E4M3, device=codes.device, dtype=torch.float32)[codes.int()]
    return _scaled(numbers, scales, dtype)


def _scaled(numbers, scales, dtype):
    rows = numbers.flatten(scales.dim() - 1)
    each = scales.view(torch.float32)
    if not _is_channel(rows, scales):
        each = _spread(each, *rows.shape[-2:])
    return (rows * each).view(numbers.shape).to(dtype)


def _is_channel(rows, scales):
    """Does each row have one scale?"""
    return scales.shape[-1] == 1 and scales.shape[-2] == rows.shape[-2]


@triton.jit
def numbers_of_fp8(CODES, SCALES, OUT, out_dim, K, scale_rows, scale_columns, TALL: tl.constexpr, WIDE: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (experts * out_dim, K): a program makes BLOCK entries of a row; TALL rows of an expert share their scales, and in them WIDE entries (0: all)."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(CODES + row * K + k, mask=k < K, other=0).to(tl.int32)
    above = row // out_dim * scale_rows + row % out_dim // TALL
    column = tl.zeros_like(k)
    if WIDE:
        column = k // WIDE
    scale = tl.load(SCALES + above * scale_columns + column, mask=k < K, other=0.0)
    # the exponent of half precision is eight more: its subnormal numbers are those of e4m3, shifted
    number = ((code & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    number = tl.where((code & 127) == 127, float("nan"), number)
    number = tl.where(code > 127, -number, number)
    tl.store(OUT + row * K + k, rounded(number * scale, OUT.dtype.element_ty, BY_HAND), mask=k < K)


def by_triton(codes, scales, dtype):
    """The same by the Triton body."""
    out = torch.empty(codes.shape, device=codes.device, dtype=dtype)
    if not out.numel():
        return out
    rows = codes.flatten(scales.dim() - 1)
    channel, (out_dim, length) = _is_channel(rows, scales), rows.shape[-2:]
    grid = (codes.numel() // length, triton.cdiv(length, 1024))
    numbers_of_fp8[grid](
        codes.contiguous(), scales.contiguous().view(torch.float32), out, out_dim, length, scales.shape[-2], scales.shape[-1],
        TALL=1 if channel else BLOCK, WIDE=0 if channel else BLOCK, BY_HAND=by_hand(dtype), BLOCK=1024, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@functools.cache
def _table(device):
    return torch.tensor(E4M3, device=device, dtype=torch.float32)


def launch(codes, scales, dtype):
    if torch.compiler.is_compiling() or isinstance(codes, FakeTensor):
        return reference(codes, scales, dtype)
    if codes.is_cuda:
        return by_triton(codes, scales, dtype)
    numbers = _table(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)  # torch's cast takes four times as long
    return _scaled(numbers, scales, dtype)


def fake(codes, scales, dtype):
    return codes.new_empty(codes.shape, dtype=dtype)


dequant_fp8 = Op(reference, launch, fake)
