"""Several named adapters in one live model: switched bit for bit, combined by effect, saved one by one."""

import pytest
import torch
from checks import close, rejects, rounding, tensor_of
from models import build

from rewrite import Refused, adapters, load, rewrite, save
from rewrite import graph as g

LORA, IA3 = {"pass": "lora", "where": "attention.{q,v}", "rank": 4}, {"pass": "ia3"}
IDS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))


def logits(live):
    with torch.no_grad():
        return live(input_ids=IDS).logits


def awake(live, name):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for path in live.report.made:
            if f".{name}." in path:
                tensor = tensor_of(live, path)
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return live


def two(base):
    """A live model with the adapters fr and de, fr in use."""
    live = rewrite(base, {"passes": []}).eval()
    known = adapters(live)
    known.add("fr", [LORA])
    awake(live, "fr")
    known.add("de", [{**LORA, "rank": 3, "alpha": 7.0}])
    awake(live, "de")
    known.use("fr")
    return live, known


def test_switching():
    base = build("llama")
    live, known = two(base)
    assert known.names == ("fr", "de") and known.active == ("fr",)
    alone = awake(rewrite(base, {"passes": [{**LORA, "name": "fr"}]}).eval(), "fr")
    fr = logits(live)
    close(reference=logits(alone), result=fr, drift=0.0)
    weights = {name: id(p) for name, p in live.named_parameters()}
    known.use("de")
    rejects(reference=fr, result=logits(live), drift=rounding(torch.float32))
    known.use()
    close(reference=logits(base), result=logits(live), drift=0.0)
    assert not any(p.requires_grad for p in live.parameters())
    known.use("fr", "de")
    both = logits(live)
    rejects(reference=fr, result=both, drift=rounding(torch.float32))
    known.use("fr")
    close(reference=fr, result=logits(live), drift=0.0)
    assert weights == {name: id(p) for name, p in live.named_parameters()}
    assert {name for name, p in live.named_parameters() if p.requires_grad} == {name for name in weights if ".fr." in name}
    generated = live.generate(IDS, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, alone.generate(IDS, max_new_tokens=3, do_sample=False))


def test_an_optimizer_keeps_its_parameters():
    live, known = two(build("llama"))
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


def test_combine_is_the_sum_of_effects():
    live, known = two(build("llama").double())
    known.combine("mix", {"fr": 0.7, "de": -0.3})
    known.use("mix")
    layer, x = "model.layers.0.self_attn.q_proj.lora", torch.randn(5, 24, dtype=torch.float64)
    t = lambda name: g.attribute(live, f"{layer}.{name}").detach()  # noqa: E731
    wanted = 0.7 * 16 / 4 * t("fr.up") @ t("fr.down") @ x.T - 0.3 * 7 / 3 * t("de.up") @ t("de.down") @ x.T
    close(reference=wanted, result=t("mix.up") @ t("mix.down") @ x.T, drift=1e-12)
    rejects(reference=wanted, result=0.7 * t("fr.up") @ t("fr.down") @ x.T, drift=1e-12)
    assert known.steps_of("mix")[0].options.rank == 7 == known.steps_of("mix")[0].options.alpha


def test_deleting_and_refusing():
    live, known = two(build("llama"))
    fr = logits(live)
    with pytest.raises(Refused, match='"fr" is there already'):
        known.add("fr", [LORA])
    with pytest.raises(Refused, match='there is no "it". There are: fr, de'):
        known.use("it")
    with pytest.raises(Refused, match="rank 400 is above"):
        known.add("it", [{**LORA, "rank": 400}])
    with pytest.raises(Refused, match="trains tensors of the model itself"):
        known.add("it", [{"pass": "bitfit", "where": "norm", "create": True}])
    with pytest.raises(Refused, match="same passes at the same places"):
        known.add("it", [IA3])
        known.use("fr")
        known.combine("mix", {"fr": 1.0, "it": 1.0})
    close(reference=fr, result=logits(live), drift=0.0)
    known.delete("it")
    known.delete("de")
    assert known.names == ("fr",) and not any(".de." in name or ".it." in name for name in live.state_dict())
    close(reference=fr, result=logits(live), drift=0.0)


def test_saved_each_in_a_folder_of_its_own(tmp_path):
    base = build("llama")
    live, known = two(base)
    with pytest.raises(Refused, match=r"not in use \(de\) would be left out"):
        save(live, tmp_path / "whole")
    known.save(tmp_path / "all")
    for name in ("fr", "de"):
        known.use(name)
        close(reference=logits(live), result=logits(load(base, tmp_path / "all" / name).eval()), drift=0.0)
    again = rewrite(base, {"passes": []}).eval()
    for name in ("fr", "de"):
        adapters(again).load(tmp_path / "all" / name, name)
    adapters(again).use("fr")
    known.use("fr")
    close(reference=logits(live), result=logits(again), drift=0.0)


def test_the_slots_of_a_batch(tmp_path):
    """Trained alone, put into its slot; taken out of it, loaded alone."""
    base = build("llama")
    alone = awake(rewrite(base, {"passes": [LORA]}).eval(), "default")
    live = rewrite(base, {"passes": [{"batch": {"fr": [LORA], "de": [LORA], "it": [IA3]}}]}).eval()
    assert adapters(live).names == ("fr", "de", "it")
    adapters(live).load(save(alone, tmp_path / "alone"), "de")
    ids = torch.tensor([1, -1])
    rows = live(input_ids=IDS, adapter_ids=ids).logits.detach()
    close(reference=logits(alone)[:1], result=rows[:1], drift=rounding(torch.float32))
    rejects(reference=logits(base)[:1], result=rows[:1], drift=rounding(torch.float32))
    again = load(base, adapters(live).save(tmp_path / "slot", "de")).eval()
    close(reference=logits(alone), result=logits(again), drift=0.0)
    with pytest.raises(Refused, match="its steps are not those of the adapter 'it'"):
        adapters(live).load(tmp_path / "slot", "it")
