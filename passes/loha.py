"""Low-rank Hadamard products: the update is the elementwise product of two low-rank matrices, of rank up to rank².

    y = op(x, w) + b
    -->
    y = op(x, w + alpha/rank * (up1 @ down1) * (up2 @ down2)) + b

`up2` starts at zero, so nothing changes until the first step.
Hyeon-Woo et al. 2021 (FedPara), arXiv:2108.06098; as LoHa in LyCORIS, arXiv:2309.14859.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rewrite.contract import Pass


@dataclass(frozen=True)
class LoHa(Pass):
    """rank: of each factor. alpha: the update's scale is alpha/rank."""

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

    def params(self, w):
        out_dim, in_dim = w.shape[0], w.shape[1:].numel()
        return {
            "up1": w.new_empty(out_dim, self.rank).normal_(std=0.1),
            "down1": w.new_empty(self.rank, in_dim).normal_(),
            "up2": w.new_zeros(out_dim, self.rank),
            "down2": w.new_empty(self.rank, in_dim).normal_(std=0.1),
        }

    def weight(self, w, up1, down1, up2, down2):
        return w + self.alpha / self.rank * ((up1 @ down1) * (up2 @ down2)).view(w.shape)
