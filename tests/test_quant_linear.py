"""Linears over weights in codes: against their reference in float64, as one op, on a CPU's own products, by the Triton body, and as `fuse` finds them."""

import json
import subprocess
import sys

import aot_few_rows
import few_rows as cases
import pytest
import torch
from aot import fault
from checks import captured, close, rejects, rounding
from interpreted import error
from rewrite.kernels import chips, int4_cpu
from test_formats import even
from test_kernels import allowed

from rewrite import pipeline, rewrite, source

FORMATS = cases.FORMATS
STEPS = {"int8": {}, "int8 groups": {"group_size": 32}, "int4": {"group_size": 32}, "int4 zeros": {"symmetric": False}, "nf4": {}, "nf4 single": {"double": False}, "fp4": {}, "mxfp4": {}, "fp8": {}, "fp8 blocks": {"blocks": True}}


def gradients(function, x, codes, b, grad):
    x, b = x.detach().clone().requires_grad_(), b if b is None else b.detach().clone().requires_grad_()
    y = function(x, *codes, b)
    y.backward(grad)
    return [y.detach(), x.grad, *([] if b is None else [b.grad])]


@pytest.mark.parametrize("form", FORMATS)
def test_as_exact_as_the_plain_ops(form):
    for case in ("odd", "parts"):
        (op, _, _), (x, codes, b), dtype = FORMATS[form], cases.given(form, case), cases.CASES[case][3]
        grad = torch.randn(x.shape[0], b.shape[0]).to(x.dtype)
        exact = gradients(op.reference, x.double(), codes, b.double(), grad.double())
        plain, ours, registered = (gradients(f, x, codes, b, grad) for f in (op.reference, op.launch, op))
        for reference, usual, one, two in zip(exact, plain, ours, registered):
            assert error(reference, one) <= allowed(error(reference, usual), dtype) and error(reference, two) <= allowed(error(reference, usual), dtype)
        broken = op.launch(x, codes[0] ^ 4, *codes[1:], b)
        assert not error(exact[0], broken) <= allowed(error(exact[0], plain[0]), dtype)


@pytest.mark.parametrize("form", FORMATS)
def test_few_rows_of_bfloat16_take_the_codes_on_a_cpu(form, monkeypatch):
    """Whatever this CPU's own figures are; the products are PyTorch's, and so are their limits."""
    monkeypatch.setattr(chips, "few_rows", lambda op, device: 4)
    op, quantize, _ = FORMATS[form]
    w, x, b = torch.randn(48, 192) * 192**-0.5, torch.randn(2, 2, 192).bfloat16(), torch.randn(48).bfloat16()
    codes = (*quantize(w), *(([48, 192],) if len(cases.given(form, "odd")[1]) > len(quantize(w)) else ()))
    if form.startswith("fp8"):
        assert "no product of a CPU" in op.reason(x, *codes)
        return
    assert op.reason(x, *codes) is None
    assert "more rows" in op.reason(x.repeat(2, 1, 1), *codes) and "float32" in op.reason(x.float(), *codes)
    exact = op.reference(x.double(), *codes, b.double())
    limit = allowed(error(exact, op.reference(x, *codes, b)), "bfloat16")
    assert error(exact, op.launch(x, *codes, b)) <= limit and error(exact, op(x, *codes, b)) <= limit
    assert error(exact, op.launch(x.transpose(0, 1).contiguous().transpose(0, 1), *codes, b)) <= limit
    other = (codes[0] ^ 8 if form != "int8" else -codes[0], *codes[1:])
    assert error(exact, op.launch(x, *other, b)) > limit
    codes[0].copy_(other[0])  # what was laid out anew follows codes that were loaded
    assert error(op.reference(x.double(), *other, b.double()), op.launch(x, *codes, b)) <= limit


def test_what_a_cpu_does_not_take():
    x, scales = torch.randn(1, 40).bfloat16(), torch.ones(33, 1)
    assert "multiple of 16 outputs, not 33" in int4_cpu.unsuited(x, 33, 1) and "groups of 32 to 256 entries, not 40" in int4_cpu.unsuited(x, 32, 1)
    assert "a multiple of 16 entries, not 40" in FORMATS["int8"][0].unsuited(x, torch.ones(33, 40).to(torch.int8), scales)
    assert "blocks of 64 cross" in FORMATS["nf4"][0].unsuited(x, None, None, None, [48, 40])


@pytest.mark.parametrize("form", ["int8", "int4 zeros", "nf4", "mxfp4", "fp8 blocks"])
def test_the_registered_op_is_whole(form):
    x, codes, b = cases.given(form, "parts")
    torch.library.opcheck(FORMATS[form][0].overload, (x[:2].requires_grad_(), *codes, b.requires_grad_()))


def test_gradients_of_reference_and_launch():
    op, _, _ = FORMATS["int8"]
    _, codes, _ = cases.given("int8", "one row")
    x, b = torch.randn(2, 64, dtype=torch.float64, requires_grad=True), torch.randn(18, dtype=torch.float64, requires_grad=True)
    for function in (op.reference, op.launch, op):
        assert torch.autograd.gradcheck(lambda x, b: function(x, *codes, b), (x, b))  # noqa: B023


def test_nothing_is_kept_for_backward_and_no_rows_are_no_work():
    op, _, _ = FORMATS["nf4"]
    x, codes, b = cases.given("nf4", "parts")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        op.launch(x.requires_grad_(), *codes, b)
    assert not kept
    assert op.launch(x[:0], *codes, b).shape == (0, 131)


def test_autocast():
    op, _, _ = FORMATS["int4"]
    x, codes, b = cases.given("int4", "parts")
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = op.launch(x, *codes, b), op.reference(x, *codes, b)
    exact = op.reference(x.double(), *codes, b.double())
    assert y.dtype == plain.dtype == torch.bfloat16 and error(exact, y) <= allowed(error(exact, plain), "bfloat16")


def test_triton_body_under_the_interpreter():
    done = subprocess.run([sys.executable, cases.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert len(report) == len(cases.names())
    for name, found in report.items():
        limit = allowed(found["plain"], found["dtype"])
        assert found["ours"] <= limit and not found["broken"] <= limit, name


@pytest.mark.parametrize("form", ["int4", "table", "mxfp4", "fp8, blocks"])
def test_default_tiles_compile_for_hopper(form):
    found = aot_few_rows.compiled(90, form, "bf16")
    assert fault(90, found) is None, fault(90, found)


# ---- the pass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["int8 groups", "int4 zeros", "nf4 single", "mxfp4", "fp8"])
def test_fuse_finds_it_and_nothing_else_changes(form, monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)
    quantize = {"pass": "quantize", "where": "linear", "format": form.split()[0], **STEPS[form]}
    plain, live = (rewrite(even(), {"passes": [quantize, *steps]}) for steps in ([], [{"pass": "fuse"}]))
    name = FORMATS[form][0].name
    assert sum(node.target is FORMATS[form][0].overload for node in live.graph.nodes) == 7
    assert not any("dequant" in str(node.target) or (not node.users and node.op == "call_function") for node in live.graph.nodes)
    assert f"{name}(" in source(live)
    ids = torch.randint(0, 30, (2, 5))
    close(reference=plain(input_ids=ids).logits, result=live(input_ids=ids).logits, drift=rounding(torch.float32))
    rejects(reference=even()(input_ids=ids).logits, result=live(input_ids=ids).logits, drift=rounding(torch.float32))
    assert list(live.state_dict()) == list(plain.state_dict())
