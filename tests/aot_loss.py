"""Compile the body of the loss for chips that are not there: no spills, shared memory within the chip's limit.

    make aot        every chip and dtype, with and without gradients; the suite compiles it for sm_90
"""

import itertools

from aot import DTYPES, SHARED, resources, tell
from rewrite.kernels import linear_cross_entropy
from triton.compiler import ASTSource


def compiled(chip, dtype, wanted):
    body, config = linear_cross_entropy.softmax_gradient, dict(linear_cross_entropy.CONFIG)
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages"), "enable_fp_fusion": True}
    fixed = {"IGNORED": linear_cross_entropy.IGNORED, "WANTED": wanted, "BY_HAND": False, **config}
    pointers = {"LOGITS": dtype, "LABELS": "i64", "LOSSES": "fp32"}
    signature = {word: "constexpr" if word in fixed else f"*{pointers[word]}" if word in pointers else "i32" for word in body.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, word in enumerate(body.arg_names) if signature[word] != "constexpr"}
    return resources(ASTSource(body, signature, constexprs=fixed, attrs=aligned), chip, options)


def bodies():
    for chip, dtype, wanted in itertools.product(SHARED, DTYPES, (True, False)):
        yield chip, f"{dtype:5} {'with gradients' if wanted else 'the loss alone'}", compiled(chip, dtype, wanted)


if __name__ == "__main__":
    tell(bodies())
