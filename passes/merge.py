"""Fold what passes have added into the base weights, so that no operation of theirs is left.

    y = linear(x, w, b) + s * linear(linear(x, down), up)
    -->
    y = linear(x, w', b)        w' = w + s * up @ down

Which additions fold is found out, not declared: the added nodes of a site are run on an identity in float64, and must be affine in x.
The sum is made in float64 and rounded once to the weight's dtype: in bfloat16 what is below 1/256 of an entry is lost. A weight in codes holds
no sum: with `dequantize` it becomes numbers again, those that its codes stand for with what was added; weights that nothing was added to keep
their codes. Fused operations are taken apart for it.
"""

from dataclasses import dataclass

from rewrite.contract import Pass
from rewrite.fold import fold


@dataclass(frozen=True)
class Merge(Pass):
    """partial: leave in place what cannot be merged, instead of refusing. dequantize: a weight in codes becomes numbers again."""

    partial: bool = False
    dequantize: bool = False

    drift = 1e-5
    unfuses = True
    example = {}
    shown_after = ({"pass": "lora", "where": "attention.{q,v}", "rank": 4},)

    def requires(self, graph):
        if not any("made" in node.meta for part in graph.all() for node in part.nodes):
            return "no pass before it has added anything. Put it after the pass whose work is to be merged."

    def apply(self, edit, sites):
        return fold(edit, partial=self.partial, dequantize=self.dequantize)
