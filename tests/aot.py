"""Compile the Triton bodies for chips that are not there, and look at what they need: no spills, shared memory within the chip's limit.

    make aot        every chip, config, dtype and layout; the suite compiles the default config for sm_90
"""

import contextlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from rewrite.kernels import lora_linear
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have
DTYPES = ("bf16", "fp16", "fp32")
#: strides that are one: x w' + h up' of the forward, g w + (g up) down of the backward
LAYOUTS = {"forward": ("a_k", "b_k", "p_r", "q_r"), "backward": ("a_k", "b_n", "p_r", "q_n"), "strided": ()}


def compiled(chip, dtype, layout, config, rank=16, bias=True):
    """(registers, spilled bytes, stack bytes, shared bytes) of the body of lora_linear."""
    body = lora_linear.product_plus_low_rank
    sizes = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    constant = {"R": rank, "BLOCK_R": lora_linear.block_of(rank), "HAS_BIAS": bias, "WIDEN": False, **sizes, **dict.fromkeys(LAYOUTS[layout], 1)}
    kind = lambda name: "constexpr" if name in constant else f"*{dtype}" if name.isupper() and len(name) == 1 and name not in "MNK" or name in ("BIAS", "OUT") else "fp32" if name == "scale" else "i32"  # noqa: E731
    signature = {name: kind(name) for name in body.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(body.arg_names) if signature[name] != "constexpr" and name != "scale"} if layout != "strided" else {}
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"], "enable_fp_fusion": True}
    return resources(ASTSource(body, signature, constexprs=constant, attrs=aligned), chip, options)


def resources(source, chip, options):
    """(registers, spilled bytes, stack bytes, shared bytes) of a body, compiled for a chip."""
    made = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    number = lambda word: int(re.search(rf"{word}:(\d+)", text)[1])  # noqa: E731
    return number("REG"), number("LOCAL"), number("STACK"), made.metadata.shared


def fault(chip, found):
    """Why a body may not be shipped for a chip, or None."""
    registers, local, stack, shared = found
    if local or stack:
        return f"{local} bytes of local memory and {stack} of stack: registers are spilled"
    return f"{shared} bytes of shared memory, sm_{chip} has {SHARED[chip]}" if shared > SHARED[chip] else None


def tell(bodies):
    """Print each of (chip, words, what it needs) as soon as it is compiled; exits with 1 where one has a fault."""
    faults = 0
    for chip, words, found in bodies:
        reason = fault(chip, found)
        faults += reason is not None
        with contextlib.suppress(BrokenPipeError):
            print(f"sm_{chip:<4} {words} {found[0]:4} registers {found[3]:7} shared  {reason or 'ok'}", flush=True)
    sys.exit(min(faults, 1))


def bodies():
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    for chip, (name, config), layout, dtype, rank in itertools.product(SHARED, lora_linear.CONFIGS.items(), LAYOUTS, DTYPES, (8, 64)):
        if (name == "float32") != (dtype == "fp32"):
            continue
        yield chip, f"{name:8} {layout:9} {dtype:5} rank {rank:<3}", compiled(chip, dtype, layout, config, rank)


if __name__ == "__main__":
    tell(bodies())
