"""Bottleneck adapters, with none in the first blocks: what lies below the first adapter is the same for every task, and backward ends there.

    y = f(x)
    -->
    y = f(x)                                                          in the first `drop` blocks
    y = f(x) + up(act(down(f(x))))                                    in the others; in training not in the first `dropped` of them

Specialised: "drop" alone. Robust: with "most" each step draws `dropped` from drop … most, so that the trained adapters still serve when a spec with
a larger "drop" leaves some of them out. `up` starts at zero, so nothing changes until the first step.
Rücklé et al. 2020, arXiv:2010.11918.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass, frozen


@dataclass(frozen=True)
class AdapterDrop(Pass):
    """bottleneck: inner width. drop: the first blocks, which get no adapter. most: the most that a step of training leaves out, 0 for always `drop`.
    activation: between the two linears."""

    bottleneck: Annotated[int, Field(ge=1)]
    drop: Annotated[int, Field(ge=0)] = 0
    most: Annotated[int, Field(ge=0)] = 0
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"

    role = "mlp"
    drift = 0.0
    example = {"where": "mlp", "bottleneck": 6, "most": 1}
    drawn = ("dropped",)

    def __post_init__(self):
        if 0 < self.most < self.drop:
            raise ValueError(f"most {self.most} is below drop {self.drop}")

    def refuse(self, index):
        if index is None:
            return "it lies in no block, and adapters are left out by the number of their block"

    def shared(self, sites):
        return {"dropped": frozen(sites[0].y.new_full((), float(self.drop)))} if self.most else {}

    def params(self, y, index):
        if index < self.drop:
            return {}
        width = y.shape[-1]
        return {"down": y.new_empty(self.bottleneck, width).normal_(std=width**-0.5), "up": y.new_zeros(width, self.bottleneck)}

    def output(self, y, index, training, dropped=None, down=None, up=None):
        if down is None:
            return y
        change = F.linear(getattr(F, self.activation)(F.linear(y, down)), up)
        return y + change if dropped is None else y + change * (1 - training * (dropped > index).to(y.dtype))

    def before_forward(self, generator, dropped=None):
        if dropped is not None:
            dropped.fill_(int(torch.randint(self.drop, self.most + 1, (), generator=generator)))
