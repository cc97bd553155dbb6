"""A linear whose weight is in the four-bit microscaling format, for decoding.

    y = x (E2M1[codes] * 2^(scales - 127))' + b

Shapes: x (…, K), codes (N, K/2) and scales (N, K/32) of a weight `shape` = (N, K) as `dequant_mxfp4` has them, b (N) or None, y (…, N).
Bytes: 0.531·N·K, where bfloat16 has 2·N·K. On a CPU with bfloat16, the codes as two four-bit weights side by side (`int4_cpu`), exactly, 1.25·N·K.
"""

import torch
from torch.nn import functional as F

from rewrite.kernels import dequant_mxfp4 as d
from rewrite.kernels import few_rows, int4_cpu
from rewrite.kernels.once import once
from rewrite.kernels.quant_linear import QuantLinear

#: a, b, c of int4_cpu: a number of e2m1 is a whole multiple of a half, and so a sum of twos and halves
FIT = (2.0, 0.5, 0.0)


def reference(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, shape: list[int], b: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, d.dequant_mxfp4(codes, scales, shape, x.dtype), b)


def unsuited(x, codes, scales, shape):
    return few_rows.unsuited(x, d.BLOCK) if x.is_cuda else int4_cpu.unsuited(x, shape[0], shape[1] // d.BLOCK)


def fast(x, codes, scales, shape, b):
    if x.is_cuda:
        return few_rows.product(x, codes, scales, b, shape[0], "mxfp4")
    y = int4_cpu.product(x, once(_packed, codes, scales))
    return y if b is None else y.add_(b)


def _packed(codes, scales):
    first, second, _ = int4_cpu.fitted(d.E2M1, *FIT)
    halves = torch.stack([codes & 15, codes >> 4], -1).flatten(1).int()
    return int4_cpu.pack_two(first[halves], second[halves], d.powers(codes.device)[scales.int()], FIT)


def launch(x, codes, scales, shape, b):
    return linear_mxfp4.run(x, codes, scales, shape, b)


linear_mxfp4 = QuantLinear(reference, launch, d.dequant_mxfp4, unsuited, fast)
