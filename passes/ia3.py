"""Learned gains on keys, values and the inner activations of the feed-forward layer.

    k = linear(x, w_k)   v = linear(x, w_v)   y = linear(h, w_down)
    -->
    k * gain             v * gain             linear(h * gain, w_down)

Gains start at one. On `mlp.down` the gain acts on the input, elsewhere on the output, unless `side` says which; all of it merges into the weights.
Liu et al. 2022, arXiv:2205.05638.
"""

from dataclasses import dataclass
from typing import Literal

from rewrite.contract import Pass


@dataclass(frozen=True)
class IA3(Pass):
    """side: of the linear that the gain acts on, "input" or "output"; null goes by the role."""

    side: Literal["input", "output"] | None = None

    role = ["attention.{k,v}", "mlp.down"]
    drift = 0.0
    example = {"where": ["attention.{k,v}", "mlp.down"]}

    def refuse(self, kind):
        if kind != "linear":
            return f"a gain per feature is defined for linears, not for {kind}"

    def params(self, w, role):
        return {"gain": w.new_ones(w.shape[1] if self.is_inner(role) else w.shape[0])}

    def input(self, x, role, gain):
        return x * gain if self.is_inner(role) else x

    def output(self, y, role, gain):
        return y if self.is_inner(role) else y * gain

    def is_inner(self, role):
        """Does the gain act on x?"""
        return role == "mlp.down" if self.side is None else self.side == "input"
