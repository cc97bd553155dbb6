"""Save and load: what comes back is equal, what is wrong is refused in words, nothing is half written."""

import copy
import io
import json
import os
import pickle
import threading
import time

import pytest
import safetensors
import safetensors.torch
import torch
from models import build, example
from torch import nn

import rewrite.store.folder as store
from rewrite.contract import Pass
from rewrite.errors import Refused, SpecError
from rewrite.pipeline import merge, rewrite
from rewrite.spec.parse import Spec
from rewrite.store.fingerprint import Fact, fingerprint
from rewrite.store.folder import load, save

LORA = {"passes": [{"pass": "lora", "where": "attention.{q,v}", "rank": 4}]}
EXAMPLE = example("llama", batch=3, length=5)


def train(live, steps=2, inputs=EXAMPLE):
    """A few steps on whatever trains."""
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=0.02)
    live.train()
    for _ in range(steps):
        live(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return live.eval()


def logits(model, inputs=EXAMPLE):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def trained():
    """(a tiny Llama, its live model after some training); tests do not change them."""
    model = build("llama")
    return model, train(rewrite(model, LORA))


@pytest.fixture
def saved(trained, tmp_path):
    return save(trained[1], tmp_path / "adapter")


def metadata(folder):
    with safetensors.safe_open(folder / "adapter.safetensors", "pt") as file:
        return json.loads(file.metadata()["rewrite"])


def rewritten(folder, tensors=None, record=None):
    """Write the adapter file anew with some of its tensors or its record changed, the record in agreement with the tensors."""
    file = folder / "adapter.safetensors"
    tensors = safetensors.torch.load_file(file) if tensors is None else tensors
    record = {**metadata(folder), **(record or {})}
    record["tensors"] = {name: Fact.of(tensor, name).to_list() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, file, {"rewrite": json.dumps(record)})


def refusal(model, folder, **keys):
    with pytest.raises(Refused) as caught:
        load(model, folder, **keys)
    return str(caught.value)


# -- what comes back -----------------------------------------------------------------------------------------------------------------


def test_a_trained_adapter_comes_back_equal(trained, saved):
    model, live = trained
    loaded = load(build("llama"), saved)
    assert torch.equal(logits(loaded), logits(live))
    assert not torch.equal(logits(loaded), logits(model))  # the training did something
    assert loaded.spec == live.spec
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {n: p.requires_grad for n, p in live.named_parameters()}


def test_only_what_differs_from_the_base_is_written(trained, saved):
    assert sorted(os.listdir(saved)) == ["adapter.safetensors", "spec.json"]
    names = safetensors.torch.load_file(saved / "adapter.safetensors").keys()
    assert names == {name for name, p in trained[1].named_parameters() if p.requires_grad}
    assert len(names) == 8 and all(".lora.default." in name for name in names)
    assert Spec.parse(saved / "spec.json") == trained[1].spec


def test_the_same_model_gives_the_same_bytes(trained, saved, tmp_path):
    again = save(trained[1], tmp_path / "again")
    for name in os.listdir(saved):
        assert (saved / name).read_bytes() == (again / name).read_bytes()


def test_what_is_loaded_can_be_trained_on_and_saved_again(saved, tmp_path):
    model = build("llama")
    live = train(load(model, saved))
    again = load(model, save(live, tmp_path / "again"))
    assert torch.equal(logits(again), logits(live))
    assert logits(model).equal(logits(build("llama")))


@pytest.mark.parametrize(
    "passes",
    [
        [{"pass": "unfreeze", "where": "head"}],
        [{"pass": "unfreeze", "where": "model"}],
        [{"pass": "bitfit", "create": True}],
        [{"pass": "adapter", "bottleneck": 6}, {"pass": "lora", "where": "mlp.*", "rank": 3, "name": "fr"}, {"pass": "unfreeze", "where": "norm"}],
    ],
    ids=["head", "everything", "bitfit", "several"],
)
def test_trained_base_tensors_come_back(passes, tmp_path):
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    live = train(rewrite(model, {"passes": passes}))
    loaded = load(model, save(live, tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(live)) and not torch.equal(logits(live), logits(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_merged_model_comes_back(tmp_path):
    model = build("llama")
    live = train(rewrite(model, LORA))
    merged = merge(live)
    loaded = load(model, save(merged, tmp_path / "merged"))
    assert torch.equal(logits(loaded), logits(merged))
    assert not any("lora" in name for name in safetensors.torch.load_file(tmp_path / "merged" / "adapter.safetensors"))


def test_lora_that_began_again_after_a_merge_comes_back(tmp_path):
    model = build("llama")
    live = train(rewrite(model, {"passes": [*LORA["passes"], {"pass": "merge"}, *LORA["passes"]]}))
    folder = save(live, tmp_path / "adapter")
    assert len(safetensors.torch.load_file(folder / "adapter.safetensors")) == 8
    assert torch.equal(logits(load(model, folder)), logits(live))


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    model = build("gpt2")
    inputs = example("gpt2")
    live = train(rewrite(model, {"passes": [{"pass": "unfreeze", "where": "model"}]}), inputs=inputs)
    folder = save(live, tmp_path / "adapter")
    names = safetensors.torch.load_file(folder / "adapter.safetensors").keys()
    assert len({"lm_head.weight", "transformer.wte.weight"} & names) == 1
    loaded = load(model, folder)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(logits(loaded, inputs), logits(live, inputs))


class Net(nn.Module):
    """A plain model with a buffer that training changes."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(10, 24), nn.BatchNorm1d(24), nn.Linear(24, 7)

    def forward(self, x):
        return self.down(torch.relu(self.norm(self.up(x))))


def test_changed_buffers_of_a_plain_model_come_back(tmp_path):
    torch.manual_seed(0)
    model, x = Net().eval(), {"x": torch.randn(5, 10)}
    live = rewrite(model, {"passes": [{"pass": "lora", "rank": 2}]}, x)
    live.train()
    live(**x)
    live.eval()
    folder = save(live, tmp_path / "adapter")
    assert "norm.running_mean" in safetensors.torch.load_file(folder / "adapter.safetensors")
    assert not torch.equal(live(**x), model(**x))
    assert torch.equal(load(model, folder, example=x)(**x), live(**x))


def test_a_model_that_was_cast_comes_back_cast_without_its_base(trained, tmp_path):
    model, live = trained
    cast = copy.deepcopy(live).to(torch.bfloat16)
    folder = save(cast, tmp_path / "adapter")
    assert safetensors.torch.load_file(folder / "adapter.safetensors").keys() == {n for n, p in live.named_parameters() if p.requires_grad}
    loaded = load(model, folder)
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(cast))


def test_adapters_in_another_precision_than_the_base_come_back(tmp_path):
    model = build("llama").to(torch.bfloat16)
    live = rewrite(model, {"passes": [{"pass": "unfreeze", "where": "head"}]})
    live.lm_head.weight.data = live.lm_head.weight.data.float() + 1
    loaded = load(model, save(live, tmp_path / "adapter"))
    assert loaded.lm_head.weight.dtype == torch.float32 and torch.equal(loaded.lm_head.weight, live.lm_head.weight)


def test_copies_and_pickles_of_a_live_model_can_be_saved(trained, tmp_path):
    model, live = trained
    for twin in (copy.deepcopy(live), pickle.loads(pickle.dumps(live))):
        loaded = load(model, save(twin, tmp_path / "adapter"))
        assert torch.equal(logits(loaded), logits(live))


def test_a_wrapped_model_is_saved_as_what_it_wraps(trained, saved, tmp_path):
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    for wrap in (DistributedDataParallel, torch.compile):
        folder = save(wrap(trained[1]), tmp_path / "wrapped")
        assert (folder / "adapter.safetensors").read_bytes() == (saved / "adapter.safetensors").read_bytes()


@pytest.mark.parametrize("move", ["in place", "pickled"])
def test_a_base_that_is_let_go_of_is_known_by_its_fingerprint(move, tmp_path):
    model = build("llama")
    live = rewrite(model, {"passes": [{"pass": "unfreeze", "where": "head"}]})
    if move == "pickled":
        live = pickle.loads(pickle.dumps(live))
    live._base.settle()
    assert not live._base.aliases
    train(live)
    folder = save(live, tmp_path / "adapter")
    assert list(safetensors.torch.load_file(folder / "adapter.safetensors")) == ["lm_head.weight"]
    assert torch.equal(logits(load(model, folder)), logits(live))


def test_passes_of_ones_own_are_loaded_only_when_handed_over(tmp_path):
    model = build("llama")
    live = rewrite(model, Spec.parse({"passes": [{"pass": "gain"}]}, [Gain]))
    folder = save(live, tmp_path / "adapter")
    with pytest.raises(SpecError, match='passes\\[0\\]: "gain" is not a built-in pass'):
        load(model, folder)
    assert torch.equal(logits(load(model, folder, passes=[Gain])), logits(live))


# a pass of one's own
from dataclasses import dataclass  # noqa: E402


@dataclass(frozen=True)
class Gain(Pass):
    role = "mlp"

    def params(self, y):
        return {"gain": y.new_ones(y.shape[-1])}

    def output(self, y, gain):
        return y * gain


# -- another base --------------------------------------------------------------------------------------------------------------------


def test_another_base_is_refused_with_what_differs(saved):
    other = build("llama", seed=1)
    message = refusal(other, saved)
    assert f"{saved}: was saved on another base. 16 differences:\n  lm_head.weight has other values\n" in message
    assert message.endswith("Load the base that it was trained on.")


def test_one_changed_bit_of_the_base_is_seen(saved):
    other = build("llama")
    weight = other.model.layers[1].mlp.up_proj.weight
    weight.data.view(torch.int32)[3, 5] ^= 1
    message = refusal(other, saved)
    assert "1 difference:\n  model.layers.1.mlp.up_proj.weight has other values\n" in message


def test_swapped_rows_of_the_base_are_seen(saved):
    other = build("llama")
    weight = other.model.embed_tokens.weight.data
    weight[[3, 4]] = weight[[4, 3]]
    assert "model.embed_tokens.weight has other values" in refusal(other, saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.to(torch.float16), "lm_head.weight was float32, is float16"),
        (lambda m: setattr(m, "lm_head", nn.Linear(24, 98, bias=False)), "lm_head.weight was (99, 24), is (98, 24)"),
        (lambda m: setattr(m, "more", nn.Linear(3, 2)), "more.bias is new"),
        (lambda m: m.model.layers.__delitem__(1), "model.layers.1.input_layernorm.weight is missing"),
        (lambda m: setattr(m, "__class__", type("Other", (type(m),), {})), "the class was LlamaForCausalLM, is Other"),
    ],
    ids=["dtype", "shape", "more", "less", "class"],
)
def test_a_base_of_another_form_is_refused(saved, change, words):
    other = build("llama")
    change(other)
    assert words in refusal(other, saved)


def test_the_place_of_the_base_does_not_matter(saved, trained):
    other = build("llama")
    weight = other.lm_head.weight
    weight.data = torch.empty_strided(weight.shape, (1, 99)).copy_(weight.data)  # the same values, laid out otherwise
    assert fingerprint(other).differences(fingerprint(build("llama"))) == []


def test_fingerprints_are_quick():
    """22 M float32 parameters take well under a second, even where the CPU is busy with other things."""
    model = nn.Sequential(*[nn.Linear(1200, 1200) for _ in range(16)])
    start = time.perf_counter()
    facts = fingerprint(model).facts()
    assert time.perf_counter() - start < 1.0
    assert sum(torch.Size(f.shape).numel() for f in facts.values()) > 22e6


# -- a wrong folder ------------------------------------------------------------------------------------------------------------------


def test_an_adapter_cut_anywhere_is_refused(trained, saved):
    file = saved / "adapter.safetensors"
    whole = file.read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert f"{file}: truncated or damaged ({size} bytes; " in refusal(trained[0], saved)
    file.write_bytes(whole + b"\0")
    assert "truncated or damaged" in refusal(trained[0], saved)


def test_a_flipped_bit_in_the_data_is_refused(trained, saved):
    file = saved / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-6] ^= 64
    file.write_bytes(data)
    assert "has other values: the file was changed or damaged" in refusal(trained[0], saved)


def test_foreign_and_missing_names_are_refused(trained, saved):
    tensors = safetensors.torch.load_file(saved / "adapter.safetensors")
    first = sorted(tensors)[0]
    rewritten(saved, {**tensors, "../../evil": torch.zeros(2)})
    assert "1 foreign (../../evil)" in refusal(trained[0], saved)
    rewritten(saved, {name: t for name, t in tensors.items() if name != first})
    assert f"1 missing ({first})" in refusal(trained[0], saved)
    rewritten(saved, {("other." if name == first else "") + name: t for name, t in tensors.items()})
    assert "1 foreign" in refusal(trained[0], saved) and "1 missing" in refusal(trained[0], saved)


def test_names_that_the_record_does_not_have_are_refused(trained, saved):
    file = saved / "adapter.safetensors"
    record = json.dumps(metadata(saved))
    safetensors.torch.save_file({**safetensors.torch.load_file(file), "more": torch.zeros(2)}, file, {"rewrite": record})
    assert "1 foreign (more)" in refusal(trained[0], saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[:, :-1].contiguous(), " is (4, 23); this spec makes (4, 24) on this base."),
        (lambda t: t.T.contiguous(), " is (24, 4); this spec makes (4, 24) on this base."),
        (lambda t: t.long(), " is int64; this spec makes float32 on this base."),
        (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), ": 24 of 96 values are NaN or infinite."),
        (lambda t: t.index_fill(1, torch.tensor([1]), float("-inf")), ": 4 of 96 values are NaN or infinite."),
    ],
    ids=["shape", "transposed", "dtype", "nan", "inf"],
)
def test_a_wrong_tensor_is_refused(trained, saved, change, words):
    tensors = safetensors.torch.load_file(saved / "adapter.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.lora.default.down"))
    rewritten(saved, {**tensors, name: change(tensors[name])})
    assert name + words in refusal(trained[0], saved)


def test_a_tensor_that_is_not_as_recorded_is_refused(trained, saved):
    file = saved / "adapter.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = sorted(tensors)[0]
    safetensors.torch.save_file({**tensors, name: tensors[name].half()}, file, {"rewrite": json.dumps(metadata(saved))})
    assert f"{name} was float32, is float16: the file was changed or damaged" in refusal(trained[0], saved)


def test_another_spec_is_refused_with_what_differs(trained, saved):
    spec = {"passes": [{"pass": "lora", "where": "attention.{q,v}", "rank": 4, "alpha": 32}]}
    (saved / "spec.json").write_text(json.dumps(spec))
    assert "not the spec that adapter.safetensors was saved with: passes[0].alpha was 16.0, is 32.0." in refusal(trained[0], saved)
    (saved / "spec.json").write_text(json.dumps({**LORA, "seed": 3}))
    assert "seed was 0, is 3" in refusal(trained[0], saved)
    (saved / "spec.json").write_text(json.dumps({"passes": [*LORA["passes"], {"pass": "merge"}]}))
    assert "passes had 1 items, has 2" in refusal(trained[0], saved)
    (saved / "spec.json").write_text("{")
    with pytest.raises(SpecError, match="spec.json: not JSON: line 1"):
        load(trained[0], saved)


def test_a_spec_that_is_no_longer_valid_is_refused(trained, saved):
    rewritten(saved, record={"spec": {"passes": [{"pass": "lora", "rank": 4, "alfa": 3}]}})
    assert "was saved with a spec that is not valid here" in refusal(trained[0], saved)


@pytest.mark.parametrize(
    "record",
    ["", "3", "[]", "{", '{"format": 1}', '{"format": 1, "spec": {}, "dtype": "Tensor", "base": {"class": "x", "tensors": {}}, "tensors": {}}', "[" * 100_000],
)
def test_a_damaged_record_is_refused(trained, saved, record):
    file = saved / "adapter.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"rewrite": record})
    assert "its record of base and spec is damaged" in refusal(trained[0], saved)


def test_a_record_of_a_later_format_is_refused(trained, saved):
    rewritten(saved, record={"format": 2})
    assert "of format 2; this version reads 1" in refusal(trained[0], saved)


def test_a_safetensors_file_of_others_is_refused(trained, saved):
    safetensors.torch.save_file({"weight": torch.zeros(3)}, saved / "adapter.safetensors")
    assert "not one that save() wrote" in refusal(trained[0], saved)


def test_what_is_missing_is_told(trained, saved, tmp_path):
    assert refusal(trained[0], tmp_path / "none").endswith("none: is not there. Give the folder that save() wrote.")
    assert "is not a folder" in refusal(trained[0], saved / "spec.json")
    for name in ("spec.json", "adapter.safetensors"):
        (saved / name).rename(tmp_path / name)
        assert f"{name} is missing" in refusal(trained[0], saved)
        (tmp_path / name).rename(saved / name)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickles_are_never_read(trained, saved, tmp_path):
    bomb = Bomb()
    bomb.path = tmp_path / "exploded"
    file = saved / "adapter.safetensors"
    buffer = io.BytesIO()
    torch.save(bomb, buffer)
    for content in (pickle.dumps(bomb), buffer.getvalue()):
        file.write_bytes(content)
        assert "is a pickle, which can run code and is never read" in refusal(trained[0], saved)
    file.rename(saved / "adapter.bin")
    assert "adapter.bin is a pickle" in refusal(trained[0], saved)
    assert not bomb.path.exists()


@pytest.mark.parametrize("name", ["spec.json", "adapter.safetensors"])
def test_links_are_not_followed(trained, saved, tmp_path, name):
    (saved / name).rename(tmp_path / name)
    (saved / name).symlink_to(tmp_path / name)
    assert f"{saved / name}: is not a plain file" in refusal(trained[0], saved)
    (saved / name).unlink()
    (saved / name).mkdir()
    assert "is not a plain file" in refusal(trained[0], saved)
    (saved / name).rmdir()
    os.mkfifo(saved / name)
    assert "is not a plain file" in refusal(trained[0], saved)  # and does not wait for a writer


def test_a_folder_reached_by_a_link_is_fine(trained, saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    assert torch.equal(logits(load(trained[0], tmp_path / "link")), logits(trained[1]))


def test_a_spec_in_a_folder_imports_nothing(trained, saved, tmp_path, monkeypatch):
    (tmp_path / "evil_pass.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"passes": [{"pass": "evil_pass"}, {"pass": "evil_pass.x"}]}
    (saved / "spec.json").write_text(json.dumps(spec))
    rewritten(saved, record={"spec": spec})
    with pytest.raises(SpecError, match="may not have code imported"):
        load(trained[0], saved)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_changed_by_a_refused_load(saved):
    model = build("llama")
    before = {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()}
    tensors = safetensors.torch.load_file(saved / "adapter.safetensors")
    rewritten(saved, {**tensors, "more": torch.zeros(2)})
    refusal(model, saved)
    assert {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()} == before


# -- a folder that cannot be written, or is not ours ---------------------------------------------------------------------------------


def unsaved(live, folder):
    with pytest.raises(Refused) as caught:
        save(live, folder)
    return str(caught.value)


def test_a_model_of_others_is_refused(tmp_path):
    assert "did not come from rewrite()" in unsaved(build("llama"), tmp_path / "adapter")


def test_what_is_not_finite_is_not_saved(trained, saved):
    live = copy.deepcopy(trained[1])
    name, parameter = next((n, p) for n, p in live.named_parameters() if n.endswith("lora.default.up"))
    parameter.data[0, 0] = float("nan")
    before = (saved / "adapter.safetensors").read_bytes()
    assert f"{name}: 1 of " in unsaved(live, saved)
    assert (saved / "adapter.safetensors").read_bytes() == before


def test_values_that_are_not_there_are_not_saved(tmp_path):
    with torch.device("meta"):
        model = build("llama")
    assert "has no values (meta device)" in unsaved(rewrite(model, LORA), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_earlier_folder_of_ours_is_replaced(trained, saved):
    live = train(copy.deepcopy(trained[1]))
    save(live, saved)
    assert torch.equal(logits(load(trained[0], saved)), logits(live))
    assert sorted(p.name for p in saved.parent.iterdir()) == ["adapter"]  # nothing is left beside it


def test_an_empty_folder_is_filled(trained, tmp_path):
    (tmp_path / "adapter").mkdir()
    save(trained[1], tmp_path / "adapter")
    save(trained[1], tmp_path / "new" / "deep" / "adapter")
    assert len(list((tmp_path / "new" / "deep" / "adapter").iterdir())) == 2


@pytest.mark.parametrize("name", ["notes.txt", "spec.json", "adapter.safetensors", "both"])
def test_a_folder_of_others_is_left_alone(trained, saved, name):
    if name == "both":
        (saved / "adapter.safetensors").write_text("my own")
    elif name == "notes.txt":
        (saved / name).write_text("my own")
    else:
        (saved / name).unlink()
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert "Choose a new folder. Nothing was written." in unsaved(trained[1], saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert len(list(saved.parent.iterdir())) == 1


def test_a_file_or_a_link_in_the_way_is_left_alone(trained, saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file, not a folder" in unsaved(trained[1], tmp_path / "file")
    assert "cannot be written: File exists" in unsaved(trained[1], tmp_path / "file" / "deeper")
    for place in (tmp_path / "file" / "deeper", tmp_path / "file", tmp_path):
        with pytest.raises(Refused, match="Nothing was written"):
            store.refuse_unwritable(place)
    for place in (saved, tmp_path / "new" / "deep"):
        store.refuse_unwritable(place)
    (tmp_path / "link").symlink_to(saved)
    assert "is a link, not a folder" in unsaved(trained[1], tmp_path / "link")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused(trained):
    assert "/proc/adapter: cannot be written" in unsaved(trained[1], "/proc/adapter")
    assert "cannot be written" in unsaved(trained[1], "a\0b")
    assert "File name too long" in unsaved(trained[1], "x" * 300)


@pytest.mark.parametrize("moment", ["write", "swap"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_save_that_fails_leaves_the_earlier_folder(trained, saved, monkeypatch, moment, error):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    rename = store.Path.rename

    def fail(*args):
        raise error

    if moment == "write":
        monkeypatch.setattr(store.os, "fsync", fail)
    else:
        monkeypatch.setattr(store.Path, "rename", lambda self, to: fail() if ".new-" in self.name else rename(self, to))
    with pytest.raises(Refused if isinstance(error, OSError) else KeyboardInterrupt, match="No space left" if isinstance(error, OSError) else None):
        save(copy.deepcopy(trained[1]), saved)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_a_reader_beside_a_writer_sees_a_whole_folder(trained, saved):
    """While one saves again and again, whoever reads the files finds an old or a new pair of them, or for a moment none: never a mix."""
    lives = [trained[1], train(copy.deepcopy(trained[1]))]
    pairs = set()
    for live in lives:
        save(live, saved)
        pairs.add((saved / "adapter.safetensors").read_bytes())
    done = threading.Event()

    def write():
        for i in range(20):
            save(lives[i % 2], saved)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        try:
            assert (saved / "adapter.safetensors").read_bytes() in pairs
        except FileNotFoundError:
            pass
    thread.join()
