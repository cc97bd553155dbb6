"""Cases of dropout by the Triton body; run by itself, in a process of its own, under Triton's interpreter. Prints JSON, case → what was found.

Philox is written anew in numpy, from its paper, and gives the entries that stay.
"""

import json
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from interpreted import error  # noqa: E402
from rewrite.kernels.lora_dropout import CONFIG, ByTriton, Shrunk  # noqa: E402

WAY = ByTriton({"BLOCK": 8, "num_warps": 4, "num_stages": 1})
SEED = 0x3ADE68B1_9D2C5681
CASES = {  # M, K, dtype, p, seed, how x lies
    "odd": (5, 19, "float32", 0.3, SEED, "rows"),
    "bf16": (4, 34, "bfloat16", 0.1, SEED, "rows"),
    "fp16": (3, 33, "float16", 0.5, 7, "wide"),
    "columns": (4, 21, "float32", 0.3, 2**40 + 1, "columns"),
    "narrow": (3, 2, "float32", 0.5, 1, "rows"),
    "no rows": (0, 8, "bfloat16", 0.3, SEED, "rows"),
}


def philox(counter, key):
    """Philox 4×32-10 of counters (4, …) and a key of two words: four numbers of 32 bits each."""
    c, k, low = [np.asarray(each, dtype=np.uint64) for each in counter], list(key), np.uint64(0xFFFFFFFF)
    for _ in range(10):
        one, two = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(two >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), two & low, (one >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), one & low]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return np.stack(c)


def stays(m, k, p, seed):
    """The entries that are not dropped, as the docstring of lora_dropout says."""
    fourth = -(-k // 4)
    row, j = np.broadcast_arrays(np.arange(m)[:, None], np.arange(fourth)[None])
    drawn = philox([j, row, 0 * j, 0 * j], (seed % 2**32, seed >> 32))
    return torch.from_numpy((np.concatenate(drawn, 1) >> np.uint64(1)).astype(np.int64)[:, :k] >= round(p * 2**31))


def given(case):
    """(rows, down, a gradient of the result)"""
    m, k, dtype, _, _, lies = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    new = lambda *size: torch.randn(size, generator=generator).to(getattr(torch, dtype))  # noqa: E731
    rows = new(k, m).mT if lies == "columns" else new(m, 2 * k)[:, :k] if lies == "wide" else new(m, k)
    return rows, new(3, k), new(m, 3)


def run(function, rows, down, grad):
    leaves = [rows.detach().requires_grad_(), down.detach().requires_grad_()]
    y = function(*leaves)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves)]


def main():
    report = {}
    for case, (m, k, dtype, p, seed, _) in CASES.items():
        rows, down, grad = given(case)
        kept = stays(m, k, p, seed)
        exact = run(lambda x, w: (x * kept / (1 - p)) @ w.T, rows.double(), down.double(), grad)  # noqa: B023
        plain = run(lambda x, w: (x * kept / (1 - p)) @ w.T, rows, down, grad)  # noqa: B023
        ours, broken = (run(lambda x, w: Shrunk.apply(x, w, p, one, WAY), rows, down, grad) for one in (seed, seed ^ 2**33))  # noqa: B023
        errors = lambda found: [error(a, b) for a, b in zip(exact, found, strict=True)]  # noqa: B023, E731
        scale = np.float32(1 / (1 - p))
        same = torch.equal(WAY.dropped(rows, p, seed), (torch.where(kept, rows.float() * float(scale), 0.0)).to(rows.dtype))
        report[case] = {"dtype": dtype, "plain": errors(plain), "ours": errors(ours), "broken": errors(broken), "same": same}
    large = torch.ones(13, 3989)
    found = [ByTriton({**CONFIG, "BLOCK": 1024}).dropped(large, 0.3, SEED + i) for i in range(2)]
    report["large"] = {"zeros": [float((t == 0).float().mean()) for t in found], "both": float(((found[0] == 0) & (found[1] == 0)).float().mean()), "same": torch.equal(found[0] != 0, stays(13, 3989, 0.3, SEED)), "size": large.numel()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
