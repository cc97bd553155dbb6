"""Rewriting after capture: `lora` on all linears of a Llama-7B shape on the meta device, verification included, at growing depths.

    python bench/rewrite.py [--layers 8 16 32 64] [--runs 3]

Counted is what `rewrite(model, spec)` does between capture and printing: finding the roles, making tensors, pasting bodies, checking every
invariant. Each run starts from a fresh copy of the captured graph. Capture and printing are shown beside it. `slope` is the exponent of a line
through the logarithms (1: linear in the number of sites). Writes bench/results/rewrite.json.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # this file is not the package rewrite

SHAPE = dict(vocab_size=32000, hidden_size=4096, num_attention_heads=32, intermediate_size=11008)
SPEC = {"passes": [{"pass": "lora", "where": "linear", "rank": 8}]}
RESULTS = Path(__file__).parent / "results" / "rewrite.json"


def machine():
    named = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = named[0] if named else platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "python": platform.python_version()}


def timed(function, *args):
    """(seconds on the clock, seconds of this one thread, result): on a machine that others use too the second is what the code costs."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args)
    return time.perf_counter() - wall, time.process_time() - cpu, result


def measure(layers, runs):
    """A row: seconds of each run, and what they made."""
    import torch
    import transformers

    from rewrite import Spec, capture
    from rewrite.emit.live import make_live
    from rewrite.pipeline import apply

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval()
    captured, _, graph = timed(capture, model)
    spec, rows = Spec.parse(SPEC), []
    for _ in range(runs):
        fresh = graph.copy()
        rows.append(timed(apply, fresh, spec))
    printed, _, _ = timed(make_live, fresh)
    (step,) = rows[-1][2].applied
    return {
        "layers": layers, "sites": len(step.sites), "nodes": sum(len(part.nodes) for part in fresh.all()), "graphs": len(fresh.all()), "trainable": step.after.trainable,
        "capture": round(captured, 3), "rewrite": [round(wall, 4) for wall, _, _ in rows], "rewrite_cpu": [round(cpu, 4) for _, cpu, _ in rows], "print": round(printed, 3),
    }  # fmt: skip


def slope(rows):
    """The exponent of (CPU) seconds over sites; below 1 where a fixed part weighs."""
    x, y = ([math.log(value) for value in values] for values in zip(*((row["sites"], statistics.median(row["rewrite_cpu"])) for row in rows)))
    return statistics.linear_regression(x, y).slope if len(rows) > 1 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    measure(1, 1)  # what libraries load on first use is no part of it
    rows = []
    for layers in given.layers:
        rows.append(row := measure(layers, given.runs))
        print(f"{layers:3} layers  {row['sites']:4} sites  rewrite {statistics.median(row['rewrite']):.3f} s, of CPU {statistics.median(row['rewrite_cpu']):.3f} s  (capture {row['capture']:.2f} s, print {row['print']:.2f} s)", flush=True)
    print(f"seconds grow as sites to the power of {slope(rows):.2f}" if len(rows) > 1 else "")
    result = {"what": "lora on all linears of a Llama-7B shape on meta, after capture, verification included", "spec": SPEC, "rows": rows, "slope": slope(rows) and round(slope(rows), 3), "machine": machine()}
    result["versions"] = {name: version(name) for name in ("torch", "transformers")}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
