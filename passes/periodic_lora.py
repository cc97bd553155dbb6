"""Low-rank adapters that are folded into the base weight again and again, so that the sum of the updates has a high rank.

    y = linear(x, w, b)
    -->
    y = linear(x, w, b) + alpha/rank * linear(linear(x, down), up)

At the end of each stage w takes the update over, `up` is zero again, `down` is drawn anew and the optimizer forgets both; the function stays what
it is. The weight is a copy of the live model's own, and is saved with it.
Meng et al. 2024, arXiv:2402.16141.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class PeriodicLoRA(Pass):
    """rank: of the update of one stage. every: steps of a stage. alpha: the update is scaled by alpha/rank. momentum: share of the update that stays
    in the adapter at the end of a stage; above zero `down` and the optimizer's memory stay too."""

    rank: Annotated[int, Field(ge=1)]
    every: Annotated[int, Field(ge=1)]
    alpha: float = 16.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0

    role = "linear"
    drift = 0.0
    example = {"where": "attention.{q,v}", "rank": 4, "every": 10}

    def refuse(self, w, kind):
        if kind != "linear":
            return f"what is folded fits linears, not {kind}"
        if self.rank > min(w.shape):
            return f"rank {self.rank} is above the smaller side of {tuple(w.shape)}"

    def writes(self):
        return ("w",)

    def params(self, w):
        return {"down": w.new_empty(self.rank, w.shape[1]).normal_(std=w.shape[1] ** -0.5), "up": w.new_zeros(w.shape[0], self.rank)}

    def output(self, x, y, down, up):
        return y + self.alpha / self.rank * F.linear(F.linear(x, down), up)

    def after_step(self, sites, done, generator, optimizer):
        if (done + 1) % self.every:
            return
        for site in sites:
            site.w = site.w + (1 - self.momentum) * self.alpha / self.rank * (site.up @ site.down)
            site.up.mul_(self.momentum)
            if not self.momentum:
                site.down.copy_(torch.randn(site.down.shape, generator=generator) * site.down.shape[1] ** -0.5)
                for tensor in (site.down, site.up):
                    optimizer.state.pop(tensor, None)
