"""Layouts of models that a sweep over every architecture of transformers showed to be hard, one small model each."""

import pytest
import torch
import transformers as T
from models import SIZES, SPECIAL
from torch import nn

from rewrite import capture, rewrite
from rewrite.calls.signature import variants
from rewrite.emit.live import make_live


class Looped(nn.Module):
    """Cannot be traced, and has a norm without parameters inside."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x):
        while x.abs().max() > 3:
            x = self.norm(self.inner(x))
        return x


def test_a_leaf_without_parameters_inside_an_opaque_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Looped(), nn.Linear(8, 5)).eval()
    graph = capture(model, (torch.randn(3, 8) * 9,))
    assert list(graph.opaque) == ["1"]


class Counted(nn.Module):
    """Takes as many vectors as the mask has ones; the code checks that there is one kind of row."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 5)

    def forward(self, x, mask):
        torch._check(torch.unique_consecutive(mask.sum(1)).numel() == 1, lambda: "rows of several kinds")
        return self.out(x[mask, :].view(x.shape[0], -1, 8)[:, -1])


def test_a_check_of_a_size_that_depends_on_values_is_asked_at_every_call():
    torch.manual_seed(0)
    model = Counted().eval()
    mask = torch.tensor([[True, False, True, False], [True, True, False, False], [False, True, True, False]])
    graph = capture(model, {"x": torch.randn(3, 4, 8), "mask": mask})
    assert torch.ops.aten._assert_scalar.default in {node.target for node in graph.nodes} and not graph.checks
    live, x = make_live(graph), torch.randn(2, 4, 8)
    assert torch.equal(live(x, mask[:2]), model(x, mask[:2]))
    uneven = torch.tensor([[True, True, True, False], [True, False, False, False]])
    for broken in (model, live):
        with pytest.raises((ValueError, RuntimeError)):
            broken(x, uneven)


def test_a_classifier_over_an_encoder_decoder_makes_its_decoders_inputs():
    sizes = dict(d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40)
    model = T.BartForSequenceClassification(T.BartConfig(vocab_size=99, max_position_embeddings=64, **sizes, **SPECIAL, decoder_start_token_id=1)).eval()
    (main,) = variants(model)
    assert set(main.kwargs) >= {"input_ids", "attention_mask"} and "decoder_input_ids" not in main.kwargs and main.shifts is None


@pytest.fixture(scope="module")
def seeing():
    """A vision-language model: the tokens of an image stand in the ids, and the image's vectors take their places."""
    vision = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, image_size=16, patch_size=8)
    text = T.LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, **SPECIAL)
    torch.manual_seed(0)
    return T.LlavaForConditionalGeneration(T.LlavaConfig(vision_config=T.CLIPVisionConfig(**vision), text_config=text, image_token_index=98, vision_feature_layer=-1)).eval()


def test_images_take_the_places_of_their_tokens(seeing):
    """The model lists its images one by one, so their number stays that of the example; all else is captured."""
    ids = torch.tensor([[1, 98, 98, 98, 98, 7, 8], [1, 5, 98, 98, 98, 98, 9]])
    pixels = torch.randn(2, 3, 16, 16)
    live = rewrite(seeing, {"passes": [{"pass": "lora", "where": "attention.{q,v}", "rank": 2}]}, {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)})
    assert not live.report.opaque and any("batch" in note and "2" in note for note in live.report.notes)
    asked = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        assert torch.equal(live(**asked).logits, seeing.requires_grad_(False)(**asked).logits)
        assert not torch.equal(live(**{**asked, "pixel_values": pixels * 2}).logits, live(**asked).logits)
