"""A mix of trained adapters, for each token anew: what one adapter adds, weighed by how well it fits what the model has there.

    y_n = adapter_n(y)
    -->
    y + sum_n s_n * (y_n - y) @ value        s = softmax_n((y @ query) · ((y_n - y) @ key) / temperature)

`value` starts as (nearly) the identity, so that the mix begins as an average of the adapters. These are trained before, each by itself.
Pfeiffer et al. 2021, arXiv:2005.00247.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rewrite.contract import Pass


@dataclass(frozen=True)
class AdapterFusion(Pass):
    """temperature: of the softmax over the adapters; a high one keeps them all in play. train_choices: let the adapters train along with the mix."""

    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    train_choices: bool = False

    drift = 0.0
    example = {}
    shown_over = tuple({"pass": "adapter", "where": "mlp", "bottleneck": 6, "name": name} for name in ("de", "fr"))

    @property
    def freezes_choices(self):
        return not self.train_choices

    def params(self, y):
        width = y.shape[-1]
        new = lambda: y.new_empty(width, width).normal_(std=0.02)  # noqa: E731
        return {"query": new(), "key": new(), "value": y.new_full((width, width), 1e-6).fill_diagonal_(1.0)}

    def output(self, y, choices, query, key, value):
        added = torch.stack([choice - y for choice in choices], -2)
        fit = (added @ key) @ (y @ query).unsqueeze(-1)
        shares = torch.softmax(fit / self.temperature, -2)
        return y + (shares * (added @ value)).sum(-2)
