"""Conditional adapters: a router picks the few tokens that pass the frozen sub-layer; all tokens pass an adapter.

    y = f(x)
    -->
    y = adapter(x) + scatter(lambda * f(x[picked]))           picked: the k = length/reduction tokens of largest lambda
    lambda = soft_top_k(x @ score): between 0 and 1, k in sum         a_i = log k - log sum exp(s + b), b = min(-s - a, 0), in turns

Only a part of f's work is left. Tokens are picked among all of a sequence (padding counts as tokens), so the pass is refused where the model also
decodes token by token behind a cache.
Lei et al. 2023, arXiv:2304.04947.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class CoDA(Pass):
    """bottleneck: inner width of the adapter. reduction: one token in this many passes the sub-layer. turns: of the soft top-k."""

    bottleneck: Annotated[int, Field(ge=1)]
    reduction: Annotated[int, Field(ge=1)] = 4
    turns: Annotated[int, Field(ge=1)] = 20

    role = "mlp"
    drift = None
    whole_sequence = True
    example = {"where": "mlp", "bottleneck": 6, "reduction": 2, "turns": 4}

    def refuse(self, x, y):
        if x.dim() != 3 or x.shape != y.shape:
            return "its input is not (batch, length, width), or its output has another shape"

    def params(self, x):
        width = x.shape[-1]
        new = {name: x.new_empty(rows, width).normal_(std=width**-0.5) for name, rows in (("score", 1), ("down", self.bottleneck))}
        return {**new, "up": x.new_zeros(width, self.bottleneck)}

    def output(self, x, f, score, down, up):
        share = self._soft_top_k(F.linear(x, score))
        k = (x.shape[1] + self.reduction - 1) // self.reduction
        picked = share.topk(k, dim=1).indices
        at = picked.expand(-1, -1, x.shape[-1])
        heavy = f(x.gather(1, at)) * share.gather(1, picked)
        return F.linear(F.relu(F.linear(x, down)), up) + torch.zeros_like(x).scatter(1, at, heavy)

    def _soft_top_k(self, s):
        k = torch.ceil(torch.ones_like(s).sum(1, keepdim=True) / self.reduction)
        b = torch.zeros_like(s)
        for _ in range(self.turns):
            a = torch.log(k) - torch.logsumexp(s + b, 1, keepdim=True)
            b = torch.clamp(-s - a, max=0)
        return torch.exp(s + a + b)
