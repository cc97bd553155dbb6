"""Few rows times a weight of four-bit numbers that a table names: what `linear_nf4` and `linear_fp4` share."""

import functools

import torch

from rewrite.kernels import few_rows, int4_cpu
from rewrite.kernels.once import once
from rewrite.kernels.tables import BLOCK, NESTED, dynamic


def unsuited(x, codes, scales, nested, shape):
    if shape[1] % BLOCK:
        return f"rows of {shape[1]} entries, which blocks of {BLOCK} cross"
    return few_rows.unsuited(x, BLOCK) if x.is_cuda else int4_cpu.unsuited(x, shape[0], shape[1] // BLOCK)


def fast(x, codes, scales, nested, shape, b, table, fit):
    if x.is_cuda:
        return few_rows.product(x, codes, scales, b, shape[0], "table", nested, *tensors(table, x.device))
    y = int4_cpu.product(x, once(_packed, codes, scales, nested, tuple(shape), table, fit))
    return y if b is None else y.add_(b)


@functools.cache
def tensors(table, device):
    return torch.tensor(table, device=device), torch.tensor(dynamic(), device=device)


def _packed(codes, scales, nested, shape, table, fit):
    first, second, fit = int4_cpu.fitted(table, *fit)
    halves = torch.stack([codes >> 4, codes & 15], -1).view(shape).int()
    if nested is None:
        scales = scales.view(torch.float32)
    else:
        nested = nested.view(torch.float32)
        scales = torch.tensor(dynamic())[scales.int()] * nested[:-1].repeat_interleave(NESTED)[: scales.numel()] + nested[-1]
    return int4_cpu.pack_two(first[halves], second[halves], scales.view(shape[0], -1), fit)
