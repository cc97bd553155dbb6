"""Low-rank adapters that are good at every rank: each step trains the first b rows alone, b drawn anew.

    y = linear(x, w, b)
    -->
    y = linear(x, w, b) + linear(pick * linear(x, down), up)       pick = alpha/b for the first b of `rank`, then zeros

Outside of training `rest` takes the place of `pick`: `training(live).choose(rank=4)` sets its b, whatever it was trained with.
Valipour et al. 2022, arXiv:2210.07558.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rewrite.contract import Pass, frozen
from rewrite.errors import Refused


@dataclass(frozen=True)
class DyLoRA(Pass):
    """rank: the largest. lowest: the smallest that is drawn. alpha: the update at rank b is scaled by alpha/b. only_last: a step at rank b trains the
    b-th row and column alone and leaves the lower ones as they are."""

    rank: Annotated[int, Field(ge=1)]
    lowest: Annotated[int, Field(ge=1)] = 1
    alpha: float = 16.0
    only_last: bool = False

    role = "linear"
    drift = 0.0
    example = {"where": "attention.{q,v}", "rank": 4}
    drawn = ("pick",)

    def __post_init__(self):
        if self.lowest > self.rank:
            raise ValueError(f"lowest {self.lowest} is above rank {self.rank}")

    def refuse(self, w, kind):
        out_dim, in_dim = w.shape[-2:] if kind == "experts" else (w.shape[0], w.shape[1:].numel())
        if self.rank > min(out_dim, in_dim):
            return f"rank {self.rank} is above the smaller side of ({out_dim}, {in_dim})"

    def shared(self, sites):
        whole = sites[0].w.new_full((self.rank,), self.alpha / self.rank)
        return {"pick": frozen(whole), "rest": frozen(whole.clone())}

    def params(self, w, fan_in):
        return {"down": w.new_empty(self.rank, *w.shape[1:]).normal_(std=fan_in**-0.5), "up": w.new_zeros(w.shape[0], self.rank)}

    def output(self, x, y, op, mix, training, pick, rest, down, up):
        gate = training * pick + (not training) * rest
        return y + mix(op(x, down), up * gate)

    def before_forward(self, pick, generator):
        self._cut(pick, int(torch.randint(self.lowest, self.rank + 1, (), generator=generator)))

    def after_backward(self, sites, pick):
        if self.only_last:
            last = int(pick.count_nonzero()) - 1
            for site in sites:
                for grad, dim in ((site.down.grad, site.up.dim() - 2), (site.up.grad, -1)):  # experts have one dimension more before the rank
                    kept = grad.select(dim, last).clone()
                    grad.zero_().select(dim, last).copy_(kept)

    def choose(self, rest, rank):
        if not 1 <= rank <= self.rank:
            raise Refused(f"dylora: rank {rank} was not trained: choose one from 1 to {self.rank}.")
        self._cut(rest, rank)

    def _cut(self, gate, rank):
        gate.zero_()[:rank] = self.alpha / rank
