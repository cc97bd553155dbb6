"""A sparse difference to the frozen weight: each entry has a gate that is pressed towards exactly zero while training.

    y = linear(x, w, b)
    -->
    y = linear(x, w + gate * diff, b)        gate = clamp(3 * sigmoid(openness + noise) - 1.5, 0, 1)

In training `noise` is logistic, drawn for each step (hard-concrete gates), elsewhere it is absent. The penalty is the expected number of gates that
are open; `structured` gives each weight a gate for the whole besides. `training(live).choose(kept=0.005)` then keeps the largest entries alone.
Guo et al. 2020, arXiv:2012.07463.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rewrite.contract import Pass, frozen

LOW, HIGH, OPEN = -1.5, 1.5, 5.0


@dataclass(frozen=True)
class DiffPruning(Pass):
    """sparsity: weight of the penalty. initial: openness of every gate at the start. structured: one more gate for each weight as a whole."""

    sparsity: Annotated[float, Field(ge=0)] = 1.25e-7
    initial: float = OPEN
    structured: bool = False

    role = "linear"
    drift = 0.0
    example = {"where": "mlp.{up,down}"}
    drawn = ("noise", "noise_of_all")

    def params(self, w):
        own = {"diff": torch.zeros_like(w), "openness": torch.full_like(w, self.initial), "noise": frozen(torch.zeros_like(w))}
        one = w.new_zeros([1] * w.dim())
        return own | ({"openness_of_all": one + self.initial, "noise_of_all": frozen(one)} if self.structured else {})

    def weight(self, w, training, diff, openness, noise, openness_of_all=None, noise_of_all=None):
        delta = _gate(openness + training * noise) * diff
        return w + (delta if openness_of_all is None else delta * _gate(openness_of_all + training * noise_of_all))

    def before_forward(self, sites, generator):
        for site in sites:
            for name in self._noises():
                noise = getattr(site, name)
                noise.copy_(torch.rand(noise.shape, generator=generator, dtype=torch.float64).clamp(1e-7, 1 - 1e-7).logit())

    def penalty(self, sites):
        return self.sparsity * sum(self._open(site) for site in sites)

    def choose(self, sites, kept):
        deltas = [_gate(site.openness) * site.diff * (_gate(site.openness_of_all) if self.structured else 1) for site in sites]
        sizes = torch.cat([delta.abs().flatten() for delta in deltas])
        threshold = sizes.kthvalue(max(1, len(sizes) - int(kept * len(sizes)))).values
        for site, delta in zip(sites, deltas):
            site.diff.copy_(delta * (delta.abs() > threshold))
            for name in self._noises():
                getattr(site, name.replace("noise", "openness")).fill_(OPEN)

    def _noises(self):
        return ("noise", "noise_of_all") if self.structured else ("noise",)

    def _open(self, site):
        shift = math.log(-LOW / HIGH)
        entries = torch.sigmoid(site.openness - shift)
        return (entries * torch.sigmoid(site.openness_of_all - shift) if self.structured else entries).sum()


def _gate(openness):
    return (torch.sigmoid(openness) * (HIGH - LOW) + LOW).clamp(0, 1)
