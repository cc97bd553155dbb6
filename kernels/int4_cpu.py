"""Weights in codes as PyTorch's own four-bit product on a CPU takes them, laid out anew once.

    w[n, k] = (code[n, k] - 8) * scale[n, group] + zero[n, group]

A format of more than sixteen numbers, or of sixteen that do not lie evenly, is the sum of two such weights side by side, for x beside itself:

    number = a * (first - 8) + b * (second - 8) + c        first, second in 0 … 15;   x w' = [x, x] [w_first, w_second]'

With a, b and c fitted to nf4 the numbers are off by 0.0009 of the block's largest (RMS), half of what rounding the weight to bfloat16 costs; those of fp4
by 0.0001; eight-bit integers are exact. Memory beside the codes: half a byte a weight for four-bit integers, one byte for the others.
"""

import functools

import torch

GROUPS = (256, 128, 64, 32)
#: a, b, c for int8
WHOLE = (16.0, 1.0, 8.0)


def group_of(length, groups):
    """A size of groups that the product knows and that divides the format's, or None."""
    return next((size for size in GROUPS if length % groups == 0 and length // groups % size == 0), None)


def unsuited(x, out_dim, groups):
    """Why a product with codes cannot be taken here, or None."""
    if x.dtype != torch.bfloat16:
        return f"PyTorch's product with codes is slower than making the weight where x is {x.dtype}"
    if out_dim % 16:
        return f"PyTorch's four-bit product needs a multiple of 16 outputs, not {out_dim}"
    if group_of(x.shape[-1], groups) is None:
        return f"PyTorch's four-bit product has groups of 32 to 256 entries, not {x.shape[-1] / groups:g}"


def pack(codes, scales, zeros):
    """(codes as the product takes them, [scale, zero] for each group) of codes (N, K) in 0 … 15 and scales, zeros (N, groups) in float32."""
    size = group_of(codes.shape[1], scales.shape[1])
    times = codes.shape[1] // scales.shape[1] // size
    both = torch.stack([scales, zeros], -1).repeat_interleave(times, 1).transpose(0, 1)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1), both.to(torch.bfloat16).contiguous(), size


def pack_two(first, second, scales, fit):
    """The same for numbers that are the sum of two: w = number * scale."""
    a, b, c = fit
    return pack(torch.cat([first, second], 1), torch.cat([a * scales, b * scales], 1), torch.cat([c * scales, torch.zeros_like(scales)], 1))


@functools.cache
def fitted(table, a, b, c):
    """(first, second, (a, b, c)) for each number of a table: the nearest sums, then the a, b, c that fit them best."""
    numbers, steps = torch.tensor(table, dtype=torch.float64), torch.arange(-8, 8, dtype=torch.float64)
    sums = (a * steps[:, None] + b * steps[None, :] + c).flatten()
    nearest = (sums - numbers[:, None]).abs().argmin(1)
    first, second = nearest // 16, nearest % 16
    columns = torch.stack([first - 8.0, second - 8.0, torch.ones_like(numbers)], 1)
    return first.to(torch.uint8), second.to(torch.uint8), tuple(torch.linalg.lstsq(columns, numbers[:, None]).solution[:, 0].tolist())


def product(x, packed):
    codes, both, size = packed
    rows = x.reshape(-1, x.shape[-1])
    if both.shape[0] * size != rows.shape[1]:
        rows = torch.cat([rows, rows], 1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), codes, size, both).view(*x.shape[:-1], both.shape[1])
