"""Writing a decoder as ONNX, ONNX Runtime's check included, against a bare `torch.onnx.export` of the same model, in pairs.

    python bench/onnx.py [--pairs 3]

Each pair is one process, so that what a library loads on its first use is paid by the side that uses it; the order within the pairs
alternates. Capture is not counted on our side (it is paid once per model, before anything is rewritten), but shown. Writes bench/results/onnx.json.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # this file is no package onnx

SHAPE = dict(vocab_size=512, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=256)
SIZES = dict(batch=2, length=16)
RESULTS = Path(__file__).parent / "results" / "onnx.json"


def machine():
    named = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = named[0] if named else platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "python": platform.python_version()}


def pair(ours_first):
    """One pair in this process: seconds of each side, and what was written."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch
    import transformers

    from rewrite.capture.model import capture

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    start = time.perf_counter()
    graph = capture(model)
    row = {"capture": time.perf_counter() - start}
    with tempfile.TemporaryDirectory() as folder:

        def ours():
            start = time.perf_counter()
            from rewrite.emit.onnx import export_onnx  # what it loads is part of its time, as on the other side

            report = export_onnx(graph, Path(folder) / "ours.onnx")
            row.update(ours=time.perf_counter() - start, nodes=report.nodes, error=report.error, checked=report.sizes)

        def theirs():
            ids = torch.randint(0, SHAPE["vocab_size"], (SIZES["batch"], SIZES["length"]))
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
            batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
            dims = {"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}, "use_cache": None}
            start = time.perf_counter()
            program = torch.onnx.export(model, (), kwargs=given, dynamic_shapes=dims, dynamo=True, verbose=False)
            program.save(str(Path(folder) / "theirs.onnx"))
            row.update(theirs=time.perf_counter() - start, theirs_nodes=len(program.model.graph))

        for side in (ours, theirs) if ours_first else (theirs, ours):
            side()
    row["ratio"] = row["ours"] / row["theirs"]
    print(json.dumps(row))


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--pairs", type=int, default=3)
    arguments.add_argument("--one", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one:
        return pair(given.one == "ours")
    rows = []
    for i in range(given.pairs):
        order = "ours" if i % 2 == 0 else "theirs"
        done = subprocess.run([sys.executable, __file__, "--one", order], check=True, capture_output=True, text=True)
        rows.append({"first": order} | json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        nodes = f"{row['nodes']} nodes against {row['theirs_nodes']}"
        print(f"{order} first: {row['ours']:.2f} s against {row['theirs']:.2f} s, ratio {row['ratio']:.3f}, {nodes}")
    names = ("torch", "transformers", "onnxscript", "onnx-ir", "onnx", "onnxruntime-gpu")
    result = {
        "what": "seconds to write an ONNX file and check it in ONNX Runtime (ours), and of a bare torch.onnx.export (theirs)",
        "model": {"class": "LlamaForCausalLM", **SHAPE},
        "example": SIZES,
        "machine": machine(),
        "versions": {name: version(name) for name in names},
        "ratio": {"median": statistics.median(row["ratio"] for row in rows), "worst": max(row["ratio"] for row in rows)},
        "pairs": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"ratio: median {result['ratio']['median']:.3f}, worst {result['ratio']['worst']:.3f} (wanted: at most 0.1) -> {RESULTS}")


if __name__ == "__main__":
    main()
