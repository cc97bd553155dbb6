"""A decoder, from nothing to ONNX: a tiny Llama learns to write docstrings, then LoRA teaches it to write code.

    python examples/decoder.py            about three minutes on two cores
    python examples/decoder.py --small    a few seconds, to see that it runs

It is trained from scratch on the docstrings of the standard library, adapted with LoRA to their source code, generates before and after, is
saved, loaded, merged, and exported with its KV cache; ONNX Runtime then writes the same text, token by token.
"""

import argparse
import ast
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import onnxruntime
import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import track

from rewrite import export_onnx, load, merge, rewrite, save
from rewrite.demo import corpus

SPEC = {"passes": [{"pass": "lora", "where": "linear", "rank": 16, "alpha": 32}]}
PROMPTS = ("Return the", "If the name", "Set the")


@dataclass(frozen=True)
class Size:
    """Of the model, its windows of tokens, and the training: steps from scratch, steps of LoRA."""

    vocabulary: int = 1024
    hidden: int = 192
    layers: int = 4
    window: int = 64
    batch: int = 16
    steps: int = 600
    adapting: int = 200
    packages: tuple[str, ...] = tuple(corpus.PACKAGES)


SMALL = Size(vocabulary=300, hidden=48, layers=2, window=24, batch=8, steps=30, adapting=15, packages=("difflib", "http"))


def prose(packages):
    """The docstrings of some packages of the standard library."""
    return [text for _, text in corpus.docstrings(packages=packages)]


def code(packages):
    """The functions of some packages, without docstrings and comments."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), []
    for name in packages:
        place = library / corpus.PACKAGES[name]
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.FunctionDef):
                    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                    found += ["\n".join(ast.unparse(line) for line in body)] if body else []
    return found


def vocabulary(texts, size):
    """A byte-level BPE tokenizer trained on the texts; <end> is token 0."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def tokens(tokenizer, texts):
    """All texts in one line of tokens, <end> between them; the last tenth is held out → (trained on, held out)."""
    line = torch.tensor([token for each in tokenizer.encode_batch(texts) for token in (*each.ids, 0)])
    cut = len(line) * 9 // 10
    return line[:cut], line[cut:]


def batch(line, size, generator):
    """Random windows of a line of tokens: (batch, window)."""
    starts = torch.randint(len(line) - size.window, (size.batch,), generator=generator)
    return torch.stack([line[start : start + size.window] for start in starts])


def train(model, line, size, steps, rate, label):
    """AdamW on random windows, the rate rising and then falling, in place."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in track(range(steps), label):
        ids = batch(line, size, generator)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def loss(model, line, size):
    """Mean loss on eight fixed batches of held-out text."""
    generator = torch.Generator().manual_seed(1)
    return sum(model(input_ids=ids, labels=ids).loss.item() for ids in (batch(line, size, generator) for _ in range(8))) / 8


def write(model, tokenizer, prompt, length=24):
    """What a model goes on to write, greedily, with some care not to repeat itself."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, no_repeat_ngram_size=3)
    return tokenizer.decode(made[0].tolist())


def write_in_onnx_runtime(report, ids, length):
    """The tokens that the ONNX file writes greedily after `ids` (a list), its KV cache handed from step to step."""
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"], disabled_optimizers=list(report.disabled_optimizers))
    inputs, outputs = ({each.name: each.shape for each in side} for side in (session.get_inputs(), session.get_outputs()))
    cache = {name: numpy.zeros((1, shape[1], 0, shape[3]), numpy.float32) for name, shape in inputs.items() if name.startswith("past_key_values")}
    line, new = [], list(ids)
    for _ in range(length):
        places = numpy.arange(len(line), len(line) + len(new))[None]
        line += new
        feed = {"input_ids": numpy.array([new]), "attention_mask": numpy.ones((1, len(line)), numpy.int64), "position_ids": places, **cache}
        logits, *grown = session.run(list(outputs), {name: value for name, value in feed.items() if name in inputs})
        cache = dict(zip(cache, grown))
        new = [int(logits[0, -1].argmax())]
    return [*line, *new]


def main(size=Size(), out="examples/out"):
    """Runs it all, prints as it goes, and returns what it found as a dict."""
    console, start, out = Console(), time.perf_counter(), Path(out)
    torch.manual_seed(0)
    told, written = prose(size.packages), code(size.packages)
    tokenizer = vocabulary([*told, *written], size.vocabulary)
    (told, told_held), (written, written_held) = tokens(tokenizer, told), tokens(tokenizer, written)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=size.hidden, intermediate_size=size.hidden * 8 // 3, num_hidden_layers=size.layers,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    console.print(f"a Llama of {sum(p.numel() for p in base.parameters()) / 1e6:.1f} M parameters; {len(told):,} tokens of docstrings, {len(written):,} of code", highlight=False)
    train(base, told, size, size.steps, 3e-3, "docstrings")

    live = rewrite(base, SPEC)
    console.print(live.report.table())
    before = {prompt: write(live, tokenizer, prompt) for prompt in PROMPTS}
    found = {"prose": loss(base, told_held, size), "code_before": loss(live, written_held, size)}
    train(live, written, size, size.adapting, 5e-3, "code, LoRA")
    found["code_after"] = loss(live, written_held, size)
    after = {prompt: write(live, tokenizer, prompt) for prompt in PROMPTS}
    console.print(f"held-out loss: docstrings {found['prose']:.2f}; code {found['code_before']:.2f} → {found['code_after']:.2f}", highlight=False)
    for prompt in PROMPTS:
        console.print(f"[bold]before[/]  {before[prompt]!r}\n[bold]after[/]   {after[prompt]!r}", highlight=False)

    save(live, out / "adapter")
    loaded = load(base, out / "adapter")
    found["loaded_equal"] = all(write(loaded, tokenizer, prompt) == after[prompt] for prompt in PROMPTS)
    merged = merge(loaded)
    report = export_onnx(merged, out / "model.onnx", cache=True)
    ids = tokenizer.encode(PROMPTS[0]).ids
    wanted = merged.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=24, do_sample=False, eos_token_id=None)[0].tolist()
    found["onnx_equal"] = write_in_onnx_runtime(report, ids, 24) == wanted
    console.print(f"loaded from {out / 'adapter'}: writes the same: {found['loaded_equal']}")
    console.print(f"merged and exported to {report.path} ({report.bytes / 1e6:.1f} MB): ONNX Runtime writes the same tokens: {found['onnx_equal']}", highlight=False)
    console.print(f"{time.perf_counter() - start:.0f} s in all", highlight=False)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes; nothing is learned worth reading")
    parser.add_argument("--out", default="examples/out", help="the folder for adapter and ONNX file")
    given = parser.parse_args()
    main(SMALL if given.small else Size(), given.out)
