"""A prefix that each input weighs, place by place, and each layer as a whole.

    y = attention(q, k, v)
    -->
    y = attention(q, [p * keys; k], [p * values; v])        p = layer * sigmoid(gate · h)

h is the first token of what the block reads ([CLS] of an encoder), `gate` gives a weight to each place, `layer` is one number.
Zhang et al. 2023, arXiv:2305.15212.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass
from rewrite.edit.lengthen import in_front


@dataclass(frozen=True)
class APT(Pass):
    """length: places of the prefix."""

    length: Annotated[int, Field(ge=1)]

    role = "attention"
    drift = None
    whole_sequence = True
    example = {"where": "attention", "length": 5}

    def refuse(self, k, v, block_x):
        if k.dim() != 4 or v.dim() != 4:
            return f"its keys and values have {k.dim()} and {v.dim()} dimensions; a prefix needs (batch, heads, length, dim)"
        if block_x is None or block_x.dim() != 3:
            return "there is no block around it whose input, of (batch, tokens, features), a gate could read"

    def params(self, k, v, key_heads, block_x):
        width = block_x.shape[-1]
        prefix = {name: of.new_empty(self.length, key_heads, of.shape[-1]).normal_(std=0.02) for name, of in (("keys", k), ("values", v))}
        return prefix | {"gate": k.new_empty(self.length, width).normal_(std=width**-0.5), "layer": k.new_ones(1)}

    def key(self, k, block_x, keys, gate, layer):
        return self._weighed(k, block_x, keys, gate, layer)

    def value(self, v, block_x, values, gate, layer):
        return self._weighed(v, block_x, values, gate, layer)

    def _weighed(self, of, block_x, prefix, gate, layer):
        places = layer * torch.sigmoid(F.linear(block_x[:, 0], gate))
        return in_front(places.unsqueeze(-1).unsqueeze(-1) * prefix, of)
