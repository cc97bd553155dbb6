"""Runs the Triton bodies under Triton's interpreter, in a process of its own: it must be asked for before they are defined. Prints JSON, case → errors."""

import json
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from rewrite.kernels import lora_linear as k  # noqa: E402

SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
CASES = {  # M, K, N, R, dtype, bias, how x lies
    "odd": (7, 19, 13, 3, "float32", True, "rows"),
    "bf16": (33, 40, 29, 5, "bfloat16", True, "rows"),
    "fp16 without bias": (5, 17, 47, 1, "float16", False, "rows"),
    "strided": (9, 21, 18, 4, "float32", True, "columns"),
    "rank 17": (18, 33, 34, 17, "bfloat16", False, "rows"),
    "one row": (1, 8, 8, 2, "float32", True, "rows"),
    "no rows": (0, 8, 8, 2, "float32", True, "rows"),
}


def tensors(m, k_, n, r, dtype, bias, lies):
    generator = torch.Generator().manual_seed(m + 31 * k_ + n)
    new = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    x = new(k_, m).mT if lies == "columns" else new(m, k_)
    given = [x, new(n, k_) * k_**-0.5, new(n) if bias else None, new(r, k_) * k_**-0.5, new(n, r)]
    return [t if t is None else t.to(getattr(torch, dtype)) for t in given], new(m, n).to(getattr(torch, dtype))


def run(function, given, grad):
    given = [t if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in given]
    y = function(*given, 0.75)
    y.backward(grad)
    return [y.detach(), *(t.grad for t in given if t is not None)]


def error(reference, result):
    if not reference.numel():
        return 0.0 if reference.shape == result.shape else float("inf")
    if torch.equal(reference.double(), result.double()):
        return 0.0
    return float((reference.double() - result.double()).square().mean().sqrt() / reference.double().square().mean().sqrt())


def main():
    report = {}
    product = lambda a, b, p, q, bias, scale: k.fused_product(a, b, p, q, bias, scale, SMALL)  # noqa: E731
    half = lambda a, b, p, q, bias, scale: k.fused_product(a, b, p, q, bias, 0.98 * scale, SMALL)  # noqa: E731
    for name, case in CASES.items():
        given, grad = tensors(*case)
        exact = run(k.reference, [t if t is None else t.double() for t in given], grad.double())
        plain = run(k.reference, given, grad)
        ours = run(lambda *a: k.launch(*a, product), given, grad)  # noqa: B023
        broken = run(lambda *a: k.launch(*a, half), given, grad)  # noqa: B023
        report[name] = {"dtype": case[4], "plain": [error(a, b) for a, b in zip(exact, plain)], "ours": [error(a, b) for a, b in zip(exact, ours)], "broken": [error(a, b) for a, b in zip(exact, broken)][0]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
