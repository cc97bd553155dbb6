"""A linear whose weight is in eight-bit floating point (e4m3), for decoding.

    y = x (E4M3[codes] * scales)' + b

Shapes: x (…, K), codes uint8 (N, K), scales (N, 1) or (N/128, K/128) as `dequant_fp8` has them, b (N) or None, y (…, N).
Bytes: N·K, where bfloat16 has 2·N·K. A CPU has no product that takes these codes, and making numbers of them is what costs there.
"""

import torch
from torch.nn import functional as F

from rewrite.kernels import dequant_fp8 as d
from rewrite.kernels import few_rows
from rewrite.kernels.quant_linear import QuantLinear


def reference(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, d.dequant_fp8(codes, scales, x.dtype), b)


def is_channel(codes, scales):
    """Does each row have one scale?"""
    return scales.shape[1] == 1 and scales.shape[0] == codes.shape[0]


def unsuited(x, codes, scales):
    return few_rows.unsuited(x, codes.shape[1] if scales.shape[1] == 1 else d.BLOCK) if x.is_cuda else "no product of a CPU takes codes of eight-bit floating point"


def fast(x, codes, scales, b):
    return few_rows.product(x, codes, scales, b, codes.shape[0], "fp8", tall=1 if is_channel(codes, scales) else d.BLOCK)


def launch(x, codes, scales, b):
    return linear_fp8.run(x, codes, scales, b)


linear_fp8 = QuantLinear(reference, launch, d.dequant_fp8, unsuited, fast)
