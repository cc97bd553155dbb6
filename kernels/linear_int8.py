"""A linear whose weight is in eight-bit integers, for decoding.

    y = x (codes * scales)' + b

Shapes: x (…, K), codes int8 (N, K), scales (N, groups) as `dequant_int8` has them, b (N) or None, y (…, N).
Bytes: N·K, where bfloat16 has 2·N·K and making the weight first moves 5·N·K. On a CPU with bfloat16, PyTorch's own products take the codes: with one scale
for each output as they are, with more as the sum of two four-bit weights (`int4_cpu`).
"""

import torch
from torch.nn import functional as F

from rewrite.kernels import dequant_int8 as d
from rewrite.kernels import few_rows, int4_cpu
from rewrite.kernels.once import once
from rewrite.kernels.quant_linear import QuantLinear, scaled_after


def reference(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, d.dequant_int8(codes, scales, x.dtype), b)


def unsuited(x, codes, scales):
    (out_dim, length), groups = codes.shape, scales.shape[1]
    if x.is_cuda:
        return few_rows.unsuited(x, length // groups)
    if groups > 1:
        return int4_cpu.unsuited(x, out_dim, groups)
    if x.dtype != torch.bfloat16:
        return f"PyTorch's product with codes is slower than making the weight where x is {x.dtype}"
    return f"PyTorch's product with codes needs rows of a multiple of 16 entries, not {length}" if length % 16 else None


def fast(x, codes, scales, b):
    if x.is_cuda:
        return few_rows.product(x, codes, scales, b, codes.shape[0], "int8")
    if scales.shape[1] > 1:
        y = int4_cpu.product(x, once(_packed, codes, scales))
    else:
        rounded = once(_rounded, codes, scales)
        y = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).contiguous(), codes, rounded).view(*x.shape[:-1], codes.shape[0])
    return y if b is None else y.add_(b)


def _rounded(codes, scales):
    return scales.view(torch.float32).view(-1).to(torch.bfloat16)


def _packed(codes, scales):
    shifted = codes.int() + 128
    return int4_cpu.pack_two(shifted >> 4, shifted & 15, scales.view(torch.float32), int4_cpu.WHOLE)


def plain(x, codes, scales, b):
    if not x.is_cuda and scales.shape[1] == 1 and x.dtype != torch.float16:  # sums of codes leave the range of float16
        return scaled_after(x, codes, scales, b)
    return F.linear(x, d.dequant_int8.launch(codes, scales, x.dtype), b)


def launch(x, codes, scales, b):
    return linear_int8.run(x, codes, scales, b)


linear_int8 = QuantLinear(reference, launch, d.dequant_int8, unsuited, fast, plain)
