"""A linear whose weight is in four-bit floating point, for decoding.

    y = x (FP4[codes] * scales)' + b

Shapes: x (…, K), codes and scales, nested of a weight `shape` = (N, K) as `dequant_fp4` has them, b (N) or None, y (…, N).
Bytes: 0.516·N·K, where bfloat16 has 2·N·K. On a CPU with bfloat16, the codes as two four-bit weights side by side (`int4_cpu`), 1·N·K.
"""

import torch
from torch.nn import functional as F

from rewrite.kernels import dequant_fp4 as d
from rewrite.kernels import table_linear
from rewrite.kernels.quant_linear import QuantLinear

#: a, b, c of int4_cpu, found by a search for the least RMS error
FIT = (0.0837, 0.0830, 0.0830)


def reference(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, nested: torch.Tensor | None, shape: list[int], b: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, d.dequant_fp4(codes, scales, nested, shape, x.dtype), b)


def fast(x, codes, scales, nested, shape, b):
    return table_linear.fast(x, codes, scales, nested, shape, b, d.FP4, FIT)


def launch(x, codes, scales, nested, shape, b):
    return linear_fp4.run(x, codes, scales, nested, shape, b)


linear_fp4 = QuantLinear(reference, launch, d.dequant_fp4, table_linear.unsuited, fast)
