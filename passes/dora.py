"""Weight-decomposed low-rank adaptation: the magnitude of each row trains apart from its direction.

    y = op(x, w) + b
    -->
    v = w + alpha/rank * up @ down
    y = op(x, magnitude * v / |v|) + b        |v| per output row, without gradient

`magnitude` starts as |w| and `up` at zero, so nothing changes until the first step.
Liu et al. 2024, arXiv:2402.09353.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rewrite.contract import Pass


@dataclass(frozen=True)
class DoRA(Pass):
    """rank: of the update of the direction. alpha: its scale is alpha/rank."""

    rank: Annotated[int, Field(ge=1)]
    alpha: float = 16.0

    role = "linear"
    drift = 1e-6  # on a fused projection the weight is put together anew, and another memory layout rounds otherwise
    example = {"where": "attention.{q,v}", "rank": 4}

    def refuse(self, w, kind):
        if kind not in ("linear", "conv"):
            return f"the norm of an output row is defined for linears and convolutions, not for {kind}"
        if self.rank > min(w.shape[0], w.shape[1:].numel()):
            return f"rank {self.rank} is above the smaller side of ({w.shape[0]}, {w.shape[1:].numel()})"

    def params(self, w, fan_in):
        return {
            "down": w.new_empty(self.rank, *w.shape[1:]).normal_(std=fan_in**-0.5),
            "up": w.new_zeros(w.shape[0], self.rank),
            "magnitude": _row_norm(w),
        }

    def weight(self, w, down, up, magnitude):
        v = w + self.alpha / self.rank * (up @ down.flatten(1)).view(w.shape)
        return v * (magnitude / _row_norm(v).detach())


def _row_norm(w):
    """The norm of each output row, shaped to multiply `w`."""
    return torch.linalg.vector_norm(w, dim=tuple(range(1, w.dim())), keepdim=True)
