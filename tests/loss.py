"""Cases of the head with its loss; run by itself, in a process of its own, they go through the Triton body under Triton's interpreter. Prints JSON, case → errors."""

import json
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
from interpreted import error  # noqa: E402
from rewrite.kernels import linear_cross_entropy as k  # noqa: E402

SMALL = {"BLOCK": 16, "num_warps": 4, "num_stages": 1}
CASES = {  # lead of x, K, N, dtype, with b, which tokens have no label, how x lies
    "odd": ((7,), 19, 41, "float32", True, "some", "rows"),
    "bf16": ((3, 5), 34, 77, "bfloat16", False, "some", "rows"),
    "fp16": ((9,), 17, 33, "float16", True, "none", "rows"),
    "strided": ((2, 6), 21, 18, "float32", False, "some", "columns"),
    "one token": ((1, 1), 8, 16, "float32", True, "none", "rows"),
    "no label": ((2, 3), 8, 35, "bfloat16", True, "all", "rows"),
    "no tokens": ((0,), 8, 35, "float32", False, "none", "rows"),
}
ROWS = 4  # of a chunk: all but the small cases take several, the last one not full


def given(case):
    """(x, w, b, labels, items)"""
    lead, width, n, dtype, bias, empty, lies = CASES[case]
    generator = torch.Generator().manual_seed(len(case) + n)
    new = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    x = new(*lead[:-1], width, lead[-1]).mT if lies == "columns" else new(*lead, width)
    labels = torch.randint(n, lead, generator=generator)
    if empty != "none":
        labels.flatten()[:: 1 if empty == "all" else 3] = k.IGNORED
    narrow = getattr(torch, dtype)
    counted = (labels != k.IGNORED).sum()
    return [(3 * x).to(narrow), new(n, width).to(narrow), new(n).to(narrow) if bias else None, labels, counted + (empty == "some" or not counted)]


def plainly(x, w, b, labels, items):
    """The formula, written anew."""
    logits = (x @ w.T if b is None else x @ w.T + b).flatten(0, -2)
    total = 0 * logits.sum()
    for row, label in zip(logits, labels.flatten().tolist()):
        if label != -100:
            total = total + torch.log(torch.exp(row).sum()) - row[label]
    return total / items


def mistaken(function):
    """Broken: each label is the class before."""
    return lambda x, w, b, labels, items: function(x, w, b, torch.where(labels > 0, labels - 1, labels), items)


def run(function, arguments, dtype=None, factor=0.7):
    """The loss and all gradients."""
    leaves = [a.detach().to(dtype or a.dtype, copy=True).requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    result = function(*leaves)
    (factor * result).backward()
    return [result.detach(), *(a.grad for a in leaves if isinstance(a, torch.Tensor) and a.is_floating_point())]


def main():
    report, way = {}, lambda *a: k.by_triton(*a, SMALL)
    ours = lambda *a: k.launch(*a, way, ROWS)  # noqa: E731
    for case in CASES:
        arguments = given(case)
        exact, plain = run(plainly, arguments, torch.float64), run(k.reference, arguments)
        errors = lambda found: [error(a, b) for a, b in zip(exact, found, strict=True)]  # noqa: B023, E731
        report[case] = {"dtype": CASES[case][3], "plain": errors(plain), "ours": errors(run(ours, arguments)), "broken": errors(run(mistaken(ours), arguments))}
        with torch.no_grad():
            report[case]["alone"] = error(exact[0], ours(*arguments))
    x, w, b, labels, items = given("odd")
    loss, *found = run(ours, (x, w, b, torch.full_like(labels, k.IGNORED), 0 * items))
    report["nothing over nothing"] = [str(loss.item()), *(t.abs().max().item() for t in found)]
    labels[1] = len(w)
    report["no such class"] = str(ours(x, w, b, labels, items).item())
    print(json.dumps(report))


if __name__ == "__main__":
    main()
