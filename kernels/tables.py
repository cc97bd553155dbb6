"""Four-bit numbers that a table names, in blocks of 64 entries with a scale each: what nf4 and fp4 have in common.

    w[i] = TABLE[code[i]] * scale[i // 64]
    scale[j] = DYNAMIC[scales[j]] * nested[j // 256] + nested[-1]        where the scales are doubly quantised

Layout, as bitsandbytes has it: a weight of n entries, row by row, has n/2 bytes of codes (the first of two entries in the upper half; one that is
missing at the end is the code of 0) and n/64 scales, the last block being shorter where 64 does not divide n: float32, or uint8 with n/64/256 + 1
float32 numbers `nested`, the last one being what was taken off before (the mean). Leading dimensions (experts) are kept. The float32 numbers are
stored by their bits, as int32: casting a model to bfloat16 must not round them.
Bytes read: 0.516 a weight (0.5625 without double quantisation), where bfloat16 has 2.
The eight-bit numbers: Dettmers et al. 2021, arXiv:2110.02861.
"""

import functools

import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensor

from rewrite.kernels.looked_up import looked_up
from rewrite.kernels.rounding import by_hand, rounded

BLOCK, NESTED, CHUNK = 64, 256, 64 * 2**14


@functools.cache
def dynamic():
    """The 256 numbers of the dynamic tree format: for each of seven powers of ten, the middles of 1, 2, … 64 equal parts of [0.1, 1]; ±, with 0 and 1."""
    found = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32, device="cpu")
        found += [sign * x for x in (10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist() for sign in (1, -1)]
    return tuple(sorted(found))


def quantize(w, table, double=True):
    """(codes, scales, nested or None) of a weight, its entries row by row; a million at a time, so that a large weight needs no float copy."""
    flat = w.reshape(-1)
    parts = [_packed(part, table) for part in flat.split(CHUNK)]
    codes, scales = (torch.cat(found) for found in zip(*parts))
    if not double:
        return codes, scales.view(torch.int32), None
    mean = scales.mean()
    scales, nested = _nearest(scales - mean, dynamic(), NESTED)
    return codes, scales, torch.cat([nested, mean[None]]).view(torch.int32)


def _packed(flat, table):
    codes, scales = _nearest(flat, table, BLOCK)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), table.index(0.0))])
    return codes[::2] << 4 | codes[1::2], scales


def _nearest(flat, table, block):
    """(uint8 number of the nearest entry of a table, largest magnitude) for blocks of a vector, each scaled to [-1, 1]."""
    order = sorted(range(len(table)), key=table.__getitem__)
    ordered = torch.tensor([table[i] for i in order], device=flat.device, dtype=torch.float32)
    n = flat.numel()
    rows = torch.nn.functional.pad(flat.float(), (0, -n % block)).view(-1, block)
    scales = rows.abs().amax(1)
    rows = rows * (1.0 / scales.clamp(min=1e-38))[:, None]
    found = torch.bucketize(rows, (ordered[:-1] + ordered[1:]) / 2, out_int32=True)
    if order != list(range(len(table))):
        found = torch.tensor(order, device=flat.device)[found]
    return found.to(torch.uint8).view(-1)[:n], scales


def reference(codes, scales, nested, shape, dtype, table):
    levels = None if nested is None else torch.tensor(dynamic(), device=codes.device, dtype=torch.float32)
    return _dequantize(codes, scales, nested, shape, dtype, _pairs(table, codes.device), levels)


def _pairs(table, device):
    """What a byte stands for: the two numbers of its halves."""
    return torch.tensor([(a, b) for a in table for b in table], device=device, dtype=torch.float32)


def _dequantize(codes, scales, nested, shape, dtype, pairs, levels):
    n = _entries(codes, shape)
    values = pairs[codes.int()].flatten(-2)[..., :n]  # a byte gives two entries
    scales = _scales(scales, nested, levels)
    if n % BLOCK:
        return (values * scales.repeat_interleave(BLOCK, -1)[..., :n]).view(shape).to(dtype)
    return (values.unflatten(-1, (-1, BLOCK)) * scales.unsqueeze(-1)).view(shape).to(dtype)


def _scales(scales, nested, levels):
    """The scales in float32."""
    if nested is None:
        return scales.view(torch.float32)
    nested = nested.view(torch.float32)
    coarse = nested[..., :-1].repeat_interleave(NESTED, -1)[..., : scales.shape[-1]]
    return levels[scales.int()] * coarse + nested[..., -1:]


def _entries(codes, shape):
    """How many entries stand behind the leading dimensions of the codes."""
    n = 1
    for size in shape[codes.dim() - 1 :]:
        n *= size
    return n


@triton.jit
def numbers_of_blocks(CODES, SCALES, NESTED, TABLE, LEVELS, OUT, n, bytes_each, scales_each, nested_each, DOUBLE: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (experts, n): a program makes the 2 * BLOCK entries of BLOCK bytes; 32 bytes have a scale, 256 scales a nested one."""
    expert = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < bytes_each
    code = tl.load(CODES + expert * bytes_each + place, mask=inside, other=0).to(tl.int32)
    scale = tl.load(SCALES + expert * scales_each + place // 32, mask=inside, other=0)
    if DOUBLE:
        coarse = tl.load(NESTED + expert * nested_each + place // 8192, mask=inside, other=0.0)
        scale = tl.load(LEVELS + scale.to(tl.int32)) * coarse + tl.load(NESTED + expert * nested_each + nested_each - 1)
    values = tl.interleave(tl.load(TABLE + (code >> 4)) * scale, tl.load(TABLE + (code & 15)) * scale)
    entry = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(OUT + expert * n + entry, rounded(values, OUT.dtype.element_ty, BY_HAND), mask=entry < n)


def by_triton(codes, scales, nested, shape, dtype, table, levels):
    """The same by the Triton body; `table` and `levels` are tensors."""
    n, out = _entries(codes, shape), torch.empty(shape, device=codes.device, dtype=dtype)
    if not out.numel():
        return out
    codes, single = codes.contiguous(), scales.contiguous() if nested is not None else scales.contiguous().view(torch.float32)
    nested = single if nested is None else nested.contiguous().view(torch.float32)
    grid = (triton.cdiv(codes.shape[-1], 512), out.numel() // n)
    numbers_of_blocks[grid](
        codes, single, nested, table, levels, out, n, codes.shape[-1], single.shape[-1], nested.shape[-1],
        DOUBLE=single.dtype == torch.uint8, BY_HAND=by_hand(dtype), BLOCK=512, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@functools.cache
def _tables(table, device):
    return torch.tensor(table, device=device), _pairs(table, device), torch.tensor(dynamic(), device=device)


def launch(codes, scales, nested, shape, dtype, table):
    if torch.compiler.is_compiling() or isinstance(codes, FakeTensor):  # tables that outlive the call belong to real tensors
        return reference(codes, scales, nested, shape, dtype, table)
    numbers, pairs, levels = _tables(table, codes.device)
    if codes.is_cuda:
        return by_triton(codes, scales, nested, shape, dtype, numbers, levels)
    if codes.dim() > 1 or _entries(codes, shape) % BLOCK:  # experts, and a last block that is shorter
        return _dequantize(codes, scales, nested, shape, dtype, pairs, levels)
    return looked_up(codes, pairs, _scales(scales, nested, levels), shape, dtype)
