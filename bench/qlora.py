"""QLoRA of a small Llama side by side: ours fused beside HF PEFT over bitsandbytes' Linear4bit; every site that was fused, and every one that was not, with its reason.

    OMP_NUM_THREADS=1 python bench/qlora.py [--hidden 512] [--layers 4] [--pairs 9] [--out bench/results/qlora.json]

Weights in nf4, double quantised, LoRA on all linears but the head, bfloat16, forward, loss and backward. Both have the same codes and the same adapters: their losses and
the gradients of all adapters are compared before anything is measured, by the error of each to a float32 model of the numbers that the codes stand for.
Memory is measured way by way in a process of its own: bytes that autograd keeps after forward, and the peak of the process over a step beyond what it held
before (VmHWM, which the kernel is asked to count anew). Times are interleaved in one process. In neither does anything before the first adapter get a gradient.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # this file is not a package of that name

RANK, ALPHA, ROWS, LENGTH, VOCAB = 16, 32, 4, 128, 1000
WAYS = ("ours", "PEFT + bitsandbytes")
QUANTIZE = {"pass": "quantize", "where": {"role": "linear", "not": "head"}, "format": "nf4"}
LORA = {"pass": "lora", "where": {"role": "linear", "not": "head"}, "rank": RANK, "alpha": ALPHA}


def base(hidden, layers):
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCAB, **sizes)).bfloat16()


def made(way, hidden, layers):
    """The model of a way, its adapters drawn by their names."""
    import torch

    from rewrite import rewrite

    model = base(hidden, layers)
    live = rewrite(model, {"passes": [QUANTIZE, LORA, {"pass": "fuse"}]}) if way == "ours" else _peft(model)
    with torch.no_grad():
        for name, tensor in adapters(live).items():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(sum(name.encode()))) * 0.02)
    return live.train()


def adapters(model):
    """(site, "down" or "up") as one name → tensor, of either way."""
    found = {}
    for path, tensor in model.named_parameters():
        for theirs, which in ((".lora_A.default.weight", "down"), (".lora_B.default.weight", "up"), (".lora.default.down", "down"), (".lora.default.up", "up")):
            if path.endswith(theirs):
                found[f"{path.removesuffix(theirs).removeprefix('base_model.model.')} {which}"] = tensor
    return found


def _peft(model):
    import bitsandbytes
    import peft
    import torch
    from torch import nn

    for path, linear in [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]:
        coded = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
        coded.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=coded)
        model.set_submodule(path, coded.to("cpu"))
    model.is_loaded_in_4bit = True
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"), autocast_adapter_dtype=False)


def batch():
    import torch

    return torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def step(model, ids):
    """Seconds of one forward and backward, and the loss."""
    model.zero_grad()
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return time.perf_counter() - start, float(loss.detach())


def measured(way, hidden, layers):
    """Bytes of one way, in a process of its own."""
    from rewrite import kept

    model, ids = made(way, hidden, layers), batch()
    step(model, ids)  # what is made once
    with kept(model) as saved:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    held = saved.bytes
    del loss, saved
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    step(model, ids)
    return {"kept for backward": held, "peak beyond the model": _status("VmHWM") - before, "process at its peak": _status("VmHWM")}


def _status(name):
    """Bytes of a line of /proc/self/status."""
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))


def compared(models, hidden, layers):
    """Loss of each way, and the worst relative error of an adapter's gradient, against the numbers of the codes in float32."""
    from rewrite import rewrite

    exact = rewrite(base(hidden, layers), {"passes": [QUANTIZE, LORA]}).train().float()
    for name, tensor in adapters(exact).items():
        tensor.data.copy_(adapters(models["ours"])[name])
    ids = batch()
    losses = {"float32": step(exact, ids)[1], **{way: step(model, ids)[1] for way, model in models.items()}}
    errors = {way: max(float((t.grad - (given := adapters(exact)[name].grad)).norm() / given.norm()) for name, t in adapters(model).items()) for way, model in models.items()}
    if not errors["ours"] <= 2 * errors["PEFT + bitsandbytes"]:
        raise SystemExit(f"gradients of ours are off by {errors['ours']:.1e}, those of PEFT + bitsandbytes by {errors['PEFT + bitsandbytes']:.1e}")
    return losses, errors


def sites(live):
    """{"fused": {op: sites}, "not fused": {site: reason}} of the last step."""
    applied, fused = live.report.applied[-1], {}
    for path, op in applied.sites:
        fused.setdefault(op, []).append(path)
    return {"fused": fused, "not fused": dict(applied.refused)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 512), ("layers", 4), ("pairs", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        print(json.dumps(measured(given.memory_of, given.hidden, given.layers)))
        return
    memory = {}
    for way in WAYS:
        call = [sys.executable, __file__, "--memory-of", way, "--hidden", str(given.hidden), "--layers", str(given.layers)]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{way}: {done.stderr[-2000:]}")
        memory[way] = json.loads(done.stdout.splitlines()[-1])
    models, ids, times = {way: made(way, given.hidden, given.layers) for way in WAYS}, batch(), {way: [] for way in WAYS}
    losses, errors = compared(models, given.hidden, given.layers)
    load = os.getloadavg()[0]
    for i in range(given.pairs):
        for way in WAYS[:: 1 if i % 2 else -1]:
            times[way].append(step(models[way], ids)[0])
    ratio = statistics.median(a / b for a, b in zip(times[WAYS[0]], times[WAYS[1]]))
    print(models["ours"].report)
    for op, paths in sites(models["ours"])["fused"].items():
        print(f"fused by {op}: {', '.join(paths)}")
    for way in WAYS:
        held = "  ".join(f"{name} {value / 1e6:.1f} MB" for name, value in memory[way].items())
        print(f"{way:20} {held}  step {1000 * statistics.median(times[way]):.1f} ms  loss {losses[way]:.5f}, worst gradient off by {errors[way]:.1e}")
    print(f"a step of ours takes {ratio:.2f} of PEFT + bitsandbytes', load {load:.1f}")
    if given.out:
        result = {"hidden": given.hidden, "layers": given.layers, "tokens": [ROWS, LENGTH], "dtype": "bfloat16", "memory": memory, "losses": losses, "worst error of a gradient": errors}
        result |= {"seconds": {way: statistics.median(values) for way, values in times.items()}, "ratio": ratio, "pairs": given.pairs, "load": load, **sites(models["ours"])}
        result |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
