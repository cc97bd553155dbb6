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
    "many adapters": (2, 17, 23, 70, 2, [69, 7, -1, 35], "float32", 1),
}
#: L, K, N, (adapters, rank, scale) of each group, (group, adapter) of each row or None, dtype, parts of K
MIXED = {
    "prefill": (19, 33, 37, ((3, 5, 0.75), (1, 17, 2.0)), [(0, 2), None, (1, 0), (0, 0)], "float32", 1),
    "decode": (1, 50, 29, ((2, 3, 0.5), (4, 1, 1.5), (1, 18, -1.0)), [(1, 3), (2, 0), None, (0, 1), (1, 3), (0, 0)], "bfloat16", 3),
    "an empty group": (4, 24, 18, ((2, 4, 1.0), (70, 2, 0.25)), [(1, 69), (1, 7), None], "float16", 1),
}


def given(case):
    """(y, x, down, up, slot, mask, scale) and a gradient of the result."""
    length, inner, out_dim, adapters, rank, slots, dtype, _ = CASES[case]
    generator = torch.Generator().manual_seed(length + 31 * inner)
    new = lambda *size: torch.randn(size, generator=generator).to(getattr(torch, dtype))  # noqa: E731
    slot = torch.tensor(slots)
    tensors = new(len(slots), out_dim, length).mT, new(len(slots), length, inner), new(adapters, rank, inner) * inner**-0.5, new(adapters, out_dim, rank)
    return [*tensors, slot.clamp(min=0), slot >= 0, 0.75], new(len(slots), length, out_dim)


def given_mixed(case):
    """(y, x), the arguments of each group, and a gradient of the result."""
    length, inner, out_dim, groups, rows, dtype, _ = MIXED[case]
    generator = torch.Generator().manual_seed(length + 31 * inner)
    new = lambda *size: torch.randn(size, generator=generator).to(getattr(torch, dtype))  # noqa: E731
    y, x, each = new(len(rows), out_dim, length).mT, new(len(rows), length, inner), []
    for g, (adapters, rank, scale) in enumerate(groups):
        own = [-1 if row is None or row[0] != g else row[1] for row in rows]
        slot = torch.tensor(own)
        each.append([new(adapters, rank, inner) * inner**-0.5, new(adapters, out_dim, rank), slot.clamp(min=0), slot >= 0, scale])
    return [y, x], each, new(len(rows), length, out_dim)


def run_mixed(function, leads, each, grad):
    """The result and the gradients of y, x, and of down, up of each group."""
    leaf = lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()  # noqa: E731
    leads, each = [leaf(t) for t in leads], [[leaf(down), leaf(up), *rest] for down, up, *rest in each]
    result = function(*leads, *(a for group in each for a in group))
    result.backward(grad)
    leaves = [*leads, *(t for group in each for t in group[:2])]
    return [result.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


def exactly_mixed(case):
    leads, each, grad = given_mixed(case)
    wide = lambda values: [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in values]  # noqa: E731

    def one_by_one(y, x, *given):
        for g in range(0, len(given), 5):
            y = plainly(y, x, *given[g : g + 5])
        return y

    reference = k.grouped_loras(len(each)).reference
    return run_mixed(one_by_one, wide(leads), [wide(group) for group in each], grad.double()), run_mixed(reference, leads, each, grad)


def exchanged(each):
    """The groups with their rows taken from one another."""
    return [[*group[:2], other[2] % len(group[0]), *other[3:4], group[4]] for group, other in zip(each, each[1:] + each[:1])]


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
        way = k.ByTriton([(tensors[4], tensors[5])], SMALL, parts)
        other = k.ByTriton([(tensors[4], ~tensors[5])], SMALL, parts)
        exact, plain = exactly(case)
        ours, broken = run(lambda *a: k.launch(*a, way=way), tensors, grad), k.launch(*tensors, way=other)  # noqa: B023
        report[case] = {"dtype": dtype, "plain": [error(a, b) for a, b in zip(exact, plain)], "ours": [error(a, b) for a, b in zip(exact, ours)], "broken": [error(exact[0], broken)]}
    for case, (*_, dtype, parts) in MIXED.items():
        leads, each, grad = given_mixed(case)
        exact, plain = exactly_mixed(case)
        launch = k.grouped_loras(len(each)).launch
        way, other = (k.ByTriton([group[2:4] for group in groups], SMALL, parts) for groups in (each, exchanged(each)))
        ours = run_mixed(lambda *a: launch(*a, way=way), leads, each, grad)  # noqa: B023
        broken = launch(*leads, *(a for group in exchanged(each) for a in group), way=other)
        report[f"mixed, {case}"] = {"dtype": dtype, "plain": [error(a, b) for a, b in zip(exact, plain)], "ours": [error(a, b) for a, b in zip(exact, ours)], "broken": [error(exact[0], broken)]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
