"""Training without backward: the slope of the loss along one random direction, from two forward passes, is all that a step needs.

    g = (loss(t + epsilon z) - loss(t - epsilon z)) / (2 epsilon)
    t = t - lr * (g z + decay t)

z is drawn from a seed whenever it is needed and never stored, so a step needs the memory of a forward pass. Works on whatever the passes before
let train.
Malladi et al. 2023, arXiv:2305.17333.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rewrite.contract import Pass


@dataclass(frozen=True)
class MeZO(Pass):
    """epsilon: how far the two passes stand from the weights."""

    epsilon: Annotated[float, Field(gt=0)] = 1e-3

    drift = 0.0
    example = {}
    shown_after = ({"pass": "lora", "where": "attention.{q,v}", "rank": 4},)

    def apply(self, edit, sites):
        return ()

    @torch.no_grad()
    def step(self, loss, optimizer, generator):
        seed, groups = generator.initial_seed(), optimizer.param_groups
        self._move(groups, seed, self.epsilon)
        above = loss()
        self._move(groups, seed, -2 * self.epsilon)
        below = loss()
        self._move(groups, seed, self.epsilon)
        slope = float(above - below) / (2 * self.epsilon)
        for tensor, z, group in _directions(groups, seed):
            tensor.sub_(group["lr"] * (slope * z + group.get("weight_decay", 0.0) * tensor))
        return (above + below) / 2

    @staticmethod
    def _move(groups, seed, length):
        for tensor, z, _ in _directions(groups, seed):
            tensor.add_(length * z)


def _directions(groups, seed):
    """Each tensor that trains, its part of the direction, and its group; the same for the same seed."""
    generators = {}
    for group in groups:
        for tensor in group["params"]:
            if tensor.device not in generators:
                generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
            yield tensor, torch.randn(tensor.shape, generator=generators[tensor.device], dtype=tensor.dtype, device=tensor.device), group
