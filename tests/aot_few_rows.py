"""Compile the products with codes for chips that are not there: no spills, shared memory within the chip's limit.

    make aot        every chip, format, dtype and size of tile; the suite compiles each format for sm_90
"""

import itertools

from aot import SHARED, resources, tell
from rewrite.kernels import few_rows
from triton.compiler import ASTSource

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
POINTERS = {"SCALES": "fp32", "EXTRA": "fp32", "TABLE": "fp32", "LEVELS": "fp32", "CODES": "u8"}
#: name → (constants, types of pointers where they are others)
FORMATS = {
    "int8": ({"FORMAT": "int8", "BLOCK_K": 128}, {"CODES": "i8"}),
    "int4": ({"FORMAT": "int4", "BLOCK_K": 64, "HAS_EXTRA": True}, {"EXTRA": "u8"}),
    "int4, 32": ({"FORMAT": "int4", "BLOCK_K": 32}, {}),
    "table": ({"FORMAT": "table", "BLOCK_K": 64, "DOUBLE": True, "HAS_EXTRA": True}, {"SCALES": "u8"}),
    "table, single": ({"FORMAT": "table", "BLOCK_K": 64}, {}),
    "mxfp4": ({"FORMAT": "mxfp4", "BLOCK_K": 32}, {"SCALES": "u8"}),
    "fp8": ({"FORMAT": "fp8", "BLOCK_K": 128}, {}),
    "fp8, blocks": ({"FORMAT": "fp8", "BLOCK_K": 128, "TALL": 128}, {}),
}


def compiled(chip, name, dtype, tile=16, parts=False):
    constants, others = FORMATS[name]
    config = dict(few_rows.CONFIG)
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages"), "enable_fp_fusion": True}
    fixed = {"DOUBLE": False, "TALL": 1, "HAS_EXTRA": False, "HAS_BIAS": not parts, "BY_HAND": False, "BLOCK_M": tile, **config, **constants}
    fixed["BLOCK_K"] = min(fixed["BLOCK_K"], few_rows.MOST[DTYPES[dtype]][1])
    kinds = {**POINTERS, **others, "X": dtype, "BIAS": dtype, "OUT": "fp32" if parts else dtype}
    body = few_rows.few_rows
    signature = {word: "constexpr" if word in fixed else f"*{kinds[word]}" if word in kinds else "i32" for word in body.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, word in enumerate(body.arg_names) if word in kinds or word in ("N", "K", "x_m", "bytes_each")}
    return resources(ASTSource(body, signature, constexprs=fixed, attrs=aligned), chip, options)


def bodies():
    for chip, name, dtype, tile, parts in itertools.product(SHARED, FORMATS, DTYPES, (16, 64), (False, True)):
        if tile > few_rows.MOST[DTYPES[dtype]][0]:
            continue
        yield chip, f"{name:14} {dtype:5} {tile:3} rows {'parts' if parts else 'whole'}", compiled(chip, name, dtype, tile, parts)


if __name__ == "__main__":
    tell(bodies())
