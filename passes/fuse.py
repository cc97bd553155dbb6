"""Put the ops of kernels/ in the place of what says the same.

    y = linear(x, w, b) + scale * linear(linear(x, down), up)
    -->
    y = lora_linear(x, w, b, down, up, scale)

    q, k, v = each such a sum of one x, w perhaps in codes
    -->
    q, k, v = lora_linears_1_1_1(x, w_0, b_0, down_0, up_0, scale_0, w_1, …)

    y = such a sum in which `down` takes dropout(x, p, training)
    -->
    y = lora_dropout(x, w, b, down, up, scale, p, training)

    y = such a sum of x = silu(e) * g, or gelu
    -->
    y = gated_linear_silu_1(e, g, w, b, down, up, scale)

    y = linear(x, dequant_nf4(codes, scales, nested), b)
    -->
    y = linear_nf4(x, codes, scales, nested, b)

    y = linear(x, v * magnitude / |v|, b), v = w + scale * up @ down, w perhaps in codes
    -->
    y = dora_linear(x, w, b, down, up, magnitude, scale)

    y = where(mask, vmap(lora)(y, x, down[slot], up[slot]), y)        what a batch makes of lora, for all adapters of one rank, one rank after the other
    -->
    y = grouped_lora(y, x, down, up, slot, mask, scale)              grouped_loras_2(y, x, down_0, …, scale_0, down_1, …) for two ranks

    logits = linear(x, w, b) for a call with labels in training mode, with "logits": false
    -->
    loss = linear_cross_entropy(x, w, b, labels shifted, items)      no logits: the call gives the loss alone

    norms, rotary positions and gates, the model's own among them, with "library": "liger"
    -->
    rms_norm(x, w, eps)      ropes(cos, sin, q, half, k, half)      swiglu(e, g)      …      (kernels/liger)

Nothing changes but the order of roundings: sums are made in one op, which keeps less for backward. What stays as it is, and why, is in the
report. Put it last: other passes look for what it has replaced.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from rewrite.kernels import liger
from rewrite.kernels.dora_linear import dora_linear
from rewrite.kernels.gated_linear import ACTIVATIONS, gated_linear
from rewrite.kernels.grouped_lora import grouped_lora, grouped_loras
from rewrite.kernels.linear_cross_entropy import linear_cross_entropy
from rewrite.kernels.linear_fp4 import linear_fp4
from rewrite.kernels.linear_fp8 import linear_fp8
from rewrite.kernels.linear_int4 import linear_int4
from rewrite.kernels.linear_int8 import linear_int8
from rewrite.kernels.linear_mxfp4 import linear_mxfp4
from rewrite.kernels.linear_nf4 import linear_nf4
from rewrite.kernels.lora_dropout import lora_dropout
from rewrite.kernels.lora_linears import lora_linears

from rewrite.contract import Pass
from rewrite.edit.loss import fuse_loss
from rewrite.fuse import fuse


@dataclass(frozen=True)
class Fuse(Pass):
    """logits: false, and a call with labels in training mode gives the loss alone, which a causal language model then makes without them.
    library: whose kernels run the model's own norms, rotary positions and gates on a GPU where it is installed; elsewhere they stay what they are."""

    logits: bool = True
    library: Literal["liger"] | None = None

    drift = 1e-6
    example = {}
    shown_after = ({"pass": "lora", "where": "attention.{q,v}", "rank": 4},)

    def requires(self, graph):
        if self.logits and self.library is None and not any("made" in node.meta for part in graph.all() for node in part.nodes):
            return "no pass before it has added anything. Put it after the passes whose work is to be fused."

    def apply(self, edit, sites):
        coded = {node.target.made_by.name for node in edit.graph.nodes if hasattr(node.target, "made_by")}
        formats = [None, *(name.removeprefix("dequant_") for name in sorted(coded) if name.startswith("dequant_"))]
        called = {str(node.target).split(".")[1] for node in edit.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
        known = ops(formats, [act for act in ACTIVATIONS if act.removesuffix("_tanh") in called])
        if self.library is not None:
            known += of_liger()
            note = f'{self.library}: {reason}. What "library" asks for runs as plain PyTorch here' if (reason := liger.missing()) else None
            if note is not None and note not in edit.report.notes:
                edit.report.notes.append(note)
        return fuse(edit, known, together, in_turn, lambda: [] if self.logits else fuse_loss(edit, linear_cross_entropy))


def together(ops):
    """The op of several with adapters that read one x, or of the positions of q and k."""
    if all(op is liger.rope for op in ops) and len(ops) <= 2:
        return liger.ropes if len(ops) == 2 else ops[0]
    if not all(hasattr(op, "counts") for op in ops) or len({op.format for op in ops}) > 1:
        return None
    return lora_linears(tuple(n for op in ops for n in op.counts), ops[0].format)


def in_turn(ops):
    """The op of groups of adapters that add to one value."""
    return grouped_loras(sum(op.groups for op in ops)) if all(hasattr(op, "groups") for op in ops) else None


def ops(formats, activations):
    """Each op with a small tensor for each of its arguments, and sizes where it asks for them; with adapters over the formats, and behind the gates, that there are."""
    new = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype)  # noqa: E731
    linear = {"x": new(3, 6), "b": new(7)}
    whole = {**linear, "codes": new(7, 6, dtype=torch.uint8), "scales": new(7, 1, dtype=torch.int32)}
    table = {**linear, "codes": new(21, dtype=torch.uint8), "scales": new(1, dtype=torch.int32), "nested": new(2, dtype=torch.int32), "shape": [7, 6]}
    rows = {"y": new(3, 4, 7), "x": new(3, 4, 6)}
    one = {**linear, "w": new(7, 6), "down": new(2, 6), "up": new(7, 2)}
    halves = {"e": linear["x"], "g": new(3, 6)}
    two = {**one, "down_0": new(2, 6), "up_0": new(7, 2), "down_1": new(3, 6), "up_1": new(7, 3)}
    return [
        *((lora_linears(counts, form), values) for form in formats for counts, values in (((1,), one), ((2,), two))),
        *((gated_linear(act, count, form), {**halves, **values}) for form in formats for act in activations for count, values in enumerate((one, one, two)) if count or form is None),
        *((lora_dropout(form), one) for form in formats),
        *((dora_linear(form), {**one, "magnitude": new(7, 1)}) for form in formats),
        (linear_int8, {**whole, "codes": new(7, 6, dtype=torch.int8)}),
        (linear_int4, {**whole, "codes": new(7, 3, dtype=torch.uint8), "zeros": new(7, 1, dtype=torch.uint8), "shape": [7, 6]}),
        (linear_nf4, table),
        (linear_fp4, table),
        (linear_fp8, whole),
        (linear_mxfp4, {"x": new(3, 32), "b": new(7), "codes": new(7, 16, dtype=torch.uint8), "scales": new(7, 1, dtype=torch.uint8), "shape": [7, 32]}),
        (grouped_lora, {**rows, "down": new(5, 2, 6), "up": new(5, 7, 2), "slot": new(3, dtype=torch.int64), "mask": new(3, dtype=torch.bool)}),
    ]


def of_liger():
    """As `ops`, for what the library has. A narrow x tells what was rounded to its dtype from what was made wide."""
    new = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype)  # noqa: E731
    norm = {"x": new(3, 4, 6, dtype=torch.bfloat16), "w": new(6, dtype=torch.bfloat16)}
    gate = {"e": new(3, 6), "g": new(3, 6)}
    positions = {"cos": new(2, 1, 4, 26), "sin": new(2, 1, 4, 26), "x": new(2, 5, 4, 26), "half": 13}
    return [(liger.rms_norm, norm), (liger.rms_norm_offset, norm), (liger.rope, positions), (liger.swiglu, gate), (liger.geglu, gate)]
