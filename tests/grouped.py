"""Cases of adapters in one batch; run by itself, in a process of its own, they go through the Triton bodies under Triton's interpreter. Prints JSON, case → errors."""

import json
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
from interpreted import error  # noqa: E402
from rewrite.kernels import grouped_lora as k  # noqa: E402

SMALL = {"BLOCK_L": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
CASES = {  # L, K, N, adapters, rank, slots (-1: none), dtype, parts of K
    "prefill": (19, 33, 37, 3, 5, [2, -1, 0, 2], "float32", 1),
    "decode": (1, 50, 29, 4, 3, [1, 3, -1, 0, 0], "bfloat16", 3),
    "one adapter": (5, 24, 18, 1, 17, [0, 0], "float16", 1),
    "nobody": (3, 24, 18, 2, 4, [-1, -1], "float32", 2),
    "many adapters": (2, 17, 23, 300, 2, [299, 7, -1, 150], "float32", 1),
}


def given(case):
    """(y, x, down, up, slot, mask, scale) and a gradient of the result."""
    length, inner, out_dim, adapters, rank, slots, dtype, _ = CASES[case]
    generator = torch.Generator().manual_seed(length + 31 * inner)
    new = lambda *size: torch.randn(size, generator=generator).to(getattr(torch, dtype))  # noqa: E731
    slot = torch.tensor(slots)
    tensors = new(len(slots), out_dim, length).mT, new(len(slots), length, inner), new(adapters, rank, inner) * inner**-0.5, new(adapters, out_dim, rank)
    return [*tensors, slot.clamp(min=0), slot >= 0, 0.75], new(len(slots), length, out_dim)


def plainly(y, x, down, up, slot, mask, scale):
    """The formula, written anew: row by row."""
    rows = [y[i] + scale * (x[i] @ down[slot[i]].T) @ up[slot[i]].T if mask[i] else y[i] for i in range(len(y))]
    return torch.stack(rows)


def run(function, tensors, grad):
    """The result and the gradients of y, x, down, up."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors[:4]]
    result = function(*leaves, *tensors[4:])
    result.backward(grad)
    return [result.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


def exactly(case):
    """(what float64 says, what the reference says in the case's dtype)."""
    tensors, grad = given(case)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]
    return run(plainly, wide, grad.double()), run(k.reference, tensors, grad)


def main():
    report = {}
    for case, (*_, dtype, parts) in CASES.items():
        tensors, grad = given(case)
        way = k.ByTriton(tensors[4], tensors[5], SMALL, parts)
        other = k.ByTriton(tensors[4], ~tensors[5], SMALL, parts)
        exact, plain = exactly(case)
        ours, broken = (run(lambda *a, way=way: k.launch(*a, way), tensors, grad) for way in (way, other))
        report[case] = {"dtype": dtype, "plain": [error(a, b) for a, b in zip(exact, plain)], "ours": [error(a, b) for a, b in zip(exact, ours)], "broken": [error(a, b) for a, b in zip(exact, broken)]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
