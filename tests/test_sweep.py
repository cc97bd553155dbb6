"""The sweep's own bookkeeping: PEFT's tables beside roles, the list of what cannot be built, the table that is printed."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench.agreement import agreement, differences, explained
from bench.judged import Judged, accepts
from bench.tables import write
from bench.tiny import LEVELS, Architecture, shrunk, tiny
from rewrite.capture.model import capture
from rewrite.roles.find import roles

VERSIONS = {"torch": "2.0"}
RUN = {"command": "python -m bench.sweep --again all", "models": 2, "seconds": 90}


def _record(name, outcome, **rest):
    return {"name": name, "type": "kind", "outcome": outcome, "notes": [], **rest}


@pytest.fixture
def files(tmp_path):
    found = [tmp_path / name for name in ("sweep.json", "not-built.json", "table.md")]
    found[1].write_text(json.dumps({"Old": "upstream", "NotRun": "upstream"}))
    return found


def test_the_list_may_only_become_shorter(files):
    assert write([_record("Old", "not built", reason="upstream"), _record("New", "not built", reason="ours")], [], VERSIONS, RUN, *files) == 1
    assert set(json.loads(files[1].read_text())) == {"Old", "NotRun"}, "a list that grew is not written"
    assert write([_record("Old", "whole")], [SimpleNamespace(name="NotRun")], VERSIONS, RUN, *files) == 0
    assert set(json.loads(files[1].read_text())) == {"NotRun"}, "what was not run stays"
    assert "ran 2 of them in 2 minutes" in files[2].read_text()


def test_a_failure_is_one(files):
    assert write([_record("Old", "failed", reason="wrong")], [], VERSIONS, RUN, *files) == 1


def test_peft_tables_beside_roles(files):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, ffn_dim=56, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32)
    model = OPTForCausalLM(config).eval()
    sites = roles(capture(model))
    found = agreement(model, sites)
    assert "differences" not in found["lora"] and found["lora"]["roles"] == ["attention.q", "attention.v"]
    assert set(found["ia3"]["differences"]) == {"theirs alone: attention.q", "ours alone: attention.v"} and all(found["ia3"]["differences"].values())
    modules = [path for path, module in model.named_modules() if any(True for _ in module.parameters())]
    assert set(differences("lora", ["k_proj", "w2"], modules, sites)) == {"no module: w2", "theirs alone: attention.k", "ours alone: attention.q", "ours alone: attention.v"}
    assert explained("opt", "lora", "ours alone: attention.v") is None
    entry = {"targets": ["k_proj"], "roles": ["attention.k"], "differences": {"theirs alone: attention.k": None}}
    write([_record("OPT", "whole", peft={"lora": entry})], [], VERSIONS, RUN, *files)
    assert "1 rows, 1 differences, 1 unexplained" in files[2].read_text() and "**unexplained**" in files[2].read_text()


@pytest.mark.parametrize("name, kind, more", [("SmolVLMForConditionalGeneration", "smolvlm", set()), ("Mistral3ForConditionalGeneration", "mistral3", {"image_sizes"})])
def test_images_take_their_places_in_the_text(name, kind, more):
    model, inputs, _ = tiny(Architecture(name, kind, ("image-text to text",)), accepts)
    assert {"input_ids", "pixel_values", *more} <= inputs.keys() and inputs["pixel_values"].dim() == (4 if more else 5)
    model(**inputs)
    fewer = {key: value[:, :1] if key in ("input_ids", "attention_mask") else value for key, value in inputs.items()}
    with pytest.raises((ValueError, RuntimeError)):
        model(**fewer)


def test_heads_that_share_keys_still_do_when_shrunk():
    from transformers import DeepseekV3Config, MistralConfig

    grouped, each = (shrunk(kind, *LEVELS[0]) for kind in (MistralConfig, DeepseekV3Config))
    assert (grouped.num_attention_heads, grouped.num_key_value_heads) == (4, 2)
    assert (each.num_attention_heads, each.num_key_value_heads) == (4, 4)


@pytest.mark.parametrize("name, kind, more", [("IdeficsForVisionText2Text", "idefics", "image_attention_mask"), ("UdopForConditionalGeneration", "udop", "bbox")])
def test_examples_hold_what_is_read_beside_the_tokens(name, kind, more):
    model, inputs, _ = tiny(Architecture(name, kind, ("image-text to text",)), accepts)
    assert inputs[more].shape[:2] == inputs["input_ids"].shape
    with pytest.raises((ValueError, TypeError)):
        model(**{key: value for key, value in inputs.items() if key != more})


class _TrainingAlone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise AssertionError("put the model into training mode")


class _Halves(torch.nn.Module):
    def __init__(self, behind):
        super().__init__()
        self.used, self.unused, self.behind = torch.nn.Linear(3, 5), torch.nn.Linear(3, 7), behind

    def forward(self, x):
        return self.behind(self.used(x))


def test_what_the_original_goes_back_through_in_no_way_excuses_nothing():
    inputs = {"x": torch.randn(2, 3)}
    assert Judged(_Halves(torch.clone), None)._idle(inputs) == {"unused"}
    assert Judged(_Halves(_TrainingAlone.apply), None)._idle(inputs) == set()
