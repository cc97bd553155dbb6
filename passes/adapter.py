"""Bottleneck adapters after, or beside, a sub-layer.

    y = f(x)
    -->
    y = f(x) + scale * (up(act(down(f(x)))))     sequential: Houlsby on both sub-layers, Pfeiffer on the mlp alone
    y = f(x) + scale * (up(act(down(x))))        parallel (He et al. 2021)

`up` starts at zero, so nothing changes until the first step.
Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et al. 2021, arXiv:2110.04366.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class Adapter(Pass):
    """bottleneck: inner width. activation: between the two linears. parallel: read the sub-layer's input instead of its output. scale: of the sum."""

    bottleneck: Annotated[int, Field(ge=1)]
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    parallel: bool = False
    scale: float = 1.0

    role = ["attention.block", "mlp"]
    drift = 0.0
    example = {"where": ["attention.block", "mlp"], "bottleneck": 6}

    def refuse(self, y):
        if y.dim() < 2:
            return f"its output has {y.dim()} dimension; an adapter needs features in the last one"

    def params(self, x, y):
        width = (x if self.parallel else y).shape[-1]
        return {
            "down": y.new_empty(self.bottleneck, width).normal_(std=width**-0.5),
            "down_bias": y.new_zeros(self.bottleneck),
            "up": y.new_zeros(y.shape[-1], self.bottleneck),
            "up_bias": y.new_zeros(y.shape[-1]),
        }

    def output(self, x, y, down, down_bias, up, up_bias):
        inner = getattr(F, self.activation)(F.linear(x if self.parallel else y, down, down_bias))
        return y + self.scale * F.linear(inner, up, up_bias)
