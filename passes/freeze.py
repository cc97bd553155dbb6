"""Keep the tensors of some sites, base or new, from training.

    @layers.0.mlp.up.lora.default.down   -->   @layers.0.mlp.up.lora.default.down ❄

A region (`mlp`, `attention.block`, `block`, `model`) stands for all tensors inside it.
"""

from dataclasses import dataclass

from rewrite.contract import Pass


@dataclass(frozen=True)
class Freeze(Pass):
    role = "norm"
    drift = 0.0
    example = {"where": "norm"}
    shown_after = ({"pass": "unfreeze", "where": "model"},)

    def apply(self, edit, sites):
        for site in sites:
            for path in edit.tensors(site, sites):
                edit.freeze(path)
        return [(site.name, site.role) for site in sites]
