"""Four-bit integer weights with a scale, and perhaps a zero, for each group of a row's entries.

    w[o, k] = (code[o, k] - zeros[o, k // group]) * scales[o, k // group]        zeros = 8 where there are none (symmetric)

Shapes: a row of K entries has K/2 bytes of codes, the first of two entries in the lower half (as GPTQ and ONNX have it): codes uint8 (out, K/2);
scales (out, K/group) float32 stored by its bits, as int32 (casting a model must not round them); zeros uint8 (out, K/group), whole numbers
from 0 to 16. Leading dimensions (experts) are kept. A convolution's row is all that follows out. The group divides K.
Bytes read: 0.5 + 4/group a weight, and 1/group with zeros: 0.5625 and 0.578 at 64, where bfloat16 has 2.
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

ZERO = 8


@by_rows
def quantize(w, group=64, symmetric=True):
    """(codes, scales, zeros or None) of a weight. Symmetric: ±7.5 scales are the largest magnitude, so that none is off by more than half of one."""
    rows = w.flatten(1).float().unflatten(1, (-1, group))
    if symmetric:
        scales, zeros = rows.abs().amax(2, keepdim=True) / 7.5, None
    else:
        low, high = rows.amin(2, keepdim=True).clamp(max=0), rows.amax(2, keepdim=True).clamp(min=0)
        scales = (high - low) / 15
        zeros = (-low / scales.clamp(min=1e-36)).round_()
    scales = scales.clamp(min=1e-36)
    codes = ((rows / scales).round_() + (ZERO if zeros is None else zeros)).clamp_(0, 15).to(torch.uint8).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales[..., 0].view(torch.int32), zeros if zeros is None else zeros[..., 0].to(torch.uint8)


def reference(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    pairs = torch.stack([codes & 15, codes >> 4], -1).to(torch.int8)  # a byte gives two entries
    centred = pairs.view(*scales.shape, -1) - (ZERO if zeros is None else zeros.to(torch.int8).unsqueeze(-1))
    return (centred.float() * scales.view(torch.float32).unsqueeze(-1)).view(shape).to(dtype)


@triton.jit
def numbers_of_int4(CODES, SCALES, ZEROS, OUT, half, group, groups, HAS_ZEROS: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (rows, 2 * half): a program makes the 2 * BLOCK entries of BLOCK bytes of a row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(CODES + row * half + place, mask=place < half, other=0).to(tl.int32)
    at = row * groups + 2 * place // group
    scale, zero = tl.load(SCALES + at, mask=place < half, other=0.0), 8
    if HAS_ZEROS:
        zero = tl.load(ZEROS + at, mask=place < half, other=0).to(tl.int32)
    values = tl.interleave(((code & 15) - zero).to(tl.float32) * scale, ((code >> 4) - zero).to(tl.float32) * scale)
    entry = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(OUT + row * (2 * half) + entry, rounded(values, OUT.dtype.element_ty, BY_HAND), mask=entry < 2 * half)


def by_triton(codes, scales, zeros, shape, dtype):
    """The same by the Triton body."""
    out, groups = torch.empty(shape, device=codes.device, dtype=dtype), scales.shape[-1]
    if not out.numel():
        return out
    rows, half = scales.numel() // groups, codes.shape[-1]
    codes, zeros = codes.contiguous(), zeros if zeros is None else zeros.contiguous()
    numbers_of_int4[rows, triton.cdiv(half, 512)](
        codes, scales.contiguous().view(torch.float32), codes if zeros is None else zeros, out, half, 2 * half // groups, groups,
        HAS_ZEROS=zeros is not None, BY_HAND=by_hand(dtype), BLOCK=512, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@functools.cache
def _pairs(zero, device):
    """What a byte stands for."""
    return torch.tensor([(low - zero, high - zero) for high in range(16) for low in range(16)], device=device, dtype=torch.float32)


def launch(codes, scales, zeros, shape, dtype):
    if torch.compiler.is_compiling() or isinstance(codes, FakeTensor):
        return reference(codes, scales, zeros, shape, dtype)
    if codes.is_cuda:
        return by_triton(codes, scales, zeros, shape, dtype)
    return looked_up(codes, _pairs(ZERO if zeros is None else 0, codes.device), scales.view(torch.float32), shape, dtype, zeros)


def fake(codes, scales, zeros, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)


dequant_int4 = Op(reference, launch, fake)
