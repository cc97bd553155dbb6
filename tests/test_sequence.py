"""Prefixes and prompts: HF PEFT with copied weights and the original model behind a cache filled by hand are the oracles."""

import copy
import functools

import peft
import pytest
import torch
import transformers as T
from checks import captured, close, rejects, rounding
from models import build, example
from torch import nn
from torch.nn import functional as F

from rewrite import Refused, Spec, SpecError, export_onnx, load, pipeline, rewrite, save

PLACES = 21  # more than the tokens with which a model is traced
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
    return [tuple(live.get_parameter(f"{site}.prefix_tuning.default.{name}".strip(".")) for name in ("keys", "values")) for site in sites]


def pieces(live, family):
    """Which part of PEFT's prefix each of ours is. An encoder-decoder gets them four at a time, of which its decoder reads the first two."""
    flat = [part for pair in prefixes(live) for part in pair]
    return [(part, (4 * (i // 2) + i % 2) % len(flat) if family == "t5" else i) for i, part in enumerate(flat)]


def copied(wrapped, live, family):
    """`live` with PEFT's prefix: of each layer the keys, then the values."""
    for mine, at in pieces(live, family):
        mine.data.copy_(wrapped.prompt_encoder.default.embedding.weight.split(mine.shape[1], 1)[at])
    return live


@pytest.mark.parametrize("family", TASKS)
def test_prefix_as_peft(family):
    wrapped = peft_prefixed(family)
    live = copied(wrapped, prefixed(family), family)
    for batch, length in ((3, 9), (1, 1)):
        inputs = example(family, batch, length)
        theirs, mine = wrapped(**inputs).logits, live(**inputs).logits
        close(reference=theirs, result=mine, drift=EXACT)
    inputs = example(family, 3, 9)
    labels = torch.tensor([0, 1, 2]) if family == "bert" else inputs.get("decoder_input_ids", inputs["input_ids"])
    for model in (wrapped, live):
        model(**inputs, labels=labels).loss.backward()
    theirs = wrapped.prompt_encoder.default.embedding.weight.grad
    mine = torch.zeros_like(theirs)
    for part, at in pieces(live, family):
        mine.split(part.shape[1], 1)[at].add_(part.grad)
    assert theirs.any()
    close(reference=theirs, result=mine, drift=EXACT)
    rejects(reference=theirs, result=1.001 * mine, drift=EXACT)
    theirs = wrapped(**inputs).logits
    if family != "t5":
        rejects(reference=theirs, result=copied(wrapped, prefixed(family, shift=False), family)(**inputs).logits, drift=EXACT)
    for keys, values in prefixes(live):
        keys.data, values.data = values.data, keys.data
    rejects(reference=theirs, result=live(**inputs).logits, drift=EXACT)


def prompts(family):
    """Ids of three rows, and a mask that pads one of them on the left."""
    ids = example(family, 3, 7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


GENERATES = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefix_generates_as_peft(family, beams):
    wrapped = peft_prefixed(family)
    live = copied(wrapped, prefixed(family), family)
    theirs = wrapped.generate(**prompts(family), **GENERATES, num_beams=beams)
    assert torch.equal(theirs, live.generate(**prompts(family), **GENERATES, num_beams=beams))
    assert not torch.equal(theirs, base(family).generate(**prompts(family), **GENERATES, num_beams=beams))


def turns(live, family, **options):
    """Two turns of generation behind one cache, and the cache's length after the first."""
    ids = example(family, 2, 7)["input_ids"]
    go = lambda ids, **more: live.generate(ids, attention_mask=torch.ones_like(ids), **GENERATES, **options, **more)  # noqa: E731
    first = go(ids, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids[:, :3]], 1)
    length = first.past_key_values.get_seq_length()
    return longer, go(longer, past_key_values=first.past_key_values), length


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prefix_second_turn(family):
    wrapped = peft_prefixed(family)
    live = copied(wrapped, prefixed(family), family)
    longer, second, length = turns(live, family)
    assert length == 7 + 6 - 1  # the cache holds tokens alone
    assert torch.equal(second, wrapped.generate(input_ids=longer, attention_mask=torch.ones_like(longer), **GENERATES))


def test_prefix_of_a_network_as_peft():
    """The two-layer network: PEFT makes the prefixes of all layers at once, we the part of each site."""
    wrapped = peft_prefixed("gpt2", prefix_projection=True, encoder_hidden_size=10)
    live = prefixed("gpt2", inner=10)
    encoder = wrapped.prompt_encoder.default
    pairs = [("tokens", encoder.embedding.weight), ("inner_weight", encoder.transform[0].weight), ("inner_bias", encoder.transform[0].bias)]
    mine = [(theirs, live.get_parameter(f"prefix_tuning.default.{name}")) for name, theirs in pairs]
    last = zip(encoder.transform[2].weight.split(24), encoder.transform[2].bias.split(24), [part for pair in prefixes(live) for part in pair], strict=True)
    biases = [live.get_parameter(f"{site}.prefix_tuning.default.{name}_bias") for site, _ in live.report.applied[0].sites for name in ("keys", "values")]
    parts = [(theirs, ours) for (w, b, ours_w), ours_b in zip(last, biases, strict=True) for theirs, ours in ((w, ours_w), (b, ours_b))]
    for theirs, ours in mine + parts:
        ours.data.copy_(theirs)
    inputs = example("gpt2", 3, 9)
    for model in (wrapped, live):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    close(reference=wrapped(**inputs).logits, result=live(**inputs).logits, drift=EXACT)
    for theirs, ours in mine:
        close(reference=theirs.grad, result=ours.grad, drift=EXACT)
    wide = torch.cat([ours.grad for theirs, ours in parts if theirs.dim() == 2])
    close(reference=encoder.transform[2].weight.grad, result=wide, drift=EXACT)
    rejects(reference=encoder.transform[2].weight.grad, result=wide.roll(24, 0), drift=EXACT)


def test_two_prefixes():
    """Two of different names are one of both, the later one in front; two of one name are refused."""
    steps = [{"pass": "prefix_tuning", "length": length, "name": name} for name, length in (("fr", 3), ("de", 4))]
    live, whole = rewrite(base("llama"), {"passes": steps}), rewrite(base("llama"), {"passes": [{"pass": "prefix_tuning", "length": 7}]})
    for site, _ in whole.report.applied[0].sites:
        for part in ("keys", "values"):
            de, fr = (live.get_parameter(f"{site}.prefix_tuning.{name}.{part}") for name in ("de", "fr"))
            whole.get_parameter(f"{site}.prefix_tuning.default.{part}").data.copy_(torch.cat([de, fr]))
    inputs = example("llama", 3, 9)
    close(reference=whole(**inputs).logits, result=live(**inputs).logits, drift=EXACT)
    rejects(reference=whole(**inputs).logits, result=rewrite(base("llama"), {"passes": steps[:1]})(**inputs).logits, drift=EXACT)
    with pytest.raises(SpecError, match='stands at "attention" already'):
        rewrite(base("llama"), {"passes": [steps[0], steps[0]]})


# ---- masks of every kind ----------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    """One attention, its mask as `kind` says; 4 heads of queries, over 2 of keys where `grouped`."""

    def __init__(self, kind, grouped=False):
        super().__init__()
        self.kind, self.grouped = kind, grouped
        self.q, self.k, self.v, self.o = nn.Linear(24, 24), nn.Linear(24, 12 if grouped else 24), nn.Linear(24, 12 if grouped else 24), nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 6)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.grouped and self.kind != "native":
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return self.o(self.attend(q, k, v, x).transpose(1, 2).flatten(2))

    def attend(self, q, k, v, x):
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        bias = -0.3 * (x[..., :1] + x[..., 0].unsqueeze(1)).unsqueeze(1)
        if self.kind in ("causal", "native"):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kind == "native")
        if self.kind in ("bool", "float", "none"):
            return F.scaled_dot_product_attention(q, k, v, attn_mask={"bool": seen, "float": bias, "none": None}[self.kind])
        scores = q @ k.transpose(-1, -2) / 6**0.5
        if self.kind == "added":
            scores = bias + scores
        if self.kind == "filled":
            scores = scores.masked_fill(~seen, float("-inf"))
        if self.kind == "chosen":
            scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
        if self.kind == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k)
        return torch.softmax(scores, -1) @ v

    def formula(self, x, keys, values):
        """The same with a prefix (places, width), from the definition."""
        q, k, v = (f(x).unflatten(-1, (-1, 6)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (torch.cat([p.unflatten(-1, (-1, 6)).transpose(0, 1).expand(len(x), -1, -1, -1), t], 2) for p, t in ((keys, k), (values, v)))
        scores = torch.einsum("bgrid,bgjd->bgrij", q.unflatten(1, (k.shape[1], -1)), k).flatten(1, 2) / 6**0.5
        front, own = scores[..., : len(keys)], scores[..., len(keys) :]
        if self.kind in ("float", "added"):
            own = own - 0.3 * (x[:, None, :, :1] + x[:, None, None, :, 0])
        elif self.kind != "none":
            own = own.masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), float("-inf"))
        y = torch.einsum("bgrij,bgjd->bgrid", torch.cat([front, own], -1).softmax(-1).unflatten(1, (k.shape[1], -1)), v).flatten(1, 2)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "kind, grouped", [("none", False), ("causal", False), ("causal", True), ("native", True), ("bool", True), ("float", False), ("added", True), ("filled", False), ("chosen", False)]
)
def test_prefix_under_every_mask(kind, grouped):
    torch.manual_seed(0)
    model = Attends(kind, grouped).double()
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    live = rewrite(model, {"passes": [{"pass": "prefix_tuning", "length": PLACES}]}, example={"x": x})
    ((keys, values),) = prefixes(live)
    assert keys.shape == (PLACES, 12 if grouped else 24)
    for tensor in (keys, values):
        nn.init.normal_(tensor)
    for length in (1, 7, 11):
        x = torch.randn(2, length, 24, dtype=torch.float64)
        close(reference=model.formula(x, keys, values), result=live(x=x), drift=EXACT)
        rejects(reference=model.formula(x, keys.roll(1, 1), values), result=live(x=x), drift=EXACT)


def test_prefix_refuses_what_it_cannot_lengthen():
    x = torch.randn(3, 7, 24)
    with pytest.raises(Refused, match="its keys are read by einsum"):
        rewrite(Attends("einsum"), {"passes": [{"pass": "prefix_tuning", "length": 2}]}, example={"x": x})
    with pytest.raises(Refused, match=r"have 3 and 3 dimensions; a prefix needs \(batch, heads, length, dim\)"):
        rewrite(base("deberta_v2"), {"passes": [{"pass": "prefix_tuning", "length": 2}]})
    with pytest.raises(Refused, match="no one value by which the model counts"):
        rewrite(base("t5"), {"passes": [{"pass": "prefix_tuning", "length": 2, "shift": True}]})


# ---- kept and handed on ----------------------------------------------------------------------------------------------------


def test_prefix_saved_and_exported(tmp_path):
    model = build("llama")
    live = rewrite(model, {"passes": [{"pass": "prefix_tuning", "length": PLACES, "shift": True}]})
    for keys, values in prefixes(live):
        nn.init.normal_(keys), nn.init.normal_(values)
    again = load(model, save(live, tmp_path / "saved"))
    inputs = example("llama")
    close(reference=live(**inputs).logits, result=again(**inputs).logits, drift=0.0)
    rejects(reference=live(**inputs).logits, result=model(**inputs).logits, drift=rounding(torch.float32))
    report = export_onnx(live, tmp_path / "model.onnx", cache=True)  # compared in ONNX Runtime, an empty cache among the sizes
    assert report.error is not None and len(report.sizes) == 3


# ---- prompts ---------------------------------------------------------------------------------------------------------------


def prompted(family, **options):
    where = {"role": "embed", "path": "encoder.**"} if family == "t5" else "embed"
    return rewrite(base(family), {"passes": [{"pass": "prompt_tuning", "where": where, "length": PLACES, **options}]})


def prompt_of(live):
    """The prompt of a live model, with values as large as the embeddings that it stands among."""
    (path,) = live.report.made
    return live.get_parameter(path)


def peft_prompted(family):
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(copy.deepcopy(base(family)), peft.PromptTuningConfig(task_type=TASKS[family], num_virtual_tokens=PLACES)).double().eval()
    if family == "bert":
        wrapped.base_model.classifier = copy.deepcopy(base(family).classifier)
    return wrapped


def with_prompt(wrapped, live):
    prompt_of(live).data.copy_(wrapped.prompt_encoder.default.embedding.weight[:PLACES])  # an encoder-decoder gets two; its encoder reads the first
    return live


@pytest.mark.parametrize("family", TASKS)
def test_prompt_as_peft(family):
    wrapped = peft_prompted(family)
    live = with_prompt(wrapped, prompted(family))
    kept = slice(PLACES if TASKS[family] == "CAUSAL_LM" else 0, None)  # PEFT hands the prompt's own logits back too
    for batch, length in ((1, 1), (3, 9)):
        inputs = example(family, batch, length)
        labels = torch.tensor([0, 1, 2])[:batch] if family == "bert" else inputs.get("decoder_input_ids", inputs["input_ids"])
        theirs, mine = wrapped(**inputs, labels=labels), live(**inputs, labels=labels)
        close(reference=theirs.logits[:, kept], result=mine.logits, drift=EXACT)
        close(reference=theirs.loss, result=mine.loss, drift=EXACT)
        close(reference=mine.logits, result=live(**inputs).logits, drift=EXACT)
        for found in (theirs, mine):
            found.loss.backward()
    a, b = wrapped.prompt_encoder.default.embedding.weight.grad[:PLACES], prompt_of(live).grad
    assert a.any()
    close(reference=a, result=b, drift=EXACT)
    rejects(reference=a, result=1.001 * b, drift=EXACT)
    rejects(reference=theirs.loss, result=base(family)(**inputs, labels=labels).loss, drift=EXACT)
    prompt_of(live).data.copy_(prompt_of(live).flip(0))
    rejects(reference=theirs.logits[:, kept], result=live(**inputs).logits, drift=EXACT)


def by_embeddings(live, family, input_ids, attention_mask, **options):
    """What the original model generates when the prompt is put before the embeddings by hand."""
    model, prompt = base(family), prompt_of(live).detach()
    embeds = torch.cat([prompt.expand(len(input_ids), -1, -1), model.get_input_embeddings()(input_ids)], 1)
    mask = torch.cat([attention_mask.new_ones(len(input_ids), PLACES), attention_mask], 1)
    return torch.cat([input_ids, model.generate(inputs_embeds=embeds, attention_mask=mask, **GENERATES, **options)], 1)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_generates(family, beams):
    live = with_prompt(peft_prompted(family), prompted(family))
    wanted = by_embeddings(live, family, **prompts(family), num_beams=beams)
    assert torch.equal(wanted, live.generate(**prompts(family), **GENERATES, num_beams=beams))
    assert not torch.equal(wanted, base(family).generate(**prompts(family), **GENERATES, num_beams=beams))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_second_turn(family):
    live = with_prompt(peft_prompted(family), prompted(family))
    longer, second, length = turns(live, family)
    assert length == 7 + 6 - 1  # what generate sees of the cache
    assert torch.equal(second, by_embeddings(live, family, longer, torch.ones_like(longer)))


def test_prompt_of_an_encoder_generates_as_peft():
    wrapped = peft_prompted("t5")
    live = with_prompt(wrapped, prompted("t5"))
    inputs = {k: v for k, v in example("t5", 3, 9).items() if not k.startswith("decoder")}
    for beams in (1, 3):
        theirs = wrapped.generate(**inputs, **GENERATES, num_beams=beams)
        assert torch.equal(theirs, live.generate(**inputs, **GENERATES, num_beams=beams))
    prompt_of(live).data.neg_()
    assert not torch.equal(theirs, live.generate(**inputs, **GENERATES, num_beams=beams))


def test_prompt_refuses_in_words():
    prompt = {"pass": "prompt_tuning", "length": 3}
    with pytest.raises(Refused, match="tokens stand in front of the model's own already"):
        rewrite(base("llama"), {"passes": [{**prompt, "name": "fr"}, {**prompt, "name": "de"}]})
    with pytest.raises(Refused, match="tokens stand in front of the model's own already.*narrow"):
        rewrite(base("t5"), {"passes": [prompt]})
    with pytest.raises(Refused, match="ids name 99, and its table has 99 rows"):
        rewrite(base("llama"), {"passes": [{**prompt, "ids": [1, 99]}]})
    live, ids = prompted("llama"), example("llama")["input_ids"]
    cache = base("llama")(ids, use_cache=True).past_key_values
    with pytest.raises(Refused, match="was filled by a model with 0 tokens in front, this one has 21"):
        live(input_ids=ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 8, dtype=torch.long))
    with pytest.raises(Refused, match="was filled by a model with 21 tokens in front, this one has 0"):
        rewrite(base("llama"), {"passes": []})(input_ids=ids[:, :1], past_key_values=live(input_ids=ids, use_cache=True).past_key_values, attention_mask=torch.ones(2, 8, dtype=torch.long))


REPEATED = ([7, 9] * PLACES)[:PLACES]


def test_prompt_starts_from_ids_and_hides_itself():
    live = prompted("llama", ids=[7, 9])
    table = base("llama").get_input_embeddings().weight
    close(reference=table[REPEATED].detach(), result=prompt_of(live), drift=0.0)
    ids = example("llama")["input_ids"]
    behind = torch.cat([torch.tensor([REPEATED]).expand(2, -1), ids], 1)
    wanted, found = base("llama")(behind, output_hidden_states=True), live(input_ids=ids, output_hidden_states=True)
    close(reference=wanted.logits[:, PLACES:], result=found.logits, drift=EXACT)
    for theirs, mine in zip(wanted.hidden_states, found.hidden_states, strict=True):
        close(reference=theirs[:, PLACES:], result=mine, drift=EXACT)
    rejects(reference=wanted.logits[:, :-PLACES], result=found.logits, drift=EXACT)


def test_prompt_saved_and_exported(tmp_path):
    model = build("llama")
    live = rewrite(model, {"passes": [{"pass": "prompt_tuning", "length": PLACES}, {"pass": "lora", "where": "linear", "rank": 4}]})
    again = load(model, save(live, tmp_path / "saved"))
    inputs = example("llama")
    close(reference=live(**inputs).logits, result=again(**inputs).logits, drift=0.0)
    rejects(reference=live(**inputs).logits, result=model(**inputs).logits, drift=rounding(torch.float32))
    for variant in ("forward", "first", "past"):  # each compared in ONNX Runtime
        assert export_onnx(live, tmp_path / f"{variant}.onnx", variant).error is not None


def test_apt_weighs_each_place_by_the_first_token():
    """From the definition: the prefix of each row, weighed by its first token, is a prefix like any other."""
    model, inputs = base("bert"), example("bert", 3, 9)
    live = rewrite(model, {"passes": [{"pass": "apt", "length": PLACES}]})
    for path in live.report.made:
        nn.init.normal_(live.get_parameter(path))
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        plain = rewrite(model, {"passes": [{"pass": "p_tuning_v2", "length": PLACES}]})
        for index, (site, _) in enumerate(live.report.applied[0].sites):  # layer by layer: what a block reads depends on the prefixes before it
            keys, values, gate, layer = (live.get_parameter(f"{site}.apt.default.{name}") for name in ("keys", "values", "gate", "layer"))
            first = plain(**one, output_hidden_states=True).hidden_states[index][0, 0]
            weight = layer * torch.sigmoid((gate * first).sum(1))
            for name, prefix in (("keys", keys), ("values", values)):
                plain.get_parameter(f"{site}.p_tuning_v2.default.{name}").data.copy_(weight[:, None, None] * prefix)
        close(reference=plain(**one).logits, result=live(**inputs).logits[row : row + 1], drift=EXACT)
        rejects(reference=plain(**one).logits, result=live(**inputs).logits[row - 1 : row or None], drift=EXACT)
    with pytest.raises(Refused, match="decodes token by token behind a cache"):
        rewrite(base("llama"), {"passes": [{"pass": "apt", "length": 2}]})


def test_p_tuning_v2_is_a_flat_prefix():
    """PEFT's prefix without a network, its places as heads of keys: on BERT, whose head trains with it."""
    wrapped = peft_prefixed("bert")
    live = rewrite(base("bert"), {"passes": [{"pass": "p_tuning_v2", "length": PLACES, "shift": True}, {"pass": "unfreeze", "where": "head"}]})
    paths = [f"{site}.p_tuning_v2.default.{name}" for site, _ in live.report.applied[0].sites for name in ("keys", "values")]
    for path, theirs in zip(paths, wrapped.prompt_encoder.default.embedding.weight.split(24, 1), strict=True):
        live.get_parameter(path).data.copy_(theirs.unflatten(1, (4, 6)))
    inputs = example("bert", 3, 9)
    close(reference=wrapped(**inputs).logits, result=live(**inputs).logits, drift=EXACT)
    live.get_parameter(paths[0]).data.neg_()
    rejects(reference=wrapped(**inputs).logits, result=live(**inputs).logits, drift=EXACT)
    assert live.get_parameter("classifier.weight").requires_grad


def test_deep_vpt_by_inserted_tokens():
    """From the paper: tokens behind [CLS] at the input of each block, those of the block before taken out."""
    model, pixels = base("vit"), example("vit", 3)["pixel_values"].double()
    live = rewrite(model, {"passes": [{"pass": "deep_vpt", "length": PLACES}, {"pass": "unfreeze", "where": "head"}]})
    found = [live.get_parameter(path) for path in live.report.made]

    def by_hand(prompts):
        h = model.vit.embeddings(pixels)
        for layer, prompt in zip(model.vit.layers, prompts, strict=True):
            h = layer(torch.cat([h[:, :1], prompt.expand(3, -1, -1), h[:, 1:]], 1))
            h = torch.cat([h[:, :1], h[:, 1 + PLACES :]], 1)
        return model.classifier(model.vit.layernorm(h)[:, 0])

    wanted, logits = by_hand(found), live(pixel_values=pixels).logits
    close(reference=wanted, result=logits, drift=EXACT)
    rejects(reference=by_hand(found[::-1]), result=logits, drift=EXACT)
    grads = [torch.autograd.grad(each.square().sum(), found) for each in (wanted, logits)]
    for theirs, mine in zip(*grads, strict=True):
        close(reference=theirs, result=mine, drift=EXACT)
    turning = captured(base("gpt_neox"))
    turning.variants.clear()
    with pytest.raises(Refused, match="turned by their positions"):
        pipeline.apply(turning, Spec.parse({"passes": [{"pass": "deep_vpt", "length": 2}]}))
    with pytest.raises(Refused, match="come out of a cache"):
        rewrite(base("gpt2"), {"passes": [{"pass": "deep_vpt", "length": 2}]})
