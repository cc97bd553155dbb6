"""A training step side by side: what adapters on every linear of a small Llama add to it, ours beside those of HF PEFT.

    OMP_NUM_THREADS=2 python bench/step.py [--hidden 512 1024] [--pairs 21] [--dtypes float32 bfloat16] [--modes eager compiled]

Forward, loss and backward with a gradient to the embeddings, eager beside eager and compiled beside compiled; the optimizer's step, the same for all, is
left out. `compiled` is torch.compile(fullgraph=True): each model in one graph. One round runs each way once in both modes, in turn, so that all of them meet the machine's load alike; added is the median over rounds of a way's step minus that of the frozen base
in the same round. `ours` is taken off the same base as PEFT's, the original model; `ours, printed base` off the frozen model as `rewrite` prints it, so
that nothing which printing gains counts for the adapters. PEFT's adapters have the dtype of the base, as ours do. All ways start from the
same weights, and their losses are compared before anything is timed. Writes bench/results/step.json.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # this file is not the package rewrite

SHAPES = {  # hidden size → what else there is of the model; tokens of a step are rows × length
    512: dict(intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8),
    1024: dict(intermediate_size=2752, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=16),
}
RANK, ALPHA, ROWS, LENGTH, VOCAB = 16, 32, 4, 64, 1000
RESULTS = Path(__file__).parent / "results" / "step.json"


def ways(hidden, dtype):
    """name → model; those with adapters have the same tensors."""
    import peft
    import torch
    import transformers

    from rewrite import rewrite

    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=hidden, **SHAPES[hidden])).to(dtype)
    embeddings = {"pass": "unfreeze", "where": "embed"}
    lora = {"pass": "lora", "where": {"role": "linear", "not": "head"}, "rank": RANK, "alpha": ALPHA}
    found = {"frozen": copy.deepcopy(base), "frozen, printed": rewrite(base, {"passes": [embeddings]}), "plain": rewrite(base, {"passes": [embeddings, lora]})}
    found["ours"] = rewrite(base, {"passes": [embeddings, lora, {"pass": "fuse"}]})
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    found["PEFT"] = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    for name in ("frozen", "PEFT"):
        for path, parameter in found[name].named_parameters():
            parameter.requires_grad_("lora_" in path or "embed_tokens" in path)
    tensors = dict(found["ours"].named_parameters())
    with torch.no_grad():
        for path, tensor in tensors.items():
            if path.endswith("lora.default.up"):
                tensor.normal_(std=0.01)
        found["plain"].load_state_dict(found["ours"].state_dict())
        for path, tensor in found["PEFT"].named_parameters():
            site, _, which = path.removeprefix("base_model.model.").partition(".lora_")
            if which:
                tensor.copy_(tensors[f"{site}.lora.default.{'down' if which[0] == 'A' else 'up'}"])
    return {name: model.train() for name, model in found.items()}


def step(model, ids, clock=time.perf_counter):
    """Seconds of one forward and backward, and the loss."""
    for parameter in model.parameters():
        parameter.grad = None
    start = clock()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return clock() - start, float(loss.detach())


def measure(hidden, dtype, pairs, clock, modes):
    """A row of the result for each mode."""
    import torch

    torch._dynamo.reset()  # what it has compiled of other sizes counts against its limit
    models = {}
    for name, model in ways(hidden, getattr(torch, dtype)).items():
        models |= {(mode, name): torch.compile(model, fullgraph=True) if mode == "compiled" else model for mode in modes}
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    losses = {name: [step(model, ids)[1] for _ in range(3)][-1] for name, model in models.items()}
    for mode, name in models:
        if name in ("plain", "ours") and abs(losses[mode, name] - losses[mode, "PEFT"]) > {"float32": 1e-5, "bfloat16": 2e-2}[dtype] * losses[mode, "PEFT"]:
            raise SystemExit(f"{name} and PEFT differ, {mode}: losses {losses[mode, name]} and {losses[mode, 'PEFT']}")
        if name == "frozen" and abs(losses[mode, name] - losses[mode, "PEFT"]) < 1e-6:
            raise SystemExit("the adapters do nothing: there is nothing to compare")
    load, times = os.getloadavg()[0], {way: [] for way in models}
    for i in range(pairs):
        for way in list(models)[:: 1 if i % 2 else -1]:
            times[way].append(step(models[way], ids, clock)[0])
    for mode in modes:
        of = {name: values for (kind, name), values in times.items() if kind == mode}
        added = {name: statistics.median(a - b for a, b in zip(of[name], of["frozen"])) for name in ("PEFT", "plain", "ours")}
        added["ours, printed base"] = statistics.median(a - b for a, b in zip(of["ours"], of["frozen, printed"]))
        yield {
            "hidden": hidden, "dtype": dtype, "mode": mode, "losses": {name: losses[mode, name] for name in of}, "pairs": pairs, "load": [round(load, 2), round(os.getloadavg()[0], 2)],
            "seconds": {name: statistics.median(values) for name, values in of.items()}, "added": added, "ratio": {name: value / added["PEFT"] for name, value in added.items()},
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--cpu", action="store_true", help="count seconds of CPU, not of the clock: for a machine that others use too")
    given = parser.parse_args()
    import torch

    named = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = {"cpu": named[0] if named else platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(), "clock": "CPU" if given.cpu else "wall"}
    rows = []
    for hidden in given.hidden:
        for dtype in given.dtypes:
            for row in measure(hidden, dtype, given.pairs, time.process_time if given.cpu else time.perf_counter, given.modes):
                rows.append(row)
                shown = "  ".join(f"{name} {1000 * row['added'][name]:6.1f} ms ({row['ratio'][name]:.2f})" for name in row["added"])
                print(f"hidden {hidden:4} {dtype:8} {row['mode']:8}  frozen {1000 * row['seconds']['frozen']:6.1f} ms, ours {1000 * row['seconds']['ours']:6.1f} ms  added: {shown}  load {row['load'][0]}", flush=True)
    result = {"what": f"LoRA of rank {RANK} on all linears but the head, {ROWS} × {LENGTH} tokens, forward and backward; added to the frozen base", "rows": rows, "machine": machine}
    result["versions"] = {name: version(name) for name in ("torch", "transformers", "peft")}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
