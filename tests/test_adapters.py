"""Several named adapters in one live model: switched bit for bit, combined by effect, saved one by one."""

import copy
import functools
import importlib

import peft
import pytest
import torch
from checks import captured, close, model_of, rejects, rounding, tensor_of

from rewrite import Refused, adapters, load, pipeline, rewrite, save, training
from rewrite import graph as g

LORA, IA3, BITFIT = {"pass": "lora", "where": "attention.{q,v}", "rank": 4}, {"pass": "ia3"}, {"pass": "bitfit", "where": "attention.{q,k}"}
IDS = torch.randint(3, 20, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


@functools.cache
def base():
    return copy.deepcopy(model_of("gated")).double()


def logits(live):
    with torch.no_grad():
        return live(input_ids=IDS).logits


def awake(live, name):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for path in live.report.made:
            if f".{name}." in path:
                tensor = tensor_of(live, path)
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return live


def two():
    """A live model with the adapters fr and de, fr in use."""
    live = rewrite(base(), {"passes": []}).eval()
    known = adapters(live)
    known.add("fr", [LORA])
    awake(live, "fr")
    known.add("de", [{**LORA, "rank": 3, "alpha": 7.0}])
    awake(live, "de")
    known.use("fr")
    return live, known


def test_switching():
    live, known = two()
    assert known.names == ("fr", "de") and known.active == ("fr",)
    alone = awake(rewrite(base(), {"passes": [{**LORA, "name": "fr"}]}).eval(), "fr")
    fr = logits(live)
    close(reference=logits(alone), result=fr, drift=0.0)
    weights = {name: id(p) for name, p in live.named_parameters()}
    known.use("de")
    rejects(reference=fr, result=logits(live), drift=rounding(torch.float64))
    known.use()
    close(reference=logits(base()), result=logits(live), drift=0.0)
    assert not any(p.requires_grad for p in live.parameters())
    known.use("fr", "de")
    both = logits(live)
    rejects(reference=fr, result=both, drift=rounding(torch.float64))
    known.use("fr")
    close(reference=fr, result=logits(live), drift=0.0)
    assert weights == {name: id(p) for name, p in live.named_parameters()}
    assert {name for name, p in live.named_parameters() if p.requires_grad} == {name for name in weights if ".fr." in name}
    generated = live.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, alone.generate(IDS, max_new_tokens=3, do_sample=False))


def test_an_optimizer_keeps_its_parameters():
    live, known = two()
    optimizer = torch.optim.AdamW([p for name, p in live.named_parameters() if ".fr." in name or ".de." in name], lr=0.01)
    kept = {name: p.detach().clone() for name, p in live.named_parameters()}
    for name in ("fr", "de"):
        known.use(name)
        optimizer.zero_grad()
        live(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        changed = {path for path, p in live.named_parameters() if not torch.equal(kept[path], p)}
        assert changed == {path for path in kept if ".fr." in path or (name == "de" and ".de." in path)}
        kept |= {path: kept[path] for path in kept}


def test_switching_back_runs_no_pass(monkeypatch):
    live, known = two()
    for names in ((), ("de",), ("de", "fr")):
        known.use(*names)
    with monkeypatch.context() as context:
        context.setattr(importlib.import_module("rewrite.adapters"), "run_again", None)  # none of what follows runs a pass
        found = {names: (known.use(*names), logits(live))[1] for names in ((), ("fr",), ("de",), ("de", "fr"))}
        close(reference=logits(base()), result=found[()], drift=0.0)
        known.use("fr")
        close(reference=found["fr",], result=logits(live), drift=0.0)
        rejects(reference=found["de",], result=logits(live), drift=rounding(torch.float64))
        assert {name.split(".")[-2] for name, p in live.named_parameters() if p.requires_grad} == {"fr"}
        assert [step.name for step in live.spec.passes] == ["fr"] == [step.name for step in live.report.applied]
        awake(live, "fr")  # as if it had been trained
        trained = logits(live)
        rejects(reference=found["fr",], result=trained, drift=rounding(torch.float64))
        known.use("de")
        known.use("fr")
        close(reference=trained, result=logits(live), drift=0.0)
        twin = copy.deepcopy(live)
    adapters(twin).use("de")  # what is kept belongs to one tree
    close(reference=found["de",], result=logits(twin), drift=0.0)
    close(reference=trained, result=logits(live), drift=0.0)
    known.delete("de")
    known.add("de", [{**LORA, "rank": 2}])
    known.use("de")
    assert live.model.layers[0].self_attn.q_proj.lora.de.down.shape[0] == 2
    close(reference=logits(base()), result=logits(live), drift=0.0)


def test_hooks_go_on_where_they_were():
    live, known = two()
    known.add("dy", [{"pass": "dylora", "rank": 3}])
    optimizer = training(live).optimizer(torch.optim.SGD, lr=0.01)
    live.train()
    for names in (("dy",), ("fr",), ("dy",)):
        known.use(*names)
        training(live).step(optimizer, lambda: live(input_ids=IDS, labels=IDS).loss)
    assert training(live).done == 2  # fr has no hooks, and counts nothing
    training(live).finish()
    known.use("fr")
    known.use("dy")  # what it remembered is gone, and made anew
    assert training(live).done == 0


# ---- base tensors that an adapter trains --------------------------------------------------------------------------------------


def test_each_adapter_has_its_own_biases():
    live, known = two()
    bias, mine = "model.layers.0.self_attn.q_proj.bias", {}
    known.use()
    start, where = live.get_parameter(bias), live.get_parameter(bias).data_ptr()
    for name, scale in (("b1", 0.5), ("b2", 0.1)):
        known.add(name, [BITFIT])
        mine[name] = live.get_parameter(bias)
        optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=scale)
        live(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        mine[name, "logits"], mine[name, "value"] = logits(live), mine[name].detach().clone()
        known.use()
        close(reference=logits(base()), result=logits(live), drift=0.0)
        assert live.get_parameter(bias) is start and start.data_ptr() == where and not any(p.requires_grad for p in live.parameters())
    for name in ("b1", "b2"):
        known.use(name)
        assert live.get_parameter(bias) is mine[name] and mine[name].requires_grad and torch.equal(mine[name], mine[name, "value"])
        close(reference=mine[name, "logits"], result=logits(live), drift=0.0)
        rejects(reference=logits(base()), result=logits(live), drift=rounding(torch.float64))
        known.use(name, "fr")
        assert live.get_parameter(bias) is mine[name]
    rejects(reference=mine["b1", "logits"], result=mine["b2", "logits"], drift=rounding(torch.float64))
    known.use("b1")
    with pytest.raises(Refused, match=r'"b1" and "b2" train @model.layers.0.self_attn.*one value of it at a time'):
        known.use("b1", "b2")
    close(reference=mine["b1", "logits"], result=logits(live), drift=0.0)
    assert live.get_parameter(bias) is mine["b1"]
    known.use()
    known.combine("mix", {"b1": 0.5, "b2": 2.0})
    close(reference=start + 0.5 * (mine["b1"] - start) + 2.0 * (mine["b2"] - start), result=live.get_parameter(bias), drift=rounding(torch.float64))
    known.delete("mix")
    close(reference=logits(base()), result=logits(live), drift=0.0)
    live.float()
    known.use("b1")
    assert live.get_parameter(bias) is mine["b1"] and mine["b1"].dtype == torch.float32  # cast like the rest


def test_own_biases_are_saved_and_loaded(tmp_path):
    live, known = two()
    known.use()
    known.add("b1", [BITFIT])
    with torch.no_grad():
        for p in live.parameters():
            p += 0.1 * p.requires_grad
    known.use("fr", "b1")
    together = logits(live)
    known.save(tmp_path / "all")
    known.delete("de")  # which is not in use, and would be left out
    save_of_both = save(live, tmp_path / "both")
    for folder in (tmp_path / "all", save_of_both):
        again = rewrite(base(), {"passes": []}).eval()
        assert set(adapters(again).load(folder)) == set(adapters(again).names) >= {"fr", "b1"} and not adapters(again).active
        close(reference=logits(base()), result=logits(again), drift=0.0)
        adapters(again).use("fr", "b1")
        close(reference=together, result=logits(again), drift=0.0)
        adapters(again).use("fr")
        rejects(reference=together, result=logits(again), drift=rounding(torch.float64))
    close(reference=together, result=logits(load(base(), save_of_both).eval()), drift=0.0)
    with pytest.raises(Refused, match=r"holds several adapters \(fr, b1\). Leave out the name"):
        adapters(again).load(save_of_both, "it")
    first = rewrite(base(), {"passes": [{**BITFIT, "name": "b1"}]})
    with pytest.raises(Refused, match='bitfit of "b1" trains tensors of the model itself, and what they were before is not kept'):
        adapters(first).use()


def test_combine_is_the_sum_of_effects():
    live, known = two()
    known.combine("mix", {"fr": 0.7, "de": -0.3})
    known.use("mix")
    layer, x = "model.layers.0.self_attn.q_proj.lora", torch.randn(5, 24, dtype=torch.float64)
    t = lambda name: g.attribute(live, f"{layer}.{name}").detach()  # noqa: E731
    wanted = 0.7 * 16 / 4 * t("fr.up") @ t("fr.down") @ x.T - 0.3 * 7 / 3 * t("de.up") @ t("de.down") @ x.T
    close(reference=wanted, result=t("mix.up") @ t("mix.down") @ x.T, drift=1e-12)
    rejects(reference=wanted, result=0.7 * t("fr.up") @ t("fr.down") @ x.T, drift=1e-12)
    assert known.steps_of("mix")[0].options.rank == 7 == known.steps_of("mix")[0].options.alpha


LORAS = {"pass": "lora", "where": ["attention.{q,v}", "embed"], "rank": 4, "alpha": 16.0}, {"pass": "lora", "where": ["attention.{q,v}", "embed"], "rank": 3, "alpha": 7.0}
TARGETS = dict(target_modules=["q_proj", "v_proj", "embed_tokens"])
OF_LORA = {"down": ("lora_A", "lora_embedding_A"), "up": ("lora_B", "lora_embedding_B")}
COMBINED = {
    "lora, side by side": (LORAS, [peft.LoraConfig(r=4, lora_alpha=16, **TARGETS), peft.LoraConfig(r=3, lora_alpha=7, **TARGETS)], OF_LORA, dict(combination_type="cat"), dict(combination_type="svd", svd_rank=6)),
    "lora, to the same rank": (LORAS, [peft.LoraConfig(r=4, lora_alpha=16, **TARGETS), peft.LoraConfig(r=3, lora_alpha=7, **TARGETS)], OF_LORA, dict(combination_type="svd", svd_rank=7), dict(combination_type="svd", svd_rank=4)),
    "ia3": ((IA3, IA3), [peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])] * 2, {"gain": ("ia3_l",)}, {}, None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", COMBINED)
def test_combine_is_peft_s(case):
    """From copied weights, its `cat` (of LoRA, also its `svd` at the sum of the ranks, which is exact) and its weighted IA3."""
    steps, configs, names, kind, other = COMBINED[case]
    live = rewrite(base(), {"passes": []}).eval()
    known, wrapped = adapters(live), peft.get_peft_model(copy.deepcopy(base()), configs[0], "fr")
    wrapped.add_adapter("de", configs[1])
    for name, step in zip(("fr", "de"), steps):
        known.add(name, [step])
        awake(live, name)
        for path in [path for path in live.report.made if f".{name}." in path]:
            module, _, part = path.partition(f".{step['pass']}.{name}.")
            layer = wrapped.get_submodule(f"base_model.model.{module}")
            theirs = next(getattr(layer, one)[name] for one in names[part] if name in getattr(layer, one, {}))
            theirs = getattr(theirs, "weight", theirs)
            theirs.data = tensor_of(live, path).detach().reshape(theirs.shape).clone()
    weights = {"fr": 0.75, "de": -0.5}  # numbers of float32, which PEFT makes of them
    known.combine("mix", weights)
    known.use("mix")
    for number, chosen in enumerate([kind, *([other] if other else [])]):
        wrapped.base_model.add_weighted_adapter(list(weights), list(weights.values()), f"mix{number}", **chosen)
        wrapped.set_adapter(f"mix{number}")
        (rejects if number else close)(reference=logits(wrapped), result=logits(live), drift=rounding(torch.float64))
    wrapped.set_adapter("fr")
    rejects(reference=logits(wrapped), result=logits(live), drift=rounding(torch.float64))


def test_deleting_and_refusing():
    live, known = two()
    fr = logits(live)
    with pytest.raises(Refused, match='"fr" is there already'):
        known.add("fr", [LORA])
    with pytest.raises(Refused, match='there is no "it". There are: fr, de'):
        known.use("it")
    with pytest.raises(Refused, match="rank 400 is above"):
        known.add("it", [{**LORA, "rank": 400}])
    with pytest.raises(Refused, match="same passes at the same places"):
        known.add("it", [IA3])
        known.use("fr")
        known.combine("mix", {"fr": 1.0, "it": 1.0})
    close(reference=fr, result=logits(live), drift=0.0)
    known.delete("it")
    known.use("de", "fr")
    known.delete("de")
    assert known.names == ("fr",) and not any(".de." in name or ".it." in name for name in live.state_dict())
    close(reference=fr, result=logits(live), drift=0.0)


def test_saved_each_in_a_folder_of_its_own(tmp_path):
    live, known = two()
    with pytest.raises(Refused, match=r"not in use \(de\) would be left out"):
        save(live, tmp_path / "whole")
    known.save(tmp_path / "all")
    for name in ("fr", "de"):
        known.use(name)
        close(reference=logits(live), result=logits(load(base(), tmp_path / "all" / name).eval()), drift=0.0)
    again = rewrite(base(), {"passes": []}).eval()
    for name in ("fr", "de"):
        adapters(again).load(tmp_path / "all" / name, name)
    adapters(again).use("fr")
    known.use("fr")
    close(reference=logits(live), result=logits(again), drift=0.0)


def test_the_slots_of_a_batch(tmp_path):
    """Trained alone, put into its slot; taken out of it, loaded alone."""
    alone = awake(rewrite(base(), {"passes": [LORA]}).eval(), "default")
    live = rewrite(base(), {"passes": [{"batch": {"fr": [LORA], "de": [LORA], "it": [IA3]}}]}).eval()
    assert adapters(live).names == ("fr", "de", "it")
    adapters(live).load(save(alone, tmp_path / "alone"), "de")
    ids = torch.tensor([1, -1])
    rows = live(input_ids=IDS, adapter_ids=ids).logits.detach()
    close(reference=logits(alone)[:1], result=rows[:1], drift=rounding(torch.float64))
    rejects(reference=logits(base())[:1], result=rows[:1], drift=rounding(torch.float64))
    again = load(base(), adapters(live).save(tmp_path / "slot", "de")).eval()
    close(reference=logits(alone), result=logits(again), drift=0.0)
    with pytest.raises(Refused, match="its steps are not those of the adapter 'it'"):
        adapters(live).load(tmp_path / "slot", "it")
