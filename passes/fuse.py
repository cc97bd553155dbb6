"""Put the ops of kernels/ in the place of what says the same.

    y = linear(x, w, b) + scale * linear(linear(x, down), up)
    -->
    y = lora_linear(x, w, b, down, up, scale)

Nothing changes but the order of roundings: sums are made in one op, which keeps less for backward. What stays as it is, and why, is in the
report. Put it last: other passes look for what it has replaced.
"""

from dataclasses import dataclass

import torch
from rewrite.kernels.lora_linear import lora_linear

from rewrite.contract import Pass
from rewrite.fuse import fuse


@dataclass(frozen=True)
class Fuse(Pass):
    drift = 1e-6
    example = {}
    shown_after = ({"pass": "lora", "where": "attention.{q,v}", "rank": 4},)

    def requires(self, graph):
        if not any("made" in node.meta for part in graph.all() for node in part.nodes):
            return "no pass before it has added anything. Put it after the passes whose work is to be fused."

    def apply(self, edit, sites):
        x = torch.empty(3, 5)
        shapes = {"x": x, "w": x.new_empty(7, 5), "b": x.new_empty(7), "down": x.new_empty(2, 5), "up": x.new_empty(7, 2)}
        return fuse(edit, [(lora_linear, shapes)])
