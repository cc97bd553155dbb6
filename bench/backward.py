"""Bytes that wait for backward after a forward pass, for each way to train one model: what autograd has saved, without the model's own tensors.

    python bench/backward.py [--layers 8] [--hidden 256] [--batch 8] [--length 128]

A decoder of transformers with random weights in training mode on a CPU, float32, no dropout, one batch without padding. `checkpoint` is full fine-tuning with
the live model's own gradient checkpointing. Seconds are one forward and backward pass, the best of three, on one thread. Writes
bench/results/backward.json.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # this file is not a package of that name

RESULTS = Path(__file__).parent / "results" / "backward.json"
FULL = [{"pass": "unfreeze", "where": "model"}]


def ways(layers):
    """name → (steps of a spec, whether blocks are checkpointed)."""
    half = {"role": "mlp", "path": f"layers.{{{layers // 2}..{layers - 1}}}.**"}
    return {
        "full": (FULL, False),
        "full, checkpointed": (FULL, True),
        "lora on all linears": ([{"pass": "lora", "where": "linear", "rank": 8}], False),
        "lora_fa on all linears": ([{"pass": "lora_fa", "where": "linear", "rank": 8}], False),
        "bitfit": ([{"pass": "bitfit", "where": "linear", "create": True}], False),
        "adapter after every mlp": ([{"pass": "adapter", "where": "mlp", "bottleneck": 32}], False),
        "adapter after the upper half": ([{"pass": "adapter", "where": half, "bottleneck": 32}], False),
        "adapterdrop, half": ([{"pass": "adapterdrop", "where": "mlp", "bottleneck": 32, "drop": layers // 2}], False),
        "lst": ([{"pass": "lst", "where": "block", "width": 32}], False),
        "meft": ([{"pass": "meft", "where": "block", "bottleneck": 32}], False),
        "ipa": ([{"pass": "ipa", "where": "logits", "width": 32}], False),
    }


def measured(model, steps, checkpointed, batch, length):
    import torch

    from rewrite import kept, rewrite

    live = rewrite(model, {"passes": steps}).train()
    if checkpointed:
        live.gradient_checkpointing_enable()
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    with kept(live) as saved:
        live(ids, labels=ids, use_cache=False)
    best = float("inf")
    for _ in range(3):
        live.zero_grad()
        start = time.perf_counter()
        live(ids, labels=ids, use_cache=False).loss.backward()
        best = min(best, time.perf_counter() - start)
    return {"trainable": live.report.applied[-1].after.trainable, "kept_bytes": saved.bytes, "kept_tensors": len(saved.shapes), "seconds": round(best, 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 8), ("hidden", 256), ("batch", 8), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = dict(vocab_size=1000, hidden_size=given.hidden, intermediate_size=given.hidden * 11 // 4, num_hidden_layers=given.layers, num_attention_heads=8, num_key_value_heads=4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    rows = {}
    for name, (steps, checkpointed) in ways(given.layers).items():
        rows[name] = measured(model, steps, checkpointed, given.batch, given.length)
        print(f"{name:30} {rows[name]['kept_bytes'] / 1e6:8.1f} MB  {rows[name]['trainable']:>10,}  {rows[name]['seconds']:.3f} s", flush=True)
    named = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    machine = {"cpu": named[0] if named else platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "python": platform.python_version()}
    versions = {name: version(name) for name in ("torch", "transformers")}
    result = {"model": "LlamaForCausalLM", "shape": shape, "batch": given.batch, "length": given.length, "dtype": "float32", "threads": 1, "machine": machine, "versions": versions, "ways": rows}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
