"""Four-bit NormalFloat weights, in blocks of 64 with a scale each; the scales themselves may be in eight bits, in blocks of 256.

    w[i] = NF4[code[i]] * scale[i // 64]
    scale[j] = DYNAMIC[scales[j]] * nested[j // 256] + nested[-1]        where the scales are doubly quantised

Shapes: a weight of n entries, row by row, has n/2 bytes of codes (the first of two entries in the upper half) and n/64 scales: float32, or
uint8 with n/64/256 + 1 float32 numbers `nested`, the last one being what was taken off before (the mean). Leading dimensions (experts) are kept.
The float32 numbers are stored by their bits, as int32: casting a model to bfloat16 must not round them.
Bytes read: 0.516 a weight (0.5625 without double quantisation), where bfloat16 has 2.
Dettmers et al. 2023 (QLoRA), arXiv:2305.14314; the eight-bit numbers: Dettmers et al. 2021, arXiv:2110.02861. Bits as bitsandbytes has them.
"""

import functools

import torch
from torch._subclasses import FakeTensor

from rewrite.kernels.op import Op

BLOCK, NESTED, CHUNK = 64, 256, 64 * 2**14
#: quantiles of the normal distribution that hold equal shares, with an exact zero, scaled to [-1, 1]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.cache
def dynamic():
    """The 256 numbers of the dynamic tree format: for each of seven powers of ten, the middles of 1, 2, … 64 equal parts of [0.1, 1]; ±, with 0 and 1."""
    found = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32, device="cpu")
        found += [sign * x for x in (10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist() for sign in (1, -1)]
    return tuple(sorted(found))


def quantize(w, double=True):
    """(codes, scales, nested or None) of a weight, its entries row by row; a million at a time, so that a large weight needs no float copy."""
    flat = w.reshape(-1)
    parts = [_nearest(part, NF4, BLOCK) for part in flat.split(CHUNK)]
    codes, scales = (torch.cat(found) for found in zip(*parts))
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), NF4.index(0.0))])
    codes = codes[::2] << 4 | codes[1::2]
    if not double:
        return codes, scales.view(torch.int32), None
    mean = scales.mean()
    scales, nested = _nearest(scales - mean, dynamic(), NESTED)
    return codes, scales, torch.cat([nested, mean[None]]).view(torch.int32)


def _nearest(flat, table, block):
    """(uint8 number of the nearest entry of a sorted table, largest magnitude) for blocks of a vector, each scaled to [-1, 1]."""
    table = torch.tensor(table, device=flat.device, dtype=torch.float32)
    n = flat.numel()
    rows = torch.nn.functional.pad(flat.float(), (0, -n % block)).view(-1, block)
    scales = rows.abs().amax(1)
    rows = rows * (1.0 / scales.clamp(min=1e-38))[:, None]
    return torch.bucketize(rows, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8).view(-1)[:n], scales


def reference(codes: torch.Tensor, scales: torch.Tensor, nested: torch.Tensor | None, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    pairs = torch.tensor([(a, b) for a in NF4 for b in NF4], device=codes.device, dtype=torch.float32)
    levels = None if nested is None else torch.tensor(dynamic(), device=codes.device, dtype=torch.float32)
    return _dequantize(codes, scales, nested, shape, dtype, pairs, levels)


def _dequantize(codes, scales, nested, shape, dtype, pairs, levels):
    lead, n = codes.shape[:-1], 1
    for size in shape[len(lead) :]:
        n *= size
    values = pairs[codes.int()].flatten(-2)[..., :n]  # a byte gives two entries
    if nested is None:
        scales = scales.view(torch.float32)
    else:
        nested = nested.view(torch.float32)
        coarse = nested[..., :-1].repeat_interleave(NESTED, -1)[..., : scales.shape[-1]]
        scales = levels[scales.int()] * coarse + nested[..., -1:]
    if n % BLOCK:
        return (values * scales.repeat_interleave(BLOCK, -1)[..., :n]).view(shape).to(dtype)
    return (values.unflatten(-1, (-1, BLOCK)) * scales.unsqueeze(-1)).view(shape).to(dtype)


@functools.cache
def _tables(device):
    return torch.tensor([(a, b) for a in NF4 for b in NF4], device=device), torch.tensor(dynamic(), device=device)


def launch(codes, scales, nested, shape, dtype):
    if torch.compiler.is_compiling() or isinstance(codes, FakeTensor):  # tables that outlive the call belong to real tensors
        return reference(codes, scales, nested, shape, dtype)
    return _dequantize(codes, scales, nested, shape, dtype, *_tables(codes.device))


def fake(codes, scales, nested, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)


dequant_nf4 = Op(reference, launch, fake)
