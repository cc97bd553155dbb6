"""What is known of a chip: its files, what stands for one that has none, and what `bench/kernels.py` finds wrong and writes."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from rewrite.kernels import chips

FILES = sorted(chips.FOLDER.glob("*.json"))
CPU = torch.device("cpu")
PEAKS = {"bytes a second": 1e10, "operations a second": 1e11}


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "bench" / "kernels.py"
    spec = importlib.util.spec_from_file_location("bench_kernels", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_each_figure_says_how_it_is_known(path):
    found = json.loads(path.read_text())
    assert set(found) == {"chip", "device", "versions", "few_rows", "configs"}
    for op, figure in found["few_rows"].items():
        assert set(figure) == {"most", "by"} and figure["by"] in ("measured", "counted") and figure["most"] >= 0, op
    measured = bool(found["configs"]) or any(figure["by"] == "measured" for figure in found["few_rows"].values())
    assert bool(found["versions"]) == measured


def test_a_chip_without_a_file_goes_by_its_kind(monkeypatch):
    known = {"cuda": {"few_rows": {"linear_int4": {"most": 3}}, "configs": {}}, "GPU X": {"few_rows": {"linear_int4": {"most": 9}}, "configs": {"few_rows": {"BLOCK_N": 64}}}}
    monkeypatch.setattr(chips, "tuned", lambda: known)
    for name, most, config in (("GPU X", 9, {"BLOCK_N": 64}), ("GPU Y", 3, None)):
        for ask in (chips.chip, chips.few_rows, chips.config):
            ask.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert chips.few_rows("linear_int4", torch.device("cuda", 0)) == most and chips.config("few_rows", torch.device("cuda", 0)) == config
        assert chips.few_rows("linear_int4", torch.device("cpu")) == 0
    for ask in (chips.chip, chips.few_rows, chips.config):
        ask.cache_clear()


def test_crossings_need_each_shape_and_no_gap(bench):
    def result(rows, shape, codes, weight):
        ways = {"linear_int4, codes as they are": {"seconds": codes}, "plain ops": {"seconds": weight}}
        return {"op": "linear_int4", "case": f"{rows} × ({shape})", "ways": ways}

    assert bench.crossings([result(1, "a", 1, 2), result(4, "a", 1, 2), result(4, "b", 3, 2), result(16, "a", 1, 2)]) == {"linear_int4": 1}
    assert bench.crossings([result(1, "a", 3, 2)]) == {"linear_int4": 0}


def test_a_file_is_written_beside_what_it_has(bench, tmp_path):
    machine = {"machine": "a machine", "torch": "2.13", "triton": "3.9"}
    result = {"op": "linear_int8", "case": "16 × (4 × 4)", "ways": {"linear_int8, codes as they are": {"seconds": 1}, "plain ops": {"seconds": 2}}}
    path = bench.write_tuned(CPU, machine, [result], {}, tmp_path)
    path.write_text(path.read_text().replace("linear_int8", "linear_fp8"))
    assert bench.write_tuned(CPU, machine, [result], {"few_rows": {"BLOCK_N": 64}}, tmp_path) == path
    found = json.loads(path.read_text())
    assert found["chip"] == chips.name(CPU) and found["configs"] == {"few_rows": {"BLOCK_N": 64}}
    assert found["few_rows"] == {op: {"most": 16, "by": "measured"} for op in ("linear_fp8", "linear_int8")}


def test_a_wrong_gradient_and_a_failing_peer_are_not_timed(bench, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", ((48, 32),))
    row = next(bench.dora_linear(CPU, torch.bfloat16))

    def broken(new):
        ways, exact = row.make(new)
        own = ways["dora_linear"]

        def run():
            y = own.run()
            return y + 0.1 * (y - y.detach())

        return ways | {"dora_linear": bench.Way(run, own.leaves), "Liger": bench.Way(lambda: 1 / 0, own.leaves)}, exact

    whole = bench.case(row, CPU, torch.bfloat16, PEAKS, 1)
    found = bench.case(dataclasses.replace(row, make=broken), CPU, torch.bfloat16, PEAKS, 1)
    assert not whole["wrong"] and set(found["wrong"]) == {"dora_linear", "Liger"} and set(found["ways"]) == {"PEFT", "plain ops", "LoRA"}
    assert "gradient" in found["wrong"]["dora_linear"] and "ZeroDivisionError" in found["wrong"]["Liger"]


def test_rows_of_a_gpu_can_be_listed(bench):
    """What they make is made where they run; their labels, floors and targets are of here."""
    for op in bench.OPS:
        for row in op(torch.device("cuda"), torch.bfloat16):
            assert row.bytes > 0 and row.op and row.label
