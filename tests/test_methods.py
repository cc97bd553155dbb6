"""The pages made from the code are up to date, and what the page on adding a method says works as it stands there."""

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import checks
import pytest
import test_passes

from rewrite import Refused, contract, pipeline
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
    for word in ("shared", "trains", "derive", "remembers", "refuse", "params", "inputs", "no_grad", "lengthens", "drawn"):
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


#: a mistake in the page's method → the check that sees it, and what it says
TOLD = {
    "all factors at zero": ({".normal_(std=fan_in**-0.5)": ".zero_()"}, test_passes.test_wakes, r"no gradient comes to \S*q_proj\.\w+\.default\.down, .*mixer.*\.up.* in the first 3 steps: they never learn\. Let one factor"),
    "a tensor behind a detach": ({"mixer), up)": "mixer.detach()), up)"}, test_passes.test_wakes, r"mixer is to train, and \w+ lets no gradient through to it .* Freeze it \(`frozen\(…\)` where a pass makes it\)"),
    "no example": ({'    example = {"where": "attention.{q,v}", "rank": 4}\n': ""}, test_passes.test_holds_still, r"has no example: give the class `example = "),
    "a size that does not fit": ({"if self.rank > min(": "if self.rank < 0 > min(", "torch.nn.init.orthogonal_(torch.empty(self.rank, self.rank)).to(w)": "w[: self.rank, : self.rank]"}, test_passes.test_huge_sizes_work_or_are_refused_in_words, r"rank \d+: refuse\(\) should say why, in words"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TOLD)
def test_the_generated_checks_name_what_is_wrong(mistake, tmp_path, monkeypatch):
    changes, check, words = TOLD[mistake]
    code, name = re.search(r"```python\n# \S+\n(.*?)```", ADDING, re.S)[1], "moslora_" + re.sub(r"\W", "_", mistake)
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(test_passes, "class_of", lambda name: spec.pass_of(importlib.import_module(name.partition(":")[0])))
    monkeypatch.setattr(pipeline, "capture", checks.captured)
    points = {name: importlib.metadata.EntryPoint(name, name, "rewrite.passes")}
    monkeypatch.setattr(spec, "_entry_points", lambda: points)
    given = (name, "gated") if "toy" in inspect.signature(check).parameters else (name,)
    with pytest.raises((AssertionError, Refused, pytest.fail.Exception), match=words):
        check(*given)


def run(command, *more, path):
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", *command, *more, "-p", "no:cacheprovider"], cwd=DOCS.parent, env=environment, capture_output=True, text=True)
