"""Prefixes and prompts: HF PEFT with copied weights and the original model behind a cache filled by hand are the oracles."""

import copy
import functools

import peft
import pytest
import torch
import transformers as T
from checks import captured, close, rejects, rounding
from models import SIZES, SPECIAL, build, example

from rewrite import Refused, export_onnx, load, pipeline, rewrite, save

PLACES = 5
EXACT = rounding(torch.float64)


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


@functools.cache
def base(family):
    """The model of a family in float64, with matrices as large as trained ones; the T5 as PEFT takes it (head dim = width / heads)."""
    torch.manual_seed(0)
    if family == "t5":
        config = T.T5Config(vocab_size=99, d_model=24, d_kv=6, d_ff=56, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
        model = T.T5ForConditionalGeneration(config).eval().double()
    else:
        model = build(family).double()
    with torch.no_grad():
        for value in {id(p): p for p in model.parameters() if p.dim() == 2}.values():
            value.mul_(value.shape[1] ** -0.5 / value.std())
        if family == "t5":  # HF gives the places of a prefix relative positions as if they were tokens; ours have none
            model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    return model


# ---- prefixes --------------------------------------------------------------------------------------------------------------

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
DECODER = {"role": "attention", "path": "decoder.**.SelfAttention"}  # PEFT prefixes the decoder of an encoder-decoder alone


def prefixed(family, **options):
    """Our model with a prefix; positions count it, as they do in PEFT."""
    where = DECODER if family == "t5" else "attention"
    return rewrite(base(family), {"passes": [{"pass": "prefix_tuning", "where": where, "length": PLACES, "shift": family != "t5", **options}]})


def peft_prefixed(family, **options):
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(task_type=TASKS[family], num_virtual_tokens=PLACES, **options)
    wrapped = peft.get_peft_model(copy.deepcopy(base(family)), config).double().eval()
    if family == "bert":
        wrapped.base_model.classifier = copy.deepcopy(base(family).classifier)
    return wrapped


def prefixes(live):
    """(keys, values) of each site, in the order of the layers."""
    sites = [site for site, _ in live.report.applied[0].sites]
    return [tuple(live.get_parameter(f"{site}.prefix_tuning.default.{name}") for name in ("keys", "values")) for site in sites]


def copied(wrapped, live):
    """`live` with PEFT's prefix: of each layer the keys, then the values."""
    flat = [part for pair in prefixes(live) for part in pair]
    for mine, theirs in zip(flat, wrapped.prompt_encoder.default.embedding.weight.split(flat[0].shape[1], 1), strict=True):
        mine.data.copy_(theirs)
    return live


@pytest.mark.parametrize("family", TASKS)
def test_prefix_as_peft(family):
    wrapped = peft_prefixed(family)
    live = copied(wrapped, prefixed(family))
    for batch, length in ((3, 9), (1, 1)):
        inputs = example(family, batch, length)
        theirs, mine = wrapped(**inputs).logits, live(**inputs).logits
        close(reference=theirs, result=mine, drift=EXACT)
    inputs = example(family, 3, 9)
    labels = torch.tensor([0, 1, 2]) if family == "bert" else inputs.get("decoder_input_ids", inputs["input_ids"])
    for model in (wrapped, live):
        model(**inputs, labels=labels).loss.backward()
    theirs = wrapped.prompt_encoder.default.embedding.weight.grad
    mine = torch.cat([part.grad for pair in prefixes(live) for part in pair], 1)
    assert theirs.any()
    close(reference=theirs, result=mine, drift=EXACT)
    rejects(reference=theirs, result=1.001 * mine, drift=EXACT)
    theirs = wrapped(**inputs).logits
    if family != "t5":
        rejects(reference=theirs, result=copied(wrapped, prefixed(family, shift=False))(**inputs).logits, drift=EXACT)
    for keys, values in prefixes(live):
        keys.data, values.data = values.data, keys.data
    rejects(reference=theirs, result=live(**inputs).logits, drift=EXACT)
