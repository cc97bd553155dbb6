"""A small policy whose judgement of the next token is multiplied into the model's own.

    y = head(x)                                   p(token) = softmax(y)
    -->
    y = head(x) + outer(gelu(inner(x)))           p(token) ∝ p_model(token) * p_policy(token)

The product of two softmaxes, made one again, is the softmax of the sum: the policy's logits do what its log-probabilities would. `outer` starts at
zero (a uniform policy), so nothing changes until the first step. The head's x is read without a gradient into the model.
Lu et al. 2023, arXiv:2305.15065 (whose policy is a small language model, trained by reinforcement).
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class IPA(Pass):
    """width: of the policy."""

    width: Annotated[int, Field(ge=1)]

    role = "logits"
    drift = 0.0
    example = {"where": "logits", "width": 8}

    def refuse(self, x, y):
        if x.shape[:-1] != y.shape[:-1]:
            return "its logits are not one row for each of the head's inputs"

    def params(self, x, y):
        return {"inner": x.new_empty(self.width, x.shape[-1]).normal_(std=x.shape[-1] ** -0.5), "outer": x.new_zeros(y.shape[-1], self.width)}

    def output(self, x, y, inner, outer):
        return y + F.linear(F.gelu(F.linear(x.detach(), inner)), outer)
