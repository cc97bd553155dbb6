"""Learned tokens in front of those of the text, at the embedding.

    y = embedding(w, ids)
    -->
    y = [prompt; embedding(w, ids)]

The model's own code sees a longer text, in which the prompt counts as tokens: it stands at the first positions, before padding on the left too,
every token may attend to it, labels leave it out, and it is in the cache. The caller sees none of it. Of an encoder-decoder the encoder's
embedding takes it. It starts from the embeddings of `ids` (repeated to its length), or from random ones of the table's own spread.
Lester et al. 2021, arXiv:2104.08691.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rewrite.contract import Pass


@dataclass(frozen=True)
class PromptTuning(Pass):
    """length: tokens of the prompt. ids: of the vocabulary, to start from; none: random."""

    length: Annotated[int, Field(ge=1)]
    ids: tuple[Annotated[int, Field(ge=0)], ...] = ()

    role = "embed"
    drift = None
    lengthens = True
    example = {"where": "embed", "length": 5}

    def refuse(self, w, kind):
        if kind != "embedding":
            return f"tokens are put in front of what an embedding gives, and this is of kind {kind}"
        if any(i >= w.shape[1] for i in self.ids):
            return f"ids name {max(self.ids)}, and its table has {w.shape[1]} rows"

    def params(self, w):
        if self.ids:
            return {"prompt": w[:, [self.ids[i % len(self.ids)] for i in range(self.length)]].T.contiguous()}
        return {"prompt": w.new_empty(self.length, w.shape[0]).normal_() * w.std()}

    def output(self, y, prompt):
        return torch.cat([prompt.to(y.dtype).expand(y.shape[0], -1, -1), y], 1)
