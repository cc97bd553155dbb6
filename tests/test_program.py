"""`.pt2` files: read by torch alone, right at other sizes, whole or not there."""

import subprocess
import sys

import pytest
import torch
from models import build, example
from torch import nn

from rewrite.capture.model import capture
from rewrite.emit.live import make_live
from rewrite.emit.program import export_program
from rewrite.errors import Refused


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_is_read_by_torch_alone_and_right_at_other_sizes(family, tmp_path):
    torch.set_num_threads(1)
    model = build(family)
    live = make_live(capture(model)).train()
    path = export_program(live, tmp_path / "model.pt2")
    assert live.training and [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    cases = []
    for batch, length in [(3, 11), (2, 5)]:
        inputs = example(family, batch, length)
        with torch.no_grad():
            cases.append((inputs, model(**inputs).logits))
    names = [node.name for node in live.graph.placeholders if node.name != "labels"]
    for inputs, _ in cases:
        ids = inputs["input_ids"]
        for name in names:
            filled = {"position_ids": torch.arange(ids.shape[1]).expand_as(ids), "token_type_ids": torch.zeros_like(ids)}
            if name not in inputs:
                inputs[name] = filled[name] if name in filled else torch.ones_like(inputs["decoder_input_ids"])
    torch.save((names, cases, list(model.state_dict())), tmp_path / "cases.pt")
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1); torch.set_grad_enabled(False)\n"
        "program = torch.export.load(sys.argv[1]); names, cases, state = torch.load(sys.argv[2])\n"
        "assert 'transformers' not in sys.modules and set(program.state_dict) <= set(state)\n"
        "for inputs, wanted in cases:\n"
        "    found = program.module()(**{n: inputs[n] for n in names})\n"
        "    assert list(found)[0] == 'logits' and torch.equal(found['logits'], wanted), (found['logits'] - wanted).abs().max()\n"
    )
    subprocess.run([sys.executable, "-c", code, path, tmp_path / "cases.pt"], check=True)


def test_a_variant_with_a_cache(tmp_path):
    model = build("llama")
    live = make_live(capture(model))
    program = torch.export.load(export_program(live, tmp_path / "past.pt2", variant="past")).module()
    ids, mask = example("llama", 2, 9)["input_ids"], torch.ones(2, 9, dtype=torch.long)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
        inputs = {"input_ids": ids[:, 6:], "attention_mask": mask, "position_ids": torch.arange(6, 9).expand(2, 3)}
        for i, layer in enumerate(cache.layers):
            inputs |= {f"past_key_values_{i}_key": layer.keys.clone(), f"past_key_values_{i}_value": layer.values.clone()}
        wanted = model(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
        found = program(**inputs)
    assert torch.allclose(found["logits"], wanted, atol=1e-6) and found["past_key_values.1.value"].shape[2] == 9


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    live = make_live(capture(nn.Sequential(nn.Linear(6, 3)), (torch.randn(4, 6),)))
    with pytest.raises(Refused, match="nowhere is not a folder"):
        export_program(live, tmp_path / "nowhere" / "model.pt2")
    with pytest.raises(Refused, match='no variant "past".  It has: forward'):
        export_program(live, tmp_path / "model.pt2", variant="past")
    live.graph.opaque["0"] = "a loop over time"
    with pytest.raises(Refused, match="0 could not be captured .a loop over time."):
        export_program(live, tmp_path / "model.pt2")
    live.graph = None
    with pytest.raises(Refused, match="carries no graph"):
        export_program(live, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
