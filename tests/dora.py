"""Cases of DoRA's norm and linear; run by itself, in a process of its own, they go through the Triton bodies under Triton's interpreter. Prints JSON, case → errors."""

import json
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
from interpreted import error  # noqa: E402
from rewrite.kernels import dora_linear, dora_norm  # noqa: E402

NORM = {"BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
SCALED = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
CASES = {  # N, K, R, M, dtype, how w and x lie, how near the update comes to -w (1: all the way)
    "odd": (29, 37, 3, 150, "float32", "rows", 0.0),
    "bf16": (21, 50, 5, 7, "bfloat16", "rows", 0.0),
    "fp16, strided": (18, 33, 17, 9, "float16", "columns", 0.0),
    "cancelling": (24, 40, 4, 5, "bfloat16", "rows", 0.97),
    "cancelling, fp32": (24, 40, 4, 5, "float32", "columns", 0.97),
    "one row": (5, 16, 1, 1, "float32", "rows", 0.0),
    "no rows": (6, 16, 2, 0, "bfloat16", "rows", 0.0),
}
SCALE = 0.75


def given(case):
    """x, w, b, down, up, magnitude, and a gradient of the result."""
    n, k, rank, m, dtype, lies, near = CASES[case]
    generator = torch.Generator().manual_seed(n + 31 * k)
    new = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    matrix = lambda a, b: new(b, a).mT if lies == "columns" else new(a, b)  # noqa: E731
    down, up, w = new(rank, k) * k**-0.5, new(n, rank), matrix(n, k) * k**-0.5
    if near:  # each row of w is what the update takes away, and a little more
        w = -near * SCALE * up @ down + (1 - near) * w
    tensors = matrix(m, k), w, new(n), down, up, new(n, 1).abs() + 0.1
    return [t.to(getattr(torch, dtype)) for t in tensors], new(m, n).to(getattr(torch, dtype))


def plainly(x, w, b, down, up, magnitude, scale):
    """The formula, written anew."""
    v = w + scale * up @ down
    return x @ (v / v.detach().square().sum(1, keepdim=True).sqrt() * magnitude).T + b


def run(function, tensors, grad):
    """The result and all gradients."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    result = function(*leaves, SCALE)
    result.backward(grad)
    return [result.detach(), *(t.grad for t in leaves)]


def norms(tensors):
    """(float64, the plain ops): |w + s up down| of each row."""
    _, w, _, down, up, _ = tensors
    exact = (w.double() + SCALE * up.double() @ down.double()).square().sum(1).sqrt()
    return exact, torch.linalg.vector_norm(w + SCALE * up @ down, dim=1)


def main():
    report = {}
    for case, (*_, dtype, _, _) in CASES.items():
        tensors, grad = given(case)
        (x, w, _, down, up, magnitude), (exact, plain) = tensors, norms(tensors)
        ours, broken = (dora_norm.by_triton(w, down, up, s, NORM) for s in (SCALE, 0.9 * SCALE))
        report[case] = {"dtype": dtype, "plain": error(exact, plain), "ours": error(exact, ours), "broken": error(exact, broken)}
        z, gain = x @ w.T, magnitude.view(-1)
        wide = [t.double() for t in (grad, z, gain)]
        for i, name in enumerate(("dz", "dgain")):
            exact, plain = dora_linear.by_library(*wide)[i], dora_linear.by_library(grad, z, gain)[i]
            ours, broken = (dora_linear.by_triton(grad, other, gain, SCALED)[i] for other in (z, 0.9 * z))
            report[f"{case}, {name}"] = {"dtype": dtype, "plain": error(exact, plain), "ours": error(exact, ours), "broken": error(exact, broken)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
