"""Compile the bodies of the gated linear for chips that are not there: no spills, shared memory within the chip's limit.

    make aot        every chip, dtype and activation; the suite compiles them for sm_90
"""

import itertools

from aot import DTYPES, SHARED, resources, tell
from rewrite.kernels import gated_linear
from triton.compiler import ASTSource

BODIES = {"forward": {}, "backward": {"HAS_H": True}, "backward alone": {"HAS_H": False}}


def compiled(chip, way, dtype, act):
    body, config = getattr(gated_linear, f"gated_{way.split()[0]}"), dict(gated_linear.CONFIG)
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages"), "enable_fp_fusion": True}
    fixed = {"ACT": act, "BY_HAND": False, **BODIES[way], **config}
    signature = {word: "constexpr" if word in fixed else f"*{dtype}" if word in ("E", "G", "H", "DG", "DH") else "i32" for word in body.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, word in enumerate(body.arg_names) if signature[word] != "constexpr"}
    return resources(ASTSource(body, signature, constexprs=fixed, attrs=aligned), chip, options)


def bodies():
    for chip, way, dtype, act in itertools.product(SHARED, BODIES, DTYPES, gated_linear.ACTIVATIONS):
        yield chip, f"{way:14} {dtype:5} {act:9}", compiled(chip, way, dtype, act)


if __name__ == "__main__":
    tell(bodies())
