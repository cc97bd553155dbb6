"""Adapters of many owners in one batch: against the formula written anew in float64, by the Triton bodies, for chips that are not there."""

import json
import subprocess
import sys

import aot_grouped
import grouped as cases
import pytest
import torch
from aot import fault
from checks import captured, close, rejects, rounding
from interpreted import error
from rewrite.kernels import grouped_lora as k
from test_formats import even
from test_kernels import allowed

from rewrite import pipeline, rewrite, source

CASES = cases.CASES


@pytest.mark.parametrize("case", CASES)
def test_launch_is_as_exact_as_the_plain_ops(case):
    tensors, grad = cases.given(case)
    exact, plain = cases.exactly(case)
    for function in (k.launch, k.grouped_lora, k.in_a_batch):
        for reference, usual, ours in zip(exact, plain, cases.run(function, tensors, grad)):
            assert error(reference, ours) <= allowed(error(reference, usual), CASES[case][6])
    broken = cases.run(k.launch, [*tensors[:5], ~tensors[5], tensors[6]], grad)
    assert error(exact[0], broken[0]) > allowed(error(exact[0], plain[0]), CASES[case][6])


def test_gradients():
    tensors = [t.double().requires_grad_() for t in cases.given("prefill")[0][:4]]
    tensors = [t[:, :2, :7].detach().requires_grad_() if i < 2 else t[..., :7].detach().requires_grad_() if i == 2 else t[:, :7].detach().requires_grad_() for i, t in enumerate(tensors)]
    slot, mask = cases.given("prefill")[0][4:6]
    for function in (k.reference, k.launch, k.grouped_lora):
        assert torch.autograd.gradcheck(lambda *a: function(*a, slot, mask, 0.75), tensors)  # noqa: B023


def test_the_registered_op_is_whole():
    tensors, _ = cases.given("prefill")
    torch.library.opcheck(k.grouped_lora.overload, (*(t.requires_grad_() for t in tensors[:4]), *tensors[4:]))


def test_autocast():
    tensors, _ = cases.given("prefill")
    exact, plain = cases.exactly("prefill")
    with torch.autocast("cpu", torch.bfloat16):
        ours, usual = k.launch(*tensors), k.reference(*tensors)
    assert ours.dtype == usual.dtype and error(exact[0], ours) <= allowed(error(exact[0], usual), "bfloat16")


@pytest.mark.parametrize("case", cases.MIXED)
def test_different_ranks_in_one_launch(case):
    leads, each, grad = cases.given_mixed(case)
    op, dtype = k.grouped_loras(len(each)), cases.MIXED[case][5]
    exact, plain = cases.exactly_mixed(case)
    for function in (op.launch, op):
        for reference, usual, ours in zip(exact, plain, cases.run_mixed(function, leads, each, grad)):
            assert error(reference, ours) <= allowed(error(reference, usual), dtype)
    broken = cases.run_mixed(op.launch, leads, cases.exchanged(each), grad)
    assert error(exact[0], broken[0]) > allowed(error(exact[0], plain[0]), dtype)


def test_the_registered_op_of_different_ranks_is_whole():
    leads, each, _ = cases.given_mixed("prefill")
    given = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in (*leads, *(a for group in each for a in group))]
    torch.library.opcheck(k.grouped_loras(2).overload, tuple(given))


def test_a_broken_adapter_breaks_its_own_rows_alone():
    (y, x, down, up, slot, mask, scale), grad = cases.given("prefill")
    down[0], up[0] = float("nan"), float("inf")  # row 1 has no adapter, and its slot is 0
    result, _, dx, ddown, dup = cases.run(k.launch, [y, x, down, up, slot, mask, scale], grad)
    for rows in (result, dx):
        assert rows[[0, 1, 3]].isfinite().all() and not rows[2].isfinite().all()
    assert ddown[1:].isfinite().all() and dup[1:].isfinite().all()


def test_what_no_tile_takes():
    x = torch.randn(1, 1, 4)
    assert "no body for a cpu" in k.unsuited(x, 8) and isinstance(k.way_of(x, [8], [(None, torch.ones(1))]), k.ByLibrary)
    meta = type("OnCuda", (), {"is_cuda": True, "dtype": torch.float32, "element_size": lambda self: 4})()
    assert "rank 65" in k.unsuited(meta, 65) and k.unsuited(meta, 64) is None
    assert k.launch(torch.empty(2, 0, 5), torch.empty(2, 0, 4), torch.ones(1, 2, 4), torch.ones(1, 5, 2), torch.zeros(2).long(), torch.ones(2).bool(), 1.0).shape == (2, 0, 5)


def test_triton_bodies_under_the_interpreter():
    done = subprocess.run([sys.executable, cases.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report.keys() == {*CASES, *(f"mixed, {case}" for case in cases.MIXED)}
    for case, found in report.items():
        for plain, ours in zip(found["plain"], found["ours"]):
            assert ours <= allowed(plain, found["dtype"]), case
        assert found["broken"][0] > allowed(found["plain"][0], found["dtype"]), case


@pytest.mark.parametrize("launch, backward, ranks", [("shrink", False, (8, 64)), ("expand", True, (16,)), ("expand", False, (8, 64)), ("gradient", False, (16,))])
def test_default_tiles_compile_for_hopper(launch, backward, ranks):
    found = aot_grouped.compiled(90, launch, "bf16", ranks, backward)
    assert fault(90, found) is None, fault(90, found)


# ---- the pass ------------------------------------------------------------------------------------------------------------


def test_fuse_finds_it_in_a_batch(monkeypatch):
    """Adapters of several ranks are one op, each rank a group of it."""
    monkeypatch.setattr(pipeline, "capture", captured)
    lora = lambda rank: {"pass": "lora", "where": "attention.q", "rank": rank}  # noqa: E731
    batch = {"batch": {"a": [lora(4)], "b": [lora(4)], "c": [lora(2)]}}
    plain, live = (rewrite(even(), {"passes": [batch, *steps]}) for steps in ([], [{"pass": "fuse"}]))
    assert sum(node.target is k.grouped_loras(2).overload for node in live.graph.nodes) == 1 and not any(node.target is k.grouped_lora.overload for node in live.graph.nodes)
    assert "grouped_loras_2(" in source(live) and not any("bmm" in str(node.target) for node in live.graph.nodes)
    for model in (plain, live):
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sorted(model.named_parameters()):
            if ".lora." in name:
                parameter.data.normal_(generator=generator).mul_(0.1)
    ids, rows = torch.randint(0, 30, (5, 6)), torch.tensor([0, 2, -1, 1, 0])
    reference, result = (model(input_ids=ids, adapter_ids=rows).logits for model in (plain, live))
    close(reference=reference, result=result, drift=rounding(torch.float32))
    rejects(reference=reference, result=live(input_ids=ids, adapter_ids=rows.flip(0)).logits, drift=rounding(torch.float32))
    close(reference=even()(input_ids=ids[2:3]).logits, result=result[2:3], drift=rounding(torch.float32))
    for model, logits in ((plain, reference), (live, result)):
        logits.square().mean().backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            close(reference=parameter.grad, result=live.get_parameter(name).grad, drift=rounding(torch.float32))
