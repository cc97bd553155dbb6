"""The linear of what a gate lets through: against its formula in float64, what backward keeps, the Triton bodies, and `fuse` on models beside HF PEFT.

An error may be twice that of the plain ops in the same dtype, plus one rounding of it (test_kernels).
"""

import json
import subprocess
import sys

import aot_gated
import gated as cases
import pytest
import torch
from aot import fault
from checks import TOYS, captured, close, model_of, rejects, rounding, same_gradients, wake
from interpreted import error
from rewrite.kernels import dequant_int8, dequant_nf4
from rewrite.kernels.gated_linear import gated_linear
from test_kernels import allowed
from transformers import LlamaConfig, LlamaForCausalLM

from rewrite import kept, merge, pipeline, rewrite, show, source

CASES = cases.CASES


@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_the_plain_ops(case):
    op, arguments, grad = cases.given(case)
    exact = cases.run(cases.plainly(case), arguments, grad, torch.float64)
    plain, ours, registered = (cases.run(f, arguments, grad) for f in (op.reference, op.launch, op))
    broken = cases.run(lambda e, g, *a: op.launch(e, 0.95 * g, *a), arguments, grad)
    for reference, usual, one, two in zip(exact, plain, ours, registered, strict=True):
        limit = allowed(error(reference, usual), CASES[case][4])
        assert one.shape == two.shape == reference.shape
        assert error(reference, one) <= limit and error(reference, two) <= limit
    if exact[0].numel():
        for i in (0, 1, 2, 3):  # the result, and gradients of e, g, w
            assert error(exact[i], broken[i]) > allowed(error(exact[i], plain[i]), CASES[case][4])


@pytest.mark.parametrize("case", ["silu", "gelu_tanh, two", "gelu, fp16", "none"])
def test_gradients(case):
    op, arguments, _ = cases.given(case)
    leaves = [a[..., :2, :].double().requires_grad_() if i < 2 else a.double().requires_grad_() if isinstance(a, torch.Tensor) else a for i, a in enumerate(arguments)]
    for function in (op.reference, op.launch, op):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("case", ["silu", "gelu_tanh, two"])
def test_registered_ops_are_whole(case):
    op, arguments, _ = cases.given(case)
    torch.library.opcheck(op.overload, tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments))


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_over_codes(form):
    op = gated_linear("silu", 1, form)
    _, (e, g, w, b, down, up, scale), grad = cases.given("silu")
    codes = dequant_int8.quantize(w) if form == "int8" else (*dequant_nf4.quantize(w), list(w.shape))
    call = lambda f: lambda e, g, b, down, up, scale: f(e, g, *codes, b, down, up, scale)  # noqa: E731
    given = [e, g, b, down, up, scale]
    exact = cases.run(call(op.reference), given, grad, torch.float64)
    plain, ours, registered = (cases.run(call(f), given, grad) for f in (op.reference, op.launch, op))
    broken = cases.run(call(lambda e, g, codes, *a: op.launch(e, g, codes.roll(1, 0), *a)), given, grad)
    for reference, usual, one, two in zip(exact, plain, ours, registered, strict=True):
        assert max(error(reference, one), error(reference, two)) <= allowed(error(reference, usual), "float32")
    assert error(exact[0], broken[0]) > allowed(error(exact[0], plain[0]), "float32")


def test_backward_keeps_both_halves_and_what_is_shrunk():
    op, (e, g, w, b, down, up, scale), _ = cases.given("silu")
    leaves = e.requires_grad_(), g.requires_grad_(), w, b, down.requires_grad_(), up.requires_grad_()
    own, found = {t.untyped_storage().data_ptr() for t in leaves}, []

    def entries(function):
        found.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.untyped_storage().data_ptr() in own or found.append(tuple(t.shape)) or t, lambda t: t):
            function(*leaves, scale)
        return sorted(found)

    assert entries(op.launch) == [(7, 3)]
    assert entries(op.reference).count((7, 19)) == 2  # act(e), and h


def test_what_is_frozen_has_no_gradient_and_costs_none():
    op, (e, g, w, b, down, up, scale), grad = cases.given("silu")
    up.requires_grad_()
    op.launch(e, g, w, b, down, up, scale).backward(grad)
    assert up.grad is not None and w.grad is e.grad is down.grad is None
    down.requires_grad_()
    op.launch(e, g, w, b, down, up, scale).backward(grad)  # neither half asks: h is made again for down
    assert error(cases.run(op.reference, [e, g, w, b, down, up, scale], grad)[5], down.grad) < 1e-6


def test_autocast():
    op, arguments, _ = cases.given("silu")
    exact = cases.plainly("silu")(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))
    with torch.autocast("cpu", torch.bfloat16):
        plain, ours = op.reference(*arguments), op.launch(*arguments)
    assert ours.dtype == plain.dtype == torch.bfloat16 and error(exact, ours) <= allowed(error(exact, plain), "bfloat16")


def test_halves_that_broadcast_or_differ_go_the_plain_way():
    op, (e, g, *rest), _ = cases.given("silu")
    for other in (g[:1], g.double()):
        if other.dtype == torch.float64:
            rest = [a.double() if isinstance(a, torch.Tensor) else a for a in rest]
        assert torch.equal(op.launch(e, other, *rest), op.reference(e, other, *rest))


# ---- Triton ----------------------------------------------------------------------------------------------------------------


def test_triton_bodies_under_the_interpreter():
    done = subprocess.run([sys.executable, cases.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report.keys() == CASES.keys()
    for case, found in report.items():
        limits = [allowed(plain, found["dtype"]) for plain in found["plain"]]
        assert all(ours <= limit for ours, limit in zip(found["ours"], limits)), case
        assert case == "no rows" or all(found["broken"][i] > limits[i] for i in (0, 1, 2, 3)), case


@pytest.mark.parametrize("way, act", [("forward", "gelu"), ("backward", "gelu_tanh"), ("backward", "silu")])
def test_bodies_compile_for_hopper(way, act):
    found = aot_gated.compiled(90, way, "bf16", act)
    assert fault(90, found) is None, fault(90, found)


# ---- the pass ------------------------------------------------------------------------------------------------------------


def llama(act="silu"):
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_act=act)
    return LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager"))


def names(live):
    return [node.target.made_by.name for node in live.graph.nodes if node.meta.get("fused")]


@pytest.mark.parametrize(
    "where, before, name",
    [
        ("mlp.*", [], "gated_linear_silu_1"),
        ("mlp.gate", [], "gated_linear_silu_0"),
        ("mlp.{up,down}", [], "gated_linear_silu_1"),
        ("mlp.*", [{"pass": "quantize", "where": "mlp.down", "format": "int8"}], "gated_linear_silu_1_int8"),
        ("attention.q", [], None),
        ("mlp.{gate,up}", [{"pass": "quantize", "where": "mlp.down", "format": "int8"}], None),  # whose codes are decoded on as they are
    ],
)
def test_fuse_finds_it_and_nothing_else_changes(where, before, name, monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)
    steps = [*before, {"pass": "lora", "where": where, "rank": 3}]
    plain, live = (wake(rewrite(model_of("gated"), {"passes": [*steps, *more]})) for more in ([], [{"pass": "fuse"}]))
    assert [found for found in names(live) if found.startswith("gated")] == ([name] * 2 if name else [])
    assert name is None or f"{name}(" in source(live, "model.layers.0")
    close(reference=TOYS["gated"].output(plain), result=TOYS["gated"].output(live), drift=rounding(torch.float32))
    rejects(reference=TOYS["gated"].output(model_of("gated")), result=TOYS["gated"].output(live), drift=rounding(torch.float32))
    for model in (plain, live):
        TOYS["gated"].loss(model).backward()
    same_gradients(reference=plain, result=live, drift=3 * rounding(torch.float32))
    if not before:
        for ours, theirs in zip(merge(live).graph.all(), rewrite(model_of("gated"), {"passes": []}).graph.all(), strict=True):
            assert show(ours) == show(theirs)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_step_is_peft_s_and_keeps_less(act):
    """Gradients of HF PEFT's model with the same adapters; of what a whole model keeps for backward, at least a quarter less."""
    peft = pytest.importorskip("peft")
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    theirs = peft.get_peft_model(llama(act), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["gate_proj", "up_proj", "down_proj"]))
    live = rewrite(llama(act), {"passes": [{"pass": "lora", "where": "mlp.*", "rank": 4, "alpha": 8.0}, {"pass": "fuse"}]})
    assert sum(name.startswith("gated_linear_") for name in names(live)) == 2
    ours = {path: p for path, p in live.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for path, p in theirs.named_parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.normal_(std=0.3, generator=generator)
            base, _, part = path.removeprefix("base_model.model.").partition(".lora_")
            twin = next(q for name, q in ours.items() if name.startswith(base + ".") and name.endswith("down" if part[0] == "A" else "up"))
            twin.data.copy_(p)
            pairs.append((p, twin))
    assert len(pairs) == len(ours) == 12
    sizes = []
    for model in (theirs, live):
        with kept(model) as saved:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        sizes.append(saved.bytes)
    for p, twin in pairs:
        close(reference=p.grad, result=twin.grad, drift=4 * rounding(torch.float32))
        rejects(reference=p.grad, result=1.01 * twin.grad, drift=4 * rounding(torch.float32))
    assert sizes[1] < 0.75 * sizes[0]
