"""Vector-based random adaptation: one frozen random pair of matrices for all sites, two trained vectors for each.

    y = linear(x, w, b)
    -->
    y = linear(x, w, b) + gain * linear(scale * linear(x, A), B)      A, B frozen, shared, cut to the site's size

`gain` starts at zero, so nothing changes until the first step; `scale` starts at `initial`. A and B are as large as the largest site.
Kopiczko et al. 2023, arXiv:2310.11454.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Pass, frozen


@dataclass(frozen=True)
class VeRA(Pass):
    """rank: of the shared pair. initial: what each entry of `scale` starts from."""

    rank: Annotated[int, Field(ge=1)]
    initial: float = 0.1

    role = "linear"
    drift = 0.0
    example = {"where": "attention.{q,v}", "rank": 8}

    def refuse(self, kind):
        if kind != "linear":
            return f"the shared matrices fit linears, not {kind}"

    def shared(self, sites):
        weights = [site.w for site in sites]
        out_dim, in_dim = (max(w.shape[d] for w in weights) for d in (0, 1))
        down, up = weights[0].new_empty(self.rank, in_dim), weights[0].new_empty(out_dim, self.rank)
        return {"down": frozen(down.uniform_(-1, 1) * (6 / in_dim) ** 0.5), "up": frozen(up.uniform_(-1, 1) * (6 / self.rank) ** 0.5)}

    def params(self, w):
        return {"scale": w.new_full((self.rank,), self.initial), "gain": w.new_zeros(w.shape[0])}

    def output(self, x, y, down, up, scale, gain):
        return y + gain * F.linear(scale * F.linear(x, down[:, : x.shape[-1]]), up[: gain.shape[0]])
