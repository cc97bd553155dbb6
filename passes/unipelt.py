"""Gates that let each input decide how much of each method it takes: LoRA, adapters and prefixes under one roof.

    y_n = method_n(y)
    -->
    y + sum_n g_n * (y_n - y)        g_n = mean over tokens of sigmoid(gate_n · x)

x is what the sub-layer around the value reads. Methods and gates train together; of a prefix, the gate weighs the keys and values in front.
A mean over all tokens is for encoders alone: a model that decodes token by token would see other gates there than in training, and is refused.
Mao et al. 2021, arXiv:2110.07577.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class UniPELT(Pass):
    drift = None  # with a prefix among the methods
    whole_sequence = True
    example = {}
    shown_over = (
        {"pass": "lora", "where": "attention.{q,v}", "rank": 4},
        {"pass": "adapter", "where": "mlp", "bottleneck": 6},
        {"pass": "prefix_tuning", "where": "attention", "length": 5},
    )

    def refuse(self, sublayer_x):
        if sublayer_x is None or sublayer_x.dim() != 3:
            return "there is no sub-layer around it whose input, of (batch, tokens, features), a gate could read"

    def params(self, choices, sublayer_x):
        return {"gate": sublayer_x.new_empty(len(choices), sublayer_x.shape[-1]).normal_(std=0.02)}

    def output(self, y, choices, sublayer_x, gate):
        return _gated(y, choices, sublayer_x, gate)

    def key(self, k, choices, sublayer_x, gate):
        return _gated(k, choices, sublayer_x, gate)

    def value(self, v, choices, sublayer_x, gate):
        return _gated(v, choices, sublayer_x, gate)


def _gated(value, choices, x, gate):
    """value + Σ gate · (choice - value); where the choices have more places in front, the value has zeros."""
    longer = choices[0].shape[-2] - value.shape[-2]
    start = F.pad(value, (0, 0, longer, 0)) if longer else value
    gates, total = torch.sigmoid(F.linear(x, gate)).mean(1), start
    for n, choice in enumerate(choices):
        total = total + gates.select(1, n).reshape(-1, *[1] * (value.dim() - 1)) * (choice - start)
    return total
