"""The live model: it is the graph that runs, it equals the model, and everything people do with a module still works."""

import pytest
import torch
from models import build, example

from rewrite.capture import capture
from rewrite.emit.live import make_live, source

SHAPES = [(2, 7), (1, 1), (3, 11), (1, 5)]


def tensors(out):
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else [out]
    return [v for v in values if isinstance(v, torch.Tensor)]


@pytest.fixture(scope="module", params=["llama", "bert", "vit", "t5"])
def pair(request):
    model = build(request.param)
    return request.param, model, make_live(capture(model, example(request.param)))


def test_equals_the_model_at_other_sizes(pair):
    family, model, live = pair
    for batch, length in SHAPES:
        inputs = example(family, batch, length)
        with torch.no_grad():
            want, got = tensors(model(**inputs))[0], tensors(live(**inputs))[0]
        assert torch.equal(want, got), (batch, length)


def test_is_still_its_own_class(pair):
    family, model, live = pair
    assert isinstance(live, type(model)) and type(live).__name__ == type(model).__name__
    assert list(live.state_dict()) == list(model.state_dict())


def test_equal_blocks_share_one_code_object():
    live = make_live(capture(build("llama"), example("llama")))
    first, second = live.model.layers
    assert type(first) is type(second) and "linear(" in source(live, "model.layers.1")
