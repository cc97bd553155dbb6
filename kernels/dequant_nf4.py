"""Four-bit NormalFloat weights, in blocks of 64 with a scale each; the scales themselves may be in eight bits, in blocks of 256.

    w[i] = NF4[code[i]] * scale[i // 64]
    scale[j] = DYNAMIC[scales[j]] * nested[j // 256] + nested[-1]        where the scales are doubly quantised

Shapes, layout and bytes as in `tables`: codes (n/2) bytes with the first entry in the upper half, scales (n/64), nested (n/16384 + 1) or None.
Dettmers et al. 2023 (QLoRA), arXiv:2305.14314. Bits as bitsandbytes has them.
"""

import torch

from rewrite.kernels import tables
from rewrite.kernels.op import Op

#: quantiles of the normal distribution that hold equal shares, with an exact zero, scaled to [-1, 1]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize(w, double=True):
    """(codes, scales, nested or None) of a weight."""
    return tables.quantize(w, NF4, double)


def reference(codes: torch.Tensor, scales: torch.Tensor, nested: torch.Tensor | None, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return tables.reference(codes, scales, nested, shape, dtype, NF4)


def launch(codes, scales, nested, shape, dtype):
    return tables.launch(codes, scales, nested, shape, dtype, NF4)


def fake(codes, scales, nested, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)


dequant_nf4 = Op(reference, launch, fake)
