"""Late prompts: a prompt made of the hidden state of a middle layer, for the layers from there on; backward ends at that layer.

    y = attention(q, k, v)                            in the blocks that `where` picks, the upper half for example
    -->
    y = attention(q, [keys(p); k], [values(p); v])    p = up(tanh(down(mean over tokens of x)))        x: what enters the first of these blocks

Nothing below the first of these blocks trains or is kept for backward. The prompt enters as keys and values in front of the tokens' own (the paper
inserts it as tokens). It is made of a whole sequence, padding included, so the pass is refused where the model also decodes token by token behind
a cache. x is read without a gradient.
Liu et al. 2022, arXiv:2210.11292.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass
from rewrite.edit.lengthen import in_front


@dataclass(frozen=True)
class LPT(Pass):
    """length: of the prompt. bottleneck: inner width of what makes it. width: of each of its places."""

    length: Annotated[int, Field(ge=1)]
    bottleneck: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)] = 64

    role = "attention"
    drift = None
    whole_sequence = True
    example = {"where": "attention", "length": 3, "bottleneck": 6, "width": 8}

    def refuse(self, block_x, k, v):
        if block_x is None or block_x.dim() != 3:
            return "it lies in no block with an input of (batch, length, width)"
        if k.dim() != 4 or v.dim() != 4:
            return f"its keys and values have {k.dim()} and {v.dim()} dimensions; a prefix needs (batch, heads, length, dim)"

    def shared(self, sites):
        x = sites[0].block_x
        down = x.new_empty(self.bottleneck, x.shape[-1]).normal_(std=x.shape[-1] ** -0.5)
        return {"down": down, "up": x.new_empty(self.length * self.width, self.bottleneck).normal_(std=self.bottleneck**-0.5)}

    def params(self, k, v, key_heads):
        new = lambda one: k.new_empty(key_heads * one.shape[-1], self.width).normal_(std=self.width**-0.5)
        return {"keys": new(k), "values": new(v)}

    def start(self, block_x, down, up):
        return F.linear(F.linear(block_x.detach().mean(1), down).tanh(), up).unflatten(-1, (self.length, self.width))

    def carry(self, carry):
        return carry

    def key(self, k, key_heads, carry, keys):
        return in_front(F.linear(carry, keys).unflatten(-1, (key_heads, -1)), k)

    def value(self, v, key_heads, carry, values):
        return in_front(F.linear(carry, values).unflatten(-1, (key_heads, -1)), v)
