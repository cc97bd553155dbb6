"""A linear whose weight is in four-bit integers with scales for groups, for decoding.

    y = x ((codes - zeros) * scales)' + b

Shapes: x (…, K), codes (N, K/2), scales and zeros (N, groups) of a weight `shape` = (N, K) as `dequant_int4` has them, b (N) or None, y (…, N).
Bytes: 0.5625·N·K at groups of 64, where bfloat16 has 2·N·K. On a CPU with bfloat16, PyTorch's own product (`int4_cpu`).
"""

import torch
from torch.nn import functional as F

from rewrite.kernels import dequant_int4 as d
from rewrite.kernels import few_rows, int4_cpu
from rewrite.kernels.once import once
from rewrite.kernels.quant_linear import QuantLinear


def reference(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, shape: list[int], b: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, d.dequant_int4(codes, scales, zeros, shape, x.dtype), b)


def unsuited(x, codes, scales, zeros, shape):
    return few_rows.unsuited(x, shape[1] // scales.shape[1]) if x.is_cuda else int4_cpu.unsuited(x, shape[0], scales.shape[1])


def fast(x, codes, scales, zeros, shape, b):
    if x.is_cuda:
        return few_rows.product(x, codes, scales, b, shape[0], "int4", zeros)
    y = int4_cpu.product(x, once(_packed, codes, scales, zeros))
    return y if b is None else y.add_(b)


def _packed(codes, scales, zeros):
    scales = scales.view(torch.float32)
    return int4_cpu.pack(torch.stack([codes & 15, codes >> 4], -1).flatten(1), scales, torch.zeros_like(scales) if zeros is None else (d.ZERO - zeros.float()) * scales)


def launch(x, codes, scales, zeros, shape, b):
    return linear_int4.run(x, codes, scales, zeros, shape, b)


linear_int4 = QuantLinear(reference, launch, d.dequant_int4, unsuited, fast)
