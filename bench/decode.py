"""Decoding with weights in codes beside the same model in bfloat16: tokens a second in interleaved pairs, and how far the logits are off.

    python bench/decode.py [--hidden 1024] [--layers 16] [--tokens 8] [--rounds 7] [--out bench/results/decode.json]

A Llama of random weights, greedy decoding behind a prompt of 16 tokens through `generate`, one thread unless OMP_NUM_THREADS says otherwise. Each round
times the bfloat16 model, then every format, and gives the ratio of the two; what is printed is the median of the rounds' ratios, with the least and the
greatest. The error is that of the logits of one prompt, RMS relative to those of the model in float32: the bfloat16 model's own, that of the numbers the
format gives (in float32), and that of the model that was timed. It is read where the step is decoding: behind the prompt, in one more token.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # kernels.py beside this is not a package of that name

import torch  # noqa: E402
import transformers as T  # noqa: E402
from rewrite.kernels import chips  # noqa: E402

from rewrite import rewrite  # noqa: E402

FORMATS = {"int8": {}, "int4": {"group_size": 64}, "nf4": {}}


def model(hidden, layers):
    torch.manual_seed(0)
    sizes = dict(hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128)
    return T.LlamaForCausalLM(T.LlamaConfig(vocab_size=8192, max_position_embeddings=512, eos_token_id=None, **sizes)).eval()


def step(given, ids):
    """Logits of the token behind a prompt, which decoding computes."""
    with torch.no_grad():
        found = given(input_ids=ids[:, :-1], use_cache=True)
        return given(input_ids=ids[:, -1:], past_key_values=found.past_key_values, use_cache=True).logits[:, -1].double()


def rms(reference, result):
    return float((reference - result).square().mean().sqrt() / reference.square().mean().sqrt())


def seconds(given, ids, tokens):
    start = time.perf_counter()
    given.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return time.perf_counter() - start


def one_token(given, ids, tokens):
    """Seconds a token takes once the prompt is read."""
    with torch.no_grad():
        return (seconds(given, ids, tokens + 1) - seconds(given, ids, 1)) / tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("hidden", 1024), ("layers", 16), ("tokens", 8), ("rounds", 7), ("batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    ids = torch.randint(0, 8192, (given.batch, 17), generator=torch.Generator().manual_seed(1))
    whole = model(given.hidden, given.layers)
    exact = step(whole, ids)
    steps = {name: [{"pass": "quantize", "where": "linear", "format": name, **options}] for name, options in FORMATS.items()}
    errors = {name: {"its numbers in float32": rms(exact, step(rewrite(whole, {"passes": steps[name]}), ids))} for name in FORMATS}
    base = whole.bfloat16()
    lives = {name: rewrite(base, {"passes": [*steps[name], {"pass": "fuse"}]}) for name in FORMATS}
    for name, live in {"bfloat16": base, **lives}.items():
        errors.setdefault(name, {})["as timed"] = rms(exact, step(live, ids))
    times = {name: [] for name in ("bfloat16", *FORMATS)}
    for _ in range(given.rounds):
        for name, live in {"bfloat16": base, **lives}.items():
            times[name].append(one_token(live, ids, given.tokens))
    ratios = {name: sorted(plain / ours for plain, ours in zip(times["bfloat16"], times[name])) for name in FORMATS}
    found = {
        "machine": f"{platform.machine()}, {chips.chip(torch.device('cpu'))}", "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "torch": torch.__version__,
        "transformers": T.__version__, "hidden": given.hidden, "layers": given.layers, "batch": given.batch, "rounds": given.rounds,
        "tokens a second": {name: 1 / statistics.median(values) * given.batch for name, values in times.items()},
        "times bfloat16": {name: {"median": statistics.median(values), "least": values[0], "greatest": values[-1]} for name, values in ratios.items()}, "error": errors,
    }  # fmt: skip
    print(f"{found['machine']}, {found['threads']} thread(s), load {found['load']:.1f}, torch {found['torch']}; hidden {given.hidden} × {given.layers} layers, batch {given.batch}")
    print(f"bfloat16  {found['tokens a second']['bfloat16']:7.1f} tokens/s                                 error {errors['bfloat16']['as timed']:.1e}")
    for name, ratio in found["times bfloat16"].items():
        error = errors[name]
        print(f"{name:8}  {found['tokens a second'][name]:7.1f} tokens/s  {ratio['median']:.2f} × bfloat16 ({ratio['least']:.2f} – {ratio['greatest']:.2f})  error {error['as timed']:.1e}, of its numbers {error['its numbers in float32']:.1e}")
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
