"""Blocks made reversible: two streams, so that backward computes what entered a block from what left it, and nothing in between is kept.

    x_(i+1) = F(x_i)
    -->
    x_(i+1) = alpha * c_i + F(x_i) + F_adapter(F(x_i))      F the frozen block; c_1 = x_1
    c_(i+1) = beta * x_i + G(x_(i+1))                       G an adapter
    what the last norm and the head read: x_n + alpha * c_n

The first of the paper's three forms, its two streams in turn. A small alpha starts near the model, but to compute back is to divide by it, block for
block, and errors grow by 1 / alpha each time: so what enters every fourth block is kept after all (`every`: null keeps none between, and bytes do not
grow with depth). A backward that has gone astray is refused. Under torch.compile and with a cache blocks are kept as any
others. What the last block hands on is this file's choice: what a next block with F(x) = x would give.
Liao et al. 2023, arXiv:2306.00477.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass


@dataclass(frozen=True)
class MEFT(Pass):
    """bottleneck: inner width of the two adapters of a block. alpha, beta: how much of a stream goes on. every: the inputs of every n-th block are kept; null: of the first and the last alone."""

    bottleneck: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)] = 0.1
    beta: Annotated[float, Field(gt=0)] = 1.0
    every: Annotated[int, Field(ge=2)] | None = 4

    role = "block"
    drift = None
    example = {"where": "block", "bottleneck": 6}

    @property
    def reversible(self):
        return True if self.every is None else self.every

    def params(self, y):
        width = y.shape[-1]
        draw = lambda *size: y.new_empty(*size).normal_(std=0.02)  # noqa: E731
        return {"f_down": draw(self.bottleneck, width), "f_up": draw(width, self.bottleneck), "g_down": draw(self.bottleneck, width), "g_up": draw(width, self.bottleneck)}

    def start(self, x):
        return x

    def output(self, y, carry, f_down, f_up):
        return self.alpha * carry + (y + F.linear(F.relu(F.linear(y, f_down)), f_up))

    def carry(self, x, y, g_down, g_up):
        return self.beta * x + F.linear(F.relu(F.linear(y, g_down)), g_up)

    def end(self, y, carry):
        return y + self.alpha * carry
