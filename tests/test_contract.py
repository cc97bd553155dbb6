"""What a pass author may rely on: handles and nouns do what they say in every layout, mistakes are told in words, seeds belong to places."""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from checks import TOYS, captured, close, model_of, rejects, rounding, tensor_of, unchanged, wake
from models import build, example
from torch import nn
from torch.nn import functional as F

from rewrite import Pass, Refused, Spec, SpecError, pipeline, rewrite
from rewrite.contract import frozen

EXACT = rounding(torch.float64)


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


@functools.cache
def base(family):
    torch.manual_seed(0)
    model = (Grouped().eval() if family == "grouped" else build(family)).double()
    with torch.no_grad():  # biases that are zeros would hide mistakes
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value) if value.dim() == 1 else 0)
    return model


class Grouped(nn.Module):
    """A convolution with groups between two without."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv1d(5, 10, 3), nn.Conv1d(10, 20, 3, groups=5), nn.Conv1d(20, 7, 1)

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def inputs_of(family):
    if family == "grouped":
        return {"x": torch.randn(2, 5, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    return {k: v.double() if v.is_floating_point() else v for k, v in example(family).items()}


def output(model, family):
    with torch.no_grad():
        made = model(**inputs_of(family))
    return made if isinstance(made, torch.Tensor) else made.logits


def apply(family, *passes, classes=(), **spec):
    """A live model of a family; `classes` are the passes of this file that the spec names."""
    return rewrite(base(family), Spec.parse({"passes": list(passes), **spec}, classes), example=inputs_of(family))


def refusal(family, *passes, classes=(), error=Refused):
    with unchanged(base(family)), pytest.raises(error) as caught:
        apply(family, *passes, classes=classes)
    return str(caught.value)


# ---- nouns, in every layout ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain(Pass):
    """IA3's gain on the outputs of anything affine."""

    role = "linear"

    def params(self, w, kind):
        size = w.shape[-2] if kind == "experts" else w.shape[0]
        return {"gain": w.new_ones(size, *[1] * (w.dim() - 2) if kind == "conv" else ())}

    def output(self, y, gain):
        return y * gain


@dataclass(frozen=True)
class Magnitude(Pass):
    """DoRA's magnitude: each row of a weight has a length of its own."""

    role = "linear"

    def params(self, w):
        return {"length": w.norm(dim=1, keepdim=True)}

    def weight(self, w, length):
        return length * w / w.norm(dim=1, keepdim=True)


@dataclass(frozen=True)
class Scale(Pass):
    """A number that a value is multiplied with."""

    by: float
    role = "linear"


@dataclass(frozen=True)
class ScaleInput(Scale):
    def input(self, x):
        return self.by * x


@dataclass(frozen=True)
class ScaleBias(Scale):
    def bias(self, b):
        return self.by * b


@dataclass(frozen=True)
class ScaleQuery(Scale):
    role = "attention"

    def query(self, q):
        return self.by * q


@dataclass(frozen=True)
class ScaleValue(Scale):
    role = "attention"

    def value(self, v):
        return self.by * v


@dataclass(frozen=True)
class ScaleBranch(Scale):
    role = "residual"

    def branch(self, branch):
        return self.by * branch


def changed(family, change):
    """The output of a copy of the base whose weights `change` has had its way with."""
    model = build(family).double()
    model.load_state_dict(base(family).state_dict())
    with torch.no_grad():
        change(model)
    return output(model, family)


def scaled(names, by, rows=None, dim=0):
    """A change: these parameters times a number, or some of their rows times as many numbers."""

    def change(model):
        found = [p for n, p in model.named_parameters() if n.endswith(names)]
        assert found
        for value in found:
            part = value if rows is None else value.narrow(dim if value.dim() > 1 else 0, rows.start, rows.stop - rows.start)
            part.mul_(by)

    return change


NOUNS = {
    "weight of linears": ("llama", {"pass": "magnitude", "where": "attention.q"}, 2.0, scaled("q_proj.weight", 2)),
    "weight of Conv1D": ("gpt2", {"pass": "magnitude", "where": "mlp.up"}, 2.0, scaled("c_fc.weight", 2)),
    "weight of a third": ("gpt2", {"pass": "magnitude", "where": "attention.k"}, 2.0, scaled("c_attn.weight", 2, slice(24, 48), 1)),
    "output of a third": ("gpt2", {"pass": "gain", "where": "attention.v"}, 2.0, scaled(("c_attn.weight", "c_attn.bias"), 2, slice(48, 72), 1)),
    "output of linears": ("bert", {"pass": "gain", "where": "mlp.up"}, 2.0, scaled(("intermediate.dense.weight", "intermediate.dense.bias"), 2)),
    "output of patches": ("vit", {"pass": "gain", "where": "embed.patch"}, 2.0, scaled(("projection.weight", "projection.bias"), 2)),
    "input": ("bert", {"pass": "scaleinput", "where": "mlp.down", "by": 3}, None, scaled(("output.dense.weight",), 3)),
    "bias": ("bert", {"pass": "scalebias", "where": "attention.v", "by": 3}, None, scaled("value.bias", 3)),
    "bias of a third": ("gpt2", {"pass": "scalebias", "where": "attention.v", "by": 3}, None, scaled("c_attn.bias", 3, slice(48, 72))),
    "query": ("llama", {"pass": "scalequery", "by": 3}, None, scaled("q_proj.weight", 3)),
    "value": ("gpt2", {"pass": "scalevalue", "by": 3}, None, scaled(("c_attn.weight", "c_attn.bias"), 3, slice(48, 72), 1)),
    "branch": ("llama", {"pass": "scalebranch", "by": 3}, None, scaled(("o_proj.weight", "down_proj.weight"), 3)),
}
CLASSES = (Gain, Magnitude, ScaleInput, ScaleBias, ScaleQuery, ScaleValue, ScaleBranch)


@pytest.mark.parametrize("case", NOUNS)
def test_nouns_replace_what_they_name(case):
    family, step, factor, change = NOUNS[case]
    if case == "input":  # BERT calls two linears output.dense
        change = lambda model: scaled("output.dense.weight", 3)(model) or scaled("attention.output.dense.weight", 1 / 3)(model)  # noqa: E731
    live = apply(family, step, classes=CLASSES)
    if factor is not None:
        close(reference=output(base(family), family), result=output(live, family), drift=EXACT)
        with torch.no_grad():
            for path in live.report.made:
                tensor_of(live, path).mul_(factor)
    close(reference=changed(family, change), result=output(live, family), drift=EXACT)
    rejects(reference=output(base(family), family), result=output(live, family), drift=EXACT)


def test_passes_stack_in_the_order_written():
    """A later pass sees what an earlier one has made of y and w."""
    lora, gain = {"pass": "lora", "where": "attention.q", "rank": 4}, {"pass": "gain", "where": "attention.q"}
    outputs = []
    for passes in ([lora, gain], [gain, lora]):
        live = apply("llama", *passes, classes=CLASSES)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for path in sorted(live.report.made):
                tensor_of(live, path).copy_(torch.randn(tensor_of(live, path).shape, generator=generator, dtype=torch.float64))
        outputs.append((live, output(live, "llama")))

    def change(model, gain_last):
        for layer, twin in zip(model.model.layers, outputs[0][0].model.layers):
            q, own = layer.self_attn.q_proj, twin.self_attn.q_proj
            delta, gain = 4 * own.lora.default.up @ own.lora.default.down, own.gain.default.gain[:, None]
            q.weight.copy_(gain * (q.weight + delta) if gain_last else gain * q.weight + delta)

    for (live, found), gain_last in zip(outputs, (True, False)):
        close(reference=changed("llama", lambda model: change(model, gain_last)), result=found, drift=EXACT)
    rejects(reference=outputs[0][1], result=outputs[1][1], drift=EXACT)


def test_magnitude_then_lora_reads_the_base_x_alone():
    live = wake(apply("llama", {"pass": "magnitude", "where": "attention.q"}, {"pass": "lora", "where": "attention.q", "rank": 4}, classes=CLASSES))

    def change(model):
        for layer, twin in zip(model.model.layers, live.model.layers):
            q, own = layer.self_attn.q_proj, twin.self_attn.q_proj
            q.weight.copy_(own.magnitude.default.length * q.weight / q.weight.norm(dim=1, keepdim=True) + 4 * own.lora.default.up @ own.lora.default.down)

    close(reference=changed("llama", change), result=output(live, "llama"), drift=EXACT)


# ---- gradients, training, shared and frozen tensors -------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded(Pass):
    """A gain rounded to whole numbers, straight through."""

    role = "attention.v"

    def params(self, w):
        return {"gain": torch.full((w.shape[0],), 1.7, dtype=w.dtype)}

    def output(self, y, gain):
        hard = gain.round()
        return y * (hard + gain - gain.detach())


def test_straight_through_keeps_its_gradient():
    live = apply("llama", {"pass": "rounded"}, classes=[Rounded])
    soft = apply("llama", {"pass": "gain", "where": "attention.v"}, classes=CLASSES)
    with torch.no_grad():
        for path in soft.report.made:
            tensor_of(soft, path).fill_(2.0)
    close(reference=output(soft, "llama"), result=output(live, "llama"), drift=EXACT)
    for model in (live, soft):
        model(**inputs_of("llama")).logits.square().mean().backward()
    for a, b in zip(soft.report.made, live.report.made):
        assert tensor_of(soft, a).grad.any()
        close(reference=tensor_of(soft, a).grad, result=tensor_of(live, b).grad, drift=EXACT)


@dataclass(frozen=True)
class Bases(Pass):
    """VeRA in small: two frozen bases for all sites, a trained gain for each."""

    rank: int = 5
    role = "attention.{q,v}"

    def shared(self, sites):
        out_dim, in_dim = max(s.w.shape[0] for s in sites), max(s.w.shape[1] for s in sites)
        w = sites[0].w
        return {"down": frozen(w.new_empty(self.rank, in_dim).normal_()), "up": frozen(w.new_empty(out_dim, self.rank).normal_())}

    def params(self, w):
        return {"gain": w.new_zeros(w.shape[0])}

    def output(self, x, y, down, up, gain):
        return y + gain * F.linear(F.linear(x, down[:, : x.shape[-1]]), up[: y.shape[-1]])


def test_shared_and_frozen_tensors():
    live = apply("llama", {"pass": "bases"}, classes=[Bases])
    close(reference=output(base("llama"), "llama"), result=output(live, "llama"), drift=0.0)
    buffers = [p for p in live.report.made if p in dict(live.named_buffers())]
    assert sorted(buffers) == ["bases.default.down", "bases.default.up"] and set(buffers) <= set(live.state_dict())
    trained = [n for n, p in live.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(n.endswith("bases.default.gain") for n in trained)
    with torch.no_grad():
        for name in trained:
            tensor_of(live, name).fill_(0.3)

    def change(model):
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                down, up = tensor_of(live, "bases.default.down"), tensor_of(live, "bases.default.up")
                linear.weight.add_(0.3 * up[: linear.weight.shape[0]] @ down)

    close(reference=changed("llama", change), result=output(live, "llama"), drift=EXACT)
    assert tensor_of(apply("llama", {"pass": "bases"}, classes=[Bases]), "bases.default.down").equal(tensor_of(live, "bases.default.down"))


def test_dropout_of_a_body_follows_the_mode():
    live = wake(apply("llama", {"pass": "lora", "where": "linear", "rank": 4, "dropout": 0.5}))
    plain = wake(apply("llama", {"pass": "lora", "where": "linear", "rank": 4}))
    close(reference=output(plain, "llama"), result=output(live, "llama"), drift=0.0)
    live.train()
    torch.manual_seed(0)
    first, second = output(live, "llama"), output(live, "llama")
    torch.manual_seed(0)
    close(reference=first, result=output(live, "llama"), drift=0.0)
    rejects(reference=first, result=second, drift=EXACT)
    close(reference=output(plain, "llama"), result=output(live.eval(), "llama"), drift=0.0)


@dataclass(frozen=True)
class ByBlock(Pass):
    """Reads facts of its site."""

    role = ["attention.q", "mlp.down"]

    def output(self, y, index, kind, fan_in, role):
        return y * (1 + index) * fan_in * (10 if role == "mlp.down" else 1) if kind == "linear" else y


def test_facts_of_a_site():
    live = apply("llama", {"pass": "byblock"}, classes=[ByBlock])

    def change(model):
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight.mul_((1 + number) * 24)
            layer.mlp.down_proj.weight.mul_((1 + number) * 56 * 10)

    close(reference=changed("llama", change), result=output(live, "llama"), drift=EXACT)


# ---- mistakes of a pass author ----------------------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


def body(output, params=None, refuse=None):
    """A pass class called Mine with these methods."""
    made = {"role": "attention.q", "output": output, "__module__": __name__, "__annotations__": {}}
    made |= {name: method for name, method in (("params", params), ("refuse", refuse)) if method is not None}
    for name in ("output", "params", "refuse"):
        if name in made:
            made[name].__name__ = name
    return dataclass(frozen=True)(type("Mine", (Pass,), made))


def small(self, w):
    return {"new": w.new_zeros(5)}


MISTAKES = {
    "an unknown handle": (body(lambda self, y, z: y), r"mine at model\.layers\.0\.self_attn\.q_proj: output\(\) asks for 'z'; this site has x, w, b, y and the new tensors none"),
    "a handle of another role": (body(lambda self, y, stream: y + stream), r"output\(\) asks for 'stream'; this site has x, w, b, y"),
    "another shape": (body(lambda self, y: y[..., :3]), r"output\(\) gives .*3\).* where the model has .*40\)"),
    "another dtype": (body(lambda self, y: y.half()), r"output\(\) gives .*float16 where the model has"),
    "two values": (body(lambda self, y: (y, y)), r"output\(\) must return one tensor"),
    "nothing": (body(lambda self, y: None), r"output\(\) must return one tensor"),
    "shapes that do not fit": (body(lambda self, y, new: y + new, small), r"the body does not fit here: RuntimeError: .*5"),
    "a name that is not there": (body(lambda self, y: y.no_such_thing()), r"the body does not fit here: AttributeError"),
    "a custom backward": (body(lambda self, y: Square.apply(y)), r"Square is a torch\.autograd\.Function, whose backward a traced body would lose.*straight-through: hard \+ s - s\.detach\(\)"),
    "control flow on training": (body(lambda self, y, training: y * 2 if training else y), r"the body takes other steps in training than in eval"),
    "a tensor constant": (body(lambda self, y: y * torch.tensor([1.0] * 40, dtype=y.dtype)), r"the body makes tensor constants|give them as new tensors in `params`"),
    "a number of a value": (body(lambda self, y: y * float(y.sum())), r"mine at model\.layers\.0\.self_attn\.q_proj: the body does not fit here"),
    "a branch on a value": (body(lambda self, y: y if (y.sum() > 0).item() else -y), r"the body does not fit here"),
    "a tensor of another name": (body(lambda self, y: y, lambda self, w: {"weight.x": w.new_zeros(3)}), r"params\(\) gives 'weight\.x', and no noun asks for it"),
    "params that are no tensors": (body(lambda self, y: y, lambda self, w: {"new": 3}), r"params\(\) gives int for 'new': give a tensor, or frozen\(tensor\)"),
    "params that cannot train": (body(lambda self, y, new: y, lambda self, w: {"new": torch.zeros(3, dtype=torch.int64)}), r"params\(\) gives 'new' as torch\.int64, which cannot be trained"),
    "params without names": (body(lambda self, y: y, lambda self, w: [w.new_zeros(3)]), r"params\(\) must return a dict of names and tensors, not list"),
    "params that ask for what is not there": (body(lambda self, y: y, lambda self, q: {}), r"params\(\) asks for 'q'"),
    "refuse that asks for what is not there": (body(lambda self, y: y, None, lambda self, q: None), r"refuse\(\) asks for 'q'"),
    "new tensors that nothing reads": (body(lambda self, y: y, small), r"params\(\) gives 'new', and no noun asks for it"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_words(case):
    cls, words = MISTAKES[case]
    with unchanged(base("llama")), pytest.raises((Refused, SpecError), match=words) as caught:
        apply("llama", {"pass": "mine"}, classes=[cls])
    assert "mine" in str(caught.value) and len(str(caught.value)) < 1000


def test_a_custom_backward_works_again_afterwards():
    refusal("llama", {"pass": "mine"}, classes=[MISTAKES["a custom backward"][0]])
    x = torch.ones(3, requires_grad=True)
    Square.apply(x).sum().backward()
    assert x.grad.equal(torch.ones(3))


def test_a_name_that_the_model_has():
    found = refusal("llama", {"pass": "lora", "where": "attention.q", "rank": 2}, {"pass": "lora", "where": {"role": "attention.q", "path": "layers.**"}, "rank": 2})
    assert "lora at model.layers.0.self_attn.q_proj.lora.default" in found and 'another "name"' in found


# ---- what a pass declines ------------------------------------------------------------------------------------------------------


def test_rank_above_a_weight():
    found = refusal("llama", {"pass": "lora", "where": ["attention.k", "mlp.up"], "rank": 24})
    assert found == (
        "lora at model.layers.0.self_attn.k_proj (20×24): rank 24 is above the smaller side of (20, 24)\n"
        "lora at model.layers.1.self_attn.k_proj (20×24): rank 24 is above the smaller side of (20, 24)\n"
        '2 of 4 sites refused (passes[0]); narrow "where", change the options, or say "allow_refusals": true in this pass.'
    )


def test_allowed_refusals_are_reported():
    live = apply("llama", {"pass": "lora", "where": ["attention.k", "mlp.up"], "rank": 24, "allow_refusals": True})
    (step,) = live.report.applied
    assert [path for path, _ in step.sites] == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert [path for path, _ in step.refused] == ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"]
    assert "refused  lora at model.layers.0.self_attn.k_proj: rank 24 is above" in str(live.report)
    assert len(live.report.made) == 4


def test_all_refused_is_an_error_even_if_allowed():
    found = refusal("llama", {"pass": "lora", "where": "attention.k", "rank": 99, "allow_refusals": True})
    assert found.endswith('2 of 2 sites refused (passes[0]); narrow "where" or change the options.')


REFUSALS = {
    "expect": ("llama", {"pass": "lora", "where": {"role": "attention.q", "expect": 3}, "rank": 2}, 'found 2 sites for {"role": "attention.q", "expect": 3}, expected 3'),
    "no such role": ("bert", {"pass": "lora", "where": "mlp.gate", "rank": 2}, 'passes[0]: lora found no site for "mlp.gate".  This model has: attention.{q,k,v,o'),
    "groups": ("grouped", {"pass": "lora", "where": "conv", "rank": 2}, "lora at second (20×2×3): its convolution has groups"),
    "dropout on ids": ("llama", {"pass": "lora", "where": "embed", "rank": 2, "dropout": 0.1}, "dropout has no meaning on token ids"),
    "no bias": ("llama", {"pass": "bitfit", "where": "linear"}, 'it has no bias; say "create": true to add one'),
    "a part of a fused bias": ("gpt2", {"pass": "bitfit", "where": "attention.q"}, "its bias is one tensor for the whole fused projection: name all of its parts"),
    "a part of a fused weight": ("gpt2", {"pass": "unfreeze", "where": "attention.q"}, "its weight is one tensor for the whole fused projection"),
    "an operation of a norm": ("llama", {"pass": "lora", "where": "norm", "rank": 2}, "lora at model.layers.0.input_layernorm"),
    "an operation of a region": ("llama", {"pass": "lora", "where": "mlp", "rank": 2}, "lora at model.layers.0.mlp"),
    "no norm behind it": ("llama", {"pass": "adapter", "where": "mlp", "bottleneck": 5, "read": "normed"}, "no norm follows its residual add"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_have_place_reason_and_step(case):
    family, step, words = REFUSALS[case]
    assert words in refusal(family, step)


def test_all_or_nothing():
    """A pass that is refused later leaves nothing of the earlier ones."""
    refusal("llama", {"pass": "unfreeze", "where": "model"}, {"pass": "lora", "where": "linear", "rank": 99})
    assert not any(p.requires_grad is False for p in base("llama").parameters())


# ---- seeds ---------------------------------------------------------------------------------------------------------------------


def drawn(live, ending=".down"):
    return {path: tensor_of(live, path).detach() for path in live.report.made if path.endswith(ending)}


def test_a_seed_belongs_to_its_place():
    alone = drawn(apply("llama", {"pass": "lora", "where": "attention.q", "rank": 4}))
    torch.manual_seed(12345)
    among = drawn(apply("llama", {"pass": "adapter", "bottleneck": 5}, {"pass": "lora", "where": ["mlp.*", "attention.{q,v}"], "rank": 4}))
    assert len(alone) == 2
    for path, value in alone.items():
        close(reference=value, result=among[path], drift=0.0)
    first, second = alone.values()
    rejects(reference=first, result=second, drift=EXACT)


def test_another_seed_or_name_is_another_adapter():
    step = {"pass": "lora", "where": "attention.q", "rank": 4}
    (one, *_), (two, *_), (three, *_) = (drawn(live).values() for live in (apply("llama", step), apply("llama", step, seed=1), apply("llama", {**step, "name": "fr"})))
    rejects(reference=one, result=two, drift=EXACT)
    rejects(reference=one, result=three, drift=EXACT)


def test_initial_values_have_the_spread_that_the_pass_says():
    live = rewrite(model_of("gated"), {"passes": [{"pass": "lora", "where": "linear", "rank": 12}]}, example=TOYS["gated"].inputs(2, 7))
    for path, value in drawn(live).items():
        assert abs(value.std().item() * math.sqrt(value.shape[1]) - 1) < 0.3, path
    assert all(not tensor_of(live, path).any() for path in live.report.made if path.endswith(".up"))
