"""The head with its loss: against its formula in float64, what backward keeps, the Triton body, and `fuse` on models beside transformers' own loss.

An error may be twice that of the plain ops in the same dtype, plus one rounding of it (test_kernels).
"""

import json
import subprocess
import sys

import aot_loss
import loss as cases
import pytest
import torch
from aot import fault
from interpreted import error
from rewrite.kernels import linear_cross_entropy as k
from test_kernels import allowed

CASES = cases.CASES


@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_the_plain_ops(case):
    arguments, dtype = cases.given(case), CASES[case][3]
    exact = cases.run(cases.plainly, arguments, torch.float64)
    plain = cases.run(k.reference, arguments)
    chunked = lambda *a: k.launch(*a, rows=cases.ROWS)  # noqa: E731
    for function in (chunked, k.launch, k.linear_cross_entropy):
        for reference, usual, ours in zip(exact, plain, cases.run(function, arguments), strict=True):
            assert reference.shape == ours.shape and error(reference, ours) <= allowed(error(reference, usual), dtype)
    with torch.no_grad():
        assert error(exact[0], chunked(*arguments)) <= allowed(error(exact[0], plain[0]), dtype)
    if exact[0]:
        broken = cases.run(cases.mistaken(chunked), arguments)
        assert all(error(a, c) > allowed(error(a, b), dtype) for a, b, c in zip(exact, plain, broken, strict=True))


@pytest.mark.parametrize("case", ["odd", "strided"])
def test_gradients(case):
    x, w, b, labels, items = cases.given(case)
    leaves = [t if t is None else t.double().requires_grad_() for t in (x, w, b)]
    for function in (k.reference, lambda *a: k.launch(*a, rows=cases.ROWS), k.linear_cross_entropy):
        assert torch.autograd.gradcheck(lambda *a: function(*a, labels, items), leaves)  # noqa: B023


@pytest.mark.parametrize("case", ["odd", "bf16", "no label"])
def test_registered_ops_are_whole(case):
    x, w, b, labels, items = (t.detach() if isinstance(t, torch.Tensor) else t for t in cases.given(case))
    torch.library.opcheck(k.gradients.overload, (x, w, b, labels, [True, False, b is not None]))
    torch.library.opcheck(k.linear_cross_entropy.overload, (x.requires_grad_(), w.requires_grad_(), b, labels, items))


def test_where_nothing_is_labelled_it_is_as_in_pytorch():
    x, w, b, labels, items = cases.given("odd")
    nothing = x, w, b, torch.full_like(labels, k.IGNORED), 0 * items
    for function in (k.reference, k.launch, k.linear_cross_entropy):
        loss, *found = cases.run(function, nothing)
        assert loss.isnan() and not any(t.any() for t in found)


def test_labels_that_are_no_classes_fail():
    x, w, b, labels, items = cases.given("odd")
    for wrong in (len(w), -1):
        labels[1] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            k.launch(x, w, b, labels, items)


def kept(function, arguments, trains):
    """Shapes and dtypes of what backward keeps beside the arguments themselves."""
    leaves = [a.requires_grad_(i in trains) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for i, a in enumerate(arguments)]
    own, found = {t.untyped_storage().data_ptr() for t in leaves if t is not None}, []

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            found.append((tuple(t.shape), t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(*leaves)
    return [entry for entry in found if entry[0]]


def test_backward_keeps_the_gradients_and_no_logits():
    arguments = cases.given("bf16")
    assert kept(k.launch, arguments, {0}) == [((15, 34), torch.bfloat16)]
    assert kept(k.launch, arguments, {0, 1}) == [((15, 34), torch.bfloat16), ((77, 34), torch.bfloat16)]
    assert ((15, 77), torch.float32) in kept(k.reference, arguments, {0})


def test_no_more_than_a_chunk_of_logits_is_there():
    x, w, b, labels, items = cases.given("bf16")
    seen = []

    def way(logits, *given):
        seen.append(len(logits))
        return k.by_library(logits, *given)

    k.launch(x.requires_grad_(), w, b, labels, items, way, 4)
    assert seen == [4, 4, 4, 3]
    assert k.rows_of(4096, 32000, 4096) == 1024 and k.rows_of(8, 32000, 4096) == k.LEAST


def test_autocast():
    x, w, b, labels, items = cases.given("odd")
    exact = cases.run(cases.plainly, (x, w, b, labels, items), torch.float64)
    cast = lambda f: lambda *a: torch.autocast("cpu", torch.bfloat16)(f)(*a)  # noqa: E731
    plain, ours = (cases.run(cast(f), (x, w, b, labels, items)) for f in (k.reference, k.launch))
    for reference, usual, own in zip(exact, plain, ours, strict=True):
        assert own.dtype == torch.float32 and error(reference, own) <= allowed(error(reference, usual), "bfloat16")


# ---- Triton ----------------------------------------------------------------------------------------------------------------


def test_triton_body_under_the_interpreter():
    done = subprocess.run([sys.executable, cases.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report.pop("nothing over nothing") == ["nan", 0, 0, 0] and report.pop("no such class") == "nan"
    assert report.keys() == CASES.keys()
    for case, found in report.items():
        limits = [allowed(plain, found["dtype"]) for plain in found["plain"]]
        assert all(ours <= limit for ours, limit in zip(found["ours"], limits)) and found["alone"] <= limits[0], case
        assert case in ("no label", "no tokens") or all(broken > limit for broken, limit in zip(found["broken"], limits)), case


@pytest.mark.parametrize("dtype, wanted", [("bf16", True), ("fp32", False)])
def test_body_compiles_for_hopper(dtype, wanted):
    found = aot_loss.compiled(90, dtype, wanted)
    assert fault(90, found) is None, fault(90, found)
