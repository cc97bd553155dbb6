"""The command `rewrite`: what the Python functions do, for folders and files.

Exit codes: 0 done, 1 refused or wrong input, 2 wrong usage. Errors go to standard error, in the words of the three errors. Every command
imports what it needs when it runs, so that `--help` is quick.
"""

import json
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from .errors import Refused, RewriteError

KIND = 12  # the width of "SpecError   "


class Commands(typer.core.TyperGroup):
    """The three errors end a command with code 1 and their own words, not with a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except RewriteError as error:
            complain(error)
            raise typer.Exit(1) from None


def complain(error):
    """An error on standard error: its kind, then its lines, wrapped under each other on a terminal and left whole elsewhere."""
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    width = max(console.width - KIND, 30) if console.is_terminal else None
    lines = []
    for line in str(error).splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        wrapped = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) if width else [line]
        lines += wrapped or [""]
    kind = type(error).__name__
    text = Text(f"{kind:{KIND}}", style="bold red")
    text.append(("\n" + " " * KIND).join(lines), style="none")
    console.print(text)


app = typer.Typer(
    cls=Commands,
    name="rewrite",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Parameter-efficient fine-tuning as a compiler: one JSON spec takes a model from graph to trained adapter to ONNX.",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face model folder (safetensors) or hub id.", show_default=False)]
Shape = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a config.json alone, or a hub id.", show_default=False)]
SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="A JSON spec.", show_default=False)]


def examples(*lines):
    """The epilog of a command: lines to copy."""
    return "\n\n".join(["Examples:", *(f"`{line}`" for line in lines)])


@app.command(epilog=examples("rewrite apply models/minilm lora.json --out adapter"))
def apply(
    model: Model,
    spec: SpecFile,
    out: Annotated[Path, typer.Option(help="The folder to write: the spec, and the tensors that differ from the model's.", show_default=False)],
):
    """Rewrite a model by a spec, and save what is new."""
    from .spec.parse import Spec

    parsed = Spec.parse(spec)  # what is wrong with it is told before the weights are read
    from .pipeline import rewrite
    from .store.folder import refuse_unwritable, save
    from .store.pretrained import pretrained

    refuse_unwritable(out)
    live = rewrite(pretrained(model), parsed)
    save(live, out)
    _print(live.report)
    print(f'saved in {out}. In Python: load(model, "{out}")')


@app.command(epilog=examples("rewrite roles models/minilm", "rewrite roles llama/config.json"))
def roles(model: Shape):
    """List what a spec's "where" can pick in a model. No weights are read."""
    from .capture.model import capture
    from .roles.find import everywhere
    from .store.pretrained import pretrained

    found = everywhere(capture(pretrained(model, weights=False), generation=False))
    _print(found)
    if not sys.stdout.isatty():
        print(f"\n{found.summary()}")


@app.command(epilog=examples("rewrite show models/minilm", "rewrite show models/minilm lora.json | less"))
def show(
    model: Shape,
    spec: Annotated[Path | None, typer.Argument(metavar="SPEC", help="A JSON spec; the graph is shown after its passes.", show_default=False)] = None,
):
    """Print a model's graph, or what a spec makes of it, as text: one line an operation. No weights are read."""
    from .spec.parse import Spec

    parsed = Spec.parse(spec) if spec is not None else Spec()
    from .capture.model import capture
    from .pipeline import apply as run
    from .store.pretrained import pretrained
    from .text import show as text

    graph = capture(pretrained(model, weights=False), generation=False)
    run(graph, parsed)
    print(text(graph), end="")


@app.command(epilog=examples("rewrite plan llama-70b/config.json qlora.json", "rewrite plan llama-70b/config.json qlora.json --json"))
def plan(
    model: Shape,
    spec: SpecFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
):
    """Count what a spec would train and store, per pass, from a config alone: no weights are read or made."""
    from .spec.parse import Spec

    parsed = Spec.parse(spec)
    from .capture.model import capture
    from .pipeline import apply as run
    from .report import Size
    from .store.pretrained import pretrained

    with Console(stderr=True).status("capturing"):
        graph = capture(pretrained(model, weights=False), generation=False)
    base = Size.of(graph.root)
    value = _plan(model, base, run(graph, parsed))
    if as_json:
        print(json.dumps(value, indent=2, ensure_ascii=False))
        return
    _print_plan(value)


def _plan(model, base, report):
    """A plan as JSON values: the base, what each pass adds to it, and what stands after all of them."""
    from .report import Size

    steps = []
    for step in report.applied:
        steps.append(
            {
                "pass": step.method,
                "name": step.name,
                "sites": dict(Counter(role for _, role in step.sites)),
                "refused": [{"site": path, "reason": reason} for path, reason in step.refused],
                "trainable_added": step.after.trainable - step.before.trainable,
                "stored_bytes_added": step.after.stored_bytes - step.before.stored_bytes,
            }
        )
    training = [{"pass": hooked.step.method, "name": hooked.step.name, "hooks": hooked.step.options.hooks()} for hooked in report.hooked.values()]
    last = report.applied[-1].after if report.applied else Size(0, base.trainable + base.frozen, base.stored_bytes)
    return {
        "model": model,
        "base": {"parameters": base.trainable + base.frozen, "stored_bytes": base.stored_bytes},
        "passes": steps,
        "training": training,
        "after": {"trainable": last.trainable, "frozen": last.frozen, "share": last.share, "stored_bytes": last.stored_bytes},
        "opaque": dict(report.opaque),
        "notes": list(report.notes),
    }


def _print_plan(value):
    from rich.table import Table

    base = value["base"]
    table = Table(title=f"{value['model']}: {_count(base['parameters'])} parameters, {_size(base['stored_bytes'])}", title_justify="left")
    for head, justify in (("pass", "left"), ("sites", "left"), ("refused", "right"), ("trains", "right"), ("stores", "right")):
        table.add_column(head, justify=justify)
    for step in value["passes"]:
        name = step["pass"] + (f" ({step['name']})" if step["name"] != "default" else "")
        sites = ", ".join(f"{role} ×{n}" for role, n in step["sites"].items()) or "whole graph"
        trains, stores = f"{step['trainable_added']:+,}", _size(step["stored_bytes_added"], sign=True)
        table.add_row(name, sites, str(len(step["refused"])), trains, stores)
    after = value["after"]
    table.add_section()
    table.add_row("in all", "", "", f"{after['trainable']:,} ({after['share']:.3%})", _size(after["stored_bytes"]))
    _console().print(table)
    for step in value["passes"]:
        for refused in step["refused"]:
            print(f"refused  {step['pass']} at {refused['site']}: {refused['reason']}")
    for hooked in value["training"]:
        print(f"training {hooked['pass']} ({hooked['name']}): {', '.join(hooked['hooks'])}")
    for path, reason in value["opaque"].items():
        print(f"opaque   {path}: {reason}")
    for note in value["notes"]:
        print(f"note     {note}")


def _count(number):
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def _size(number, sign=False):
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(number) >= size:
            return f"{number / size:{'+' if sign else ''}.1f} {unit}"
    return f"{number:{'+' if sign else ''}} B"


@app.command(
    epilog=examples(
        "rewrite export models/minilm --to minilm.onnx",
        "rewrite export models/minilm adapter --merge --to tuned.onnx",
        "rewrite export models/llama adapter --cache --to llama.onnx",
        "rewrite export models/minilm --to minilm.pt2",
    )
)
def export(
    model: Model,
    source: Annotated[str | None, typer.Argument(metavar="SPEC|FOLDER", help="A spec, or a folder that was saved.", show_default=False)] = None,
    to: Annotated[Path, typer.Option(help="The file to write: .onnx or .pt2.", show_default=False)] = ...,
    merge: Annotated[bool, typer.Option("--merge", help="Fold what the passes added into the weights first.")] = False,
    cache: Annotated[bool, typer.Option("--cache", help="A decoder with its KV cache as inputs and outputs.")] = False,
):
    """Write a model, rewritten or not, as ONNX or as a PyTorch program. ONNX is checked in ONNX Runtime before it is handed over."""
    if to.suffix not in (".onnx", ".pt2"):
        raise typer.BadParameter(f'"{to}" ends in neither .onnx nor .pt2.', param_hint="--to")
    if not to.parent.is_dir():
        raise Refused(f"{to}: cannot be written: {to.parent} is not a folder. Make it first, or choose another.")
    from .spec.parse import Spec

    folder = source is not None and Path(source).is_dir()
    parsed = Spec() if source is None or folder else Spec.parse(source)
    from .store.pretrained import pretrained

    base = pretrained(model)
    if folder:
        from .store.folder import load

        live = load(base, source)
    else:
        from .pipeline import rewrite

        live = rewrite(base, parsed)
    if merge:
        from .pipeline import merge as fold

        live = fold(live)
    if to.suffix == ".onnx":
        from .emit.onnx import export_onnx

        print(export_onnx(live, to, cache=cache))
        return
    from .emit.program import export_program

    export_program(live, to, variant="past" if cache else "forward")
    print(f"{to}: {_size(to.stat().st_size)}")


@app.command(epilog=examples("rewrite demo", "rewrite demo --all"))
def demo(
    model: Annotated[str | None, typer.Option(help="A Hugging Face model folder or hub id, in place of the MiniLM.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Bottleneck adapters, BitFit and full fine-tuning too.")] = False,
    out: Annotated[Path, typer.Option(help="The folder for what it makes.")] = Path("demo-out"),
):
    """Adapt a real pretrained model to real text, export it, and compare: the whole way in a few minutes."""
    from .demo import demo as run

    run(model=model, everything=everything, out=out)


@app.command(epilog=examples("rewrite schema > spec.schema.json"))
def schema():
    """Print the JSON Schema of a spec, for editors."""
    from .spec.parse import Spec

    print(json.dumps(Spec.schema(), indent=2, ensure_ascii=False))


@app.command(epilog=examples("rewrite methods > docs/methods.md"))
def methods():
    """Print the built-in passes as a page: equations, where they act, options, sources."""
    from .spec.methods import page

    print(page(), end="")


def _console():
    """Standard output; where it is no terminal, wide enough that nothing is cut."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def _print(value):
    """A report or roles: a table on a terminal, plain text elsewhere."""
    if sys.stdout.isatty():
        Console().print(value.table())
    else:
        print(value)


def main():
    app()
