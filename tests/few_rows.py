"""Cases of products with codes; run by itself, in a process of its own, they go through the Triton body under Triton's interpreter. Prints JSON, case → errors."""

import json
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
from interpreted import error  # noqa: E402
from rewrite.kernels import dequant_fp4, dequant_fp8, dequant_int4, dequant_int8, dequant_mxfp4, dequant_nf4, few_rows, linear_fp4, linear_fp8, linear_int4, linear_int8, linear_mxfp4, linear_nf4, table_linear  # noqa: E402

SMALL = {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
#: name → (its op, how a weight is stored, how the Triton body is told)
FORMATS = {
    "int8": (linear_int8.linear_int8, dequant_int8.quantize, {"format": "int8"}),
    "int8 groups": (linear_int8.linear_int8, lambda w: dequant_int8.quantize(w, 32), {"format": "int8"}),
    "int4": (linear_int4.linear_int4, lambda w: dequant_int4.quantize(w, 32), {"format": "int4"}),
    "int4 zeros": (linear_int4.linear_int4, lambda w: dequant_int4.quantize(w, 64, False), {"format": "int4"}),
    "nf4": (linear_nf4.linear_nf4, dequant_nf4.quantize, {"format": "table", "numbers": dequant_nf4.NF4}),
    "nf4 single": (linear_nf4.linear_nf4, lambda w: dequant_nf4.quantize(w, False), {"format": "table", "numbers": dequant_nf4.NF4}),
    "fp4": (linear_fp4.linear_fp4, dequant_fp4.quantize, {"format": "table", "numbers": dequant_fp4.FP4}),
    "fp8": (linear_fp8.linear_fp8, dequant_fp8.quantize, {"format": "fp8"}),
    "mxfp4": (linear_mxfp4.linear_mxfp4, dequant_mxfp4.quantize, {"format": "mxfp4"}),
    "fp8 blocks": (linear_fp8.linear_fp8, lambda w: dequant_fp8.quantize(w, True), {"format": "fp8", "tall": 128}),
}
CASES = {  # M, K, N, dtype, bias, parts of K, how x lies
    "odd": (3, 192, 29, "bfloat16", True, 1, "rows"),
    "parts": (17, 192, 131, "float32", True, 2, "columns"),
    "one row": (1, 64, 18, "float16", False, 1, "rows"),
    "more rows than a tile": (66, 128, 16, "float32", False, 1, "every other"),
    "nested scales": (2, 512, 40, "bfloat16", False, 3, "rows"),  # more than one block of scales
}
#: what runs everywhere; the others on the formats that differ in it
EVERY = ("odd",)
ONLY = {"parts": ("int8 groups", "int4 zeros", "nf4 single", "fp8 blocks"), "one row": ("int8", "fp8 blocks", "mxfp4"), "more rows than a tile": ("int8", "nf4"), "nested scales": ("nf4", "fp4")}


def names():
    return [(form, case) for form in FORMATS for case in CASES if case in EVERY or form in ONLY[case]]


def given(form, case):
    """(x, codes, b) of a case."""
    m, k, n, dtype, bias, _, lies = CASES[case]
    generator = torch.Generator().manual_seed(m + 31 * k + n)
    new = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    x = new(k, m).mT if lies == "columns" else new(m, 2, k)[:, 1] if lies == "every other" else new(m, k)
    op, quantize, _ = FORMATS[form]
    codes = (*quantize(new(n, k) * k**-0.5), *(([n, k],) if form.split()[0] in ("int4", "nf4", "fp4", "mxfp4") else ()))
    return x.to(getattr(torch, dtype)), codes, new(n).to(getattr(torch, dtype)) if bias else None


def main():
    report = {}
    for form, case in names():
        op, _, told = FORMATS[form]
        x, codes, b = given(form, case)
        told = dict(told)
        if "numbers" in told:
            told["table"], told["levels"] = table_linear.tensors(told.pop("numbers"), x.device)
        extra = codes[2] if len(codes) == 4 else None
        exact = op.reference(x.double(), *codes, b if b is None else b.double())
        ours, broken = (few_rows.product(x, first, codes[1], b, CASES[case][2], extra=extra, parts=CASES[case][5], config=SMALL, **told) for first in (codes[0], codes[0] ^ 4))
        report[f"{form}, {case}"] = {"dtype": CASES[case][3], "plain": error(exact, op.reference(x, *codes, b)), "ours": error(exact, ours), "broken": error(exact, broken)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
