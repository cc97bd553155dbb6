"""Bottleneck adapters after, or beside, a sub-layer.

    y = f(x)
    -->
    y = f(x) + scale * up(act(down(z)))
        z = f(x)                    Houlsby: where ["attention.block", "mlp"]
        z = norm(f(x) + stream)     Pfeiffer on a post-norm model: where "mlp", read "normed" (on a pre-norm one: read "output")
        z = x                       parallel (He et al.): where "mlp", read "input", scale 4

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
    """bottleneck: inner width. activation: between the two linears. read: what `down` sees. scale: of what is added."""

    bottleneck: Annotated[int, Field(ge=1)]
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    read: Literal["output", "normed", "input"] = "output"
    scale: float = 1.0

    role = ["attention.block", "mlp"]
    drift = 0.0
    example = {"where": ["attention.block", "mlp"], "bottleneck": 6}

    def refuse(self, x, y, norm):
        if y.dim() < 2:
            return f"its output has {y.dim()} dimension; an adapter needs features in the last one"
        if self.read == "normed" and norm is None:
            return 'no norm follows its residual add, as in post-norm models such as BERT; say "read": "output"'

    def params(self, x, y):
        width = (x if self.read == "input" else y).shape[-1]
        return {
            "down": y.new_empty(self.bottleneck, width).normal_(std=width**-0.5),
            "down_bias": y.new_zeros(self.bottleneck),
            "up": y.new_zeros(y.shape[-1], self.bottleneck),
            "up_bias": y.new_zeros(y.shape[-1]),
        }

    def output(self, x, y, norm, down, down_bias, up, up_bias):
        z = {"output": lambda: y, "normed": lambda: norm(y), "input": lambda: x}[self.read]()
        inner = getattr(F, self.activation)(F.linear(z, down, down_bias))
        return y + self.scale * F.linear(inner, up, up_bias)
