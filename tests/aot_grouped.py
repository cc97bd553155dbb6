"""Compile the launches of grouped adapters for chips that are not there: no spills, shared memory within the chip's limit.

    make aot        every chip, launch, dtype and size; the suite compiles each launch for sm_90
"""

import itertools

from aot import SHARED, resources, tell
from rewrite.kernels import grouped_lora as k
from triton.compiler import ASTSource

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
#: launch → (strides that are one in forward, in backward)
LAUNCHES = {"shrink": (("x_k", "w_k"), ("x_k", "w_r")), "expand": (("w_r",), ("w_n",)), "gradient": (("p_i", "q_j"), ("p_i", "q_j"))}
FLAGS = {"shrink": {}, "expand": {"HAS_Y": True}, "gradient": {}}


def compiled(chip, launch, dtype, rank=16, backward=False, tall=True):
    config = dict(k.CONFIGS[DTYPES[dtype]])
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages"), "enable_fp_fusion": True}
    block = k.block_of(rank)
    sides = {"BLOCK_I": config["BLOCK_N"] if backward else min(block, 64), "BLOCK_J": min(block, 64) if backward else config["BLOCK_N"]}
    named = {"R": rank, "BLOCK_R": block, "BY_HAND": False, **config, **sides, **FLAGS[launch], **({} if tall else {"BLOCK_L": 16})}
    body = getattr(k, launch)
    fixed = {word: value for word, value in named.items() if word in body.arg_names} | dict.fromkeys(LAUNCHES[launch][backward], 1)
    pointers = {"SLOT": "i64", "MASK": "u8", "H": "fp32", **{word: dtype for word in ("X", "W", "Y", "OUT", "P", "Q")}}
    kind = lambda word: "constexpr" if word in fixed else f"*{pointers[word]}" if word in pointers else "fp32" if word == "scale" else "i32"  # noqa: E731
    signature = {word: kind(word) for word in body.arg_names}
    large = (*pointers, "K", "N", "I", "J", *(word for word in body.arg_names if word[1:2] == "_"))
    aligned = {(i,): [["tt.divisibility", 16]] for i, word in enumerate(body.arg_names) if word in large and signature[word] != "constexpr"}
    return resources(ASTSource(body, signature, constexprs=fixed, attrs=aligned), chip, options)


def bodies():
    for chip, launch, dtype, rank, backward, tall in itertools.product(SHARED, LAUNCHES, DTYPES, (8, 64, 128), (False, True), (False, True)):
        if rank > k.MOST[DTYPES[dtype]]:
            continue
        yield chip, f"{launch:8} {dtype:5} rank {rank:<3} {'backward' if backward else 'forward ':8} {'prefill' if tall else 'decode ':7}", compiled(chip, launch, dtype, rank, backward, tall)


if __name__ == "__main__":
    tell(bodies())
