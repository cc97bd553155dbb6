"""Eight-bit weights with a scale for each output channel.

    w[o, …] = codes[o, …] * scales[o]        codes int8, scales float32 (stored by their bits, as int32: casting a model must not round them)

Shapes: codes as the weight, (out, …) or (experts, out, …); scales the same with every size after out being 1.
Bytes read: 1 a weight and 4 a row, where bfloat16 has 2 a weight.
"""

import torch

from rewrite.kernels.op import Op


def quantize(w):
    """(codes, scales) of a weight, (out, …): the largest entry of a row becomes ±127."""
    scales = w.abs().amax(tuple(range(1, w.dim())), keepdim=True).float().clamp(min=1e-36) / 127
    return (w.float() / scales).round_().clamp_(-127, 127).to(torch.int8), scales.view(torch.int32)


def reference(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes.float() * scales.view(torch.float32)).to(dtype)


dequant_int8 = Op(reference, launch=reference)
