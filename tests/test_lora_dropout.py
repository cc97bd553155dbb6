"""Dropout by seed: against F.dropout with the same seed, the Triton body against Philox written anew, what backward keeps, and `fuse`, in training and in eval."""

import functools
import json
import subprocess
import sys

import aot_dropout
import dropped
import pytest
import torch
from aot import fault
from checks import TOYS, captured, close, model_of, rejects, rounding, wake
from interpreted import error
from rewrite.kernels import dequant_int8
from rewrite.kernels.lora_dropout import ByGenerator, Shrunk, lora_dropout, mask
from test_kernels import allowed

from rewrite import merge, pipeline, rewrite, source


def given(dtype=torch.float32):
    """x, w, b, down, up, a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *size: torch.randn(size, generator=generator).to(dtype)  # noqa: E731
    return [new(3, 7, 19), new(13, 19), new(13), new(5, 19), new(13, 5)], new(3, 7, 13)


def run(function, tensors, grad, *rest):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves, *rest)
    y.backward(grad)
    return [y.detach(), *(t.grad for t in leaves)]


def drawn(seed):
    """The seed that is drawn after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    return int(torch.randint(2**63 - 1, ()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_is_what_f_dropout_makes_of_the_seed(dtype):
    tensors, grad = given(getattr(torch, dtype))
    x, op = tensors[0], lora_dropout()
    seed = drawn(3)
    torch.manual_seed(seed)
    assert torch.equal(torch.nn.functional.dropout(x.view(-1, 19), 0.3, True), mask(x.view(-1, 19), 0.3, seed) * x.view(-1, 19))
    factor = mask(x.view(-1, 19), 0.3, seed).view(x.shape)
    exactly = lambda x, w, b, down, up: x @ w.T + b + 0.75 * (x * (factor != 0) / 0.7) @ down.T @ up.T  # noqa: E731
    exact = run(exactly, [t.double() for t in tensors], grad.double())
    torch.manual_seed(seed)
    plain = run(op.reference, tensors, grad, 0.75, 0.3, True)
    torch.manual_seed(3)
    ours = run(op.launch, tensors, grad, 0.75, 0.3, True)
    broken = run(op.launch, tensors, grad, 0.75, 0.3, True)  # another draw
    for i, (reference, usual, one) in enumerate(zip(exact, plain, ours, strict=True)):
        limit = allowed(error(reference, usual), dtype)
        assert error(reference, one) <= limit
        assert i in (2, 3) or error(reference, broken[i]) > limit  # w and b see no dropout


def test_drawn_as_often_as_said_and_anew_each_time():
    x = torch.ones(400, 300)
    masks = [mask(x, 0.3, drawn(seed)) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    for found in masks:
        assert abs(float((found == 0).float().mean()) - 0.3) < 5 * (0.3 * 0.7 / x.numel()) ** 0.5
    assert abs(float(((masks[0] == 0) & (masks[2] == 0)).float().mean()) - 0.09) < 5 * (0.09 * 0.91 / x.numel()) ** 0.5


def test_philox_gives_the_published_numbers():
    """The vectors of Random123 for counter and key of zeros, of ones, and of π."""
    ones = 2**32 - 1
    published = {
        (0, 0, 0, 0, 0, 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        (ones,) * 6: "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (*counter, first, second), numbers in published.items():
        assert " ".join(f"{int(number):08x}" for number in dropped.philox(counter, (first, second))) == numbers


def test_triton_body_under_the_interpreter():
    """In a process of its own: the interpreter must be chosen before Triton is imported. The entries that stay are Philox's, bit by bit; another seed is told."""
    done = subprocess.run([sys.executable, dropped.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    large, share = report.pop("large"), (0.3 * 0.7) ** 0.5
    assert report.keys() == dropped.CASES.keys() and large["same"]
    for name, found in report.items():
        assert found["same"], name
        for plain, ours, broken in zip(found["plain"], found["ours"], found["broken"], strict=True):
            assert ours <= allowed(plain, found["dtype"]), name
            assert name == "no rows" or broken > allowed(plain, found["dtype"]), name
    assert all(abs(zeros - 0.3) < 5 * share / large["size"] ** 0.5 for zeros in large["zeros"])
    assert abs(large["both"] - 0.09) < 5 * (0.09 * 0.91 / large["size"]) ** 0.5  # the next seed's entries are others


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_compiles_for_hopper(dtype):
    found = aot_dropout.compiled(90, dtype)
    assert fault(90, found) is None, fault(90, found)


@pytest.mark.parametrize("trains", [(0,), (1,), (0, 1)], ids=["x", "down", "both"])
def test_gradients_of_what_is_shrunk(trains):
    leaves = [t.requires_grad_(i in trains) for i, t in enumerate((torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)))]
    shrunk = functools.partial(Shrunk.apply, *leaves)
    assert torch.autograd.gradcheck(lambda *given: Shrunk.apply(*given, 0.3, 5, ByGenerator), leaves)
    assert not torch.equal(shrunk(0.3, 5, ByGenerator), shrunk(0.3, 6, ByGenerator))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", dropped.CASES)
def test_on_a_gpu_it_drops_the_same_entries(case):
    rows, p, seed = dropped.given(case)[0], *dropped.CASES[case][3:5]
    found = dropped.WAY.dropped(rows.cuda(), p, seed).cpu()
    assert torch.equal(found, torch.where(dropped.stays(*rows.shape, p, seed), rows.float() * float(torch.tensor(1 / (1 - p))), 0.0).to(rows.dtype))


def test_in_eval_it_is_lora_linear():
    tensors, _ = given()
    for p, training in ((0.3, False), (0.0, True)):
        assert error(lora_dropout().reference(*tensors, 0.75, p, training), lora_dropout().launch(*tensors, 0.75, p, training)) < 1e-6


def test_backward_keeps_no_mask():
    x, w, b, down, up = given()[0]
    leaves = [x.requires_grad_(), w, b, down.requires_grad_(), up.requires_grad_()]
    own, found = {t.untyped_storage().data_ptr() for t in leaves}, []

    def entries(function):
        found.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.untyped_storage().data_ptr() in own or found.append(t.numel()) or t, lambda t: t):
            function(*leaves, 0.75, 0.3, True)
        return sorted(found)

    assert entries(lora_dropout().launch) == [21 * 5]
    assert sum(entries(lora_dropout().reference)) >= 2 * 21 * 19


def test_over_codes():
    (x, w, b, down, up), grad = given()
    op, codes = lora_dropout("int8"), dequant_int8.quantize(w)
    seed = drawn(3)
    call = lambda f: lambda x, b, down, up: f(x, *codes, b, down, up, 0.75, 0.3, True)  # noqa: E731
    found = []
    for function, first in ((op.reference, seed), (op.launch, 3), (op.launch, 4)):
        torch.manual_seed(first)
        found.append(run(call(function), [x, b, down, up], grad))
    for one, two in zip(*found[:2], strict=True):
        assert error(one, two) < 1e-6
    assert error(found[0][0], found[2][0]) > 1e-2


@pytest.mark.parametrize("before, name", [([], "lora_dropout"), ([{"pass": "quantize", "where": "attention.{q,v}", "format": "int8"}], "lora_dropout_int8")], ids=["numbers", "codes"])
def test_fuse_finds_it(before, name, monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)
    steps = [*before, {"pass": "lora", "where": "attention.{q,v}", "rank": 3, "dropout": 0.3}]
    plain, live = (wake(rewrite(model_of("gated"), {"passes": [*steps, *more]})) for more in ([], [{"pass": "fuse"}]))
    assert [n.target.made_by.name for n in live.graph.nodes if n.meta.get("fused")] == [name] * 4 and f"{name}(" in source(live, "model.layers.0")
    close(reference=TOYS["gated"].output(plain.eval()), result=TOYS["gated"].output(live.eval()), drift=rounding(torch.float32))
    rejects(reference=TOYS["gated"].output(model_of("gated")), result=TOYS["gated"].output(live), drift=rounding(torch.float32))
    live.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(TOYS["gated"].output(live).detach())
    assert torch.equal(outputs[0], outputs[1])
    rejects(reference=outputs[0], result=outputs[2], drift=rounding(torch.float32))
    TOYS["gated"].loss(live).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in live.parameters() if p.requires_grad)
    if not before:
        close(reference=TOYS["gated"].output(live.eval()), result=TOYS["gated"].output(merge(live).eval()), drift=rounding(torch.float32))
