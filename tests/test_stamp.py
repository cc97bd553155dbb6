"""Blocks that are alike are written down without being run again, and blocks that are not, or might not be, are not."""

import builtins
import copy
import types

import pytest
import torch
import transformers
from models import ENC_DEC, FAMILIES, GROUPED, SIZES, SPECIAL, build
from test_capture import Run
from torch import nn

from rewrite.calls.variants import variants
from rewrite.capture.model import capture
from rewrite.capture.tidy import tidy
from rewrite.capture.trace import trace
from rewrite.errors import Refused
from rewrite.text import show

DEEP = {**SIZES, "num_hidden_layers": 4}
MORE = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DEEP, **GROUPED, **SPECIAL, attention_dropout=0.1)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**DEEP, **GROUPED, **SPECIAL, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=99, **ENC_DEC | {"encoder_layers": 3, "decoder_layers": 3}, **SPECIAL, decoder_start_token_id=1)
    ),
    "albert": lambda: transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(**DEEP, embedding_size=12, max_position_embeddings=64, num_labels=3, hidden_dropout_prob=0.1)
    ),
}


def texts(graph):
    """Each variant as text, with where each node comes from."""
    places = lambda part: [(n.name, n.target, n.meta.get("path"), n.meta.get("call"), getattr(n.meta.get("val"), "dtype", None)) for n in part.nodes]
    return {part.name: (show(part), places(part), part.checks, part.opaque) for part in graph.all()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stamped_graph_equals_the_traced_one(family):
    assert texts(capture(build(family))) == texts(capture(build(family), stamp=False))


@pytest.mark.parametrize("family", MORE)
def test_deeper_models_too(family):
    torch.manual_seed(0)
    model = MORE[family]().eval()
    assert texts(capture(model)) == texts(capture(model, stamp=False))


def test_all_but_the_first_of_each_kind_are_stamped():
    torch.manual_seed(0)
    for variant in variants(MORE["llama"]().eval()):
        assert trace(MORE["llama"]().eval(), variant).stamped == 3
    (main,) = variants(MORE["albert"]().eval())
    assert trace(MORE["albert"]().eval(), main).stamped == 2  # a module that is used several times is looked at from its second use on


KEPT, COUNTED = [], {}


class Block(nn.Module):
    """A block that may do more than its inputs and tensors say."""

    calls = 0

    def __init__(self, index, mode, table, held):
        super().__init__()
        self.index, self.mode, self.table, self.held = index, mode, table, held
        self.inner = nn.Linear(8, 8)
        if mode == "attribute":
            self.scale = 1.0 / (index + 1)

    def forward(self, x, store):
        x = self.inner(x)
        if self.mode == "arithmetic":
            x = x * (self.index + 1)
        if self.mode == "branch" and self.index % 2:
            x = x.relu()
        if self.mode == "comparison" and self.index == 3:
            x = x.relu()
        if self.mode == "tensor":
            x = torch.mul(x, self.index + torch.tensor(0.5))
        if self.mode == "strange":
            x = torch.mul(x, self.index)
        if self.mode == "table":
            x = x * self.table[self.index]
        if self.mode == "kind" and type(self.index) is int and self.index % 2:
            x = x.relu()
        if self.mode == "method" and self.index.bit_length() > 1:
            x = x.relu()
        if self.mode == "copy" and copy.deepcopy(self.index) > 2:
            x = x.relu()
        if self.mode == "counter":
            COUNTED["calls"] = COUNTED.get("calls", 0) % 5 + 1
            x = x * COUNTED["calls"]
        if self.mode == "class":
            Block.calls = Block.calls % 5 + 1
            x = x * Block.calls
        if self.mode == "held":
            self.held.calls = self.held.calls % 5 + 1
            x = x * self.held.calls
        if self.mode == "text":
            x = x * len(f"{self.index:>{self.index + 1}}")
        if self.mode == "attribute":
            x = x * self.scale
        if self.mode == "constant":
            x = x * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
        if self.mode == "list":
            store.append(x)
        if self.mode == "global":
            KEPT.append(x.sum())
        if self.mode == "inplace":
            store[0].add_(x)
        if self.mode == "view":
            store[0].view(-1).add_(x.reshape(-1))
        if self.mode == "writes":
            self.table[0] += 1
            x = x * self.table[0]
        return x


class Blocks(nn.Module):
    def __init__(self, mode):
        super().__init__()
        torch.manual_seed(0)
        self.mode, table, held = mode, [1.0, 2.0, 3.0, 4.0, 5.0], types.SimpleNamespace(calls=0)
        self.blocks = nn.ModuleList(Block(index, mode, table, held) for index in range(5))

    def forward(self, x):
        store = [torch.zeros_like(x)] if self.mode in ("inplace", "view") else []
        KEPT.clear()
        for block in self.blocks:
            block.table[0] = 1.0 if block.index == 0 else block.table[0]
            x = block(x, store)
        return (x, *store, *KEPT)


MODES = {"plain": 4, "attribute": 0}
MODES |= dict.fromkeys(["arithmetic", "branch", "comparison", "tensor", "strange", "constant", "table", "text"], 0)
MODES |= dict.fromkeys(["list", "global", "inplace", "view", "writes", "kind", "method", "copy", "counter", "class", "held"], 0)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_block_does_besides_is_seen(mode):
    model, x = Blocks(mode).eval(), torch.randn(6, 8)
    (variant,) = variants(model, (torch.randn(3, 8),))
    assert trace(model, variant).stamped == MODES[mode]
    model = Blocks(mode).eval()
    graph = capture(model, (torch.randn(3, 8),))
    want = model(x)
    got = Run(graph)(x)
    assert len(want) == len(got) and all(torch.equal(a, b) for a, b in zip(want, got))
    assert texts(graph) == texts(capture(Blocks(mode).eval(), (torch.randn(3, 8),), stamp=False))
    said = MODES[mode] == 0 and mode not in ("attribute", "list", "strange", "writes")  # there no two blocks look alike, or nothing was watched
    assert any("traced by itself" in note for note in graph.notes) == said


def test_hooks_are_not_passed_over():
    model, seen = Blocks("plain").eval(), []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: seen.append(1))
    graph = capture(model, (torch.randn(3, 8),))
    assert len(seen) == 10 and any("hooks" in note for note in graph.notes)


class Looks(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """A decoder layer that looks at more of the cache than its own slot."""

    look = staticmethod(lambda cache: 0)

    def forward(self, hidden, past_key_values=None, **rest):
        out = super().forward(hidden, past_key_values=past_key_values, **rest)
        return out if past_key_values is None else out * (1 + Looks.look(past_key_values))


LOOKS = {
    "length": lambda cache: len(cache),
    "slots": lambda cache: len(cache.layers),
    "first": lambda cache: cache.layers[0].keys.shape[2],
    "through": lambda cache: sum(layer.is_initialized for layer in cache.layers),
    "slice": lambda cache: cache.layers[0:1][0].keys.shape[2],
    "first by name": lambda cache: cache.get_seq_length(),
    "is it empty": lambda cache: bool(cache.layers) + len(cache.layers.copy()),
}


@pytest.fixture(scope="module")
def looking():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DEEP | {"num_hidden_layers": 3}, **GROUPED, **SPECIAL)
    model = transformers.LlamaForCausalLM(config).eval()
    model.model.layers = nn.ModuleList(Looks(config, index) for index in range(3))
    return model, variants(model, {"input_ids": torch.ones(2, 7, dtype=torch.long)})[1]


@pytest.mark.parametrize("look", LOOKS)
def test_a_block_that_looks_beyond_its_slot_of_the_cache_is_traced(look, looking, monkeypatch):
    monkeypatch.setattr(Looks, "look", staticmethod(LOOKS[look]))
    found, traced = trace(*looking), trace(*looking, stamp=False)
    tidy(found.graph)
    tidy(traced.graph)
    nodes = lambda graph: [(n.target, torch.fx.map_arg(n.args, lambda a: a.target)) for n in graph.nodes]
    assert nodes(found.graph) == nodes(traced.graph)
    assert any("each Looks is traced by itself: it reads other slots of the cache" in note for note in found.notes)


def test_watching_leaves_the_builtin_type_alone():
    capture(MORE["llama"]().eval())
    assert builtins.type is int.__class__


class Gated(nn.Module):
    """A block whose gate asks for a value: its method stays one call."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def gate(self, x):
        return x if float(x.detach().sum()) > 0 else -x

    def forward(self, x):
        return self.inner(x) + self.gate(x)


def test_methods_that_stay_calls_are_the_stamped_blocks_own():
    model, x = nn.Sequential(*(Gated() for _ in range(3))).eval(), torch.randn(6, 8)
    graph = capture(model, (torch.randn(5, 8),))
    assert [n.target for n in graph.nodes if n.op == "call_module"] == [f"{i}.gate" for i in range(3)]
    assert torch.equal(Run(graph)(x)[0], model(x)) and not torch.equal(Run(graph)(x)[0], model[:2](x))
    assert texts(graph) == texts(capture(model, (torch.randn(5, 8),), stamp=False))


def test_images_that_cannot_be_captured_leave_the_text(monkeypatch):
    from rewrite.capture import model as capturing

    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**SIZES, **GROUPED, **SPECIAL),
        image_token_id=SIZES["vocab_size"] - 1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    whole = capture(model, generation=False)
    assert "pixel_values" in whole.inputs and not any(note.startswith("captured without") for note in whole.notes)
    graph_of = capturing._Capture.graph

    def refuses(self):
        if "pixel_values" in self.variant.kwargs:
            raise Refused("the images go ways of their own")
        return graph_of(self)

    monkeypatch.setattr(capturing._Capture, "graph", refuses)
    graph = capture(model, generation=False)
    assert "pixel_values" not in graph.inputs
    assert any(note.startswith("captured without pixel_values: the images go ways of their own") for note in graph.notes)
    with pytest.raises(Refused, match="ways of their own"):
        capture(model, variants(model)[0].kwargs, generation=False)
