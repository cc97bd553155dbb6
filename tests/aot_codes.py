"""Compile the Triton bodies that make numbers of codes for chips that are not there: no spills.

    make aot        every chip, format and dtype; the suite compiles each format for sm_90
"""

import itertools

from aot import SHARED, resources, tell
from rewrite.kernels import dequant_fp8, dequant_int4, dequant_int8, dequant_mxfp4, tables
from triton.compiler import ASTSource

DTYPES = ("bf16", "fp16", "fp32")
FLOATS = {"NESTED": "fp32", "TABLE": "fp32", "LEVELS": "fp32", "SCALES": "fp32", "CODES": "u8", "ZEROS": "u8"}
#: name → (body, constants, types of pointers where they are others)
FORMATS = {
    "table, double": (tables.numbers_of_blocks, {"DOUBLE": True, "BLOCK": 512}, {"SCALES": "u8"}),
    "table, single": (tables.numbers_of_blocks, {"DOUBLE": False, "BLOCK": 512}, {}),
    "int4": (dequant_int4.numbers_of_int4, {"HAS_ZEROS": False, "BLOCK": 512}, {}),
    "int4, zeros": (dequant_int4.numbers_of_int4, {"HAS_ZEROS": True, "BLOCK": 512}, {}),
    "int8": (dequant_int8.numbers_of_int8, {"BLOCK": 1024}, {"CODES": "i8"}),
    "fp8": (dequant_fp8.numbers_of_fp8, {"TALL": 1, "WIDE": 0, "BLOCK": 1024}, {}),
    "fp8, blocks": (dequant_fp8.numbers_of_fp8, {"TALL": 128, "WIDE": 128, "BLOCK": 1024}, {}),
    "mxfp4": (dequant_mxfp4.numbers_of_mxfp4, {"BLOCK": 512}, {"SCALES": "u8"}),
}


def compiled(chip, name, dtype):
    body, constants, others = FORMATS[name]
    constants = {**constants, "BY_HAND": False}
    kinds = {**FLOATS, **others, "OUT": dtype}
    signature = {word: "constexpr" if word in constants else f"*{kinds[word]}" if word in kinds else "i32" for word in body.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, word in enumerate(body.arg_names) if word in kinds}
    return resources(ASTSource(body, signature, constexprs=constants, attrs=aligned), chip, {"num_warps": 4, "enable_fp_fusion": False})


def bodies():
    for chip, name, dtype in itertools.product(SHARED, FORMATS, DTYPES):
        yield chip, f"{name:14} {dtype:5}", compiled(chip, name, dtype)


if __name__ == "__main__":
    tell(bodies())
