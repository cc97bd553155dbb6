"""Properties of any spec on any model: what is drawn by tests/grown.py must hold still, train, merge, save and leave the model alone.

A few drawn models in every run, always the same; REWRITE_HUNT=500 draws that many, other ones each time.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from checks import added, close, error, rejects, rounding, tensor_of, unchanged, wake
from grown import BlockPlan, Plan, parts, plans
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st

from rewrite import Refused, SpecError, capture, load, merge, pipeline, rewrite, roles, save
from rewrite.spec.forms import leaves

HUNT = int(os.environ.get("REWRITE_HUNT", 0))
SIZES = [(2, 5), (3, 8), (1, 1)]
#: orders of sums differ between a model and its merged twin, and some layers lie between
SUMS = 64 * rounding(torch.float64)
#: how much of the loss must move before a gradient of zero is a lie
MOVES = 1e-9

profile = settings(
    max_examples=HUNT or 8,
    derandomize=not HUNT,
    database=None,
    deadline=None,
    print_blob=False,
    phases=(Phase.generate,),  # what fails is small as it is drawn, and shrinking it takes minutes
    suppress_health_check=list(HealthCheck),
)


def outputs(model, plan):
    """The outputs at every size, in one row."""
    with torch.no_grad():
        return torch.cat([model(**plan.inputs(*size), **added(model, size[0])).flatten() for size in SIZES])


def loss(model, plan):
    made = model(**plan.inputs(3, 6), **added(model, 3))
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(7), dtype=made.dtype)
    return (made * weights).sum() + made.square().mean()


@contextlib.contextmanager
def captured_once(graph):
    """Every rewrite of the model that was captured starts from a copy of that graph."""
    with mock.patch.object(pipeline, "capture", lambda model, example=None: graph.copy()):
        yield


def grow(data, plan, model, graph):
    """A live model of up to three drawn parts, and the steps; one that is refused, in words, is left out."""
    found = roles(graph).names
    live, taken = rewrite(model, {"passes": []}, plan.inputs()), []
    for _ in range(data.draw(st.integers(1, 3))):
        step = data.draw(parts(found, len(taken)))
        try:
            live = rewrite(model, {"passes": [*taken, *step]}, plan.inputs())
        except (Refused, SpecError) as reason:
            assert str(reason).strip() and "Traceback" not in str(reason)
            event("refused")
            note(f"{step}: {reason}")
            continue
        taken += step
    for step in taken:
        event(f"took {next(iter(step.values())) if 'pass' in step else next(iter(step))}")
    return live, taken


def check_holds_still(live, plan, reference):
    """Within what the passes may change together: bit for bit where none of them may change anything, anyhow where a change is the nature of one."""
    drifts = [step.options.drift for step in leaves(live.spec.passes)]
    if None in drifts:
        return
    trainable = {name for name, p in live.named_parameters() if p.requires_grad}
    live.requires_grad_(False)  # as the model that was given
    close(reference=reference, result=outputs(live, plan), drift=sum(drifts))
    for name, value in live.named_parameters():
        value.requires_grad_(name in trainable)


def check_gradients(live, plan):
    """A trainable tensor whose change moves the loss gets a gradient, a frozen one gets none."""
    trainable = {name: p for name, p in live.named_parameters() if p.requires_grad}
    before = loss(live, plan)
    if trainable:
        before.backward()
    for name, value in live.named_parameters():
        if not value.requires_grad:
            assert value.grad is None, f"{name} is frozen and has a gradient"
            assert name not in live.report.trains, f"{name} was to train"
    for name, value in trainable.items():
        assert name in live.report.made or name in live.report.trains, f"{name} trains, and nobody asked for it"
        if value.grad is not None and value.grad.any():
            continue
        old = value.detach().clone()
        with torch.no_grad():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(5), dtype=value.dtype))
            moved = abs(loss(live, plan) - before)
            value.copy_(old)
        assert moved <= MOVES * max(1.0, abs(before)), f"{name} moves the loss by {moved:.1e} and gets no gradient"


def check_merge(live, plan):
    try:
        merged = merge(live, partial=True)
    except Refused as reason:
        assert not live.report.made or "merge" in str(reason)
        event("merge refused")
        note(str(reason))
        return
    reference, result = outputs(live, plan), outputs(merged, plan)
    close(reference=reference, result=result, drift=SUMS)
    rejects(reference=reference, result=result * (1 + 4 * SUMS), drift=SUMS)


def check_folder(live, plan, model):
    with tempfile.TemporaryDirectory() as folder:
        again = load(model, save(live, Path(folder) / "saved"), example=plan.inputs())
    close(reference=outputs(live, plan), result=outputs(again, plan), drift=0.0)
    assert {n: p.requires_grad for n, p in live.named_parameters()} == {n: p.requires_grad for n, p in again.named_parameters()}


@profile
@given(plans(), st.data())
def test_any_spec_on_any_model(plan, data):
    model = plan.build()
    graph = capture(model, plan.inputs())
    with unchanged(model), captured_once(graph):
        reference = outputs(model, plan)
        close(reference=reference, result=outputs(rewrite(model, {"passes": []}, plan.inputs()), plan), drift=0.0)
        live, taken = grow(data, plan, model, graph)
        note(f"spec: {taken}")
        check_holds_still(live, plan, reference)
        wake(live, size=0.1)
        check_folder(live, plan, model)
        check_gradients(live, plan)
        check_merge(live, plan)


def test_the_checks_see_what_is_wrong():
    """The twin of all of the above: models that were broken on purpose."""
    block = BlockPlan("written", "gated silu", "rms", False, True, "none", 2, 1, 3, 9)
    plan = Plan("ids", 10, (block,), False, "tied", False, 0)
    model = plan.build()
    live = wake(rewrite(model, {"passes": [{"pass": "lora", "rank": 2}]}, plan.inputs()))
    path = next(path for path in live.report.made if path.endswith("up"))
    tensor_of(live, path).requires_grad_(False)
    live.report.trains.add(path)
    with pytest.raises(AssertionError, match="was to train"):
        check_gradients(live, plan)
    live.report.trains.discard(path)
    live.requires_grad_(True)
    with pytest.raises(AssertionError, match="nobody asked for it"):
        check_gradients(live, plan)
    with torch.no_grad():
        reference = outputs(live, plan)
        tensor_of(live, path).mul_(1.0001)
    assert error(reference=reference, result=outputs(live, plan)) > SUMS
    with pytest.raises(AssertionError), unchanged(model):
        model.tokens.weight.data[0] += 1e-3
