"""Weights in eight or four bits, made into numbers again where they are used.

    y = op(x, w) + b
    -->
    y = op(x, dequant(codes, scales)) + b

The float weight leaves memory. Codes follow from the base, so they are not saved with an adapter. The report has the error of each site, relative
to the RMS of its weight. Heads and routers are left as they are, for what they give is compared. What rows of entries are divided into
(int4, mxfp4, groups of int8) must come out even; the last blocks of nf4, fp4 and fp8 are smaller.
nf4, double: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314. fp8: Micikevicius et al. 2022, arXiv:2209.05433. mxfp4: Rouhani et al. 2023,
arXiv:2310.10537. fp4 as bitsandbytes has it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from rewrite.kernels import dequant_fp4, dequant_fp8, dequant_int4, dequant_int8, dequant_mxfp4, dequant_nf4
from rewrite.kernels.pieces import pieces

from rewrite.contract import Pass

#: format → how it is made, how it is read, its tensors, its options with what they are where a spec leaves them out
FORMATS = {
    "nf4": (dequant_nf4.quantize, dequant_nf4.dequant_nf4, ("codes", "scales", "nested"), {"double": True}),
    "fp4": (dequant_fp4.quantize, dequant_fp4.dequant_fp4, ("codes", "scales", "nested"), {"double": True}),
    "int4": (dequant_int4.quantize, dequant_int4.dequant_int4, ("codes", "scales", "zeros"), {"group_size": 64, "symmetric": True}),
    "int8": (dequant_int8.quantize, dequant_int8.dequant_int8, ("codes", "scales"), {"group_size": None}),
    "fp8": (dequant_fp8.quantize, dequant_fp8.dequant_fp8, ("codes", "scales"), {"blocks": False}),
    "mxfp4": (dequant_mxfp4.quantize, dequant_mxfp4.dequant_mxfp4, ("codes", "scales"), {}),
}
OPTIONS = ("double", "group_size", "symmetric", "blocks")


@dataclass(frozen=True)
class Quantize(Pass):
    """format: of the weights. double: the scales are quantised too (nf4 and fp4: true). group_size: entries of a row that share a scale (int4: 64; int8:
    the whole row). symmetric: no group has a zero of its own (int4: true). blocks: 128 × 128 entries share a scale, where an output channel's do (fp8: false)."""

    format: Literal["nf4", "fp4", "int4", "int8", "fp8", "mxfp4"] = "nf4"
    double: bool | None = None
    group_size: Literal[32, 64, 128] | None = None
    symmetric: bool | None = None
    blocks: bool | None = None

    role = "linear"
    whole = True
    drift = None
    example = {"where": "linear", "format": "nf4"}

    def __post_init__(self):
        known = FORMATS[self.format][3]
        for name in OPTIONS:
            if getattr(self, name) is not None and name not in known:
                raise ValueError(f'"{name}" is not an option of {self.format}, which has {", ".join(known) or "none"}')

    def refuse(self, w, kind, role):
        if kind not in ("linear", "conv", "experts"):
            return f"rows of its weight are looked up one by one ({kind}), and codes are made into numbers all at once"
        if role in ("head", "router"):
            return f"a {role}'s outputs are compared with each other, and rounding changes which is the largest"
        if not w.is_floating_point():
            return f"its weight is stored as {w.dtype} already"
        length, size = (w.shape[-1] if kind == "experts" else w.shape[1:].numel()), 32 if self.format == "mxfp4" else self._options().get("group_size")
        if size and length % size:
            fits = [n for n in (32, 64, 128) if length % n == 0 and self.format != "mxfp4"]
            return f"its rows of {length} entries do not divide into groups of {size}" + (f"; {', '.join(map(str, fits))} would do" if fits else "")
        if not w.is_meta and not torch.linalg.vector_norm(w, float("inf")).isfinite():  # a mask would be another weight
            return "its weight has values that are NaN or infinite"

    def derive(self, w):
        quantize, _, names, _ = FORMATS[self.format]
        made = zip(names, quantize(w, *self._options().values()))
        return {name: tensor for name, tensor in made if tensor is not None}

    def measure(self, w, kind, codes, scales, nested=None, zeros=None):
        given, squares, worst = (w, codes, scales, nested, zeros), 0.0, 0.0
        each = [given] if kind != "experts" else ([t if t is None else t[i] for t in given] for i in range(len(w)))
        for part, *tensors in (piece for one in each for piece in pieces(*one)):
            error = self._numbers(part.shape, torch.float32, *tensors).sub_(part)
            squares, worst = squares + float(torch.linalg.vector_norm(error)) ** 2, max(worst, float(error.abs().max()))
        norm = max(float(torch.linalg.vector_norm(w, dtype=torch.float32)), 1e-36)
        return {"rms error": squares**0.5 / norm, "max error": worst * w.numel() ** 0.5 / norm}

    def weight(self, x, w, codes, scales, nested=None, zeros=None):
        return self._numbers(w.shape, x.dtype, codes, scales, nested, zeros)

    def _options(self):
        return {name: value if getattr(self, name) is None else getattr(self, name) for name, value in FORMATS[self.format][3].items()}

    def _numbers(self, shape, dtype, codes, scales, nested, zeros):
        _, op, names, _ = FORMATS[self.format]
        if self.format in ("int8", "fp8"):  # a code for each entry: the codes have the weight's shape
            return op(codes, scales, dtype)
        return op(codes, scales, *({"nested": nested, "zeros": zeros}[name] for name in names[2:]), list(shape), dtype)
