"""Occurrences of a reference, and the pass that fuses them: what is found, what is not and why, and that nothing else changes."""

import copy
import functools
import time

import pytest
import torch
from checks import TOYS, captured, close, model_of, rejects, rounding, same_gradients, wake
from models import build, example
from rewrite.kernels.lora_linear import lora_linear
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from rewrite import Refused, export_onnx, export_program, load, merge, pipeline, rewrite, save, show, source
from rewrite.occurrence import occurrences, patterns

X, W, B, DOWN, UP = torch.randn(3, 5), torch.randn(7, 5), torch.randn(7), torch.randn(2, 5), torch.randn(7, 2)
PATTERNS = patterns(lora_linear, {"x": X, "w": W, "b": B, "down": DOWN, "up": UP})
LORA, FUSE = {"pass": "lora", "where": "linear", "rank": 3}, {"pass": "fuse"}


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


def found(function, *tensors):
    """Occurrences in a traced function, and the reasons."""
    graph = make_fx(function, pre_dispatch=True)(*(tensors or (X, W, B, DOWN, UP))).graph
    return occurrences(graph, PATTERNS)


tiny = functools.cache(build)


def gated(*steps):
    return rewrite(model_of("gated"), {"passes": list(steps)})


def fused(live):
    """What has been fused, a name for each linear."""
    return [node.target.made_by.name for node in live.graph.nodes if node.meta.get("fused") for _ in getattr(node.target.made_by, "counts", (1,))]


# ---- occurrences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b, d, u: F.linear(x, w, b) + 4.0 * F.linear(F.linear(x, d), u),
        lambda x, w, b, d, u: F.linear(x, w, b) + F.linear(F.linear(x, d), u) * 4.0,
        lambda x, w, b, d, u: 4.0 * F.linear(F.linear(x, d), u) + F.linear(x, w, b),
        lambda x, w, b, d, u: F.linear(x, w) + 4.0 * F.linear(F.linear(x, d), u),
        lambda x, w, b, d, u: F.linear(x, w, b) + 4 * F.linear(F.linear(x, d), u),
    ],
)
def test_found_whatever_the_order(function):
    (one,), reasons = found(function)
    assert one.args[5] == 4.0 and len(one.inner) == 4 and not reasons
    close(reference=function(X, W, B, DOWN, UP), result=lora_linear.reference(X, W, B if one.args[2] is not None else None, DOWN, UP, one.args[5]), drift=rounding(torch.float32))


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x, w, b, d, u: F.linear(x, w, b) + 4.0 * F.linear(F.linear(2 * x, d), u), "should be one value"),
        (lambda x, w, b, d, u: F.linear(x, w, b) + 4.0 * F.linear(F.linear(x, d).relu(), u), "relu stands in place"),
        (lambda x, w, b, d, u: (F.linear(x, w, b) + 4.0 * F.linear(h := F.linear(x, d), u)).sum() + h.sum(), "is read by"),
        (lambda x, w, b, d, u: F.linear(x, w, b) + x.mean() * F.linear(F.linear(x, d), u), "where a number should"),
        (lambda x, w, b, d, u: torch.add(F.linear(x, w, b), 4.0 * F.linear(F.linear(x, d), u), alpha=2), "other arguments"),
        (lambda x, w, b, d, u: F.linear(x, w, b) + 4.0 * F.linear(F.linear(x, d), u, b), "other arguments"),
    ],
)
def test_not_found_and_why(function, reason):
    ones, reasons = found(function)
    assert not ones and any(reason in text for text in reasons.values()), reasons


def test_two_adapters_at_one_linear_share_it():
    """The second is added to the fused value: the linear is in one occurrence alone."""
    function = lambda x, w, b, d, u: F.linear(x, w, b) + 4.0 * F.linear(F.linear(x, d), u) + 2.0 * F.linear(F.linear(x, d), u)  # noqa: E731
    ones, reasons = found(function)
    assert [one.args[5] for one in ones] == [4.0] and len(reasons) == 1


def test_one_look_at_each_node():
    def many(n):
        def function(x, w, b, d, u):
            for _ in range(n):
                x = (F.linear(x, w, b) + 4.0 * F.linear(F.linear(x, d), u))[:, :5]
            return x

        graph = make_fx(function, pre_dispatch=True)(X, W, B, DOWN, UP).graph

        def once():
            start = time.process_time()
            ones, _ = occurrences(graph, PATTERNS)
            assert len(ones) == n
            return time.process_time() - start

        return min(once() for _ in range(5))  # a collection of garbage may fall into one

    assert many(320) < 32 * many(20)  # sixteen times the nodes; a square would be 256


# ---- the pass ------------------------------------------------------------------------------------------------------------


def test_every_adapter_is_fused_and_nothing_else_changes():
    plain, live = wake(gated(LORA)), wake(gated(LORA, FUSE))
    assert len(fused(live)) == 14 and not live.report.applied[-1].refused
    assert fused(live)[:7] == ["lora_linears_1_1_1"] * 3 + ["lora_linear"] + ["lora_linears_1_1"] * 2 + ["gated_linear_silu_1"]
    assert sorted(name for _, name in live.report.applied[-1].sites) == sorted(fused(live))
    assert "lora_linear_1 = lora_linear(" in source(live, "model.layers.0") and "rewrite.kernels.lora_linear" in source(live, "model.layers.0")
    for batch, length in ((2, 7), (1, 1)):
        close(reference=TOYS["gated"].output(plain, batch, length), result=TOYS["gated"].output(live, batch, length), drift=rounding(torch.float32))
    rejects(reference=TOYS["gated"].output(model_of("gated")), result=TOYS["gated"].output(live), drift=rounding(torch.float32))
    for model in (plain, live):
        TOYS["gated"].loss(model).backward()
    same_gradients(reference=plain, result=live, drift=rounding(torch.float32))
    assert all(live.get_parameter(name).grad is None for name, parameter in plain.named_parameters() if not parameter.requires_grad)


def test_trained_weights_get_their_gradients_too():
    steps = [{"pass": "unfreeze", "where": "model"}]
    plain, live = wake(gated(LORA, *steps)), wake(gated(LORA, FUSE, *steps))
    for model in (plain, live):
        TOYS["gated"].loss(model).backward()
    for name, parameter in plain.named_parameters():
        close(reference=parameter.grad, result=live.get_parameter(name).grad, drift=rounding(torch.float32))


def test_what_stays_has_a_reason():
    steps = [{**LORA, "where": "attention.q", "dropout": 0.1}, {"pass": "loha", "where": "attention.k", "rank": 2}, {**LORA, "where": "mlp.up"}, {"pass": "ia3", "where": "mlp.up"}]
    live = gated(*steps, FUSE)
    reasons = dict(live.report.applied[-1].refused)
    assert sorted(fused(live)) == ["gated_linear_silu_0"] * 2 + ["lora_dropout"] * 2 + ["lora_linear"] * 2  # what up gives trains, so that the whole MLP is
    assert {"model.layers.1.self_attn.k_proj + loha", "model.layers.0.mlp.up_proj + ia3"} <= reasons.keys() and all(reasons.values())
    assert "model.layers.0.mlp.up_proj + lora" not in reasons


@pytest.mark.parametrize("steps", [[{"pass": "quantize", "where": "linear"}, LORA], [{"pass": "quantize", "where": "linear", "format": "int8"}, LORA], [LORA, {**LORA, "name": "b", "rank": 2}]], ids=["nf4", "int8", "two"])
def test_over_codes_and_beside_another_adapter(steps):
    plain, live = wake(gated(*steps)), wake(gated(*steps, FUSE))
    ending = {"nf4": "_nf4", "int8": "_int8"}.get(steps[0].get("format", "nf4") if steps[0]["pass"] == "quantize" else "", "_2")
    assert len(fused(live)) == 14 and all(name.startswith(("lora_linears_", "gated_linear_silu")) and name.endswith(ending) for name in fused(live))
    assert not [site for site, _ in live.report.applied[-1].refused if "head" not in site]
    for model in (plain, live):
        TOYS["gated"].loss(model).backward()
    close(reference=TOYS["gated"].output(plain), result=TOYS["gated"].output(live), drift=rounding(torch.float32))
    same_gradients(reference=plain, result=live, drift=3 * rounding(torch.float32))


@pytest.mark.parametrize("steps", [[], [{"pass": "quantize", "where": "linear"}]], ids=["numbers", "codes"])
def test_weights_stored_the_other_way(steps):
    """Conv1D; the parts of its fused projection stay, with the reason."""
    steps = [*steps, {**LORA, "where": ["attention.{q,o}", "mlp.*"]}]
    plain, live = (wake(rewrite(tiny("gpt2"), {"passes": some})) for some in (steps, [*steps, FUSE]))
    assert len([name for name in fused(live) if name.startswith("lora_linear")]) == 6
    assert "narrow" in dict(live.report.applied[-1].refused)["transformer.h.0.attn.c_attn + lora"]
    outputs = [model(**example("gpt2")).logits for model in (plain, live)]
    close(reference=outputs[0], result=outputs[1], drift=rounding(torch.float32))
    rejects(reference=outputs[0], result=tiny("gpt2")(**example("gpt2")).logits, drift=rounding(torch.float32))


@pytest.mark.parametrize(
    "steps, reason",
    [
        ([FUSE], "no pass before it has added anything"),
        ([{"pass": "ia3"}, FUSE], "nothing to fuse"),
        ([LORA, FUSE, {"pass": "ia3"}], "Fuse last"),
        ([LORA, FUSE, {"pass": "unfreeze", "where": "attention.q"}], "Fuse last"),
    ],
)
def test_refusals(steps, reason):
    with pytest.raises(Refused, match=reason):
        gated(*steps)


def test_merging_takes_what_is_fused_apart():
    live = wake(gated(LORA, FUSE))
    merged, plain = merge(live), gated()
    close(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(merged), drift=rounding(torch.float32))
    rejects(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(model_of("gated")), drift=rounding(torch.float32))
    assert not fused(merged) and fused(live) and not merged.report.made
    for ours, theirs in zip(merged.graph.all(), plain.graph.all(), strict=True):
        assert show(ours) == show(theirs)
    steps = [LORA, {"pass": "adapter", "where": "mlp", "bottleneck": 3}, FUSE]
    live = wake(gated(*steps))
    close(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(merge(live, partial=True)), drift=rounding(torch.float32))


def test_comes_back_and_goes_out(tmp_path):
    live = wake(gated(LORA, FUSE))
    close(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(load(model_of("gated"), save(live, tmp_path / "x"))), drift=0.0)
    close(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(copy.deepcopy(live)), drift=0.0)
    report = export_onnx(live, tmp_path / "m.onnx")
    assert report.error < 1e-3
    export_program(live, tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2")
    assert not [node for node in program.graph.nodes if "rewrite" in str(node.target)]  # readable with torch alone


def test_compiles_in_one_piece():
    plain, live, linears = wake(gated(LORA)), wake(gated(LORA, FUSE)), []

    def backend(graph, inputs):
        linears.append(sum(node.target is F.linear for node in graph.graph.nodes))
        return aot(graph, inputs)

    run, aot = torch.compile(live, backend=backend, fullgraph=True), torch._dynamo.lookup_backend("aot_eager")
    reference, result = (TOYS["gated"].forward(model) for model in (plain, run))
    for made in (reference, result):
        made.loss.backward()
    close(reference=reference.logits, result=result.logits, drift=rounding(torch.float32))
    same_gradients(reference=plain, result=live, drift=3 * rounding(torch.float32))
    assert linears[0] == 2 * (7 + 7 + 4) + 1, linears  # of each block the base's, what adapters give, one shrink for each x; and the head

