"""Kernels beside what they replace: checked first, then timed, all in one run; a table, and JSON with machine and versions.

    python bench/kernels.py [--quick] [--out results.json]

`lora_linear` against the plain ops, hand-written `addmm` and HF PEFT's layer, forward and backward, frozen base. Each time is the median of
interleaved rounds, given as a ratio to PEFT's. On a CPU the shapes are small and the Triton body does not run; the table says so.
"""

import argparse
import json
import platform
import statistics
import time

import peft
import torch
import triton
from rewrite.kernels import lora_linear as k
from torch import nn

K = 2.0  # an error may be K times that of the plain ops in the same dtype
GPU = [(rows, size, rank) for size in ((4096, 4096), (11008, 4096), (8192, 28672)) for rank in (8, 16, 64) for rows in (1, 16, 64, 512, 4096, 16384)]
CPU = [(rows, size, 16) for size in ((512, 512), (1376, 512)) for rows in (1, 64, 512)]


def ways(w, down, up, scale, device):
    """name → function of x."""
    out_dim, in_dim = w.shape
    layer = nn.Linear(in_dim, out_dim, bias=False, device=device, dtype=w.dtype)
    layer.weight = nn.Parameter(w, requires_grad=False)
    config = peft.LoraConfig(r=down.shape[0], lora_alpha=scale * down.shape[0], target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=False).base_model.model[0]
    theirs.lora_A["default"].weight, theirs.lora_B["default"].weight = down, up

    def by_hand(x):
        rows = x.reshape(-1, in_dim)
        return torch.addmm(rows @ w.mT, rows @ down.mT, up.mT, alpha=scale).view(*x.shape[:-1], out_dim)

    found = {
        "PEFT": theirs,
        "plain ops": lambda x: k.reference(x, w, None, down, up, scale),
        "addmm": by_hand,
        "lora_linear": lambda x: k.launch(x, w, None, down, up, scale, k.plain_product),
    }
    if device == "cuda":
        found["lora_linear, Triton"] = lambda x: k.launch(x, w, None, down, up, scale, k.fused_product)
    return found


def case(rows, size, rank, dtype, device, rounds):
    """One row of the table: error and time of each way, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)  # noqa: E731
    w, x, grad = new(*size) * size[1] ** -0.5, new(rows, size[1]), new(rows, size[0])
    down, up = nn.Parameter(new(rank, size[1]) * size[1] ** -0.5), nn.Parameter(new(size[0], rank))
    exact = k.reference(x.double(), w.double(), None, down.detach().double(), up.detach().double(), 2.0)
    functions, errors, times = ways(w, down, up, 2.0, device), {}, {}
    for name, function in functions.items():
        with torch.no_grad():
            errors[name] = float((function(x).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    for name, error in errors.items():
        if error > K * errors["plain ops"] + torch.finfo(dtype).eps:
            raise SystemExit(f"{name} at {rows} rows of {size}, rank {rank}: error {error:.1e}, the plain ops have {errors['plain ops']:.1e}")

    def step(function):
        given, down.grad, up.grad = x.detach().requires_grad_(), None, None
        start = _now(device)
        function(given).backward(grad)
        return _now(device) - start

    for _ in range(rounds + 2):
        for name, function in functions.items():
            times.setdefault(name, []).append(step(function))
    middle = {name: statistics.median(values[2:]) for name, values in times.items()}
    return {"rows": rows, "size": size, "rank": rank, "dtype": str(dtype), "seconds": middle, "ratio": {n: t / middle["PEFT"] for n, t in middle.items()}, "error": errors}


def _now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds")
    parser.add_argument("--out", help="write JSON here")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = (GPU if device == "cuda" else CPU)[slice(0, 2) if given.quick else slice(None)]
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, triton {triton.__version__}, peft {peft.__version__}, {dtype}; forward and backward, ratio to PEFT (below 1 is faster)")
    if device == "cpu":
        print("no GPU: small shapes, and the Triton body has not run")
    results = []
    for rows, size, rank in shapes:
        found = case(rows, size, rank, dtype, device, 5 if given.quick else 21)
        results.append(found)
        print(f"{rows:6} rows  {size[0]:5} × {size[1]:<5}  rank {rank:<3}", "  ".join(f"{name} {ratio:.2f}" for name, ratio in found["ratio"].items()), flush=True)
    if given.out:
        with open(given.out, "w") as file:
            json.dump({"machine": machine, "torch": torch.__version__, "triton": triton.__version__, "peft": peft.__version__, "cases": results}, file, indent=1)


if __name__ == "__main__":
    main()
