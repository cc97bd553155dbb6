"""Cases of the gated linear; run by itself, in a process of its own, they go through the Triton bodies under Triton's interpreter. Prints JSON, case → errors."""

import json
import math
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
from interpreted import error  # noqa: E402
from rewrite.kernels.gated_linear import ByTriton, gated_linear  # noqa: E402

SMALL = {"BLOCK": 16, "num_warps": 4, "num_stages": 1}
CASES = {  # activation, ranks, lead and width of e and g, N, dtype, with b, how e and g lie
    "silu": ("silu", (3,), (7, 19), 13, "float32", True, "rows"),
    "silu, bf16": ("silu", (4,), (2, 5, 34), 21, "bfloat16", False, "rows"),
    "gelu, fp16": ("gelu", (1,), (5, 33), 8, "float16", True, "halves"),
    "gelu_tanh, two": ("gelu_tanh", (2, 3), (9, 18), 11, "float32", False, "halves"),
    "gelu_tanh, bf16": ("gelu_tanh", (5,), (6, 40), 17, "bfloat16", True, "columns"),
    "none": ("silu", (), (4, 16), 7, "float32", True, "columns"),
    "no rows": ("gelu", (2,), (0, 8), 5, "bfloat16", True, "rows"),
}
SCALES = (0.75, -1.5)


def given(case):
    """(op, arguments with scales among them, a gradient of the result)."""
    act, ranks, shape, n, dtype, bias, lies = CASES[case]
    generator, width = torch.Generator().manual_seed(len(case)), shape[-1]
    new = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    if lies == "halves":  # of one fused projection
        e, g = new(*shape[:-1], 2 * width).chunk(2, -1)
    elif lies == "columns":
        e, g = (new(*shape[:-2], width, shape[-2]).mT for _ in range(2))
    else:
        e, g = new(*shape), new(*shape)
    arguments = [3 * e, g, new(n, width) * width**-0.5, new(n) if bias else None]
    for rank, scale in zip(ranks, SCALES):
        arguments += [new(rank, width) * width**-0.5, new(n, rank), scale]
    narrow = getattr(torch, dtype)
    return gated_linear(act, len(ranks)), [a.to(narrow) if isinstance(a, torch.Tensor) else a for a in arguments], new(*shape[:-1], n).to(narrow)


def plainly(case):
    """The formula of a case, written anew."""
    inner = {
        "silu": lambda e: e / (1 + torch.exp(-e)),
        "gelu": lambda e: e / 2 * (1 + torch.erf(e / math.sqrt(2))),
        "gelu_tanh": lambda e: e / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (e + 0.044715 * e**3))),
    }[CASES[case][0]]

    def function(e, g, w, b, *adapters):
        h = inner(e) * g
        y = h @ w.T
        for down, up, scale in zip(adapters[::3], adapters[1::3], adapters[2::3]):
            y = y + scale * h @ (up @ down).T
        return y if b is None else y + b

    return function


def run(function, arguments, grad, dtype=None):
    """The result and all gradients."""
    leaves = [a.detach().to(dtype or a.dtype, copy=True).requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    result = function(*leaves)
    result.backward(grad.to(result.dtype))
    return [result.detach(), *(a.grad for a in leaves if isinstance(a, torch.Tensor))]


def main():
    report = {}
    for case in CASES:
        op, arguments, grad = given(case)
        exact = run(plainly(case), arguments, grad, torch.float64)
        plain, ours = run(op.reference, arguments, grad), run(lambda *a: op.launch(*a, way=ByTriton(SMALL)), arguments, grad)  # noqa: B023
        broken = run(lambda e, g, *a: op.launch(e, 0.95 * g, *a, way=ByTriton(SMALL)), arguments, grad)  # noqa: B023
        errors = lambda found: [error(a, b) for a, b in zip(exact, found, strict=True)]  # noqa: B023, E731
        report[case] = {"dtype": CASES[case][4], "plain": errors(plain), "ours": errors(ours), "broken": errors(broken)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
