"""How nouns become nodes: places of new tensors, live handles after other passes, and what a body may not do, on models of a few lines."""

from dataclasses import dataclass

import pytest
import torch
from checks import Written, close, rejects, rounding, tensor_of
from models import build, captured, example
from torch import nn

from rewrite import Pass, Refused, Spec, capture, merge, pipeline, rewrite
from rewrite.edit import body

EXACT = rounding(torch.float64)


class Two(nn.Module):
    """Two linears; a wrong order of the graph's first nodes shows in the second."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 7)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Norms(nn.Module):
    """A norm without a weight, a table read by position."""

    def __init__(self):
        super().__init__()
        self.norm, self.table, self.up = nn.LayerNorm(6, elementwise_affine=False), nn.Parameter(torch.randn(20, 6)), nn.Linear(6, 7)

    def forward(self, ids):
        return self.up(self.norm(self.table[ids]))


def passes(*steps, classes=()):
    return Spec.parse({"passes": list(steps)}, classes)


def live_two(cls, *more, **options):
    torch.manual_seed(0)
    model = Two().double()
    step = {"pass": cls.__name__.lower(), **options}
    x = torch.randn(3, 5, dtype=torch.float64)
    return model, x, rewrite(model, passes(step, *more, classes=[cls]), example={"x": x})


@pytest.fixture(scope="module")
def written():
    """One capture of the written toy; a copy for each question."""
    torch.manual_seed(0)
    return capture(Written().eval(), {"ids": torch.randint(0, 20, (3, 7))})


def applied(graph, *steps, classes=()):
    graph = graph.copy()
    return graph, pipeline.apply(graph, passes(*steps, classes=classes))


# ---- new tensors ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Triple(Pass):
    role = "linear"

    def params(self):
        return {"gain": torch.full((), 3.0, dtype=torch.float64), "other": torch.randn(4, dtype=torch.float64)}

    def output(self, y, gain, other):
        return y * gain + 0 * other.sum()


def test_values_made_from_nothing_are_kept():
    _, _, live = live_two(Triple, where=["linear", "head"])
    assert {tensor_of(live, p).item() for p in live.report.made if p.endswith("gain")} == {3.0}
    first, second = (tensor_of(live, p) for p in live.report.made if p.endswith("other"))
    rejects(reference=first, result=second, drift=EXACT)


@dataclass(frozen=True)
class Borrowed(Pass):
    role = "linear"

    def params(self, w, b):
        return {"twin": w, "shift": b[:6]}

    def output(self, x, y, twin, shift):
        return y + 0 * nn.functional.linear(x, twin) + 0 * shift


def test_a_tensor_that_is_a_handle_is_copied():
    model, _, live = live_two(Borrowed)
    before = model.a.weight.clone(), model.a.bias.clone()
    with torch.no_grad():
        for path in live.report.made:
            tensor_of(live, path).add_(1)
    assert torch.equal(model.a.weight, before[0]) and torch.equal(model.a.bias, before[1])
    assert live.a.weight.data_ptr() == model.a.weight.data_ptr()


@dataclass(frozen=True)
class Named(Pass):
    name_of: str
    role = "linear"

    def params(self, w):
        return {self.name_of: w.new_ones(w.shape[0])}

    def output(self, y, b, training, new=None):
        return y * 2 if b is None else y * b


def test_a_tensor_may_not_take_a_handle_s_name():
    for name in ("b", "training"):
        with pytest.raises(Refused, match=f"gives '{name}', a name that already means something"):
            live_two(Named, name_of=name)


def test_a_tensor_that_no_noun_reads_is_refused():
    with pytest.raises(Refused, match=r"named at a: params\(\) gives 'new', and no noun reads it at this site"):
        live_two(Named, name_of="new")


@dataclass(frozen=True)
class Careless(Pass):
    role = "linear"

    def params(self, w):
        return {"gain": w.new_ones(w.no_such_thing)}

    def output(self, y, gain):
        return y * gain


def test_a_failure_in_params_has_its_place():
    with pytest.raises(Refused, match=r"careless at a: params\(\) fails here: AttributeError: .*no_such_thing"):
        live_two(Careless)


@dataclass(frozen=True)
class Listed(Pass):
    factors: list[float]
    role = "linear"

    def output(self, y):
        return y * self.factors[0]


def test_an_option_may_be_a_list():
    model, x, live = live_two(Listed, factors=[3.0])
    close(reference=model.b(torch.relu(3 * model.a(x))), result=live(x=x), drift=EXACT)


# ---- places --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branch(Pass):
    role = "residual"

    def params(self, y):
        return {"gain": y.new_ones(y.shape[-1])}

    def branch(self, branch, gain):
        return branch * gain


def test_sites_of_one_owner_have_tensors_of_their_own(written):
    """Both residual adds of a block, and both its sub-layers where their linears lie in the block itself."""
    _, report = applied(written, {"pass": "branch"}, classes=[Branch])
    assert len(report.made) == 4
    _, report = applied(written, {"pass": "adapter", "bottleneck": 5})
    assert len(report.made) == 4 * 4


def test_sites_that_would_share_a_place_are_refused(written):
    with pytest.raises(Refused, match='block at blocks.0: the tensors @blocks.0.plain.default would be those of .* too. Name the two in two passes'):
        applied(written, {"pass": "plain", "where": ["norm", "block", "attention"]}, classes=[Plain])


@dataclass(frozen=True)
class Plain(Pass):
    role = "block"

    def params(self, y):
        return {"gain": y.new_ones(y.shape[-1])}

    def output(self, y, gain):
        return y * gain


# ---- handles -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class In(Pass):
    role = "linear"

    def params(self, w):
        return {"gain": torch.full_like(w[0], 3)}

    def input(self, x, gain):
        return x * gain


def test_merging_takes_the_first_node_away():
    """What a pass put first in the graph is folded away, and the weights that are read after it stay in order."""
    model, x, live = live_two(In, {"pass": "merge"}, {"pass": "lora", "where": ["linear", "head"], "rank": 2}, where=["linear", "head"])
    close(reference=model.b(3 * torch.relu(model.a(3 * x))), result=live(x=x), drift=EXACT)


class Again(nn.Module):
    """One linear called twice, and nothing before it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(torch.tanh(self.a(x)))


def test_what_the_first_call_reads_stands_before_it_still():
    model, x = Again().double(), torch.randn(3, 6, dtype=torch.float64)
    lora, hira = ({"pass": name, "where": ["linear", "head"], "rank": 2} for name in ("lora", "hira"))
    live = rewrite(model, {"passes": [lora, {"pass": "merge"}, hira]}, example={"x": x})
    close(reference=model(x), result=live(x), drift=EXACT)


def test_the_x_of_a_sublayer_is_not_that_of_its_last_linear(written):
    """mlp and mlp.down have one result, and inputs of different widths."""
    graph, _ = applied(written, {"pass": "ia3", "where": "mlp.down"}, {"pass": "adapter", "where": "mlp", "read": "input", "bottleneck": 5})
    downs = [n for n in graph.nodes if n.op == "get_attr" and n.target.endswith("adapter.default.mlp.down")]
    assert len(downs) == 2
    for node in downs:
        (user,) = node.users
        assert user.args[0].meta["path"].endswith("norm2")


@dataclass(frozen=True)
class Scaled(Pass):
    role = "mlp"

    def params(self, x):
        return {"gain": x.new_ones(x.shape[-1])}

    def input(self, x, gain):
        return x * gain


def test_handles_are_the_graph_s_own_again_after_merging(written):
    _, report = applied(written, {"pass": "scaled"}, {"pass": "merge"}, {"pass": "scaled"}, classes=[Scaled])
    assert len(report.made) == 2


@dataclass(frozen=True)
class Late(Pass):
    role = "linear"

    def input(self, x, y):
        return x * y.sum()


def test_a_value_that_comes_later_is_refused():
    with pytest.raises(Refused, match="late at a: the new x reads what the site computes only after its x"):
        live_two(Late)


# ---- bodies --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asks(Pass):
    role = "linear"

    def output(self, y):
        return y * 2 if y.shape[0] > 2 else y


@dataclass(frozen=True)
class Fits(Pass):
    role = "linear"

    def params(self):
        return {"row": torch.ones(3, 1, dtype=torch.float64)}

    def output(self, y, row):
        return y * row


@pytest.mark.parametrize("cls", (Asks, Fits))
def test_a_body_for_some_sizes_alone_is_refused(cls):
    with pytest.raises(Refused, match="at a: the body was followed where .*, and batch and length vary from call to call"):
        live_two(cls)


# ---- what trains ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blind(Pass):
    """A body that never asks for a size."""

    role = "linear"

    def output(self, y):
        return y + 0.5 * torch.tanh(y)


@dataclass(frozen=True)
class Sized(Pass):
    """A body that asks for a size by itself, and goes by it: other numbers at each linear, and another op at one."""

    role = "linear"

    def output(self, y):
        return y * y.shape[-1] if y.shape[-1] == 6 else y + y.shape[-1]


@dataclass(frozen=True)
class Modal(Pass):
    """A body that looks at `training` in a way that leaves no trace by itself."""

    role = "linear"

    def output(self, y, training):
        return torch.nn.functional.dropout(y, 0.5, training is True)


def test_a_body_that_asks_for_no_size_is_traced_once(monkeypatch):
    traced = []
    monkeypatch.setattr("rewrite.edit.body._trace", lambda *args, trace=body._trace, **kwargs: traced.append(args) or trace(*args, **kwargs))
    for cls, times in ((Blind, 1), (Sized, 2), (Modal, 2)):  # Modal: once for eval, once for training, for both linears
        traced.clear()
        live_two(cls, where=["linear", "head"])
        assert len(traced) == times, (cls.__name__, len(traced))


def test_a_body_fits_each_size_that_it_is_pasted_at():
    model, x, live = live_two(Sized, where=["linear", "head"])
    y = model.a(x) * 6
    close(reference=model.b(torch.relu(y)) + 7, result=live(x), drift=EXACT)
    rejects(reference=model.b(torch.relu(y)) + 6, result=live(x), drift=EXACT)
    model, x, live = live_two(Blind, where=["linear", "head"])
    blind = lambda y: y + 0.5 * torch.tanh(y)  # noqa: E731
    close(reference=blind(model.b(torch.relu(blind(model.a(x))))), result=live(x), drift=EXACT)
    values = [node.meta["val"].shape[-1] for node in live.graph.nodes if "made" in node.meta and node.op == "call_function"]
    assert values == [*[6] * 3, *[7] * 3], values


def test_a_body_that_hides_its_look_at_training_is_followed_in_both_modes():
    _, x, live = live_two(Modal, where=["linear", "head"])
    live.eval()
    assert torch.equal(live(x), live(x))
    live.train()
    assert not torch.equal(live(x), live(x))


def test_sites_without_one_input_or_without_parameters(written):
    for where in ("attention", "residual"):
        with pytest.raises(Refused, match="no parameter lies between its inputs and its output"):
            applied(written, {"pass": "unfreeze", "where": where})
    graph = capture(Norms(), {"ids": torch.randint(0, 20, (3, 7))})
    _, report = applied(graph, {"pass": "unfreeze", "where": "embed"})
    assert report.trains == {"table"}
    for step in ({"pass": "ssf", "where": "norm"}, {"pass": "bitfit", "where": "norm", "create": True}):
        with pytest.raises(Refused, match="at norm: it has no weight"):
            applied(graph, step)


def test_each_variant_has_fake_values_of_its_own():
    """A body is traced for each variant: sizes of another one belong to other symbols."""
    graph, _ = applied(captured("llama"), {"pass": "lora", "where": "attention.q", "rank": 2})
    assert len(graph.all()) == 2
    for part in graph.all():
        values = [n.meta.get("val") for n in part.nodes]
        assert all(value.fake_mode is part.fake_mode for value in values if isinstance(value, torch.Tensor)), part.name


def test_linears_inside_an_opaque_module_are_sites():
    """Mamba's scan keeps its mixer one call; the linears that the mixer calls are rewritten, train, and merge all the same."""
    model, given = build("mamba"), example("mamba", 3, 9)
    live = rewrite(model, {"passes": [{"pass": "lora", "where": "linear", "rank": 2}]})
    sites = {path for path, _ in live.report.applied[0].sites}
    assert {f"backbone.layers.{i}.mixer.{name}" for i in (0, 1) for name in ("in_proj", "x_proj", "out_proj")} == sites
    with torch.no_grad():
        wanted = model(**given, use_cache=False).logits
        assert torch.equal(live(**given).logits, wanted)
    trainable = [p for p in live.parameters() if p.requires_grad]
    for parameter in trainable:
        torch.nn.init.normal_(parameter, std=0.1)
    live(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable)
    merged = merge(live)
    assert set(merged.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        rewritten = live(**given).logits
        rejects(reference=rewritten, result=wanted, drift=rounding(torch.float32))
        close(reference=rewritten, result=merged(**given).logits, drift=rounding(torch.float32))
