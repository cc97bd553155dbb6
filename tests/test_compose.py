"""Passes in composition: one after the other, side by side, mixed; each against a formula in float64 written here."""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers as T
from checks import TOYS, close, model_of, rejects, rounding, tensor_of, train, unchanged, wake
from torch import nn
from torch.nn import functional as F

from rewrite import Pass, Refused, Spec, SpecError, load, merge, rewrite, save, show
from rewrite.spec.forms import Form
from tests.models import build, example

DOUBLE = rounding(torch.float64)


class Gated(nn.Module):
    """One sub-layer whose every value can be written down."""

    def __init__(self, width=24, inner=56):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x):
        z = self.norm(x)
        return x + self.down(F.silu(self.gate(z)) * self.up(z))


@functools.cache
def gated():
    torch.manual_seed(0)
    return Gated().eval()


def inputs(batch=2, length=7):
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(batch), dtype=torch.float64)


def awake(passes, more=(), model=None):
    """A live model in float64 whose every new tensor has some value, with those tensors by the end of their path."""
    live = wake(rewrite(model or gated(), Spec.parse({"passes": passes}, more), example=(inputs().float(),)).double())
    return live, lambda end: next(tensor_of(live, path).detach() for path in live.report.made if path.endswith(end))


def formula(x, gate=None, up=None, down=None, z=lambda z: (z, z)):
    """The model in plain float64; `gate`, `up` and `down` make a value from the linear's input and result."""
    m = {name: value.detach().double() for name, value in gated().state_dict().items()}
    same = lambda x, y: y  # noqa: E731
    to_gate, to_up = z(F.layer_norm(x, (24,), m["norm.weight"], m["norm.bias"]))
    g = (gate or same)(to_gate, F.linear(to_gate, m["gate.weight"], m["gate.bias"]))
    u = (up or same)(to_up, F.linear(to_up, m["up.weight"], m["up.bias"]))
    h = F.silu(g) * u
    return x + (down or same)(h, F.linear(h, m["down.weight"]))


LORA = {"pass": "lora", "where": "mlp.up", "rank": 4}
IA3 = {"pass": "ia3", "where": "mlp.up"}
DOWN = {"pass": "lora", "where": "mlp.down", "rank": 4}
ADAPTER = {"pass": "adapter", "where": "mlp", "bottleneck": 6}


def lora(tensors, x, at="lora.default"):
    return 4.0 * x @ tensors(f"{at}.down").T @ tensors(f"{at}.up").T


def adapter(tensors, y, at="adapter.default"):
    return F.relu(y @ tensors(f"{at}.down").T + tensors(f"{at}.down_bias")) @ tensors(f"{at}.up").T + tensors(f"{at}.up_bias")


# ---- one after the other, side by side -----------------------------------------------------------------------------------

FIRST = lambda t: formula(inputs(), up=lambda x, y: (y + lora(t, x)) * t("gain"))  # noqa: E731
SECOND = lambda t: formula(inputs(), up=lambda x, y: y * t("gain") + lora(t, x))  # noqa: E731
BESIDE = lambda t: formula(inputs(), down=lambda x, y: y + lora(t, x) + adapter(t, y))  # noqa: E731
BEHIND = lambda t: formula(inputs(), down=lambda x, y: y + lora(t, x) + adapter(t, y + lora(t, x)))  # noqa: E731


@pytest.mark.parametrize(
    "passes, right, wrong",
    [
        ([LORA, IA3], FIRST, SECOND),
        ([IA3, LORA], SECOND, FIRST),
        ([{"parallel": [IA3, LORA]}], SECOND, FIRST),  # the gain is of what stood there before, lora reads x
        ([{"parallel": [LORA, IA3]}], SECOND, FIRST),
        ([{"parallel": [DOWN, ADAPTER]}], BESIDE, BEHIND),  # mlp and its last linear have one result
        ([{"parallel": [ADAPTER, DOWN]}], BESIDE, BEHIND),
        ([DOWN, ADAPTER], BEHIND, BESIDE),
    ],
)
def test_order_means_what_it_says(passes, right, wrong):
    live, tensors = awake(passes)
    close(reference=right(tensors), result=live(inputs()), drift=DOUBLE)
    rejects(reference=wrong(tensors), result=live(inputs()), drift=DOUBLE)
    if not any("adapter" in path for path in live.report.made):
        close(reference=right(tensors), result=merge(live)(inputs()), drift=DOUBLE)
        return
    with pytest.raises(Refused, match="not affine"):
        merge(live)


TEXT = {
    "lora, then ia3": (
        [LORA, IA3],
        """
%linear_1 = linear(%layer_norm, @up.weight ❄, @up.bias ❄)  mlp.up
%linear_default = linear(%layer_norm, @up.lora.default.down)  made.lora
%linear_default_1 = linear(%linear_default, @up.lora.default.up)  made.lora
%mul_tensor = mul.Tensor(%linear_default_1, 4.0)  made.lora
%add_tensor = add.Tensor(%linear_1, %mul_tensor)  made.lora
%mul_tensor_1 = mul.Tensor(%add_tensor, @up.ia3.default.gain)  made.ia3
%mul = mul.Tensor(%silu, %mul_tensor_1)
""",
    ),
    "ia3, then lora": (
        [IA3, LORA],
        """
%linear_1 = linear(%layer_norm, @up.weight ❄, @up.bias ❄)  mlp.up
%mul_tensor = mul.Tensor(%linear_1, @up.ia3.default.gain)  made.ia3
%linear_default = linear(%layer_norm, @up.lora.default.down)  made.lora
%linear_default_1 = linear(%linear_default, @up.lora.default.up)  made.lora
%mul_tensor_1 = mul.Tensor(%linear_default_1, 4.0)  made.lora
%add_tensor = add.Tensor(%mul_tensor, %mul_tensor_1)  made.lora
%mul = mul.Tensor(%silu, %add_tensor)
""",
    ),
    "lora beside ia3": (
        [{"parallel": [LORA, IA3]}],
        """
%linear_1 = linear(%layer_norm, @up.weight ❄, @up.bias ❄)  mlp.up
%linear_default = linear(%layer_norm, @up.lora.default.down)  made.lora
%linear_default_1 = linear(%linear_default, @up.lora.default.up)  made.lora
%mul_tensor = mul.Tensor(%linear_default_1, 4.0)  made.lora
%add_tensor = add.Tensor(%linear_1, %mul_tensor)  made.lora
%mul_tensor_1 = mul.Tensor(%linear_1, @up.ia3.default.gain)  made.ia3
%sub_tensor = sub.Tensor(%mul_tensor_1, %linear_1)  made.parallel
%add_tensor_1 = add.Tensor(%add_tensor, %sub_tensor)  made.parallel
%mul = mul.Tensor(%silu, %add_tensor_1)
""",
    ),
    "adapter beside lora": (
        [{"parallel": [ADAPTER, DOWN]}],
        """
%linear_2 = linear(%mul, @down.weight ❄)  mlp.down
%linear_default = linear(%linear_2, @adapter.default.down, @adapter.default.down_bias)  made.adapter
%relu_default = relu(%linear_default)  made.adapter
%linear_default_1 = linear(%relu_default, @adapter.default.up, @adapter.default.up_bias)  made.adapter
%mul_tensor = mul.Tensor(%linear_default_1, 1.0)  made.adapter
%add_tensor = add.Tensor(%linear_2, %mul_tensor)  made.adapter
%linear_default_2 = linear(%mul, @down.lora.default.down)  made.lora
%linear_default_3 = linear(%linear_default_2, @down.lora.default.up)  made.lora
%mul_tensor_1 = mul.Tensor(%linear_default_3, 4.0)  made.lora
%add_tensor_2 = add.Tensor(%add_tensor, %mul_tensor_1)  made.parallel
%add = add.Tensor(%x, %add_tensor_2)
""",
    ),
}


@pytest.mark.parametrize("name", TEXT)
def test_how_it_reads(name):
    passes, wanted = TEXT[name]
    live = rewrite(gated(), {"passes": passes}, example=(inputs().float(),))
    lines = ["  ".join(part for i, part in enumerate(line.split("  ")) if i != 1) for line in show(live.graph).splitlines()]
    wanted = [line.removesuffix("  mlp.up").removesuffix("  mlp.down") for line in wanted.strip().splitlines()]
    start = lines.index(wanted[0])
    assert lines[start : start + len(wanted)] == wanted


def test_at_the_start_nothing_changes_to_the_bit():
    live = rewrite(gated(), {"passes": [{"parallel": [LORA, IA3, DOWN, ADAPTER, {**LORA, "name": "other"}]}]}, example=(inputs().float(),))
    for batch, length in ((2, 7), (1, 1), (3, 11)):
        close(reference=gated()(inputs(batch, length).float()), result=live(inputs(batch, length).float()), drift=0.0)


@dataclass(frozen=True)
class Nudge(Pass):
    """Adds a vector to what a site reads."""

    role = "mlp"

    def params(self, x):
        return {"shift": x.new_zeros(x.shape[-1])}

    def input(self, x, shift):
        return x + shift


def test_what_is_read_at_sites_within_sites():
    steps = [{"pass": "nudge", "where": "mlp"}, {"pass": "nudge", "where": "mlp.gate"}]
    live, _ = awake([{"parallel": steps}], [Nudge])
    outer, inner = (tensor_of(live, path).detach() for path in ("nudge.default.shift", "gate.nudge.default.shift"))
    close(reference=formula(inputs(), z=lambda z: (z + outer + inner, z + outer)), result=live(inputs()), drift=DOUBLE)
    rejects(reference=formula(inputs(), z=lambda z: (z + inner, z + outer)), result=live(inputs()), drift=DOUBLE)


def test_weights_are_added_up_too():
    live, _ = awake([{"parallel": [{**LORA, "pass": "dora"}, {**LORA, "pass": "dora", "name": "b"}]}])
    each = []
    for name in ("default", "b"):
        one = rewrite(gated(), {"passes": [{**LORA, "pass": "dora", "name": name}]}, example=(inputs().float(),)).double()
        one.load_state_dict({path: tensor_of(live, path) for path in one.report.made}, strict=False)
        each.append(merge(one).up.weight)
    close(reference=each[0] + each[1] - gated().up.weight.double(), result=merge(live).up.weight, drift=DOUBLE)
    rejects(reference=each[0], result=merge(live).up.weight, drift=DOUBLE)


def test_rows_of_one_fused_projection():
    model, given = build("gpt2"), example("gpt2")
    steps = [{"pass": "lora", "where": "attention.q", "rank": 3}, {"pass": "ia3", "where": "attention.{k,v}"}]
    beside, after = (wake(rewrite(model, {"passes": passes}).double()) for passes in ([{"parallel": steps}], steps))
    close(reference=after(**given).logits, result=beside(**given).logits, drift=DOUBLE)
    close(reference=beside(**given).logits, result=merge(beside)(**given).logits, drift=DOUBLE)
    with torch.no_grad():
        next(tensor_of(beside, path) for path in beside.report.made if "ia3" in path).mul_(1.5)
    rejects(reference=after(**given).logits, result=beside(**given).logits, drift=DOUBLE)


def test_forms_in_forms_and_lists():
    live, t = awake([{"parallel": [[LORA, IA3], {"parallel": [DOWN, ADAPTER]}]}])
    right = formula(inputs(), up=lambda x, y: (y + lora(t, x, "up.lora.default")) * t("gain"), down=lambda x, y: y + lora(t, x, "down.lora.default") + adapter(t, y))
    close(reference=right, result=live(inputs()), drift=DOUBLE)
    assert [step.place for step in live.report.applied] == ["passes[0].parallel[0][0]", "passes[0].parallel[0][1]", "passes[0].parallel[1].parallel[0]", "passes[0].parallel[1].parallel[1]"]
    assert Spec.parse(json.loads(live.spec.to_json())) == live.spec


def test_steps_that_were_made_by_hand_do_not_share_their_tensors():
    passes = [{"parallel": [LORA, {**LORA, "name": "b", "rank": 2}]}]
    (form,) = Spec.parse({"passes": passes}).passes
    bare = Form("parallel", tuple(replace(step, place="") for step in form.steps))
    live = rewrite(gated(), Spec(passes=(bare,)), example=(inputs().float(),))
    assert tensor_of(live, "up.lora.default.down").shape[0] == 4 and tensor_of(live, "up.lora.b.down").shape[0] == 2


def test_what_comes_after_a_form_sees_all_of_it():
    form = {"parallel": [LORA, {**ADAPTER, "name": "de"}]}
    live = rewrite(gated(), {"passes": [form, {"pass": "freeze", "where": "mlp"}]}, example=(inputs().float(),))
    assert not any(p.requires_grad for p in live.parameters())
    assert "parallel: lora" in str(live.report) and "parallel: adapter de" in str(live.report)
    live, t = awake([form, {"pass": "merge", "partial": True}, DOWN])
    assert sorted(live.report.made) == sorted([*(f"adapter.de.{name}" for name in ("down", "down_bias", "up", "up_bias")), "down.lora.default.down", "down.lora.default.up"])
    again, t = awake([form, DOWN])
    right = formula(inputs(), up=lambda x, y: y + lora(t, x, "up.lora.default"), down=lambda x, y: y + adapter(t, y, "adapter.de") + lora(t, x, "down.lora.default"))
    close(reference=right, result=again(inputs()), drift=DOUBLE)
    rejects(reference=right, result=live(inputs()), drift=DOUBLE)


# ---- a mixing pass -------------------------------------------------------------------------------------------------------

TWO = [{**ADAPTER, "name": name} for name in ("de", "fr")]
MIX = {"pass": "adapter_fusion"}
FUSED = {"choose": TWO, "by": {**MIX, "temperature": 2.0}}


def fusion(t, y):
    added = torch.stack([adapter(t, y, f"adapter.{name}") for name in ("de", "fr")])
    at = "adapter_fusion.default"
    fit = ((y @ t(f"{at}.query")) * (added @ t(f"{at}.key"))).sum(-1) / 2.0
    return y + (torch.softmax(fit, 0).unsqueeze(-1) * (added @ t(f"{at}.value"))).sum(0)


def test_adapter_fusion():
    live, t = awake([FUSED])
    close(reference=formula(inputs(), down=lambda x, y: fusion(t, y)), result=live(inputs()), drift=DOUBLE)
    average = lambda x, y: y + sum(adapter(t, y, f"adapter.{name}") for name in ("de", "fr")) / 2  # noqa: E731
    rejects(reference=formula(inputs(), down=average), result=live(inputs()), drift=DOUBLE)
    assert {path for path, p in live.named_parameters() if p.requires_grad} == {f"adapter_fusion.default.{name}" for name in ("query", "key", "value")}
    both = rewrite(gated(), {"passes": [{**FUSED, "by": {"pass": "adapter_fusion", "train_choices": True}}]}, example=(inputs().float(),))
    assert {path for path, p in both.named_parameters() if p.requires_grad} == set(both.report.made)


def test_mixing_passes_of_one_name_at_other_places():
    """Their tensors stand at the sites that the steps of their choose have in common; the rows of the report count what trains when all is done."""
    of = lambda where: {"choose": [{**ADAPTER, "where": where, "name": name} for name in ("de", "fr")], "by": MIX}  # noqa: E731
    live = rewrite(model_of("gated"), {"passes": [{"parallel": [of("mlp"), of("attention.block")]}]})
    trained = sum(p.numel() for p in live.parameters() if p.requires_grad)
    assert {path.rpartition(".adapter_fusion.")[0].rpartition(".")[2] for path in live.report.made if "fusion" in path} == {"mlp", "self_attn"}
    assert [row.after.trainable for row in live.report.applied] == [0, 0, trained // 2, trained // 2, trained // 2, trained]
    assert len({row.after.trainable + row.after.frozen for row in live.report.applied}) == 6
    assert [a.after for a in live.report.applied[:-1]] == [b.before for b in live.report.applied[1:]]


def test_from_adapters_trained_each_by_itself_to_their_fusion(tmp_path):
    """Train and save two adapters, fuse them, train the mix alone."""
    toy, model = TOYS["written"], model_of("written")
    given = toy.inputs(2, 7)
    for number, step in enumerate(TWO):
        with unchanged(model):
            one = rewrite(model, {"seed": number, "passes": [step]}, example=given)
            train(one.train(), toy.loss, steps=4)
            save(one.eval(), tmp_path / step["name"])
    fused = rewrite(model, {"passes": [FUSED]}, example=given)
    for name in ("de", "fr"):
        left = fused.load_state_dict(safetensors.torch.load_file(tmp_path / name / "adapter.safetensors"), strict=False)
        assert not left.unexpected_keys
    alone = load(model, tmp_path / "de", example=given)
    for path in alone.report.made:
        assert torch.equal(tensor_of(alone, path), tensor_of(fused, path)) and tensor_of(fused, path).any()
    before = {path: tensor_of(fused, path).detach().clone() for path in fused.report.made}
    train(fused.train(), toy.loss, steps=3)
    moved = {path for path, value in before.items() if not torch.equal(value, tensor_of(fused, path))}
    assert moved == {path for path in fused.report.made if "adapter_fusion" in path}
    again = load(model, save(fused.eval(), tmp_path / "fused"), example=given)
    close(reference=toy.output(fused), result=toy.output(again), drift=0.0)


@dataclass(frozen=True)
class MoLE(Pass):
    """A mixer of a lab's own: LoRAs weighed by a gate that looks at all of their outputs (Wu et al. 2024, arXiv:2404.13628)."""

    freezes_choices = True

    def params(self, y, choices):
        return {"gate": y.new_zeros(len(choices), len(choices) * y.shape[-1]), "temperature": y.new_ones(())}

    def output(self, y, choices, gate, temperature):
        added = [choice - y for choice in choices]
        shares = torch.softmax(F.linear(torch.cat(added, -1), gate) / temperature, -1)
        return y + sum(shares[..., n : n + 1] * each for n, each in enumerate(added))


def test_a_mixer_of_ones_own():
    live, t = awake([{"choose": [{**LORA, "name": "a"}, {**LORA, "name": "b"}], "by": {"pass": "mole"}}], [MoLE])

    def mixed(x, y):
        added = torch.stack([lora(t, x, f"lora.{name}") for name in "ab"], -2)
        shares = torch.softmax(added.flatten(-2) @ t("gate").T / t("temperature"), -1)
        return y + (shares.unsqueeze(-2) @ added).squeeze(-2)

    close(reference=formula(inputs(), up=mixed), result=live(inputs()), drift=DOUBLE)
    rejects(reference=formula(inputs(), up=lambda x, y: y + lora(t, x, "lora.a")), result=live(inputs()), drift=DOUBLE)


def test_a_mixer_at_the_rows_of_a_fused_projection():
    """Each part is mixed by itself: with a gate of zeros, the mean of the two."""
    model, given = build("gpt2"), example("gpt2")
    choose = {"choose": [{"pass": "lora", "where": "attention.{q,v}", "rank": 3, "name": name} for name in "ab"], "by": {"pass": "mole"}}
    live = wake(rewrite(model, Spec.parse({"passes": [choose]}, [MoLE])).double())
    assert sum(path.endswith("gate") for path in live.report.made) == 4
    mean = rewrite(model, {"passes": [{"parallel": [{**step, "alpha": 8.0} for step in choose["choose"]]}]}).double()
    mean.load_state_dict({path: tensor_of(live, path) for path in mean.report.made}, strict=False)
    rejects(reference=mean(**given).logits, result=live(**given).logits, drift=DOUBLE)
    with torch.no_grad():
        for path in live.report.made:
            tensor_of(live, path).mul_(0.0) if path.endswith("gate") else None
    close(reference=mean(**given).logits, result=live(**given).logits, drift=DOUBLE)


def test_unipelt():
    live, t = awake([{"choose": [DOWN, {**ADAPTER, "read": "input"}], "by": {"pass": "unipelt"}}])

    def gated_(x, y):
        m = {name: value.detach().double() for name, value in gated().state_dict().items()}
        z = F.layer_norm(inputs(), (24,), m["norm.weight"], m["norm.bias"])
        gates = torch.sigmoid(z @ t("gate").T).mean(1, keepdim=True)
        return y + gates[..., :1] * lora(t, x) + gates[..., 1:] * adapter(t, z)

    close(reference=formula(inputs(), down=gated_), result=live(inputs()), drift=DOUBLE)
    rejects(reference=formula(inputs(), down=lambda x, y: y + lora(t, x)), result=live(inputs()), drift=DOUBLE)
    assert all(p.requires_grad for path, p in live.named_parameters() if path in live.report.made)


def test_unipelt_gates_a_prefix():
    """What the gate weighs is the prefix alone: as a prefix tuning whose keys and values are g times as large, g that of each row."""
    model, toy = model_of("written"), TOYS["written"]
    prefix = {"pass": "prefix_tuning", "where": {"role": "attention", "path": "blocks.0"}, "length": 3}
    live = wake(rewrite(model, {"passes": [{"choose": [prefix], "by": {"pass": "unipelt"}}]}, example=toy.inputs(2, 7)).double())
    plain = rewrite(model, {"passes": [prefix]}, example=toy.inputs(2, 7)).double()
    ids, block = toy.inputs(3, 5)["ids"], model.double().blocks[0]
    (gate,) = [tensor_of(live, path) for path in live.report.made if path.endswith("gate")]
    with torch.no_grad():
        shares = torch.sigmoid(block.norm1(model.tokens(ids)) @ gate.T).mean(1).flatten()
        model.float()
        for row in range(3):
            for path in plain.report.made:
                tensor_of(plain, path).copy_(shares[row] * tensor_of(live, path))
            close(reference=plain(ids[row : row + 1]), result=live(ids)[row : row + 1], drift=DOUBLE)
            rejects(reference=plain(ids[row : row + 1]), result=live(ids)[row - 1 : row or None], drift=DOUBLE)


# ---- values from further out ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Echo(Pass):
    """Adds what the block reads, and what the embedding gives."""

    role = "mlp"

    def params(self, y):
        return {"of_block": y.new_zeros(()), "of_embeds": y.new_zeros(())}

    def output(self, y, block_x, embeds, of_block, of_embeds):
        return y + of_block * block_x + of_embeds * embeds


def test_values_from_further_out():
    model, toy = model_of("written"), TOYS["written"]
    where = {"role": "mlp", "path": "blocks.1"}
    live = wake(rewrite(model, Spec.parse({"passes": [{"pass": "echo", "where": where}]}, [Echo]), example=toy.inputs(2, 7)))
    of_block, of_embeds = (tensor_of(live, path).item() for path in live.report.made)
    ids = toy.inputs(3, 5)["ids"]
    with torch.no_grad():
        embeds = model.tokens(ids)
        x = model.blocks[0](embeds)
        result = lambda a, b: model.head(model.norm(model.blocks[1](x) + a * x + b * embeds).mean(1))  # noqa: E731
        close(reference=result(of_block, of_embeds), result=live(ids), drift=rounding(torch.float32))
        rejects(reference=result(of_embeds, of_block), result=live(ids), drift=rounding(torch.float32))
    with unchanged(model), pytest.raises(Refused, match="'block_x', which there is not at this site"):
        rewrite(model, Spec.parse({"passes": [{"pass": "echo", "where": "head"}]}, [Echo]), example=toy.inputs(2, 7))


# ---- what is told --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, message",
    [
        ({"parallel": [LORA]}, "passes[0].parallel: expected list of at least 2 steps"),
        ({"parallel": [{**LORA, "rank": 0}, IA3]}, "passes[0].parallel[0].rank: expected int ≥ 1, got 0"),
        ({"parallel": [LORA, IA3], "where": "linear"}, 'passes[0]: "where" is not a key of "parallel". Keys: parallel.'),
        ({"parallel": [LORA, LORA]}, 'passes[0].parallel[1]: "lora" stands at "mlp.up" already (passes[0].parallel[0])'),
        ({"parallel": [LORA, {"pass": "merge"}]}, "passes[0].parallel[1]: merge replaces no value that another pass could work beside."),
        ({"parallel": [LORA, []]}, "passes[0].parallel[1]: an empty list of steps."),
        ({"parallel": [LORA, {"batch": {"fr": [IA3]}}]}, "passes[0].parallel[1]: a batch cannot stand beside other steps."),
        ({"parallel": [LORA, {"pass": "adapter_fusion"}]}, "passes[0].parallel[1]: adapter_fusion mixes what other passes make. Write"),
        ({"choose": [{"choose": TWO, "by": MIX}, {**ADAPTER, "name": "it"}], "by": MIX}, 'passes[0].by: "adapter_fusion" stands at "mlp" already (passes[0].choose[0].by) under the name "default".'),
        ({"pass": "adapter_fusion"}, "passes[0]: adapter_fusion mixes what other passes make. Write"),
        ({"choose": TWO}, 'passes[0]: "by" is missing'),
        ({"choose": TWO, "by": IA3}, "passes[0].by: ia3 mixes nothing"),
        ({"choose": TWO, "by": {"pass": "adapter_fusion", "where": "mlp"}}, "passes[0].by: adapter_fusion works where the steps of its choose do"),
        ({"choose": TWO, "by": {"pass": "adapter_fusion", "temperature": 0.0}}, "passes[0].by.temperature: expected number > 0"),
        ({"choose": [*TWO, {**TWO[0], "pass": "adaptor"}], "by": {"pass": "adapter_fusion"}}, 'passes[0].choose[2]: "adaptor" is not a pass. Did you mean "adapter'),
    ],
)
def test_a_wrong_form_is_told_with_its_place(step, message):
    with pytest.raises(SpecError) as caught:
        Spec.parse({"passes": [step]})
    assert message in str(caught.value)


@dataclass(frozen=True)
class First(Pass):
    """A mixer that forgets the others."""

    def output(self, choices):
        return choices[0]


@pytest.mark.parametrize(
    "step, message",
    [
        ({"choose": TWO, "by": {"pass": "first"}}, "passes[0].by: first reads nothing of @adapter.fr.down, which adapter has made"),
        ({"choose": [*TWO, {"pass": "bitfit", "where": "mlp.up"}], "by": {"pass": "adapter_fusion"}}, "passes[0].choose[2]: bitfit replaces no value, so there is nothing to choose"),
        ({"choose": [{**LORA, "pass": "dora"}], "by": {"pass": "adapter_fusion"}}, "passes[0].by: adapter_fusion mixes output, and a step of the choose replaces w at mlp.up at up"),
        ({"parallel": [LORA, {**IA3, "where": "router"}]}, 'passes[0].parallel[1]: ia3 found no site for "router"'),
        ({"parallel": [LORA, {**DOWN, "rank": 99}]}, "1 of 1 sites refused (passes[0].parallel[1])"),
    ],
)
def test_a_form_that_does_not_fit_the_model_is_refused(step, message):
    with unchanged(gated()), pytest.raises(Refused) as caught:
        rewrite(gated(), Spec.parse({"passes": [step]}, [First]), example=(inputs().float(),))
    assert message in str(caught.value)


def test_two_prefixes_side_by_side_are_refused():
    steps = [{"pass": "prefix_tuning", "where": "attention", "length": 3, "name": name} for name in "ab"]
    with pytest.raises(Refused, match="Write them one after the other"):
        rewrite(model_of("gated"), {"passes": [{"parallel": steps}]})


@pytest.mark.parametrize("name", ["mam", "s4", "unipelt", "adapter_fusion"])
def test_examples_fit_models_of_other_depths(name):
    path, ids = Path(__file__).parent.parent / "examples" / f"{name}.json", torch.arange(3, 17).reshape(2, 7)
    sizes = dict(vocab_size=20, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=56)
    decoder = T.LlamaForCausalLM(T.LlamaConfig(**sizes, num_key_value_heads=2))
    if name == "unipelt":
        with pytest.raises(Refused, match="looks at all tokens of a sequence at once, and this model also decodes"):
            rewrite(decoder, path)
        live = rewrite(T.BertForSequenceClassification(T.BertConfig(**sizes)), path)
        live(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    else:
        live = rewrite(decoder, path)
        live(input_ids=ids, labels=ids).loss.backward()
    trained = {path: p for path, p in live.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    if name == "s4":
        in_layers = {kind: {path.split("layers.")[1][0] for path, made in live.report.made.items() if made == kind} for kind in ("adapter", "prefix_tuning", "bitfit", "lora")}
        assert in_layers == {"adapter": set("012"), "prefix_tuning": set("123"), "bitfit": set("23"), "lora": set("03")}
