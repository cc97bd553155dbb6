"""Train the biases alone; where a site has none, one can be made.

    y = linear(x, w, b)      -->   the same, b trains
    y = linear(x, w)         -->   y = linear(x, w) + bias      with "create": true; bias starts at zero

Ben Zaken et al. 2021, arXiv:2106.10199.
"""

from dataclasses import dataclass

from rewrite.contract import Pass


@dataclass(frozen=True)
class BitFit(Pass):
    """create: make a zero bias where a site has none (models such as Llama)."""

    create: bool = False

    role = ["linear", "norm"]
    drift = 0.0
    example = {"where": ["linear", "norm"], "create": True}

    def refuse(self, b, kind):
        if b is None and not self.create:
            return 'it has no bias; say "create": true to add one'
        if b is None and kind == "experts":
            return "it has no bias, and one bias per expert cannot be added to rows that are sorted by expert"

    def trains(self, b):
        return () if b is None else ("b",)

    def params(self, w, b, kind):
        if b is not None:
            return {}
        size = w.shape[0]
        return {"bias": w.new_zeros(size, *[1] * (w.dim() - 2) if kind == "conv" else ())}

    def output(self, y, bias=None):
        return y if bias is None else y + bias
