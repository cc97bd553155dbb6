"""Low-rank adapters in the form of a singular value decomposition, with one budget of ranks for all sites.

    y = linear(x, w, b)
    -->
    y = linear(x, w, b) + alpha/rank * linear(scale * linear(x, down), up)

While training, every triplet (a row of `down`, its scale, a column of `up`) is scored by how much the loss would feel its loss, and the scales
of the least important are set to zero, until `target` are left for each site on average; `compact(live)` then leaves the others out. A penalty
keeps the vectors orthogonal.
Zhang et al. 2023, arXiv:2303.10512.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass

TRIPLET = ("down", "scale", "up")


@dataclass(frozen=True)
class AdaLoRA(Pass):
    """steps: of the whole training. rank: at the start. target: mean rank at the end. alpha: the update is scaled by alpha/rank. warmup: steps before
    the budget falls. final: steps after it has fallen. every: steps from one cut to the next. sensitivity: how slowly the mean of a triplet's
    sensitivity follows. uncertainty: likewise of its uncertainty. orthogonality: weight of the penalty."""

    steps: Annotated[int, Field(ge=1)]
    rank: Annotated[int, Field(ge=1)] = 12
    target: Annotated[int, Field(ge=1)] = 8
    alpha: float = 16.0
    warmup: Annotated[int, Field(ge=0)] = 0
    final: Annotated[int, Field(ge=0)] = 0
    every: Annotated[int, Field(ge=1)] = 1
    sensitivity: Annotated[float, Field(gt=0, lt=1)] = 0.85
    uncertainty: Annotated[float, Field(gt=0, lt=1)] = 0.85
    orthogonality: Annotated[float, Field(ge=0)] = 0.5

    role = "linear"
    drift = 0.0
    example = {"where": "attention.{q,v}", "steps": 100, "rank": 6, "target": 4, "warmup": 10, "final": 30}

    def __post_init__(self):
        if self.warmup + self.final >= self.steps:
            raise ValueError(f"warmup and final ({self.warmup} + {self.final}) leave none of the {self.steps} steps for the budget to fall")
        if self.target > self.rank:
            raise ValueError(f"target {self.target} is above rank {self.rank}")

    def refuse(self, kind):
        return None if kind == "linear" else f"its vectors fit linears, not {kind}"

    def params(self, w):
        out_dim, in_dim = w.shape
        down, up = w.new_empty(self.rank, in_dim).normal_(std=0.02), w.new_empty(out_dim, self.rank).normal_(std=0.02)
        return {"down": down, "scale": w.new_zeros(self.rank), "up": up}

    def output(self, x, y, down, scale, up):
        return y + self.alpha / self.rank * F.linear(scale * F.linear(x, down), up)

    def remembers(self, down, scale, up):
        zeros = {f"{kind}_of_{name}": torch.zeros_like(t) for name, t in zip(TRIPLET, (down, scale, up)) for kind in ("sensitivity", "uncertainty")}
        return {**zeros, "cut": torch.zeros_like(scale, dtype=torch.bool)}

    def penalty(self, sites):
        grams = [m for site in sites for m in (site.down @ site.down.mT, site.up.mT @ site.up)]
        return self.orthogonality / len(grams) * sum((m - torch.eye(self.rank, dtype=m.dtype, device=m.device)).norm() for m in grams)

    def after_step(self, sites, done):
        last, n = self.steps - self.final, len(sites)
        for site in sites if done < last else ():
            self._follow(site)
        if self.warmup < done <= last and (done == last or done % self.every == 0):
            left = 1 - (done - self.warmup) / (last - self.warmup)
            self._cut(sites, int(n * (self.rank - self.target) * left**3 + n * self.target))
        for site in sites if done >= last else ():
            site.scale.masked_fill_(site.cut, 0.0)

    def _follow(self, site):
        for name in TRIPLET:
            tensor, mean, doubt = (getattr(site, part) for part in (name, f"sensitivity_of_{name}", f"uncertainty_of_{name}"))
            now = (tensor * tensor.grad).abs() if tensor.grad is not None else torch.zeros_like(tensor)
            mean.lerp_(now, 1 - self.sensitivity)
            doubt.lerp_((now - mean).abs(), 1 - self.uncertainty)

    def _cut(self, sites, budget):
        score = lambda site, name: getattr(site, f"sensitivity_of_{name}") * getattr(site, f"uncertainty_of_{name}")  # noqa: E731
        scores = [score(site, "scale") + score(site, "down").mean(1) + score(site, "up").mean(0) for site in sites]
        n = len(sites) * self.rank - budget
        threshold = torch.cat(scores).kthvalue(n).values if n else -1.0
        for site, value in zip(sites, scores):
            site.cut.copy_(value <= threshold)
            site.scale.masked_fill_(site.cut, 0.0)

    def compacted(self, site):
        left = (~site.cut | (site.scale != 0)).nonzero().flatten()  # what was cut may have grown again since
        n, rows = len(left), {name: getattr(site, name).index_select(-1 if name.endswith("up") else 0, left) for name in site.names}
        return ({"rank": n, "target": min(self.target, n), "alpha": self.alpha * n / self.rank}, rows) if n else None
