"""Language adapters: a bottleneck after every mlp, and an invertible one at the embedding, undone before a head that reads the embedding back.

    y = mlp(x)           -->   y = mlp(x) + up(relu(down(mlp(x))))
    y = embed(ids)       -->   y = coupling(embed(ids))               a, b = halves of it; a = a + first(b); b = b + second(a)
    y = head(x), tied    -->   y = head(undone(x))                    b = b - second(a); a = a - first(b)      where [.., "head"]

A model with a head of its own needs no undoing, and is refused there. `up`, and the outer halves of `first` and `second`, start at zero, so nothing
changes until the first step. Train one for each language, then stack a task's `adapter` on it.
Pfeiffer et al. 2020, arXiv:2005.00052.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class MADX(Pass):
    """bottleneck: inner width of the adapters. coupling: inner width of the invertible one."""

    bottleneck: Annotated[int, Field(ge=1)]
    coupling: Annotated[int, Field(ge=1)]

    role = ["embed", "mlp"]
    drift = 0.0
    example = {"where": ["embed", "mlp"], "bottleneck": 6, "coupling": 4}

    def refuse(self, role, w, y, tied):
        if role not in ("embed", "mlp", "head"):
            return "language adapters stand at the embedding, after an mlp, and before a tied head"
        if role == "head" and not tied:
            return "its weight is not the embedding's, so there is nothing to undo before it"
        width = y.shape[-1] if role != "head" else w.shape[-1]
        if role != "mlp" and width % 2:
            return f"its width, {width}, has no two halves"

    def shared(self, sites):
        ends = [site for site in sites if site.role != "mlp"]
        if not ends:
            return {}
        width, new = ends[0].w.shape[0 if ends[0].role == "embed" else -1], ends[0].w.new_empty
        half = width // 2
        inner = {name: new(self.coupling, half).normal_(std=half**-0.5) for name in ("first_inner", "second_inner")}
        return {**inner, "first_outer": new(half, self.coupling).zero_(), "second_outer": new(half, self.coupling).zero_()}

    def params(self, role, y):
        if role != "mlp":
            return {}
        width = y.shape[-1]
        return {"down": y.new_empty(self.bottleneck, width).normal_(std=width**-0.5), "up": y.new_zeros(width, self.bottleneck)}

    def output(self, y, role, down=None, up=None, first_inner=None, first_outer=None, second_inner=None, second_outer=None):
        if role == "mlp":
            return y + F.linear(F.relu(F.linear(y, down)), up)
        if role == "head":
            return y
        a, b = y.chunk(2, -1)
        a = a + F.linear(F.relu(F.linear(b, first_inner)), first_outer)
        return torch.cat([a, b + F.linear(F.relu(F.linear(a, second_inner)), second_outer)], -1)

    def input(self, x, role, first_inner=None, first_outer=None, second_inner=None, second_outer=None):
        if role != "head":
            return x
        a, b = x.chunk(2, -1)
        b = b - F.linear(F.relu(F.linear(a, second_inner)), second_outer)
        return torch.cat([a - F.linear(F.relu(F.linear(b, first_inner)), first_outer), b], -1)
