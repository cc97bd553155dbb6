"""Low-rank adapters whose rank is found while training: a gate for each rank, drawn to exactly zero by a proximal step.

    y = linear(x, w, b)
    -->
    y = linear(x, w, b) + scale * linear(gate * linear(x, down), up)

After each step of the optimizer every gate comes nearer to zero by its learning rate times `sparsity`, and stays there once it arrives unless the
loss pulls harder. `compact(live)` then leaves the ranks out whose gates are zero.
Ding et al. 2023, arXiv:2311.11696.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class SoRA(Pass):
    """rank: at the start. scale: of the update, which compacting leaves as it is. sparsity: how hard gates are drawn to zero."""

    rank: Annotated[int, Field(ge=1)]
    scale: float = 2.0
    sparsity: Annotated[float, Field(ge=0)] = 0.1

    role = "linear"
    drift = 0.0
    example = {"where": "attention.{q,v}", "rank": 6}

    def refuse(self, w, kind):
        if kind != "linear":
            return f"a gate for each rank is defined for linears, not for {kind}"
        if self.rank > min(w.shape):
            return f"rank {self.rank} is above the smaller side of {tuple(w.shape)}"

    def params(self, w):
        out_dim, in_dim = w.shape
        return {"down": w.new_empty(self.rank, in_dim).normal_(std=in_dim**-0.5), "gate": w.new_ones(self.rank), "up": w.new_zeros(out_dim, self.rank)}

    def output(self, x, y, down, gate, up):
        return y + self.scale * F.linear(gate * F.linear(x, down), up)

    def after_step(self, sites, lr):
        for site in sites:
            site.gate.copy_(F.softshrink(site.gate, lr(site.gate) * self.sparsity))

    def compacted(self, site):
        left = site.gate.nonzero().flatten()
        return ({"rank": len(left)}, {"down": site.down[left], "gate": site.gate[left], "up": site.up[:, left]}) if len(left) else None
