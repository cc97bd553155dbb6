"""Norms, rotary positions and gates by a library: what the references say beside transformers' own code, where `fuse` finds them, and what the library is given.

There is no GPU here: what the library's functions are called with, and what they may not write over, is tried with functions in their place that write as they do.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from checks import close, rejects, rounding, same_gradients, wake
from interpreted import error
from models import GROUPED, SIZES, SPECIAL, build, example
from rewrite.kernels import liger
from test_kernels import allowed
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rewrite import export_onnx, export_program, load, merge, rewrite, save

FUSE = {"pass": "fuse", "library": "liger"}
OTHERS = {
    "gemma": lambda: T.GemmaForCausalLM(T.GemmaConfig(**SIZES, **GROUPED, **SPECIAL)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**SIZES, **GROUPED, **SPECIAL, sliding_window=4)),
}
FOUND = {  # norms, their op, positions of q and k, gates
    "llama": (5, "rms_norm", 4, "swiglu"),
    "qwen3": (9, "rms_norm", 4, "swiglu"),
    "gemma": (5, "rms_norm_offset", 4, "geglu"),
    "mistral": (5, "rms_norm", 4, "swiglu"),
}


@functools.cache
def tiny(family):
    if family not in OTHERS:
        return build(family)
    torch.manual_seed(0)
    return OTHERS[family]().eval()


@functools.cache
def fused(family, *, trains=False):
    return rewrite(tiny(family), {"passes": [{"pass": "unfreeze", "where": "model"}] * trains + [FUSE]})


def new(*size, dtype=torch.float32, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def rotation(batch=2, length=7, half=5, dtype=torch.float32):
    angles = new(batch, 1, length, half)
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


# ---- the references ------------------------------------------------------------------------------------------------------


def test_they_say_what_transformers_says():
    """Bit for bit in bfloat16, where the places of the roundings tell."""
    x, w = new(3, 7, 19, dtype=torch.bfloat16), new(19, dtype=torch.bfloat16)
    for kind, ours, other in ((LlamaRMSNorm, liger.normed(x, w, 1e-5), liger.normed_offset(x, w, 1e-5, 0.0)), (GemmaRMSNorm, liger.normed_offset(x, w, 1e-5, 1.0), liger.normed(x, 1 + w, 1e-5))):
        norm = kind(19, eps=1e-5).to(torch.bfloat16)
        norm.weight.data = w
        close(reference=norm(x), result=ours, drift=0.0)
        rejects(reference=norm(x), result=other, drift=0.0)
    (cos, sin), q, k = rotation(), new(2, 4, 7, 10), new(2, 3, 7, 10)
    for reference, result, broken in zip(apply_rotary_pos_emb(q, k, cos[:, 0], sin[:, 0]), liger.rotated_both(cos, sin, q, 5, k, 5), liger.rotated_both(cos, -sin, q, 5, k, 5)):
        close(reference=reference, result=result, drift=0.0)
        rejects(reference=reference, result=broken, drift=0.0)


CALLS = {
    "rms_norm": (liger.rms_norm, lambda: (new(3, 7, 19), new(19), 1e-5)),
    "rms_norm_offset": (liger.rms_norm_offset, lambda: (new(3, 7, 19), new(19), 1e-5, 1.0)),
    "ropes": (liger.ropes, lambda: (*rotation(), new(2, 4, 7, 10), 5, new(2, 3, 7, 10, seed=1), 5)),
    "swiglu": (liger.swiglu, lambda: (new(3, 7, 19), new(3, 7, 19, seed=1))),
    "geglu": (liger.geglu, lambda: (new(3, 7, 19), new(3, 7, 19, seed=1))),
}


def plainly(name, *given):
    """The formulas, written anew."""
    if name == "ropes":
        cos, sin, q, _, k, _ = given
        turned = lambda x: torch.complex(*x.chunk(2, -1)) * torch.complex(cos.chunk(2, -1)[0], sin.chunk(2, -1)[0])  # noqa: E731
        return tuple(torch.cat([turned(x).real, turned(x).imag], -1) for x in (q, k))
    if "norm" in name:
        x, w, eps, *offset = given
        return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * (w + sum(offset))
    e, g = given
    return e * g / (1 + torch.exp(-e)) if name == "swiglu" else e / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (e + 0.044715 * e**3))) * g


def run(function, given, dtype=torch.float32, at=lambda leaf: leaf):
    """Results and gradients; `at` makes of a leaf what the function is given. cos and sin stay as they are."""
    fixed = 2 if len(given) == 6 else 0
    leaves = [a.to(dtype, copy=True).requires_grad_(i >= fixed) if isinstance(a, torch.Tensor) else a for i, a in enumerate(given)]
    results = function(*(at(a) if i >= fixed and isinstance(a, torch.Tensor) else a for i, a in enumerate(leaves)))
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [new(*y.shape, seed=2).to(dtype) for y in results])
    return [*(y.detach() for y in results), *(a.grad for a in leaves[fixed:] if isinstance(a, torch.Tensor))]


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_the_formula(name):
    op, given = CALLS[name][0], CALLS[name][1]()
    exact = run(functools.partial(plainly, name), given, torch.float64)
    plain, registered = run(op.reference, given), run(op, given)
    for reference, usual, one, launched in zip(exact, plain, registered, run(op.launch, given), strict=True):
        assert error(reference, usual) < 1e-6 and error(reference, one) < 1e-6 and torch.equal(usual, launched)
        assert error(reference, 1.001 * usual) > 1e-6
    torch.library.opcheck(op.overload, tuple(a.requires_grad_(i > 1 or name != "ropes") if isinstance(a, torch.Tensor) else a for i, a in enumerate(given)))


# ---- what fuse finds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FOUND)
def test_found_in_models_and_nothing_changes(family):
    norms, norm, positions, gate = FOUND[family]
    model, live = tiny(family), fused(family, trains=True)
    applied = live.report.applied[-1]
    assert sorted(name for _, name in applied.sites) == sorted([norm] * norms + ["ropes"] * positions + [gate] * 2) and not applied.refused
    given = example(family if family in ("llama", "qwen3") else "llama")
    reference = model(**given).logits
    close(reference=reference, result=live(**given).logits, drift=0.0)
    rejects(reference=reference, result=(1 + 2**-20) * live(**given).logits, drift=0.0)
    model.requires_grad_(True).zero_grad()
    live.zero_grad()
    for one in (model, live):
        one(**given, labels=given["input_ids"]).loss.backward()
    same_gradients(reference=model, result=live, drift=rounding(torch.float32))
    tokens = [one.generate(**given, max_new_tokens=4, do_sample=False) for one in (model, live)]
    assert torch.equal(*tokens)


def test_only_where_it_is_asked_for_and_said_once():
    spec = [{"pass": "lora", "where": "attention.{q,k}", "rank": 3}]
    plain, live = (wake(rewrite(tiny("llama"), {"passes": [*spec, step]})) for step in ({"pass": "fuse"}, FUSE))
    made = lambda one: {node.target.made_by.name for node in one.graph.nodes if hasattr(node.target, "made_by")}  # noqa: E731
    assert made(plain) == {"lora_linears_1_1"} and made(live) == {"lora_linears_1_1", "rms_norm", "ropes", "swiglu"}
    assert not plain.report.notes and len([note for note in live.report.notes if note.startswith("liger:")]) == (liger.missing() is not None)
    close(reference=plain(**example("llama")).logits, result=live(**example("llama")).logits, drift=rounding(torch.float32))
    rejects(reference=tiny("llama")(**example("llama")).logits, result=live(**example("llama")).logits, drift=rounding(torch.float32))


def test_taken_apart_saved_and_exported(tmp_path):
    """What goes out is plain: a merge, a program of torch alone, ONNX."""
    live = wake(rewrite(tiny("llama"), {"passes": [{"pass": "lora", "where": "linear", "rank": 3}, FUSE]}))
    given = example("llama")
    close(reference=live(**given).logits, result=merge(live)(**given).logits, drift=rounding(torch.float32))
    assert not [node for node in merge(live).graph.nodes if "fused" in node.meta]
    close(reference=live(**given).logits, result=load(tiny("llama"), save(live, tmp_path / "x"))(**given).logits, drift=0.0)
    export_program(live, tmp_path / "m.pt2")
    assert not [node for node in torch.export.load(tmp_path / "m.pt2").graph.nodes if "rewrite" in str(node.target)]
    assert export_onnx(live, tmp_path / "m.onnx").error < 1e-3


class Odd(nn.Module):
    """A norm that is not made wide, a gate whose e is read again, positions of which no half is seen twice; and one gate as it should be."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.weight, self.cos = nn.Parameter(torch.ones(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        e, g = self.first(x), self.second(x)
        h = self.last(F.silu(e) * g) + e[..., :6]
        h = h + self.last(F.silu(self.first(h)) * self.second(h))
        h = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))
        return h * self.cos + torch.cat([-h[..., 3:], h[..., :3]], -1) * self.cos


def test_what_is_not_it_stays_and_why():
    torch.manual_seed(0)
    model, given = Odd().eval(), {"x": new(2, 3, 4, 6)}
    live = rewrite(model, {"passes": [FUSE]}, given)
    reasons = dict(live.report.applied[-1].refused)
    assert [name for _, name in live.report.applied[-1].sites] == ["swiglu"]
    assert "is read by" in reasons[": silu"] and "stands in place of" in reasons[": rsqrt"] and "halves of its cos are not seen to be the same" in reasons[": neg"]
    close(reference=model(**given), result=live(**given), drift=0.0)


# ---- what the library is given -------------------------------------------------------------------------------------------


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, eps, offset, casting_mode, in_place):
        CALLED.append((eps, offset, casting_mode, in_place))
        ctx.save_for_backward(x, w)
        ctx.rest = (liger.normed, (eps,)) if casting_mode == "llama" else (liger.normed_offset, (eps, offset))
        return ctx.rest[0](x, w, *ctx.rest[1])

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            given = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            return *torch.autograd.grad(ctx.rest[0](*given, *ctx.rest[1]), given, grad), None, None, None, None


class Rope(torch.autograd.Function):
    """Writes over q and k, and over their gradients."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        CALLED.append(tuple(q.shape))
        ctx.save_for_backward(cos, sin)
        for x in (q, k):
            x.copy_(liger.rotated(cos, sin, x, x.shape[-1] // 2))
        return q, k

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        for grad in grads:
            grad.copy_(liger.rotated(cos, -sin, grad, grad.shape[-1] // 2))
        return *grads, None, None


def writing(reference):
    class Gate(torch.autograd.Function):
        """Its backward writes over e and g, without autograd's knowledge, as a kernel does."""

        @staticmethod
        def forward(ctx, e, g):
            CALLED.append(reference.__name__)
            ctx.save_for_backward(e, g)
            return reference(e, g)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                given = [t.detach().clone().requires_grad_() for t in ctx.saved_tensors]
                found = torch.autograd.grad(reference(*given), given, grad)
            for kept, one in zip(ctx.saved_tensors, found):
                kept.data.copy_(one)
            return found

    return Gate


CALLED = []


@pytest.fixture
def library(monkeypatch):
    CALLED.clear()
    fake = SimpleNamespace(LigerRMSNormFunction=Norm, LigerRopeFunction=Rope, LigerSiLUMulFunction=writing(liger.gated), LigerGELUMulFunction=writing(liger.gated_by_gelu))
    monkeypatch.setattr(liger, "library", lambda: fake)
    monkeypatch.setattr(liger, "runs", lambda *tensors: all(t.dtype == tensors[0].dtype for t in tensors))


@pytest.mark.parametrize("name", CALLS)
def test_its_functions_get_the_same_meaning(name, library):
    op, given = CALLS[name][0], CALLS[name][1]()
    for reference, result in zip(run(op.reference, given), run(op.launch, given, at=lambda leaf: leaf * 1.0), strict=True):
        close(reference=reference, result=result, drift=1e-6)
    arguments = {"rms_norm": (1e-5, 0.0, "llama", False), "rms_norm_offset": (1e-5, 1.0, "gemma", False), "ropes": (2, 4, 7, 10), "swiglu": "gated", "geglu": "gated_by_gelu"}
    assert CALLED == [arguments[name]]


def test_it_writes_over_nothing_that_others_read(library):
    cos, sin, q, half, k, _ = CALLS["ropes"][1]()
    q, k = q.requires_grad_(), k.requires_grad_()
    before, grads = (q.clone(), k.clone()), [new(*q.shape), new(*k.shape)]
    given = [grad.clone() for grad in grads]
    torch.autograd.backward(liger.ropes.launch(cos, sin, q, half, k, half), given)
    for one, two in zip((*before, *grads), (q, k, *given)):
        assert torch.equal(one, two)
    with pytest.raises(AssertionError):  # as it would be without the copies
        torch.autograd.backward(Rope.apply(q * 1.0, k * 1.0, cos, sin), given)
        assert torch.equal(grads[0], given[0])


@pytest.mark.parametrize("op", [liger.swiglu, liger.geglu], ids=["swiglu", "geglu"])
def test_what_a_gate_has_written_over_is_not_read_again_in_silence(op, library):
    e, g = (new(3, 5, seed=i).requires_grad_() for i in range(2))
    y = op.launch(e * 1.0, g * 1.0).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified"):
        y.backward()
    h = e.exp()  # keeps its result
    with pytest.raises(RuntimeError, match="modified"):
        op.launch(h, g * 1.0).sum().backward()
    found = torch.autograd.grad(writing(op.reference).apply(e.exp(), g * 1.0).sum(), e)[0]
    assert error(torch.autograd.grad(op.reference(e.exp(), g).sum(), e)[0], found) > 1e-2  # as it would be, unsaid


@pytest.mark.parametrize("change", [lambda c, s, q, h, k, j: (c[..., :6], s[..., :6], q, h, k, j), lambda c, s, q, h, k, j: (c.double(), s, q, h, k, j), lambda c, s, q, h, k, j: (c, s, q, 4, k, j)], ids=["columns", "dtype", "half"])
def test_what_it_does_not_take_is_the_reference(change, library):
    given = change(*CALLS["ropes"][1]())
    with pytest.raises(RuntimeError) if given[0].shape[-1] != 10 else torch.no_grad():
        close(reference=liger.ropes.reference(*given)[0], result=liger.ropes.launch(*given)[0], drift=0.0)
    assert not CALLED


def test_why_it_does_not_run(monkeypatch):
    monkeypatch.setattr(liger, "library", lambda: None)
    assert "not installed" in liger.missing()
    monkeypatch.setattr(liger, "library", lambda: liger)
    assert torch.cuda.is_available() or liger.missing() == "there is no GPU"
    assert not liger.runs(new(3))


@pytest.mark.skipif(liger.missing() is not None, reason="needs a GPU and liger-kernel")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CALLS)
def test_beside_the_library_itself(name, dtype):
    op, given = CALLS[name][0], [a.cuda() if isinstance(a, torch.Tensor) else a for a in CALLS[name][1]()]
    narrow = lambda f: run(f, [a.to(getattr(torch, dtype)) if isinstance(a, torch.Tensor) else a for a in given], getattr(torch, dtype))  # noqa: E731
    exact = run(functools.partial(plainly, name), [a.double() if isinstance(a, torch.Tensor) else a for a in given], torch.float64)
    for reference, usual, result in zip(exact, narrow(op.reference), narrow(op.launch), strict=True):
        assert error(reference, result) <= allowed(error(reference, usual), dtype)
