"""A binary mask on the frozen weight: which of its entries are needed is all that is learned.

    y = linear(x, w, b)
    -->
    y = linear(x, w * mask, b)        mask = 1 where score >= threshold, else 0

The scores train as if the mask were the score itself (straight-through). They start above the threshold: nothing is masked.
Zhao et al. 2020, arXiv:2004.12406.
"""

from dataclasses import dataclass

import torch

from rewrite.contract import Pass


@dataclass(frozen=True)
class ThresholdMask(Pass):
    """threshold: of the scores. initial: what each score starts from."""

    threshold: float = 5e-3
    initial: float = 1e-2

    role = "linear"
    drift = 0.0
    example = {"where": "mlp.*"}

    def __post_init__(self):
        if self.initial < self.threshold:
            raise ValueError(f"initial {self.initial} is below threshold {self.threshold}: every weight would start as zero")

    def params(self, w):
        return {"score": torch.full_like(w, self.initial)}

    def weight(self, w, score):
        hard = (score >= self.threshold).to(score.dtype)
        return w * (hard + (score - score.detach()))
