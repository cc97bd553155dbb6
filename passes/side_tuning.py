"""A copy of a sub-layer that trains beside the frozen one, and a gate that blends the two.

    y = f(x)
    -->
    y = sigmoid(gate) * f(x) + (1 - sigmoid(gate)) * copy(x)      copy: f on tensors of its own, which start as the base's

The two agree at first, so nothing changes until the first step. With "frozen": true no gradient goes through f to what lies before it: the side
alone tells x how to change.
Zhang et al. 2020, arXiv:1912.13503.
"""

from dataclasses import dataclass

import torch

from rewrite.contract import Pass


@dataclass(frozen=True)
class SideTuning(Pass):
    """frozen: let no gradient through the frozen body."""

    frozen: bool = False

    role = "mlp"
    drift = 1e-5
    example = {"where": "mlp"}

    def params(self, y):
        return {"gate": y.new_zeros(1)}

    def output(self, y, copy, x, gate):
        blend = torch.sigmoid(gate)
        return blend * (y.detach() if self.frozen else y) + (1 - blend) * copy(x)
