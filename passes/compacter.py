"""Adapters whose matrices are sums of Kronecker products, with one factor shared by all sites.

    y = f(x)
    -->
    y = f(x) + phm(act(phm(f(x), down)), up)
    phm(x, w): x @ sum_i kron(rule[i], left[i] @ right[i]) + bias        rule n × n × n, shared; left @ right of rank one

The right factor of `up` starts at zero, so nothing changes until the first step.
Karimi Mahabadi et al. 2021, arXiv:2106.04647.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class Compacter(Pass):
    """bottleneck: inner width. n: number of Kronecker products; both widths must be multiples of it. activation: between the two."""

    bottleneck: Annotated[int, Field(ge=1)]
    n: Annotated[int, Field(ge=1)] = 4
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"

    role = ["attention.block", "mlp"]
    drift = 0.0
    example = {"where": ["attention.block", "mlp"], "bottleneck": 8, "n": 2}

    def refuse(self, y):
        for width in (y.shape[-1], self.bottleneck):
            if width % self.n:
                return f"width {width} is not a multiple of n = {self.n}"

    def shared(self, sites):
        return {"rule": sites[0].y.new_empty(self.n, self.n, self.n).normal_(std=0.1)}

    def params(self, y):
        width, inner, new = y.shape[-1] // self.n, self.bottleneck // self.n, y.new_empty
        return {
            "down_left": new(self.n, width, 1).normal_(std=width**-0.5),
            "down_right": new(self.n, 1, inner).normal_(),
            "down_bias": y.new_zeros(self.bottleneck),
            "up_left": new(self.n, inner, 1).normal_(std=inner**-0.5),
            "up_right": y.new_zeros(self.n, 1, width),
            "up_bias": y.new_zeros(y.shape[-1]),
        }

    def output(self, y, rule, down_left, down_right, down_bias, up_left, up_right, up_bias):
        inner = getattr(F, self.activation)(y @ _kronecker(rule, down_left @ down_right) + down_bias)
        return y + inner @ _kronecker(rule, up_left @ up_right) + up_bias


def _kronecker(rule, factors):
    """sum_i kron(rule[i], factors[i]): n × a × a and n × b × c give (a·b) × (a·c)."""
    n, a, _ = rule.shape
    _, b, c = factors.shape
    return torch.einsum("iab,icd->acbd", rule, factors).reshape(a * b, a * c)
