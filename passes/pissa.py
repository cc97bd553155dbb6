"""Low-rank adapters that start from the largest singular values of the weight, which keeps the rest.

    y = op(x, w) + b
    -->
    y = op(x, w - s * up0 @ down0) + b + s * mix(op(x, down), up)        s = alpha/rank

`up` and `down` start at `up0` and `down0`, the top of the singular value decomposition, so the model starts as it was, up to rounding.
Meng et al. 2024, arXiv:2404.02948.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rewrite.contract import Pass, frozen


@dataclass(frozen=True)
class PiSSA(Pass):
    """rank: of the adapter. alpha: its scale is alpha/rank. niter: rounds of a randomised decomposition, much faster for large weights; 0 for the exact one."""

    rank: Annotated[int, Field(ge=1)]
    alpha: float = 16.0
    niter: Annotated[int, Field(ge=0)] = 0

    role = "linear"
    drift = 1e-5
    example = {"where": "attention.{q,v}", "rank": 4}

    def refuse(self, w, kind):
        if kind not in ("linear", "conv", "experts"):
            return f"its update of the base is defined for linears, convolutions and experts, not for {kind}"
        out_dim, in_dim = w.shape[-2:] if kind == "experts" else (w.shape[0], w.shape[1:].numel())
        if self.rank > min(out_dim, in_dim):
            return f"rank {self.rank} is above the smaller side of ({out_dim}, {in_dim})"

    def params(self, w):
        if w.is_meta:
            up, down = w.new_empty(w.shape[0], self.rank), w.new_empty(self.rank, *w.shape[1:])
        else:
            u, s, vh = self._svd(w.flatten(1).float())
            root = (s / (self.alpha / self.rank)).sqrt()
            up, down = (u * root).to(w.dtype), (root[:, None] * vh).view(self.rank, *w.shape[1:]).to(w.dtype)
        return {"down": down, "up": up, "down0": frozen(down.clone()), "up0": frozen(up.clone())}

    def _svd(self, w):
        """The largest `rank` singular values with their vectors."""
        if self.niter:
            u, s, v = torch.svd_lowrank(w, self.rank, niter=self.niter)
            return u, s, v.mH
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        return u[:, : self.rank], s[: self.rank], vh[: self.rank]

    def derive(self, w, down0, up0):
        update = up0.double() @ down0.double().flatten(1)
        return {"w": (w.double() - self.alpha / self.rank * update.view(w.shape)).to(w.dtype)}

    def output(self, x, y, op, mix, down, up):
        return y + self.alpha / self.rank * mix(op(x, down), up)
