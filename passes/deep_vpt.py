"""Visual prompts, new ones in every block: tokens that the images' own attend to, gone behind the block.

    y = attention(q, k, v)
    -->
    y = attention(q, [key_of(prompt); k], [value_of(prompt); v])

A prompt stands in its block beside the image's tokens and is replaced by the next one: nothing but its keys and values is ever read, made by the
block's own norm and projections. So these alone are made, and no shape outside of the attention changes; where in the row the prompt stands
does not matter, since it has no position.
Jia et al. 2022 (VPT-deep), arXiv:2203.12119.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rewrite.contract import Pass
from rewrite.edit.lengthen import in_front


@dataclass(frozen=True)
class DeepVPT(Pass):
    """length: tokens of the prompt of each block."""

    length: Annotated[int, Field(ge=1)]

    role = "attention"
    drift = None
    example = {"where": "attention", "length": 5}
    shown_after = ({"pass": "unfreeze", "where": "head"},)

    def refuse(self, block_x):
        if block_x is None or block_x.dim() != 3:
            return "there is no block around it whose input, of (batch, tokens, features), a prompt could stand in"

    def params(self, block_x):
        return {"prompt": block_x.new_empty(self.length, block_x.shape[-1]).normal_(std=0.02)}

    def key(self, k, key_of, prompt):
        return in_front(key_of(prompt.unsqueeze(0)).transpose(1, 2), k)

    def value(self, v, value_of, prompt):
        return in_front(value_of(prompt.unsqueeze(0)).transpose(1, 2), v)
