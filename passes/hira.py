"""Hadamard high-rank adaptation: the low-rank update multiplies the weight, so that its rank is not bounded by the adapter's.

    y = op(x, w) + b
    -->
    y = op(x, w + alpha/rank * w * (up @ down)) + b

`up` starts at zero, so nothing changes until the first step.
Huang et al. 2025 (HiRA), ICLR.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rewrite.contract import Pass


@dataclass(frozen=True)
class HiRA(Pass):
    """rank: of the factor that multiplies the weight. alpha: its scale is alpha/rank."""

    rank: Annotated[int, Field(ge=1)]
    alpha: float = 16.0

    role = "linear"
    drift = 0.0
    example = {"where": "attention.{q,v}", "rank": 4}

    def refuse(self, w, kind):
        if kind not in ("linear", "conv"):
            return f"defined for linears and convolutions, not for {kind}"
        if self.rank > min(w.shape[0], w.shape[1:].numel()):
            return f"rank {self.rank} is above the smaller side of ({w.shape[0]}, {w.shape[1:].numel()})"

    def params(self, w, fan_in):
        return {"down": w.new_empty(self.rank, fan_in).normal_(std=fan_in**-0.5), "up": w.new_zeros(w.shape[0], self.rank)}

    def weight(self, w, down, up):
        return w + self.alpha / self.rank * w * (up @ down).view(w.shape)
