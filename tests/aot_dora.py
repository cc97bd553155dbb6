"""Compile the bodies of DoRA for chips that are not there: no spills, shared memory within the chip's limit.

    make aot        every chip, dtype and rank; the suite compiles them for sm_90
"""

import itertools

from aot import SHARED, resources, tell
from rewrite.kernels import dora_linear, dora_norm
from triton.compiler import ASTSource

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def compiled(chip, body, dtype, rank=16):
    if body == "norms":
        body, config = dora_norm.norms, dict(dora_norm.CONFIGS[DTYPES[dtype]])
        fixed = {"R": rank, "BLOCK_R": max(16, rank), "w_k": 1, "down_k": 1, "up_r": 1}
        pointers = {"W": dtype, "DOWN": dtype, "UP": dtype, "GRAM": "fp32", "OUT": "fp32"}
    else:
        body, config = dora_linear.gradients_of_scaling, dict(dora_linear.CONFIG)
        fixed = {"TILES": dora_linear.TILES}
        pointers = {"GRAD": dtype, "Z": dtype, "GAIN": dtype, "DZ": dtype, "PARTS": "fp32"}
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages"), "enable_fp_fusion": True}
    fixed |= {"BY_HAND": False, **config}
    kind = lambda word: "constexpr" if word in fixed else f"*{pointers[word]}" if word in pointers else "fp32" if word == "scale" else "i32"  # noqa: E731
    signature = {word: kind(word) for word in body.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, word in enumerate(body.arg_names) if signature[word] != "constexpr" and word not in ("scale", "M")}
    return resources(ASTSource(body, signature, constexprs=fixed, attrs=aligned), chip, options)


def bodies():
    for chip, dtype, rank in itertools.product(SHARED, DTYPES, (8, 64, dora_norm.MOST)):
        yield chip, f"norms {dtype:5} rank {rank:<3}", compiled(chip, "norms", dtype, rank)
    for chip, dtype in itertools.product(SHARED, DTYPES):
        yield chip, f"scaling {dtype:5}", compiled(chip, "scaling", dtype)


if __name__ == "__main__":
    tell(bodies())
