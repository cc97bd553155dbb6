"""Several specs on one pretrained model and one task: each rewritten, trained, merged, exported, and run in ONNX Runtime on the whole test set."""

import dataclasses
import json
import platform
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..emit.onnx import export_onnx
from ..errors import Refused
from ..pipeline import merge, rewrite
from ..roles.find import roles
from ..spec.parse import Spec
from ..store.folder import save
from . import corpus, encoder, training

PLAIN, EVERY = ("unfreeze", "lora"), ("unfreeze", "lora", "adapter", "bitfit", "full")
"""Examples that the default run compares, and those of --all."""

WORDS = {"unfreeze": "head alone", "lora": "LoRA", "adapter": "adapters", "bitfit": "BitFit", "full": "full tuning"}


@dataclass(frozen=True)
class Result:
    """One spec's row: accuracies are shares of the test set, seconds wall clock, peak bytes of the whole process while the chosen run trained.

    `merged` is "yes", "nothing to merge", or the reason why something stayed. `difference` is the largest of all test logits between ONNX
    Runtime and PyTorch (as trained, before merging), `equal` the share of equal predictions.
    """

    name: str
    spec: dict
    sites: dict[str, int]
    trainable: int
    share: float
    before: float
    after: float
    validation: float
    rate: float
    tried: dict[float, tuple[float, ...]]
    seconds: float
    seconds_in_all: float
    peak: int | None
    merged: str
    onnx_bytes: int
    onnx_accuracy: float
    difference: float
    equal: float
    folder: str


def demo(model=None, everything=False, out="demo-out", specs=None, schedule=None, limit=None, console=None):
    """Run the demo; prints as it goes and returns a Result per spec.

    model: a folder or hub id (default: the demo's own). everything: all five ways instead of two. out: the folder where its files go. specs: paths
    of specs instead of the examples. schedule: a `Schedule`. limit: texts per split, for a quick look. Raises Refused and SpecError.
    """
    console, schedule, start = console or Console(), schedule or training.Schedule(), time.perf_counter()
    paths = [Path(path) for path in specs or [examples() / f"{name}.json" for name in (EVERY if everything else PLAIN)]]
    parsed = [(path.stem, Spec.parse(path)) for path in paths]
    folder = Path(out)
    _make(folder)

    console.print(f"Reading the docstrings of Python {platform.python_version()}'s standard library, and the model.", highlight=False)
    texts = corpus.read()
    labels = texts.labels
    base, tokenizer, new = encoder.load(model or encoder.place(), labels)
    splits = [encoder.encode(tokenizer, passages[:limit]) for passages in (texts.train, texts.validation, texts.test)]
    _introduce(console, base, model, splits, labels, new)
    parsed = _with_new_modules(console, base, new, parsed)

    results = []
    for name, spec in parsed:
        results.append(_one(console, base, name, spec, splits, schedule, folder / name))
    console.print(_trained_table(results, len(splits[2])), _exported_table(results), sep="\n")
    _report(folder / "report.json", results, base, splits, schedule, time.perf_counter() - start)
    console.print(f"{time.perf_counter() - start:.0f} s in all. Specs, adapters, ONNX files and report.json are in [bold]{folder.resolve()}[/]", highlight=False)
    return results


def examples():
    """The folder of the example specs: beside the package when installed, at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next((place for place in (package / "examples", package.parent / "examples") if place.is_dir()), package / "examples")


def _make(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder}: cannot be made: {error.strerror}. Name another folder with --out.") from error


def _introduce(console, base, model, splits, labels, new):
    count = sum(p.numel() for p in base.parameters())
    console.print(f"[bold]model[/]  {model or encoder.PACKAGE}: {type(base).__name__}, {count / 1e6:.1f} M parameters, new: {', '.join(new) or 'nothing'}", highlight=False)
    sizes = " / ".join(f"{len(split):,}" for split in splits)
    console.print(f"[bold]task[/]   which of {len(labels)} packages of the standard library is this docstring from? ({', '.join(labels)})", highlight=False)
    console.print(f"       {sizes} passages to train on / choose the learning rate by / test on; guessing is right in {1 / len(labels):.1%}", highlight=False)


def _with_new_modules(console, base, new, parsed):
    """The specs, each with a step that trains what the loader had to draw anew and `"where": "head"` does not name."""
    modules = {name.rpartition(".")[0] for name in new}
    if len(modules) < 2:
        return parsed
    modules -= {site.path for site in roles(base) if site.role == "head"}
    step = {"pass": "unfreeze", "where": {"role": ["linear", "norm", "embed", "head"], "path": sorted(modules)}}
    console.print(f"       also trained in every way, because it is new: {', '.join(sorted(modules))}", highlight=False)
    return [(name, Spec.parse({"seed": spec.seed, "passes": [*spec.to_dict()["passes"], step]})) for name, spec in parsed]


def _one(console, base, name, spec, splits, schedule, folder):
    train, validation, test = splits
    console.rule(f"[bold]{_title(name)}[/]", align="left")
    console.print((Path(spec.source).read_text(encoding="utf-8") if spec.source else spec.to_json()).rstrip(), highlight=False, markup=False)
    live = rewrite(base, spec)
    console.print(live.report.table())
    before = training.accuracy(training.predict(live, test), test)
    with _progress(console) as progress:
        task = progress.add_task("training", total=schedule.work())
        fitted = training.fit(live, train, validation, schedule, lambda: progress.advance(task))
    logits = training.predict(live, test)
    after, held_out = training.accuracy(logits, test), training.accuracy(training.predict(live, validation), validation)
    size = live.report.applied[-1].after
    console.print(
        f"learning rate {fitted.rate:g} of {', '.join(f'{rate:g}' for rate in fitted.tried)}; test accuracy {before:.1%} → [bold]{after:.1%}[/] in {fitted.seconds_in_all:.0f} s",
        highlight=False,
    )
    save(live, folder / "adapter")
    final, merged = _merged(live)
    report = export_onnx(final, folder / "model.onnx")
    seen = _in_onnx_runtime(report, final, test)
    result = Result(
        name, spec.to_dict(), _sites(live), size.trainable, size.share, before, after, held_out, fitted.rate, fitted.tried, fitted.seconds, fitted.seconds_in_all, fitted.peak,
        merged, report.bytes, training.accuracy(seen, test), (seen - logits).abs().max().item(), (seen.argmax(-1) == logits.argmax(-1)).float().mean().item(), str(folder),
    )  # fmt: skip
    console.print(f"merged: {merged}", highlight=False, markup=False)
    console.print(f"ONNX Runtime on {len(test)} texts: largest difference of logits {result.difference:.1e}, {result.equal:.1%} equal predictions", highlight=False)
    return result


def _title(name):
    return WORDS.get(name, name)


def _sites(live):
    return dict(Counter(role for step in live.report.applied for _, role in step.sites))


def _merged(live):
    """The live model with what its passes added folded away, or as it is; and "yes", "nothing to merge", or why something stays."""
    if not live.report.made:
        return live, "nothing to merge"
    try:
        return merge(live), "yes"
    except Refused as reason:
        return live, " ".join(str(reason).splitlines()[:2])


def _in_onnx_runtime(report, live, texts, size=64):
    """Logits of all texts in their order, by the ONNX file: its inputs are those that PyTorch's live model is given."""
    session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"], disabled_optimizers=list(report.disabled_optimizers))
    wanted = {i.name for i in session.get_inputs()}
    logits = torch.empty(len(texts), live.config.num_labels)
    for rows in texts.ordered(size):
        inputs = texts.batch(rows)
        bound = live.graph.signature.bind(live, (), {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})
        feed = {name: value.numpy() for name, value in zip(live.graph.inputs, bound.values) if name in wanted}
        (found,) = session.run(["logits"], feed)
        logits[rows] = torch.from_numpy(found).float()
    return logits


def _progress(console):
    return Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"), TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def _trained_table(results, texts):
    title = f"trained from the same weights, tested on {texts} texts"
    table = _table(title, "", "sites", "trainable", "share", "before", "after", "s (search)", "peak MiB")
    for r in results:
        peak, seconds = f"{r.peak / 2**20:,.0f}" if r.peak else "–", f"{r.seconds:.0f} (+{r.seconds_in_all - r.seconds:.0f})"
        row = (str(sum(r.sites.values())), f"{r.trainable:,}", f"{r.share:.2%}", f"{r.before:.1%}", f"[bold]{r.after:.1%}[/]", seconds, peak)
        table.add_row(_title(r.name), *row)
    return table


def _exported_table(results):
    table = _table("exported, and run in ONNX Runtime on the same texts", "", "merged", "file", "accuracy", "largest difference of logits", "equal predictions")
    for r in results:
        merged = {"yes": "yes", "nothing to merge": "–"}.get(r.merged, "stays")
        table.add_row(_title(r.name), merged, f"{r.onnx_bytes / 1e6:.1f} MB", f"{r.onnx_accuracy:.1%}", f"{r.difference:.1e}", f"{r.equal:.1%}")
    return table


def _table(title, first, *heads):
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column(first, no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _report(path, results, base, splits, schedule, seconds):
    record = {
        "model": type(base).__name__,
        "texts": dict(zip(("train", "validation", "test"), map(len, splits))),
        "schedule": dataclasses.asdict(schedule),
        "machine": {"system": platform.platform(), "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__, "onnxruntime": onnxruntime.__version__},
        "seconds": seconds,
        "results": [dataclasses.asdict(result) for result in results],
    }
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
