"""The house stands as docs/design.md says: floors, one stem, file length, words, and a README whose code runs."""

import ast
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

from rewrite import Spec
from rewrite.spec.forms import leaves
from rewrite.spec.parse import builtin_names, pass_of

TOP = Path(__file__).resolve().parent.parent
LONGEST, WIDEST = 600, 300


def python_files(*folders):
    return sorted(file for folder in folders for file in (TOP / folder).rglob("*.py") if ".venv" not in file.parts)


def imported(tree, module_level=True):
    """Top-level names of what a file imports absolutely; with `module_level`, what stands outside of functions."""
    found, todo = [], [tree]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found += [f"{node.module}.{alias.name}" for alias in node.names]
            elif not (module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
                todo.append(node)
    return found


def floor_faults(folder, text):
    """What a file of a folder imports that its floor does not allow."""
    allowed_in_kernels = {"torch", "triton"} | set(sys.stdlib_module_names)
    faults = []
    for name in imported(ast.parse(text), module_level=folder == "rewrite"):
        if folder == "kernels" and name.split(".")[0] not in allowed_in_kernels and not name.startswith("rewrite.kernels"):
            faults.append(name)
        if folder == "rewrite" and name.startswith(("rewrite.passes", "rewrite.kernels", "passes", "kernels")):
            faults.append(name)
        if folder == "passes" and name.startswith("rewrite.passes"):
            faults.append(name)
    return faults


@pytest.mark.parametrize("file", python_files("rewrite", "passes", "kernels"), ids=lambda f: str(f.relative_to(TOP)))
def test_floors(file):
    folder = file.relative_to(TOP).parts[0]
    assert not floor_faults(folder, file.read_text()), f"{folder} may not import these; see docs/design.md"


@pytest.mark.parametrize(
    "folder, text",
    [("kernels", "import numpy"), ("kernels", "def f():\n    from rewrite import graph"), ("rewrite", "from rewrite.passes import lora"), ("passes", "from rewrite.passes.lora import LoRA")],
)
def test_a_file_on_the_wrong_floor_is_seen(folder, text):
    assert floor_faults(folder, text)


@pytest.mark.parametrize("file", python_files("rewrite", "passes", "kernels"), ids=lambda f: str(f.relative_to(TOP)))
def test_a_file_is_one_idea(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= LONGEST, f"{len(lines)} lines; a word is missing: find the second idea and give it a file"
    assert max(map(len, lines), default=0) <= WIDEST
    if lines:
        assert ast.get_docstring(ast.parse(file.read_text())), "a file begins with the picture, and one sentence of why"


@pytest.mark.parametrize("file", python_files("rewrite", "passes", "kernels", "examples"), ids=lambda f: str(f.relative_to(TOP)))
def test_how_a_line_reads(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: a bare assert outside tests; raise one of the three errors"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except swallows everything"
        if isinstance(node, ast.ClassDef):
            assert not re.search(r"(Manager|Handler|Factory|Helper|Utils?)$", node.name), node.name
    assert not re.search(r"utils|helpers|manager", file.stem)


@pytest.mark.parametrize("name", builtin_names())
def test_one_stem(name):
    """passes/x.py ↔ class X ↔ "pass": "x" ↔ examples/x.json."""
    module = __import__(f"rewrite.passes.{name}", fromlist=[name])
    assert pass_of(module).__name__.lower() == name.replace("_", "")
    path = TOP / "examples" / f"{name}.json"
    assert path.is_file(), "each pass has an example of its own"
    assert name in [leaf.method for step in Spec.parse(path).passes for leaf in leaves(step)]


@pytest.mark.parametrize("path", sorted((TOP / "examples").glob("*.json")), ids=lambda p: p.stem)
def test_examples_are_specs(path):
    Spec.parse(path)


def text_files():
    kinds = {".py", ".md", ".toml", ".txt", ".json", ""}
    skipped = {".git", ".venv", "demo-out", "build", "__pycache__", ".pytest_cache", ".hypothesis"}
    files = (f for f in TOP.rglob("*") if f.is_file() and f.suffix in kinds and not skipped & set(f.relative_to(TOP).parts))
    return sorted(f for f in files if f.name != "test_house.py" and "egg-info" not in str(f))


def test_no_host_of_packages_is_named():
    """What is installed comes from wherever pip is set to look."""
    for file in text_files():
        text = file.read_text(errors="replace")
        assert "--index-url" not in text and "--extra-index-url" not in text and "--find-links" not in text, file


def test_constraints_pin_what_the_project_asks_for():
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (TOP / "constraints.txt").read_text().splitlines() if "==" in line}
    listed = re.findall(r'"([A-Za-z0-9_-]+)\s*[><=]=', (TOP / "pyproject.toml").read_text())
    missing = {name.lower().replace("_", "-") for name in listed} - pinned - {"triton"}
    assert not missing


def measured():
    """The figures that the README names, as it writes them, from bench/results."""
    read = lambda name: json.loads((TOP / "bench" / "results" / f"{name}.json").read_text())  # noqa: E731
    for mode, dtype in itertools.product(("eager", "compiled"), ("float32", "bfloat16")):
        shares = {row["hidden"]: row["added"]["ours"] / row["added"]["PEFT"] for row in read("step")["rows"] if (row["mode"], row["dtype"]) == (mode, dtype)}
        yield f"{dtype} {shares[512]:.2f}× / {shares[1024]:.2f}×"
    for machine in ("decode", "decode-amx"):
        decode = read(machine)["times bfloat16"]
        yield ", ".join(f"{name} {decode[name]['median']:.2f}×" for name in ("int8", "int4", "nf4"))
    qlora = read("qlora")
    kept, peak = ([qlora["memory"][way][what] / 1e6 for way in ("ours", "PEFT + bitsandbytes")] for what in ("kept for backward", "peak beyond the model"))
    yield f"kept for backward {kept[0]:.1f} MB beside {kept[1]:.1f}, peak {peak[0]:.1f} beside {peak[1]:.1f}, time {qlora['ratio']:.2f}×"
    kept = {way.split()[0].rstrip(","): row["kept_bytes"] / 1e6 for way, row in reversed(read("backward")["ways"].items())}
    yield f"full {kept['full']:.0f} MB, LoRA {kept['lora']:.0f}, LoRA-FA {kept['lora_fa']:.0f}, AdapterDrop {kept['adapterdrop']:.0f}, LST {kept['lst']:.0f}, MEFT {kept['meft']:.0f}, IPA {kept['ipa']:.0f}"
    yield f"| {next(row['rewrite'] for row in read('capture')['rows'] if row['layers'] == 32):.1f} s of one core |"


def test_readme_figures_are_those_measured():
    text = (TOP / "README.md").read_text()
    for figure in measured():
        assert figure in text, f"bench/results says: {figure}"


def code_blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def test_readme_commands_exist():
    text = "\n".join(code_blocks(TOP / "README.md", "(?:sh|bash)"))
    targets = set(re.findall(r"^([a-z]+):", (TOP / "Makefile").read_text(), flags=re.MULTILINE))
    named = re.findall(r"\bmake ([a-z]+)", text)
    assert {"demo", "test"} <= set(named) <= targets
    from typer.main import get_command

    from rewrite.cli import app

    commands = set(get_command(app).commands)
    assert set(re.findall(r"\brewrite ([a-z]+)", text)) <= commands


def test_readme_specs_are_specs():
    blocks = code_blocks(TOP / "README.md", "json")
    assert blocks
    for block in blocks:
        Spec.parse(json.loads(block))


def test_readme_python_runs(tmp_path, monkeypatch):
    """The README's Python, as it stands, on a tiny model in place of the one that it names."""
    import torch
    import transformers

    monkeypatch.chdir(tmp_path)
    config = transformers.BertConfig(vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, max_position_embeddings=64, num_labels=2)
    tiny = transformers.BertForSequenceClassification(config)
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", lambda *args, **kwargs: tiny)
    g = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(3, 97, (4, 9), generator=g), "attention_mask": torch.ones(4, 9, dtype=torch.long), "labels": torch.tensor([0, 1, 1, 0])}
    space = {"batches": [batch, batch]}
    blocks = code_blocks(TOP / "README.md", "python")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    assert (tmp_path / "tuned.onnx").is_file()


def test_the_guide_s_pass_works():
    import torch

    from rewrite import rewrite
    from tests.models import build, example

    (block,) = code_blocks(TOP / "docs" / "guide.md", "python")
    space = {"__name__": "mylab"}
    exec(compile(block, "guide.md", "exec"), space)
    model = build("llama")
    spec = Spec.parse({"passes": [{"pass": "gain", "where": "mlp.up"}]}, passes=[space["Gain"]])
    live, inputs = rewrite(model, spec), example("llama")
    assert torch.equal(live(**inputs).logits, model(**inputs).logits)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if name.endswith("gain"):
                parameter.mul_(2)
    assert not torch.equal(live(**inputs).logits, model(**inputs).logits)


def test_readme_lists_every_pass():
    named = set(re.findall(r"^\|(.*?)\|", (TOP / "README.md").read_text(), flags=re.MULTILINE))
    assert set(builtin_names()) <= set(re.findall(r"`(\w+)`", " ".join(named)))
