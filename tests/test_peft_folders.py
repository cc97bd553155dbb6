"""PEFT's folders: saved by one and loaded by the other, both ways, equal outputs and equal training; and what a folder may not do to us."""

import copy
import functools
import json
from pathlib import Path

import peft
import pytest
import torch
from checks import captured, close, rejects, rounding, unchanged, wake
from models import build, example
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rewrite import Refused, cli, load, merge, pipeline, rewrite, save
from rewrite.peft import read as reading

STEPS = 20
EXACT = rounding(torch.float64)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)
    monkeypatch.setattr(reading, "capture", captured)


@functools.cache
def base(family):
    return build(family).double()


def logits(model, family, seed=0):
    inputs = example(family, seed=seed)
    return model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}).logits


def losses(model, family):
    """Plain gradient descent, so that gradients count by size, not by sign."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = (logits(model, family, seed=step % 3) - 1).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def theirs(family, config):
    """PEFT's model over a copy of the base, all that trains moved."""
    made = peft.get_peft_model(copy.deepcopy(base(family)), config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in made.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return made


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CUT = {f"model.layers.{i}.self_attn.{name}.lora_E": kept for i in range(2) for name, kept in (("q_proj", [True, False, True, True]), ("v_proj", [False] * 4 if i else [True, False, False, False]))}
CASES = {
    "lora": ("llama", peft.LoraConfig(r=4, lora_alpha=7, target_modules=LINEARS, lora_dropout=0.1)),
    "lora all-linear, head": ("llama", peft.LoraConfig(r=3, target_modules="all-linear", modules_to_save=["lm_head"])),
    "lora regex": ("llama", peft.LoraConfig(r=3, target_modules=r".*layers\.[01]\.self_attn\.(q|v)_proj")),
    "lora ranks": ("llama", peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_rslora=True, rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 5})),
    "lora one layer": ("llama", peft.LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "lora embedding": ("llama", peft.LoraConfig(r=3, target_modules=["embed_tokens", "v_proj"])),
    "lora Conv1D": ("gpt2", peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "lora T5": ("t5", peft.LoraConfig(r=3, target_modules=["q", "v", "wo"])),
    "lora all biases": ("bert", peft.LoraConfig(r=3, target_modules=["query"], bias="all", modules_to_save=["classifier"])),
    "lora own biases": ("bert", peft.LoraConfig(r=3, target_modules=["query"], bias="lora_only")),
    "lora conv": ("vit", peft.LoraConfig(r=3, target_modules=["projection", "q_proj"])),
    "dora": ("llama", peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_dora=True)),
    "dora conv": ("vit", peft.LoraConfig(r=3, target_modules=["projection"], use_dora=True)),
    "adalora": ("llama", peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, tinit=10, tfinal=10, target_modules=["q_proj", "down_proj"])),
    "adalora cut": ("llama", peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, tinit=10, tfinal=10, target_modules=["q_proj", "v_proj"], rank_pattern=CUT)),
    "ia3": ("t5", peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])),
    "ia3 every output": ("bert", peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"])),
    "vera": ("llama", peft.VeraConfig(r=3, target_modules=["q_proj", "k_proj", "down_proj"])),
    "vera drawn": ("llama", peft.VeraConfig(r=3, target_modules=["q_proj", "k_proj"], save_projection=False, projection_prng_key=5)),
    "loha": ("vit", peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "projection"])),
    "hira": ("vit", peft.HiraConfig(r=3, target_modules=["q_proj", "projection"])),
}  # fmt: skip


#: what some of them become: what a person would write
SPECS = {
    "lora T5": '[{"pass": "lora", "where": ["attention.q", "attention.v", "mlp.down"], "rank": 3, "alpha": 8.0}]',
    "lora one layer": '[{"pass": "lora", "where": {"role": "attention.q", "path": ["model.layers.1.self_attn.q_proj"]}, "rank": 3, "alpha": 8.0}]',
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tmp_path):
    """PEFT's folder, loaded here, trained on both sides, saved here, loaded by PEFT."""
    family, config = CASES[case]
    theirs(family, copy.deepcopy(config)).save_pretrained(tmp_path / "theirs")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base(family)), tmp_path / "theirs", is_trainable=True).double().eval()
    for name, value in wrapped.named_parameters():
        value.requires_grad_(value.requires_grad and "ranknum" not in name)  # a number of AdaLoRA's that PEFT lets train
    with unchanged(base(family)):
        live = load(base(family), tmp_path / "theirs")
        assert json.dumps(live.spec.to_dict()["passes"]) == SPECS.get(case, json.dumps(live.spec.to_dict()["passes"]))
        wanted = logits(wrapped, family).detach()
        close(reference=wanted, result=logits(live, family), drift=EXACT)
        rejects(reference=wanted, result=logits(base(family), family), drift=EXACT)
        a, b = losses(wrapped, family), losses(live, family)
        close(reference=a, result=b, drift=EXACT)
        rejects(reference=a, result=b * (1 + 2 * EXACT), drift=EXACT)
        save(live, tmp_path / "ours", format="peft")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base(family)), tmp_path / "ours").double().eval()
    close(reference=logits(live, family), result=logits(back, family), drift=EXACT)
    rejects(reference=wanted, result=logits(back, family), drift=EXACT)
    wrapped.save_pretrained(tmp_path / "trained")
    mine, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "trained"))
    assert mine.keys() - {"base_model.vera_A", "base_model.vera_B"} <= other.keys()
    for name in mine.keys() & other.keys():
        close(reference=other[name].double(), result=mine[name].double(), drift=EXACT)


PROMPTS = {
    "prefix": ("llama", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
    "prefix of a network": ("gpt2", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=10)),
    "prompt": ("llama", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_there_and_back(case, tmp_path):
    family, config = PROMPTS[case]
    wrapped = theirs(family, copy.deepcopy(config))
    wrapped.save_pretrained(tmp_path / "theirs")
    live = load(base(family), tmp_path / "theirs")
    kept = slice(5 if case == "prompt" else 0, None)  # PEFT hands the prompt's own logits back too
    wanted = logits(wrapped, family)[:, kept]
    close(reference=wanted, result=logits(live, family), drift=EXACT)
    rejects(reference=wanted, result=logits(base(family), family), drift=EXACT)
    for path in wake(live).report.made:  # PEFT makes the table in float32 and rounds what it reads
        live.get_parameter(path).data.copy_(live.get_parameter(path).detach().float())
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base(family)), save(live, tmp_path / "ours", format="peft")).double().eval()
    close(reference=logits(back, family)[:, kept], result=logits(live, family), drift=EXACT)
    rejects(reference=logits(back, family)[:, kept], result=wanted, drift=EXACT)
    for keys in ({"num_virtual_tokens": 4}, {"task_type": "SEQ_2_SEQ_LM"}):
        with pytest.raises(Refused, match=next(iter(keys))):
            load(base(family), changed_folder(tmp_path / "theirs", tmp_path / next(iter(keys)), keys))
    with pytest.raises(Refused, match="on this model it would be"):
        load(base(family), changed_folder(tmp_path / "theirs", tmp_path / "narrow", tensors=lambda t: {"prompt_embeddings": t["prompt_embeddings"][:, 1:].contiguous()}))


@pytest.mark.parametrize(
    "family, passes, words",
    [
        ("llama", [{"pass": "prefix_tuning", "length": 3}], '"shift": true, "inner": 0'),
        ("llama", [{"pass": "prompt_tuning", "length": 3}, {"pass": "unfreeze"}], "stands alone there"),
        ("bert", [{"pass": "prompt_tuning", "length": 3}], "for decoders alone"),
        ("gpt2", [{"pass": "lora", "where": "attention.q", "rank": 2}], r"c_attn\[q\] is on a part of a module"),
        ("gpt2", [{"pass": "lora", "where": "attention.qkv", "rank": 2}, {"pass": "unfreeze"}], "is tied to another tensor"),
        ("bert", [{"pass": "lora", "where": "attention.q", "rank": 2}, {"pass": "bitfit", "where": "attention.k"}], r"key\.bias trains, and PEFT trains whole modules"),
        ("llama", [{"pass": "lora", "where": "mlp.up", "rank": 2}, {"pass": "lora", "where": "mlp.up", "rank": 3, "name": "b"}], "is adapted twice"),
        ("llama", [{"pass": "lora", "where": "mlp.up", "rank": 2}, {"pass": "ia3"}], "one method, and this spec has ia3, lora"),
        ("llama", [{"pass": "adapter", "where": "mlp", "bottleneck": 3}], '"adapter" has no counterpart in PEFT'),
        ("llama", [{"pass": "hira", "where": "mlp.up", "rank": 2}], "has no scale"),
        ("llama", [{"pass": "lora", "where": "mlp.up", "rank": 2}, {"pass": "merge"}], '"merge" has no counterpart'),
    ],
)
def test_what_peft_cannot_say_is_refused(family, passes, words, tmp_path):
    live = rewrite(base(family), {"passes": passes})
    with pytest.raises(Refused, match=words):
        save(live, tmp_path / "x", format="peft")
    assert not list(tmp_path.iterdir())


def test_another_folder_is_not_replaced(tmp_path):
    live = wake(rewrite(base("llama"), {"passes": [{"pass": "lora", "where": "mlp.up", "rank": 2}]}))
    save(live, tmp_path / "ours")
    with pytest.raises(Refused, match="holds other files"):
        save(live, tmp_path / "ours", format="peft")
    save(live, tmp_path / "peft", format="peft")
    save(live, tmp_path / "peft", format="peft")
    with pytest.raises(Refused, match="holds other files"):
        save(live, tmp_path / "peft")
    with pytest.raises(Refused, match="there is no format 'zip'"):
        save(live, tmp_path / "peft", format="zip")


def test_merges_and_saves_as_any_other(tmp_path):
    family, config = CASES["lora ranks"]
    theirs(family, copy.deepcopy(config)).save_pretrained(tmp_path / "theirs")
    live = load(base(family), tmp_path / "theirs")
    close(reference=logits(live, family), result=logits(merge(live), family), drift=EXACT)
    again = load(base(family), save(live, tmp_path / "own"))
    close(reference=logits(live, family), result=logits(again, family), drift=0.0)


def test_exports_by_command(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    save(wake(rewrite(model, {"passes": [{"pass": "lora", "where": "mlp.up", "rank": 2}]})), tmp_path / "adapter", format="peft")
    done = CliRunner().invoke(cli.app, ["export", str(tmp_path / "model"), str(tmp_path / "adapter"), "--merge", "--to", str(tmp_path / "x.onnx")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.onnx").is_file()


# ---- what a folder may not do ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs("llama", config).save_pretrained(folder)
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"
WRONG_KEYS = {
    "unknown key": ({"tail_mode": 3}, '"tail_mode": 3 has no counterpart'),
    "another method": ({"peft_type": "OFT"}, "'OFT' has no counterpart"),
    "no method": ({"peft_type": None}, "None has no counterpart"),
    "moved base": ({"init_lora_weights": "pissa"}, "'pissa' changes the weights"),
    "bias of lora": ({"lora_bias": True}, '"lora_bias": true has no counterpart'),
    "parameters": ({"target_parameters": ["experts.w"]}, '"target_parameters"'),
    "replicated layers": ({"layer_replication": [[0, 1]]}, '"layer_replication"'),
    "dora with dropout": ({"use_dora": True}, "lacks lora_magnitude_vector"),
    "other modules": ({"target_modules": ["k_proj"]}, "q_proj is not picked by its config"),
    "more modules": ({"target_modules": ["q_proj", "k_proj"]}, "k_proj is picked by its config and without tensors"),
    "not a list": ({"target_modules": 3}, '"target_modules": expected a list of text'),
    "nothing saved": ({"modules_to_save": None}, "lm_head.weight is another than the model's"),
    "a slow pattern": ({"alpha_pattern": {"(.*)*x": 3}}, "is more than a path of modules"),
    "a slow layer": ({"layers_pattern": "(.*)*", "layers_to_transform": [0]}, "is more than a path of modules"),
    "a rank of text": ({"r": "2"}, "rank '2'"),
    "a rank below": ({"r": -2}, "rank -2"),
    "an alpha of text": ({"lora_alpha": "x"}, "alpha 'x'"),
    "another rank": ({"r": 3}, r"lora_A.weight is \(2, 24\); on this model it would be \(3, 24\)"),
    "bias of another kind": ({"bias": "some"}, '"bias": \'some\''),
    "dropout of text": ({"lora_dropout": "x"}, "dropout: expected number"),
}  # fmt: skip
WRONG_TENSORS = {
    "a name out of the tree": (lambda t: t | {"base_model.model.../../etc.lora_A.weight": torch.zeros(2, 24)}, "lacks lora_B.weight|is not a module"),
    "a private name": (lambda t: t | {"base_model.model.__class__.weight": torch.zeros(2)}, "__class__.weight is not a tensor"),
    "another prefix": (lambda t: t | {"weight": torch.zeros(2)}, "weight is not a tensor of LORA"),
    "an extra tensor": (lambda t: t | {"base_model.model.model.norm.weight": torch.zeros(24)}, "model.norm.weight is another than the model's"),
    "an extra module": (lambda t: t | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.zeros(2, 24), "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.zeros(40, 2)}, "layers.7.self_attn.q_proj is not a module"),
    "one half": (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, "q_proj lacks lora_B.weight"),
    "a turned matrix": (lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"].T.contiguous()}, r"lora_A.weight is \(24, 2\)"),
    "a NaN": (lambda t: t | {f"{Q}.lora_A.weight": torch.full((2, 24), float("nan"))}, "NaN or infinite"),
    "integers": (lambda t: t | {f"{Q}.lora_A.weight": torch.ones(2, 24, dtype=torch.int64)}, "not a floating dtype"),
    "another head": (lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(98, 24)}, r"lm_head.weight is \(98, 24\)"),
    "nothing": (lambda t: {}, "holds no tensor of LORA"),
}  # fmt: skip


def changed_folder(good, to, keys=None, tensors=None):
    to.mkdir()
    config = json.loads((good / "adapter_config.json").read_text()) | (keys or {})
    (to / "adapter_config.json").write_text(json.dumps(config))
    held = load_file(good / "adapter_model.safetensors")
    save_file(tensors(held) if tensors else held, to / "adapter_model.safetensors")
    return to


@pytest.mark.parametrize("case", WRONG_KEYS)
def test_wrong_keys(case, good, tmp_path):
    keys, words = WRONG_KEYS[case]
    with unchanged(base("llama")), pytest.raises(Refused, match=words):
        load(base("llama"), changed_folder(good, tmp_path / "x", keys))


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors(case, good, tmp_path):
    change, words = WRONG_TENSORS[case]
    with unchanged(base("llama")), pytest.raises(Refused, match=words):
        load(base("llama"), changed_folder(good, tmp_path / "x", tensors=change))


def test_what_is_not_plain_files(good, tmp_path):
    folder = changed_folder(good, tmp_path / "x")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(Refused, match="adapter_model.bin is a pickle, which can run code and is never read"):
        load(base("llama"), folder)
    (folder / "adapter_model.safetensors").symlink_to(Path(good) / "adapter_model.safetensors")
    with pytest.raises(Refused, match="is not a plain file"):
        load(base("llama"), folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04" * 30)
    with pytest.raises(Refused, match="truncated, damaged, or no safetensors file"):
        load(base("llama"), folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(Refused, match="expected an object"):
        load(base("llama"), folder)


def test_a_tied_head_is_not_trained_alone(tmp_path):
    theirs("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"])).save_pretrained(tmp_path / "x")
    with pytest.raises(Refused, match="is tied to what the folder replaces"):
        load(base("gpt2"), tmp_path / "x")
