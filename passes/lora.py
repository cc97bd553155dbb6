"""Low-rank adapters on anything affine: linears, fused projections, embeddings, convolutions, experts.

    y = op(x, w) + b
    -->
    y = op(x, w) + b + alpha/rank * mix(op(dropout(x), down), up)

`up` starts at zero, so nothing changes until the first step. With `lr_ratio` (about 16) it is LoRA+.
Hu et al. 2021, arXiv:2106.09685; Hayou et al. 2024, arXiv:2402.12354.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class LoRA(Pass):
    """rank: of the update. alpha: its scale is alpha/rank. dropout: on x, before `down`. lr_ratio: `up` learns that many times as fast as `down`."""

    rank: Annotated[int, Field(ge=1)]
    alpha: float = 16.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    lr_ratio: Annotated[float, Field(gt=0.0)] = 1.0

    role = "linear"
    drift = 0.0
    example = {"where": "attention.{q,v}", "rank": 4}

    def refuse(self, w, kind):
        out_dim, in_dim = w.shape[-2:] if kind == "experts" else (w.shape[0], w.shape[1:].numel())
        if self.rank > min(out_dim, in_dim):
            return f"rank {self.rank} is above the smaller side of ({out_dim}, {in_dim})"
        if self.dropout and kind == "embedding":
            return "dropout has no meaning on token ids"

    def params(self, w, fan_in):
        return {"down": w.new_empty(self.rank, *w.shape[1:]).normal_(std=fan_in**-0.5), "up": w.new_zeros(w.shape[0], self.rank)}

    def output(self, x, y, op, mix, training, down, up):
        if self.dropout:
            x = F.dropout(x, self.dropout, training)
        return y + self.alpha / self.rank * mix(op(x, down), up)

    def groups(self):
        return {"up": self.lr_ratio} if self.lr_ratio != 1 else {}

    def combined(self, parts):
        """The sum of what they do: the ranks side by side, each `down` scaled by its weight."""
        down = torch.cat([weight * options.alpha / options.rank * tensors["down"] for options, weight, tensors in parts])
        up, rank = torch.cat([tensors["up"] for _, _, tensors in parts], -1), sum(options.rank for options, _, _ in parts)
        return replace(self, rank=rank, alpha=float(rank)), {"down": down, "up": up}
