"""Let the base tensors of some sites train.

    @head.weight ❄, @head.bias ❄   -->   @head.weight, @head.bias

A region (`mlp`, `attention.block`, `block`, `model`) stands for all tensors inside it: {"pass": "unfreeze", "where": "model"} is full fine-tuning.
"""

from dataclasses import dataclass

from rewrite.contract import Pass


@dataclass(frozen=True)
class Unfreeze(Pass):
    role = "head"
    drift = 0.0
    example = {"where": "head"}

    def apply(self, edit, sites):
        for site in sites:
            for path in edit.tensors(site, sites):
                edit.train(path)
        return [(site.name, site.role) for site in sites]
