"""A function with a backward of its own: traced through where autograd finds the same gradient, else one call that keeps it."""

import contextlib
import copy
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import rewrite
from rewrite.capture import trace
from rewrite.capture.model import capture

Pair = namedtuple("Pair", ["hidden", "kept"])
UNFROZEN = {"passes": [{"pass": "unfreeze", "where": "linear"}]}


class Swish(Function):
    """The gradient of its forward, written out."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x)
        ctx.slope = slope
        return x * torch.sigmoid(slope * x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(ctx.slope * x)
        return dy * (s + x * ctx.slope * s * (1 - s)), None


class Apart(Swish):
    """The same with a `setup_context` of its own."""

    @staticmethod
    def forward(x, slope):
        return x * torch.sigmoid(slope * x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.slope = inputs[1]


class Noise(Function):
    """It draws, below a `no_grad` of its own, and keeps what it drew."""

    @staticmethod
    def forward(ctx, x, rate):
        with torch.no_grad():
            kept = torch.rand_like(x) > rate / 10
        ctx.save_for_backward(kept)
        return x * kept

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0], None


class Rounded(Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x, steps):
        return torch.round(x * steps) / steps

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class Wrong(Swish):
    """A sign is wrong in one of the two terms."""

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(ctx.slope * x)
        return dy * (s - x * ctx.slope * s * (1 - s)), None


class Clipped(Function):
    """The identity, whose gradient is kept small."""

    @staticmethod
    def forward(ctx, x, most):
        ctx.most = most / 300
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy.clamp(-ctx.most, ctx.most), None


class Recomputed(Function):
    """As reversible layers have it: the forward keeps nothing, the backward runs the layer again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.layer(x).backward(dy)
        return x.grad, None


class Applies(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x, 3)


class Reversible(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(7, 7), nn.Tanh())

    def forward(self, x):
        return Pair(x + Recomputed.apply(x, self.layer), kept=object())


class First(nn.Module):
    """Reads one field, and leaves what is no tensor alone."""

    def __init__(self):
        super().__init__()
        self.reversible = Reversible()

    def forward(self, x):
        return self.reversible(x).hidden


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 7)

    def forward(self, x):
        return checkpoint(lambda value: torch.tanh(self.layer(value)), x, use_reentrant=True)


class Net(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(5, 7), between, nn.Linear(7, 3)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def build(between):
    torch.manual_seed(0)
    return Net(between)


def gradients(model, x):
    torch.manual_seed(4)
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def both(between):
    """Gradients of the original and of the live model, in training mode."""
    model, x = build(between).train(), torch.randn(6, 5)
    live = rewrite.rewrite(copy.deepcopy(model), UNFROZEN, {"x": torch.randn(4, 5)}).train()
    return gradients(model, x), gradients(live, x)


def is_same(own, other):
    return "first.weight" in other and all(torch.allclose(own[name], other[name], rtol=1e-5, atol=1e-7) for name in other)


@pytest.mark.parametrize("function", (Swish, Apart, Noise), ids=lambda f: f.__name__)
def test_a_gradient_that_autograd_finds_is_traced_through(function):
    graph = capture(build(Applies(function)), {"x": torch.ones(4, 5)})
    assert not graph.opaque and all(node.op != "call_module" for node in graph.nodes)
    assert is_same(*both(Applies(function)))


@pytest.mark.parametrize("function", (Rounded, Wrong, Clipped), ids=lambda f: f.__name__)
def test_a_gradient_of_its_own_is_kept(function, monkeypatch):
    graph = capture(build(Applies(function)), {"x": torch.ones(4, 5)})
    assert list(graph.opaque) == ["between"] and f"{function.__name__} has a backward of its own, which differs" in graph.opaque["between"]
    assert is_same(*both(Applies(function)))
    monkeypatch.setattr(trace, "own_gradients", contextlib.nullcontext)
    assert not is_same(*both(Applies(function)))


def test_the_random_state_is_left_alone():
    model, x = build(Applies(Noise)), torch.ones(4, 5)
    before = torch.get_rng_state()
    capture(model, {"x": x})
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_that_are_run_again_train_as_they_do(monkeypatch):
    graph = capture(build(First()), {"x": torch.ones(4, 5)})
    assert list(graph.opaque) == ["between.reversible"] and "takes a Sequential" in graph.opaque["between.reversible"]
    assert [inner.name for inner in graph.variants.values()] == ["between.reversible.layer.0"]
    own, other = both(First())
    assert "between.reversible.layer.0.weight" in other and is_same(own, other)
    monkeypatch.setattr(trace, "own_gradients", contextlib.nullcontext)
    with pytest.raises(RuntimeError, match="does not require grad"):
        both(First())


def test_what_a_call_cannot_hand_back_may_not_be_looked_at():
    class Looks(First):
        def forward(self, x):
            hidden, kept = self.reversible(x)
            return hidden + 1 if kept else hidden

    graph = capture(build(Looks()), {"x": torch.ones(4, 5)})
    assert list(graph.opaque) == ["between"] and "returns a object, which a single call cannot hand back" in graph.opaque["between"]


def test_a_checkpoint_is_the_function_that_it_runs():
    graph = capture(build(Checkpointed()), {"x": torch.ones(4, 5)})
    assert not graph.opaque
    assert is_same(*both(Checkpointed()))


def test_adapters_in_layers_that_are_run_again_get_gradients():
    live = rewrite.rewrite(build(First()), {"passes": [{"pass": "lora", "where": {"role": "linear", "path": "between.**"}, "rank": 2}]}, {"x": torch.randn(4, 5)}).train()
    adapters = {name: p for name, p in live.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in adapters.values():
            p.fill_(0.1)
    live(torch.randn(6, 5)).square().sum().backward()
    assert len(adapters) == 2 and all(p.grad is not None and p.grad.any() for p in adapters.values())
