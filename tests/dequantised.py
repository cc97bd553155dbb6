"""Runs the Triton bodies that make numbers of codes under Triton's interpreter, in a process of its own. Prints JSON: case → entries that differ from the reference in a bit."""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from rewrite.kernels import dequant_fp4, dequant_fp8, dequant_int4, dequant_int8, dequant_mxfp4, dequant_nf4, tables  # noqa: E402

DTYPES = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}


def weight(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[-1])


def stacked(quantize, *shape):
    """What two experts have, in leading dimensions."""
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*(quantize(w) for w in weight(2, *shape)))]


def table_of(module, numbers):
    levels = torch.tensor(tables.dynamic())
    return lambda codes, scales, nested, shape, dtype: tables.by_triton(codes, scales, nested, shape, dtype, torch.tensor(numbers), levels)


def cases():
    """name → (module, the Triton way, tensors, shape or None)."""
    nf4, fp4 = table_of(dequant_nf4, dequant_nf4.NF4), table_of(dequant_fp4, dequant_fp4.FP4)
    yield "nf4", dequant_nf4, nf4, dequant_nf4.quantize(weight(37, 55)), [37, 55]
    yield "nf4 single", dequant_nf4, nf4, dequant_nf4.quantize(weight(9, 24, 3), double=False), [9, 24, 3]
    yield "nf4 long", dequant_nf4, nf4, dequant_nf4.quantize(weight(34, 512)), [34, 512]  # more than one block of scales
    yield "nf4 experts", dequant_nf4, nf4, stacked(dequant_nf4.quantize, 10, 56), [2, 10, 56]
    yield "fp4", dequant_fp4, fp4, dequant_fp4.quantize(weight(37, 55)), [37, 55]
    yield "int4", dequant_int4, dequant_int4.by_triton, dequant_int4.quantize(weight(3, 1152), 128), [3, 1152]
    yield "int4 zeros", dequant_int4, dequant_int4.by_triton, dequant_int4.quantize(weight(5, 96), 32, symmetric=False), [5, 96]
    yield "int4 experts", dequant_int4, dequant_int4.by_triton, stacked(lambda w: dequant_int4.quantize(w, 64, False), 7, 192), [2, 7, 192]
    yield "int8", dequant_int8, dequant_int8.by_triton, dequant_int8.quantize(weight(5, 7, 3)), None
    yield "int8 groups", dequant_int8, dequant_int8.by_triton, dequant_int8.quantize(weight(3, 1056), 32), None
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)
    yield "fp8 every code", dequant_fp8, dequant_fp8.by_triton, (every, torch.tensor([[1.0], [3.0]]).view(torch.int32)), None
    yield "fp8 experts", dequant_fp8, dequant_fp8.by_triton, stacked(lambda w: dequant_fp8.quantize(w, blocks=True), 129, 140), None
    powers = torch.tensor([[0, 1, 127, 250], [100, 130, 126, 2]], dtype=torch.uint8)
    yield "mxfp4 powers", dequant_mxfp4, dequant_mxfp4.by_triton, (every.view(-1)[:128].view(2, 64), powers), [2, 128]
    yield "mxfp4", dequant_mxfp4, dequant_mxfp4.by_triton, dequant_mxfp4.quantize(weight(3, 1056)), [3, 1056]


def differing(reference, result, bits):
    if reference.shape != result.shape or reference.dtype != result.dtype:
        return max(reference.numel(), 1)
    nan = reference.isnan() & result.isnan()
    return int(((reference.view(bits) != result.view(bits)) & ~nan).sum())


def main():
    report = {}
    for name, module, ours, given, shape in cases():
        rest = () if shape is None else (shape,)
        for dtype in ("float32", "bfloat16") if name.endswith("experts") else ("float32", "float16") if "powers" in name else DTYPES:  # of bfloat16 the interpreter loses what is subnormal
            reference, result = (way(*given, *rest, getattr(torch, dtype)) for way in (module.reference, ours))
            report[f"{name} {dtype}"] = differing(reference, result, DTYPES[dtype])
        report[f"{name} broken"] = differing(module.reference(*given, *rest, torch.float32), ours(given[0] ^ 1, *given[1:], *rest, torch.float32), torch.int32)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
