"""Low-rank adapters with a frozen first matrix: backward keeps `down(x)`, of width rank, instead of x.

    y = op(x, w) + b
    -->
    y = op(x, w) + b + alpha/rank * mix(op(x, down), up)      down frozen

`up` starts at zero, so nothing changes until the first step.
Zhang et al. 2023, arXiv:2308.03303.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rewrite.contract import Pass, frozen


@dataclass(frozen=True)
class LoRAFA(Pass):
    """rank: of the update. alpha: its scale is alpha/rank."""

    rank: Annotated[int, Field(ge=1)]
    alpha: float = 16.0

    role = "linear"
    drift = 0.0
    example = {"where": "attention.{q,v}", "rank": 4}

    def refuse(self, w, kind):
        out_dim, in_dim = w.shape[-2:] if kind == "experts" else (w.shape[0], w.shape[1:].numel())
        if self.rank > min(out_dim, in_dim):
            return f"rank {self.rank} is above the smaller side of ({out_dim}, {in_dim})"

    def params(self, w, fan_in):
        return {"down": frozen(w.new_empty(self.rank, *w.shape[1:]).normal_(std=fan_in**-0.5)), "up": w.new_zeros(w.shape[0], self.rank)}

    def output(self, x, y, op, mix, down, up):
        return y + self.alpha / self.rank * mix(op(x, down), up)
