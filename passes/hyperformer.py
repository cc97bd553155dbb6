"""Bottleneck adapters whose weights one small network makes for each task, layer and place: what tasks have in common is learned once.

    y = f(x)                        task_ids: the task of each row of the batch, an input beside the model's own
    -->
    y = f(x) + LN(up_r(gelu(down_r(f(x)))))                   up_r, down_r and LN's gain and offset are row r's own:
    (down_r, up_r, gamma_r, beta_r) = (D z, U z, G z, B z)    z = mix(task[task_ids[r]], layer[of the block], place[of the role])

`gamma` and `beta` start at zero (`up`, without the norm), so nothing changes until the first step.
Mahabadi et al. 2021, arXiv:2106.04489.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch.nn import functional as F

from rewrite.contract import Input, Pass

_PLACES = ("attention.block", "mlp")


@dataclass(frozen=True)
class Hyperformer(Pass):
    """tasks: how many; with more than one, each call says which by `task_ids`. bottleneck: inner width. embedding: width of what stands for a task, a layer, a place. hidden: inner width of the network that mixes them. norm: a layer norm behind `up`, its gain and offset made too."""

    tasks: Annotated[int, Field(ge=1)]
    bottleneck: Annotated[int, Field(ge=1)]
    embedding: Annotated[int, Field(ge=1)] = 64
    hidden: Annotated[int, Field(ge=1)] = 128
    norm: bool = True

    role = list(_PLACES)
    drift = 0.0
    example = {"where": ["attention.block", "mlp"], "tasks": 3, "bottleneck": 6, "embedding": 5, "hidden": 9}

    @property
    def inputs(self):
        return {"task_ids": Input(default=0 if self.tasks == 1 else None, values=range(self.tasks))}

    def refuse(self, role):
        if role not in _PLACES:
            return f"the network knows its places by their roles, which are {' and '.join(_PLACES)}"

    def shared(self, sites):
        if len({(site.index, site.role) for site in sites}) < len({site.path for site in sites}):
            raise ValueError('some sites have the same layer and place (two stacks of blocks, or two attentions in a block): name them in passes of their own, by "path"')
        if len(widths := {site.y.shape[-1] for site in sites}) > 1:
            raise ValueError(f"one network makes matrices of one width, and these sites have {sorted(widths)}")
        y, size, (width,) = sites[0].y, self.embedding, widths
        new = {
            "task": y.new_empty(self.tasks, size).normal_(),
            "layer": y.new_empty(1 + max(site.index or 0 for site in sites), size).normal_(),
            "place": y.new_empty(len(_PLACES), size).normal_(),
            "mix_in": y.new_empty(self.hidden, 3 * size).normal_(std=(3 * size) ** -0.5),
            "mix_in_bias": y.new_zeros(self.hidden),
            "mix_out": y.new_empty(size, self.hidden).normal_(std=self.hidden**-0.5),
            "mix_out_bias": y.new_zeros(size),
            "down": y.new_empty(self.bottleneck * width, size).normal_(std=(size * width) ** -0.5),
            "up": y.new_zeros(width * self.bottleneck, size),
        }
        if self.norm:
            new["up"].normal_(std=(size * self.bottleneck) ** -0.5)
            new |= {"gamma": y.new_zeros(width, size), "beta": y.new_zeros(width, size)}
        return new

    def output(self, y, role, index, task_ids, task, layer, place, mix_in, mix_in_bias, mix_out, mix_out_bias, down, up, gamma=None, beta=None):
        of_task = task.index_select(0, task_ids)
        known = torch.cat([of_task, layer[index or 0].expand_as(of_task), place[_PLACES.index(role)].expand_as(of_task)], -1)
        z = F.linear(F.relu(F.linear(known, mix_in, mix_in_bias)), mix_out, mix_out_bias)
        down, up = F.linear(z, down).unflatten(1, (self.bottleneck, -1)), F.linear(z, up).unflatten(1, (-1, self.bottleneck))
        inner = F.gelu(torch.einsum("b...d,bkd->b...k", y, down))
        new = torch.einsum("b...k,bdk->b...d", inner, up)
        if self.norm:
            rows = lambda v: v.view(-1, *[1] * (y.dim() - 2), v.shape[-1])  # noqa: E731
            new = F.layer_norm(new, new.shape[-1:]) * rows(F.linear(z, gamma)) + rows(F.linear(z, beta))
        return y + new
