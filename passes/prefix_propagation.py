"""A prefix of hidden states that goes through the model with the text, and gets a new sum in front of every block.

    H_i = block_i(H_(i-1))
    -->
    [E_i; H_i] = block_i([E_(i-1) + prefix_i; H_(i-1)])

The prefix makes queries too and is attended to as tokens are: half the tensors of a prefix of keys and values. The model's own code sees a longer
text, as with `prompt_tuning`: the places in front are empty at the embedding (E_0, what the model makes of no word, does not depend on the text),
count as tokens, and are cut where the text comes out. Behind a cache they are in it, with all their sums, and tokens that follow get none. A head
that reads the first place reads one in front. Of an encoder-decoder one side has it: {"role": ["embed", "block"], "path": "encoder.**"}.
Li et al. 2023, arXiv:2305.12086.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rewrite.contract import Pass


@dataclass(frozen=True)
class PrefixPropagation(Pass):
    """length: places of the prefix."""

    length: Annotated[int, Field(ge=1)]

    role = ["embed", "block"]
    drift = None
    lengthens = True
    example = {"where": ["embed", "block"], "length": 5}

    def refuse(self, x, kind, role):
        if role != "block" and kind != "embedding":
            return f"places are put in front of what an embedding gives and summed to where a block reads, and this is {role}"
        if role == "block" and x.dim() != 3:
            return f"it reads {x.dim()} dimensions; a prefix stands in (batch, tokens, features)"

    def params(self, role, x=None):
        return {"prefix": x.new_empty(self.length, x.shape[-1]).normal_(std=0.02)} if role == "block" else {}

    def output(self, y, kind):
        return torch.cat([y.new_zeros(y.shape[0], self.length, y.shape[-1]), y], 1) if kind == "embedding" else y

    def input(self, x, prefix):
        return torch.cat([x[:, : self.length] + prefix, x[:, self.length :]], 1)
