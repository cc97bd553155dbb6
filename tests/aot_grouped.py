"""Compile the launches of grouped adapters for chips that are not there: no spills, shared memory within the chip's limit.

    make aot        every chip, launch, dtype and size; the suite compiles each launch for sm_90
"""

import itertools

import torch
from aot import SHARED, resources, tell
from rewrite.kernels import grouped_lora as k
from triton.compiler import ASTSource

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
#: launch → (strides that are one in forward, in backward)
LAUNCHES = {"shrink": (("x_k", "w_k"), ("x_k", "w_r")), "expand": (("w_r",), ("w_n",)), "gradient": (("p_i", "q_j"), ("p_i", "q_j"))}
FLAGS = {"shrink": {}, "expand": {"HAS_Y": True}, "gradient": {}}
#: arguments that have an entry for each group
EACH = {"SLOTS": "*i64", "MASKS": "*u8", "WS": None, "PS": None, "QS": None, "OUTS": None, "SCALES": "fp32", "FIRST": "i32", "I": "i32", "J": "i32", **dict.fromkeys(("w_a", "w_r", "w_k", "w_n", "p_b", "p_l", "p_i", "q_b", "q_l", "q_j"), "i32")}


def compiled(chip, launch, dtype, ranks=(16,), backward=False, tall=True):
    config = dict(k.CONFIGS[DTYPES[dtype]])
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages"), "enable_fp_fusion": True}
    blocks = tuple(map(k.block_of, ranks))
    long, short = (config["BLOCK_N"],) * len(ranks), tuple(min(block, 64) for block in blocks)
    side = k.side_by_side([torch.empty(1, rank, 1) for rank in ranks])
    named = {**side, "BLOCKS_I": long if backward else short, "BLOCKS_J": short if backward else long, "BY_HAND": False, **config, **FLAGS[launch], **({} if tall else {"BLOCK_L": 16})}
    body, ones = getattr(k, launch), LAUNCHES[launch][backward]
    fixed = {word: value for word, value in named.items() if word in body.arg_names}
    pointers = {"X": dtype, "Y": dtype, "OUT": dtype, "H": "fp32"}
    signature, aligned = {}, {}
    for place, word in enumerate(body.arg_names):
        if word in fixed or (word in ones and word not in EACH):
            signature[word] = "constexpr"
            fixed.setdefault(word, 1)
        elif word in EACH:
            count = len(ranks) + (word == "FIRST")
            signature[word] = ("constexpr" if word in ones else EACH[word] or f"*{dtype}",) * count
            paths = [(place, g) for g in range(count)]
            fixed |= dict.fromkeys(paths, 1) if word in ones else {}
            aligned |= {} if word in ones or word in ("SCALES", "FIRST") else dict.fromkeys(paths, [["tt.divisibility", 16]])
        else:
            signature[word] = f"*{pointers[word]}" if word in pointers else "i32"
            aligned |= {(place,): [["tt.divisibility", 16]]} if word in (*pointers, "K", "N") or word[1:2] == "_" else {}
    return resources(ASTSource(body, signature, constexprs=fixed, attrs=aligned), chip, options)


def bodies():
    for chip, launch, dtype, ranks, backward, tall in itertools.product(SHARED, LAUNCHES, DTYPES, ((8,), (64,), (128,), (8, 16, 64)), (False, True), (False, True)):
        if max(ranks) > k.MOST[DTYPES[dtype]]:
            continue
        yield chip, f"{launch:8} {dtype:5} rank {', '.join(map(str, ranks)):<9} {'backward' if backward else 'forward ':8} {'prefill' if tall else 'decode ':7}", compiled(chip, launch, dtype, ranks, backward, tall)


if __name__ == "__main__":
    tell(bodies())
