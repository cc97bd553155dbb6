"""A LoRA on all linears at growing depths: a Llama-7B shape on the meta device, beside HF PEFT's injection of the same into the same model.

    python bench/capture.py [--layers 2 8 32 80] [--traced 2 8] [--runs 2]

Counted is CPU time, since a machine may have other work. `rewrite` is the whole way from a model to its live model, with verification: `capture`
(two runs each of the call without and the call with a cache, aligned and signed), `apply` (roles, LoRA, the invariants) and `live` (source printed
and compiled). `traced` is capture alone with every block run by itself. rewrite and PEFT are measured in turn on fresh models; each number is the
least of the runs. Writes bench/results/capture.json.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # this file is not the package rewrite

SHAPE = dict(vocab_size=32000, hidden_size=4096, num_attention_heads=32, intermediate_size=11008)
RESULTS = Path(__file__).parent / "results" / "capture.json"


def machine():
    named = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = named[0] if named else platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "python": platform.python_version()}


def model(layers):
    import torch
    import transformers

    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers)).eval()


def seconds(function, make, runs):
    """The least CPU seconds of a call on a fresh model."""
    found = []
    for _ in range(runs):
        given = make()
        start = time.process_time()
        function(given)
        found.append(time.process_time() - start)
    return round(min(found), 3)


def inject(given):
    import peft

    peft.get_peft_model(given, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def stages(given):
    """CPU seconds of each stage of `rewrite(given, lora)`."""
    from rewrite import capture
    from rewrite.pipeline import apply, live_of
    from rewrite.spec.parse import Spec
    from rewrite.store.fingerprint import fingerprint

    marks = [time.process_time()]
    base, spec = fingerprint(given), Spec.parse({"passes": [{"pass": "lora", "rank": 8, "where": "linear"}]})
    graph = capture(given)
    marks.append(time.process_time())
    graph.bare = graph.over(None)
    report = apply(graph, spec)
    marks.append(time.process_time())
    live_of(graph, spec, report, base)
    marks.append(time.process_time())
    parts = [after - before for before, after in zip(marks, marks[1:])]
    return {"rewrite": sum(parts), **dict(zip(("capture", "apply", "live"), parts))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32, 80])
    parser.add_argument("--traced", type=int, nargs="*", default=[2, 8])
    parser.add_argument("--runs", type=int, default=2)
    given = parser.parse_args()
    import torch

    from rewrite import capture

    torch.set_num_threads(1)
    stages(model(1))  # what libraries load on first use is no part of it
    inject(model(1))
    rows = []
    print(f"{'layers':>6} {'rewrite':>8} {'peft':>8} {'capture':>8} {'apply':>8} {'live':>8} {'traced':>8}   CPU seconds")
    for layers in given.layers:
        make = lambda layers=layers: model(layers)
        pairs = [(stages(make()), seconds(inject, make, 1)) for _ in range(given.runs)]
        best = min((ours for ours, _ in pairs), key=lambda ours: ours["rewrite"])
        row = {"layers": layers, **{name: round(value, 3) for name, value in best.items()}, "peft": min(theirs for _, theirs in pairs)}
        if layers in given.traced:
            row["traced"] = seconds(lambda fresh: capture(fresh, stamp=False), make, 1)
        rows.append(row)
        print(f"{layers:>6} " + " ".join(f"{row.get(name, float('nan')):>8.2f}" for name in ("rewrite", "peft", "capture", "apply", "live", "traced")), flush=True)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    RESULTS.write_text(json.dumps({"machine": machine(), "versions": versions, "shape": SHAPE, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
