"""The pages made from the code are up to date, and what the page on adding a method says works as it stands there."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

from rewrite import contract
from rewrite.spec import methods
from rewrite.spec import parse as spec

DOCS = Path(__file__).parent.parent / "docs"
ADDING = (DOCS / "adding-a-method.md").read_text()


def test_methods_is_up_to_date():
    assert (DOCS / "methods.md").read_text() == methods.page(), "run: rewrite methods > docs/methods.md"


def test_every_method_has_its_equation_and_its_source():
    for part in re.split(r"\n(?=## )", methods.page())[1:]:
        name = part.partition("\n")[0].removeprefix("## ")
        is_tool = hasattr(spec.pass_of(importlib.import_module(f"rewrite.passes.{name}")), "apply")
        assert "-->" in part or is_tool, f"{name}: its docstring has no picture"
        assert re.search(r"arXiv:|\b20\d\d\b", part) or is_tool, f"{name}: its docstring has no source"


def test_the_page_on_adding_names_what_is_there():
    for name in re.findall(r"\| `(\w+)` \|\n", ADDING):
        assert name in spec.builtin_names(), name
    for word in ("shared", "trains", "derive", "remembers", "refuse", "params", "inputs", "no_grad", "lengthens", "choices"):
        assert hasattr(contract.Pass, word), word
    assert {"start", "carry", "end"} == set(contract.CARRIES) and set(re.findall(r"`(prepare|before_forward|penalty|after_backward|after_step|groups)`", ADDING)) <= set(contract.HOOKS)


def test_the_method_of_the_page_passes_the_generated_checks(tmp_path):
    """The file as it stands on the page, in a folder of somebody's own; the command as it stands there."""
    code = re.search(r"```python\n# (\S+)\n(.*?)```", ADDING, re.S)
    (tmp_path / "mylab").mkdir()
    (tmp_path / code[1]).write_text(code[2])
    command = re.search(r"pytest (tests/test_passes.py --pass mylab\.moslora)", ADDING)[1].split()
    done = run(command, "-k", "some_toy or wakes or merges or golden or options", path=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    (tmp_path / code[1]).write_text(code[2].replace("mix(mix(op(x, down), mixer), up)", "mix(mix(op(x, down), mixer), up) + 1e-3"))
    done = run(command, "-k", "holds_still and gated", path=tmp_path)
    assert done.returncode == 1 and "relative to the RMS" in done.stdout


def run(command, *more, path):
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", *command, *more, "-p", "no:cacheprovider"], cwd=DOCS.parent, env=environment, capture_output=True, text=True)
