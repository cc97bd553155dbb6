"""Learned keys and values in front of those of the tokens, in every attention.

    y = attention(q, k, v)
    -->
    y = attention(q, [keys; k], [values; v])

The prefix stands behind the cache, which holds tokens alone, and every query sees it, whatever the mask. With `inner`, the prefix of every site
is made of shared learned tokens by a two-layer network, `w · tanh(inner · tokens)`, which trains more steadily; nothing of it depends on the input.
Tokens keep their positions; with `shift` they are counted from behind the prefix, as where it lies in the cache.
Li & Liang 2021, arXiv:2101.00190.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass
from rewrite.edit.lengthen import in_front


@dataclass(frozen=True)
class PrefixTuning(Pass):
    """length: places of the prefix. inner: width of the network that makes it, 0 for none. shift: the model counts the prefix as tokens."""

    length: Annotated[int, Field(ge=1)]
    inner: Annotated[int, Field(ge=0)] = 0
    shift: bool = False

    role = "attention"
    drift = None
    example = {"where": "attention", "length": 5}

    def refuse(self, k, v, positions):
        if k.dim() != 4 or v.dim() != 4:
            return f"its keys and values have {k.dim()} and {v.dim()} dimensions; a prefix needs (batch, heads, length, dim)"
        if self.shift and positions is None:
            return "there is no one value by which the model counts its tokens; leave out shift"

    def shared(self, sites):
        if not self.inner:
            return {}
        k = sites[0].k
        width = sites[0].key_heads * k.shape[-1]
        tokens, inner = k.new_empty(self.length, width).normal_(), k.new_empty(self.inner, width).normal_(std=width**-0.5)
        return {"tokens": tokens, "inner_weight": inner, "inner_bias": k.new_zeros(self.inner)}

    def params(self, k, v, key_heads):
        wide = {"keys": key_heads * k.shape[-1], "values": key_heads * v.shape[-1]}
        if not self.inner:
            return {name: k.new_empty(self.length, width).normal_() for name, width in wide.items()}
        return {name: k.new_empty(width, self.inner).normal_(std=self.inner**-0.5) for name, width in wide.items()} | {f"{name}_bias": k.new_zeros(width) for name, width in wide.items()}

    def key(self, k, key_heads, keys, keys_bias=None, tokens=None, inner_weight=None, inner_bias=None):
        return in_front(self._prefix(keys, keys_bias, tokens, inner_weight, inner_bias).unflatten(-1, (key_heads, -1)), k)

    def value(self, v, key_heads, values, values_bias=None, tokens=None, inner_weight=None, inner_bias=None):
        return in_front(self._prefix(values, values_bias, tokens, inner_weight, inner_bias).unflatten(-1, (key_heads, -1)), v)

    def positions(self, positions):
        return positions + self.length if self.shift else positions

    def _prefix(self, made, bias, tokens, inner_weight, inner_bias):
        return made if not self.inner else F.linear(F.linear(tokens, inner_weight, inner_bias).tanh(), made, bias)
