"""The live model against the original it was made of: a decoding step with a cache, and a training step, in pairs.

    python bench/live.py [--pairs 15]

Nothing is rewritten (an empty spec, then everything unfrozen), so both do the same arithmetic on the same weights; what is compared is the
printed source against the model's own code, eager. Original and live run in turn; reported are the median of the pairs' ratios in seconds of
CPU (one thread: on a machine that others use too this is what the code costs) and on the clock; milliseconds are those of a run of 40
decoding steps or 12 training steps. Writes bench/results/live.json.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # this file is not a package of that name

RESULTS = Path(__file__).parent / "results" / "live.json"
SHAPES = {
    "hidden 64": dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2),
    "hidden 256": dict(hidden_size=256, intermediate_size=688, num_attention_heads=8, num_key_value_heads=4),
}


def machine():
    named = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpu": named[0] if named else platform.machine(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "python": platform.python_version()}


def decoding(model, steps):
    """`steps` decoding steps of a batch of two after a prompt of 16 tokens."""
    import torch

    tokens = torch.ones(2, 16, dtype=torch.long)
    with torch.no_grad():
        out = model(tokens, use_cache=True)
        cache, last = out.past_key_values, tokens[:, :1]
        start = time.perf_counter(), time.process_time()
        for _ in range(steps):
            cache = model(last, past_key_values=cache, use_cache=True).past_key_values
    return time.perf_counter() - start[0], time.process_time() - start[1]


def training(model, steps, batch, length):
    """`steps` forward and backward passes, gradients let go in between."""
    import torch

    tokens = torch.arange(batch * length).reshape(batch, length) % 97
    mask = torch.ones_like(tokens)
    mask[-1, : length // 4] = 0  # a padded row, so that both take the path with a mask
    model.train()
    start = time.perf_counter(), time.process_time()
    for _ in range(steps):
        model(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
    elapsed = time.perf_counter() - start[0], time.process_time() - start[1]
    model.eval()
    return elapsed


def pairs(count, original, live, run):
    """Median ratios live / original over `count` interleaved pairs, and the medians in ms."""
    rows = []
    run(original), run(live)
    for i in range(count):
        order = ((original, 0), (live, 1)) if i % 2 else ((live, 1), (original, 0))
        found = [None, None]
        for model, at in order:
            found[at] = run(model)
        rows.append(found)
    median = statistics.median
    return {
        "ratio_cpu": round(median(b[1] / a[1] for a, b in rows), 3),
        "ratio_wall": round(median(b[0] / a[0] for a, b in rows), 3),
        "original_ms_cpu": round(1e3 * median(a[1] for a, _ in rows), 2),
        "live_ms_cpu": round(1e3 * median(b[1] for _, b in rows), 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    given = parser.parse_args()
    import torch
    import transformers

    from rewrite import rewrite

    torch.set_num_threads(1)
    rows = {}
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        original = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=97, num_hidden_layers=4, max_position_embeddings=512, **shape)).eval()
        live = rewrite(original, {"passes": [{"pass": "unfreeze", "where": "model"}]}).eval()
        rows[f"decode, {name}, batch 2"] = pairs(given.pairs, original, live, lambda model: decoding(model, 40))
        for batch, length in ((2, 16), (4, 64)):
            rows[f"train, {name}, {batch}x{length}"] = pairs(given.pairs, original, live, lambda model, b=batch, n=length: training(model, 12, b, n))
    for name, row in rows.items():
        print(f"{name:28} live/original {row['ratio_cpu']:.3f} of CPU, {row['ratio_wall']:.3f} on the clock   ({row['live_ms_cpu']:.1f} against {row['original_ms_cpu']:.1f} ms)")
    result = {"what": "live model against its original, Llama of 4 layers, float32, eager, one thread", "pairs": given.pairs, "rows": rows, "machine": machine()}
    result["versions"] = {name: version(name) for name in ("torch", "transformers")}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
