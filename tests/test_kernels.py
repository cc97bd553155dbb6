"""Kernels: against their reference in float64, under Triton's interpreter, compiled for chips that are not there.

A kernel may be off from the float64 reference by K times what the plain ops in the same dtype are off, plus one rounding of it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aot import SHARED, compiled, fault
from interpreted import CASES, error, run, tensors
from rewrite.kernels import dequant_int8, dequant_nf4
from rewrite.kernels import lora_linear as k

K = 2.0


def allowed(plain, dtype):
    """What an error may be where the plain ops' is `plain`."""
    return K * plain + torch.finfo(getattr(torch, dtype)).eps


@pytest.mark.parametrize("name", CASES)
def test_launch_is_as_exact_as_the_plain_ops(name):
    given, grad = tensors(*CASES[name])
    exact = run(k.reference, [t if t is None else t.double() for t in given], grad.double())
    plain, ours, registered = (run(f, given, grad) for f in (k.reference, k.launch, k.lora_linear))
    for reference, usual, one, two in zip(exact, plain, ours, registered):
        limit = allowed(error(reference, usual), CASES[name][4])
        assert error(reference, one) <= limit and error(reference, two) <= limit
    if exact[0].numel():
        broken = run(lambda *a: k.launch(*a[:-1], 0.98 * a[-1]), given, grad)
        assert error(exact[0], broken[0]) > allowed(error(exact[0], plain[0]), CASES[name][4])


def test_gradients_of_reference_and_launch():
    given = [t.double().requires_grad_() for t in tensors(4, 5, 6, 2, "float64", True, "rows")[0]]
    for function in (k.reference, k.launch, k.lora_linear):
        assert torch.autograd.gradcheck(lambda *a: function(*a, 0.75), given)  # noqa: B023


@pytest.mark.parametrize("bias", [True, False])
def test_the_registered_op_is_whole(bias):
    given, _ = tensors(4, 5, 6, 2, "float32", bias, "rows")
    torch.library.opcheck(k.lora_linear.overload, (*(t if t is None else t.requires_grad_() for t in given), 0.75))


def test_registered_dequantising_is_whole():
    w = torch.randn(6, 33)
    torch.library.opcheck(dequant_nf4.dequant_nf4.overload, (*dequant_nf4.quantize(w), [6, 33], torch.bfloat16))
    torch.library.opcheck(dequant_int8.dequant_int8.overload, (*dequant_int8.quantize(w), torch.float32))


def kept(function, given, frozen):
    """Shapes of what autograd keeps, storage by storage, beside the tensors given."""
    given = [t if t is None else t.clone().requires_grad_(i not in frozen) for i, t in enumerate(given)]
    own, found = {t.untyped_storage().data_ptr() for t in given if t is not None}, []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            found.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(*given, 0.75)
    return sorted(found), y


def test_backward_keeps_x_and_its_shrunk_rows_alone():
    given, _ = tensors(7, 19, 13, 3, "float32", True, "rows")
    assert kept(k.launch, given, {1, 2})[0] == [(7, 3)]  # x itself was given
    noted = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: noted.append(tuple(t.shape)) or t, lambda t: t):
        k.launch(given[0].requires_grad_(), given[1], given[2], given[3], given[4].requires_grad_(), 0.75)  # down frozen, as in LoRA-FA
    assert (7, 19) not in noted and (7, 3) in noted and (7, 13) not in noted


def test_autocast_casts_once_and_agrees():
    given, grad = tensors(33, 40, 29, 5, "float32", True, "rows")

    def under(function):
        def call(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args).float()

        return run(call, given, grad)

    exact, plain, ours = run(k.reference, [t.double() for t in given], grad.double()), under(k.reference), under(k.launch)
    for reference, usual, result in zip(exact, plain, ours):
        assert result.dtype == torch.float32 and error(reference, result) <= allowed(error(reference, usual), "bfloat16")


def test_triton_body_under_the_interpreter():
    """In a process of its own: the interpreter must be chosen before Triton is imported."""
    done = subprocess.run([sys.executable, Path(__file__).with_name("interpreted.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report.keys() == CASES.keys()
    for name, found in report.items():
        for plain, ours in zip(found["plain"], found["ours"]):
            assert ours <= allowed(plain, found["dtype"]), name
        assert name == "no rows" or found["broken"] > allowed(found["plain"][0], found["dtype"]), name


@pytest.mark.parametrize("layout", ["forward", "backward"])
def test_default_config_compiles_for_hopper(layout):
    found = compiled(90, "bf16", layout, k.CONFIGS["default"])
    assert fault(90, found) is None, fault(90, found)


def test_what_does_not_fit_is_seen():
    crowded = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 1, "num_stages": 1}
    assert "spilled" in fault(90, compiled(90, "bf16", "forward", crowded))
    assert fault(80, (100, 0, 0, SHARED[80] + 1)) and fault(80, (100, 8, 0, 0)) and fault(80, (100, 0, 0, SHARED[80])) is None
