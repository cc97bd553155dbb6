"""Four-bit floating-point weights, in blocks of 64 with a scale each; the scales themselves may be in eight bits, in blocks of 256.

    w[i] = FP4[code[i]] * scale[i // 64]
    scale[j] = DYNAMIC[scales[j]] * nested[j // 256] + nested[-1]        where the scales are doubly quantised

Shapes, layout and bytes as in `tables`: codes (n/2) bytes with the first entry in the upper half, scales (n/64), nested (n/16384 + 1) or None.
The numbers are 0, 1/16, 2, 3, 4, 6, 8, 12 with both signs, over 12. Bits as bitsandbytes has them.
"""

import torch

from rewrite.kernels import tables
from rewrite.kernels.op import Op

#: a sign, two bits of exponent and one of mantissa, over 12, the largest; in the order of their codes; the 0 with a sign is 0 too
FP4 = tuple(sign * x + 0.0 for sign in (1.0, -1.0) for x in (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25))


def quantize(w, double=True):
    """(codes, scales, nested or None) of a weight."""
    return tables.quantize(w, FP4, double)


def reference(codes: torch.Tensor, scales: torch.Tensor, nested: torch.Tensor | None, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return tables.reference(codes, scales, nested, shape, dtype, FP4)


def launch(codes, scales, nested, shape, dtype):
    return tables.launch(codes, scales, nested, shape, dtype, FP4)


def fake(codes, scales, nested, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)


dequant_fp4 = Op(reference, launch, fake)
