"""A mixture of adapters: each step sends a site through one of its copies, drawn at random; outside of training it is their average.

    y = f(x)
    -->
    y = y + up_i(gelu(down_j(y)))          i, j drawn for each site and step; elsewhere the means of all ups and of all downs

Each micro-batch is run twice with other draws, and the two answers are asked to agree (half the symmetric divergence of their logits).
Wang et al. 2022, arXiv:2205.12410.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass, frozen
from rewrite.errors import Refused


@dataclass(frozen=True)
class AdaMix(Pass):
    """copies: of each adapter. width: of the bottleneck. consistency: weight of the divergence between the two runs; 0 runs once."""

    copies: Annotated[int, Field(ge=1)] = 4
    width: Annotated[int, Field(ge=1)] = 16
    consistency: Annotated[float, Field(ge=0)] = 1.0

    role = "mlp"
    drift = 0.0
    example = {"where": "mlp", "width": 6, "copies": 3}
    drawn = ("pick_down", "pick_up")

    def params(self, y):
        down, size = y.new_empty(self.copies, self.width, y.shape[-1]), y.shape[-1]
        mean = y.new_full((self.copies,), 1 / self.copies)
        new = {"down": down.normal_(std=size**-0.5), "down_bias": y.new_zeros(self.copies, self.width), "up": y.new_zeros(self.copies, size, self.width)}
        return {**new, "up_bias": y.new_zeros(self.copies, size), "pick_down": frozen(mean), "pick_up": frozen(mean.clone())}

    def output(self, y, training, down, down_bias, up, up_bias, pick_down, pick_up):
        shares = [training * pick + (not training) / self.copies for pick in (pick_down, pick_up)]
        of = lambda share, each: (share @ each.flatten(1)).view(each.shape[1:])  # noqa: E731
        h = F.gelu(F.linear(y, of(shares[0], down), of(shares[0], down_bias)))
        return y + F.linear(h, of(shares[1], up), of(shares[1], up_bias))

    def before_forward(self, sites, generator):
        for site in sites:
            for pick in (site.pick_down, site.pick_up):
                pick.copy_(F.one_hot(torch.randint(self.copies, (), generator=generator), self.copies))

    def loss(self, sites, forward, generator):
        first = forward()
        if not self.consistency or not torch.is_grad_enabled():
            return first if isinstance(first, torch.Tensor) else first.loss
        if getattr(first, "logits", None) is None:
            raise Refused("adamix: its two runs are compared by their logits, and what runs the model gives none. Return the model's output, or say \"consistency\": 0.")
        with torch.no_grad():
            self.before_forward(sites, generator)
        a, b = (F.log_softmax(logits, -1) for logits in (first.logits, forward().logits))
        divergence = 0.5 * sum((p.exp() * (p - q)).sum(-1).mean() for p, q in ((a, b), (b, a)))
        return first.loss + self.consistency * divergence
