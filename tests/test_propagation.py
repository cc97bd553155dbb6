"""Prefixes of hidden states: the original model, run by hooks on a longer text of which it is handed the embeddings, is the oracle."""

import contextlib

import pytest
import torch
from checks import captured, close, rejects, rounding
from models import example
from test_sequence import base

from rewrite import Refused, pipeline, rewrite

PLACES = 5
EXACT = rounding(torch.float64)
BLOCKS = {"bert": "bert.encoder.layer", "llama": "model.layers", "t5": "encoder.block"}
ENCODER = {"role": ["embed", "block"], "path": "encoder.**"}


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


def propagated(family):
    """(live model, its prefixes in the order of the blocks), with values as large as what they are added to."""
    where = ENCODER if family == "t5" else ["embed", "block"]
    live = rewrite(base(family), {"passes": [{"pass": "prefix_propagation", "where": where, "length": PLACES}]})
    prefixes = [live.get_parameter(path) for path in live.report.made]
    assert len(prefixes) == len(base(family).get_submodule(BLOCKS[family]))
    for prefix in prefixes:
        torch.nn.init.normal_(prefix)
    return live, prefixes


@contextlib.contextmanager
def hooked(family, prefixes):
    """The original model, each block of which adds its prefix to the first places of what it reads."""

    def adds(prefix):
        def hook(block, args, kwargs):
            x, *rest = args if args else (kwargs.pop("hidden_states"),)
            front = torch.arange(x.shape[1]) < len(prefix)
            wide = x.new_zeros(x.shape[1:]).masked_scatter(front[:, None], prefix)
            return (x + wide, *rest), kwargs

        return hook

    blocks = base(family).get_submodule(BLOCKS[family])
    hooks = [block.register_forward_pre_hook(adds(prefix), with_kwargs=True) for block, prefix in zip(blocks, prefixes, strict=True)]
    try:
        yield base(family)
    finally:
        for hook in hooks:
            hook.remove()


def reference(family, prefixes, input_ids, attention_mask, counted=False, **more):
    """Logits of a text with empty places in front, without a cache. counted: positions are those among the tokens that are seen."""
    mask = torch.cat([attention_mask.new_ones(len(input_ids), PLACES), attention_mask], 1)
    words = base(family).get_input_embeddings()(input_ids)
    longer = {"inputs_embeds": torch.cat([words.new_zeros(len(words), PLACES, words.shape[-1]), words], 1), "attention_mask": mask}
    if family == "llama":
        longer |= {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) if counted else torch.arange(mask.shape[1])[None], "use_cache": False}
    with hooked(family, prefixes) as model:
        logits = model(**longer, **more).logits
    return logits[:, PLACES:] if family == "llama" else logits


@pytest.mark.parametrize("family", BLOCKS)
def test_propagation_by_hand(family):
    live, prefixes = propagated(family)
    for batch, length in ((1, 1), (3, 9)):
        inputs = example(family, batch, length)
        twins = [p.detach().clone().requires_grad_() for p in prefixes]
        theirs, mine = reference(family, twins, **inputs), live(**inputs).logits
        close(reference=theirs, result=mine, drift=EXACT)
    weight = torch.randn(theirs.shape, dtype=theirs.dtype, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((logits * weight).sum(), of) for logits, of in ((theirs, twins), (mine, prefixes))]
    for a, b in zip(*grads, strict=True):
        assert a.any()
        close(reference=a, result=b, drift=EXACT)
        rejects(reference=a, result=1.001 * b, drift=EXACT)
    for broken in ([p.flip(0) for p in twins], twins[::-1], [twins[0], *(torch.zeros_like(p) for p in twins[1:])]):
        rejects(reference=reference(family, broken, **inputs), result=mine, drift=EXACT)


def test_propagation_behind_a_cache():
    """The prefix is in the cache, tokens that follow get no sum; one row is padded on the left."""
    live, prefixes = propagated("llama")
    ids = example("llama", 3, 7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    made = live.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    text, seen = made.sequences, torch.cat([mask, mask.new_ones(3, 5)], 1)
    assert made.past_key_values.get_seq_length() == text.shape[1] - 1
    theirs, mine, rounded = reference("llama", prefixes, text, seen, counted=True)[:, 6:-1], torch.stack(made.logits, 1), rounding(torch.float32)  # generate hands out float32
    close(reference=theirs.float(), result=mine, drift=rounded)
    with torch.no_grad():
        prefixes[1].add_(0.01)
    rejects(reference=reference("llama", prefixes, text, seen, counted=True)[:, 6:-1].float(), result=mine, drift=rounded)


def test_propagation_refused():
    step = {"pass": "prefix_propagation", "length": PLACES}
    with pytest.raises(Refused, match="no tokens of the pass stand in front of what it reads"):
        rewrite(base("llama"), {"passes": [{**step, "where": "block"}]})
    with pytest.raises(Refused, match="no tokens of the pass stand in front of what it reads"):  # those of another pass are not its own
        rewrite(base("llama"), {"passes": [{"pass": "prompt_tuning", "length": 3}, {**step, "where": "block"}]})
    with pytest.raises(Refused, match="at decoder.block.0: no tokens of the pass"):
        rewrite(base("t5"), {"passes": [{**step, "where": [{"role": "embed", "path": "encoder.**"}, "block"]}]})
    with pytest.raises(Refused, match="and this is attention.q"):
        rewrite(base("bert"), {"passes": [{**step, "where": ["embed", "block", "attention.q"]}]})
    with pytest.raises(Refused, match="tokens that stand in front and are changed further on are those of all rows"):
        rewrite(base("bert"), {"passes": [{"batch": {"fr": [step], "de": [step]}}]})
