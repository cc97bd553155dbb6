"""Four-bit floating-point weights in the microscaling format: blocks of 32 entries of a row share a power of two.

    w[o, k] = E2M1[code[o, k]] * 2^(scales[o, k // 32] - 127)

Shapes: a row of K entries has K/2 bytes of codes, the first of two entries in the lower half: codes uint8 (out, K/2); scales uint8 (out, K/32), whose
255 is no number. Leading dimensions (experts) are kept. A convolution's row is all that follows out. 32 divides K.
Bytes read: 0.531 a weight, where bfloat16 has 2.
OCP Microscaling Formats (MX) Specification 1.0, 2023; Rouhani et al. 2023, arXiv:2310.10537.
"""

import functools

import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensor

from rewrite.kernels.looked_up import looked_up
from rewrite.kernels.op import Op
from rewrite.kernels.pieces import by_rows
from rewrite.kernels.rounding import by_hand, rounded

BLOCK, BIAS = 32, 127
#: a sign, two bits of exponent and one of mantissa, in the order of their codes
E2M1 = tuple(sign * x for sign in (1.0, -1.0) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


@by_rows
def quantize(w):
    """(codes, scales) of a weight: the largest magnitude of a block lies in [4, 8), what is above 6 becomes 6, the middle between two numbers the even code."""
    rows = w.flatten(1).float().unflatten(1, (-1, BLOCK))
    largest = rows.abs().amax(2, keepdim=True)
    exponent = (torch.frexp(largest).exponent - 3).clamp_(-BIAS, BIAS)
    scaled = torch.ldexp(rows.double(), -exponent.double()).float()  # a power of two: nothing is rounded
    numbers = torch.tensor(E2M1[:8], device=w.device)
    middles = (numbers[:-1] + numbers[1:]) / 2
    below = torch.nextafter(middles, torch.zeros_like(middles))
    middles = torch.where(torch.arange(7, device=w.device) % 2 == 1, below, middles)
    codes = torch.bucketize(scaled.abs(), middles, out_int32=True).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    codes = codes.flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, (exponent[..., 0] + BIAS).to(torch.uint8)


def reference(codes: torch.Tensor, scales: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    numbers = pairs(codes.device)[codes.int()]
    return (numbers.view(*scales.shape, BLOCK) * powers(codes.device)[scales.int()].unsqueeze(-1)).view(shape).to(dtype)


def pairs(device):
    """What a byte stands for: two entries."""
    return torch.tensor([(a, b) for b in E2M1 for a in E2M1], device=device, dtype=torch.float32)


def powers(device):
    """What each scale stands for."""
    return torch.tensor([2.0 ** (i - BIAS) for i in range(255)] + [float("nan")], device=device, dtype=torch.float32)


@triton.jit
def number(code):
    """Of an e2m1 code: the exponent of half precision is fourteen more, its subnormal numbers are those of e2m1, shifted."""
    magnitude = ((code & 7) << 9).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    return tl.where((code & 8) != 0, -magnitude, magnitude)


@triton.jit
def power(scale):
    """Of a scale; 2^-127 is subnormal."""
    bits = tl.where(scale == 0, 0x00400000, tl.where(scale == 255, 0x7FC00000, scale << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def numbers_of_mxfp4(CODES, SCALES, OUT, half, BY_HAND: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (rows, 2 * half): a program makes the 2 * BLOCK entries of BLOCK bytes of a row; 16 bytes share a power."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(CODES + row * half + place, mask=place < half, other=0).to(tl.int32)
    scale = tl.load(SCALES + row * (half // 16) + place // 16, mask=place < half, other=127).to(tl.int32)
    values = tl.interleave(number(code & 15) * power(scale), number(code >> 4) * power(scale))
    entry = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(OUT + row * (2 * half) + entry, rounded(values, OUT.dtype.element_ty, BY_HAND), mask=entry < 2 * half)


def by_triton(codes, scales, shape, dtype):
    """The same by the Triton body."""
    out, half = torch.empty(shape, device=codes.device, dtype=dtype), codes.shape[-1]
    if not out.numel():
        return out
    numbers_of_mxfp4[codes.numel() // half, triton.cdiv(half, 512)](codes.contiguous(), scales.contiguous(), out, half, BY_HAND=by_hand(dtype), BLOCK=512, enable_fp_fusion=False)
    return out


@functools.cache
def _tables(device):
    return pairs(device), powers(device)


def launch(codes, scales, shape, dtype):
    if torch.compiler.is_compiling() or isinstance(codes, FakeTensor):  # tables that outlive the call belong to real tensors
        return reference(codes, scales, shape, dtype)
    if codes.is_cuda:
        return by_triton(codes, scales, shape, dtype)
    numbers, exponents = _tables(codes.device)
    return looked_up(codes, numbers, exponents.index_select(0, scales.reshape(-1).int()), shape, dtype)


def fake(codes, scales, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)


dequant_mxfp4 = Op(reference, launch, fake)
