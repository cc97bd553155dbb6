"""Weights in eight or four bits, made into numbers again where they are used.

    y = op(x, w) + b
    -->
    y = op(x, dequant(codes, scales)) + b

The float weight leaves memory. Codes follow from the base, so they are not saved with an adapter. The report has the error of each
site, relative to the RMS of its weight.
int8: a scale for each output channel. nf4: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from rewrite.kernels import dequant_int8, dequant_nf4

from rewrite.contract import Pass


@dataclass(frozen=True)
class Quantize(Pass):
    """format: of the weights. double: the scales are quantised too, where the format has it (nf4)."""

    format: Literal["nf4", "int8"] = "nf4"
    double: bool = True

    role = "linear"
    whole = True
    drift = None
    example = {"where": "linear", "format": "nf4"}

    def refuse(self, w, kind):
        if kind not in ("linear", "conv", "experts"):
            return f"rows of its weight are looked up one by one ({kind}), and codes are made into numbers all at once"
        if not w.is_floating_point():
            return f"its weight is stored as {w.dtype} already"
        if not w.is_meta and not w.isfinite().all():
            return "its weight has values that are NaN or infinite"

    def derive(self, w):
        if self.format == "int8":
            return dict(zip(("codes", "scales"), dequant_int8.quantize(w)))
        made = zip(("codes", "scales", "nested"), dequant_nf4.quantize(w, self.double))
        return {name: tensor for name, tensor in made if tensor is not None}

    def measure(self, w, codes, scales, nested=None):
        error, rms = (self._numbers(codes, scales, nested, w.shape, torch.float32) - w.float()).abs(), w.float().square().mean().sqrt()
        return {"rms error": float(error.square().mean().sqrt() / rms), "max error": float(error.max() / rms)}

    def weight(self, x, w, codes, scales, nested=None):
        return self._numbers(codes, scales, nested, w.shape, x.dtype)

    def _numbers(self, codes, scales, nested, shape, dtype):
        if self.format == "int8":
            return dequant_int8.dequant_int8(codes, scales, dtype)
        return dequant_nf4.dequant_nf4(codes, scales, nested, list(shape), dtype)
