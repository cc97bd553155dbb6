"""Low-rank adapters that start as what quantising lost.

    y = op(x, w) + b
    -->
    y = op(x, dequant(codes, scales)) + b + s * mix(op(x, down), up)        s = alpha/rank

    repeated:  q = quantised(w - s * up @ down);  s * up @ down = the largest singular values of w - q

Quantise and LoRA in one step, so that the adapter is fitted to the codes. `up0` and `down0` are those of the last round but one, from which
the codes follow. Li et al. 2023, arXiv:2310.08659.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from rewrite.kernels import dequant_int8, dequant_nf4

from rewrite.contract import Pass, frozen


@dataclass(frozen=True)
class LoftQ(Pass):
    """rank: of the adapter. alpha: its scale is alpha/rank. rounds: of quantising and fitting. format: of the weights."""

    rank: Annotated[int, Field(ge=1)]
    alpha: float = 16.0
    rounds: Annotated[int, Field(ge=1)] = 5
    format: Literal["nf4", "int8"] = "nf4"

    role = "linear"
    whole = True
    drift = None
    example = {"where": "attention.{q,v}", "rank": 4}

    def refuse(self, w, kind):
        if kind not in ("linear", "conv"):
            return f"its rounds are defined for linears and convolutions, not for {kind}"
        out_dim, in_dim = w.shape[0], w.shape[1:].numel()
        if self.rank > min(out_dim, in_dim):
            return f"rank {self.rank} is above the smaller side of ({out_dim}, {in_dim})"
        if not w.is_meta and not w.isfinite().all():
            return "its weight has values that are NaN or infinite"

    def params(self, w):
        up, down = w.new_zeros(w.shape[0], self.rank), w.new_zeros(self.rank, *w.shape[1:])
        up0, down0 = up, down
        for _ in range(0 if w.is_meta else self.rounds):
            up0, down0 = up, down
            residual = w.float() - self._numbers(*self._codes(self._rest(w, down0, up0)), w.shape, torch.float32)
            u, s, vh = torch.linalg.svd(residual.flatten(1), full_matrices=False)
            root = (s[: self.rank] / (self.alpha / self.rank)).sqrt()
            up, down = (u[:, : self.rank] * root).to(w.dtype), (root[:, None] * vh[: self.rank]).view(down.shape).to(w.dtype)
        return {"down": down, "up": up, "down0": frozen(down0), "up0": frozen(up0)}

    def derive(self, w, down0, up0):
        made = zip(("codes", "scales", "nested"), self._codes(self._rest(w, down0, up0)))
        return {name: tensor for name, tensor in made if tensor is not None}

    def measure(self, w, down, up, codes, scales, nested=None):
        left = self._rest(w, down, up).float() - self._numbers(codes, scales, nested, w.shape, torch.float32)
        return {"rms error": float(left.square().mean().sqrt() / w.float().square().mean().sqrt())}

    def weight(self, x, w, codes, scales, nested=None):
        return self._numbers(codes, scales, nested, w.shape, x.dtype)

    def output(self, x, y, op, mix, down, up):
        return y + self.alpha / self.rank * mix(op(x, down), up)

    def _rest(self, w, down, up):
        """What the adapter leaves of the weight; in float64, so that every machine rounds it to the same numbers."""
        update = up.double() @ down.double().flatten(1)
        return (w.double() - self.alpha / self.rank * update.view(w.shape)).to(w.dtype)

    def _codes(self, w):
        return (*dequant_int8.quantize(w), None) if self.format == "int8" else dequant_nf4.quantize(w)

    def _numbers(self, codes, scales, nested, shape, dtype):
        if self.format == "int8":
            return dequant_int8.dequant_int8(codes, scales, dtype)
        return dequant_nf4.dequant_nf4(codes, scales, nested, list(shape), dtype)
