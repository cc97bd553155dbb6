"""A narrow network beside the model that reads every block and gives the prediction; no gradient enters the model.

    y_i = block_i(x)
    -->
    y_i = block_i(x)                                                        under torch.no_grad
    g_i = side_i(mu_i * down_i(y_i) + (1 - mu_i) * g_(i-1))                 mu_i = sigmoid(gate_i / temperature), g_0 = entry(x_1)
    y_n = up(g_n)                                                           what the last norm and the head read

`side` is a bottleneck, `z + outer(gelu(inner(norm(z))))`: it looks at one token at a time, the taps bring what attention has gathered, so that a
cache holds what it held. Backward keeps values of the side's width alone. The prediction is the side's, so that nothing of the model's own is left
of it at first: start from a trained model, and train.
Sung et al. 2022, arXiv:2206.06522 (whose side blocks are pruned copies of the model's, attention included).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class LST(Pass):
    """width: of the side network. temperature: of its gates."""

    width: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(gt=0)] = 0.1

    role = "block"
    drift = None
    no_grad = ("y",)
    example = {"where": "block", "width": 8}

    def shared(self, sites):
        x, width = sites[0].x, sites[0].x.shape[-1]
        return {"entry": x.new_empty(self.width, width).normal_(std=width**-0.5), "up": x.new_empty(width, self.width).normal_(std=self.width**-0.5)}

    def params(self, y):
        new, width, inner = y.new_empty, y.shape[-1], 4 * self.width
        return {
            "gate": y.new_zeros(1),
            "down": new(self.width, width).normal_(std=width**-0.5),
            "inner": new(inner, self.width).normal_(std=self.width**-0.5),
            "outer": new(self.width, inner).normal_(std=inner**-0.5),
        }

    def start(self, x, entry):
        return F.linear(x.detach(), entry)

    def carry(self, y, carry, gate, down, inner, outer):
        mu = torch.sigmoid(gate / self.temperature)
        z = mu * F.linear(y.detach(), down) + (1 - mu) * carry
        return z + F.linear(F.gelu(F.linear(F.layer_norm(z, z.shape[-1:]), inner)), outer)

    def end(self, carry, up):
        return F.linear(carry, up)
