"""Scale and shift the features that every operation gives.

    y = op(x)
    -->
    y = scale * op(x) + shift

Scales start at one and shifts at zero (the authors draw them from N(1, 0.02) and N(0, 0.02)): nothing changes until the first step.
Lian et al. 2022, arXiv:2210.08823.
"""

from dataclasses import dataclass

from rewrite.contract import Pass


@dataclass(frozen=True)
class SSF(Pass):
    role = ["linear", "norm"]
    drift = 0.0
    example = {"where": ["linear", "norm"]}

    def refuse(self, kind):
        if kind == "experts":
            return "rows of its output are sorted by expert, and one scale per feature would mix experts"

    def params(self, w, kind):
        size = (w.shape[0], *[1] * (w.dim() - 2 if kind == "conv" else 0))
        return {"scale": w.new_ones(size), "shift": w.new_zeros(size)}

    def output(self, y, scale, shift):
        return y * scale + shift
