"""Learned keys and values in front of those of the tokens, flat: no network makes them, and with them alone models of any size are tuned.

    y = attention(q, k, v)
    -->
    y = attention(q, [keys; k], [values; v])

The prefix stands behind the cache, which holds tokens alone, and every query sees it, whatever the mask. Its use is with a linear head that
trains too: `unfreeze` the head. With `shift`, tokens are counted from behind the prefix, as where it lies in the cache.
Liu et al. 2021, arXiv:2110.07602.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rewrite.contract import Pass
from rewrite.edit.lengthen import in_front


@dataclass(frozen=True)
class PTuningV2(Pass):
    """length: places of the prefix. shift: the model counts the prefix as tokens."""

    length: Annotated[int, Field(ge=1)]
    shift: bool = False

    role = "attention"
    drift = None
    example = {"where": "attention", "length": 6}

    def refuse(self, k, v, positions):
        if k.dim() != 4 or v.dim() != 4:
            return f"its keys and values have {k.dim()} and {v.dim()} dimensions; a prefix needs (batch, heads, length, dim)"
        if self.shift and positions is None:
            return "there is no one value by which the model counts its tokens; leave out shift"

    def params(self, k, v, key_heads):
        return {name: of.new_empty(self.length, key_heads, of.shape[-1]).normal_() for name, of in (("keys", k), ("values", v))}

    def key(self, k, keys):
        return in_front(keys, k)

    def value(self, v, values):
        return in_front(values, v)

    def positions(self, positions):
        return positions + self.length if self.shift else positions
