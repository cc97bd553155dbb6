"""Compile the body of dropout by seed for chips that are not there: no spills, shared memory within the chip's limit.

    make aot        every chip and dtype; the suite compiles it for sm_90
"""

import itertools

from aot import DTYPES, SHARED, resources, tell
from rewrite.kernels import lora_dropout
from triton.compiler import ASTSource

KINDS = {"X": "*", "OUT": "*", "seed": "i64", "scale": "fp32"}


def compiled(chip, dtype):
    body, config = lora_dropout.drop_entries, dict(lora_dropout.CONFIG)
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages"), "enable_fp_fusion": True}
    fixed = {"BY_HAND": False, **config}
    signature = {word: "constexpr" if word in fixed else KINDS.get(word, "i32").replace("*", f"*{dtype}") for word in body.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, word in enumerate(body.arg_names) if word in ("X", "OUT", "K", "x_m")}
    return resources(ASTSource(body, signature, constexprs=fixed, attrs=aligned), chip, options)


def bodies():
    for chip, dtype in itertools.product(SHARED, DTYPES):
        yield chip, f"{dtype:5}", compiled(chip, dtype)


if __name__ == "__main__":
    tell(bodies())
