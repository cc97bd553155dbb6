"""How a model is called: example inputs, defaults, caches, labels, refusals. No capture: see `signed.py`."""

import copy
import dataclasses
import inspect
import pickle

import models
import pytest
import sympy
import torch
import transformers as T
from signed import signed
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache

from rewrite import capture
from rewrite.calls import caches, slots
from rewrite.calls.leaves import leaves, rebuild
from rewrite.calls.signature import Signature, variants
from rewrite.emit.live import make_live
from rewrite.errors import Refused

DECODERS = ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "mixtral"]
SEQ2SEQ = ["t5", "bart", "whisper"]
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pair():
    made = {}

    def get(family):
        if family not in made:
            model = models.build(family)
            made[family] = model, signed(model)
        model, live = made[family]
        del live._calls[:]
        return model.eval(), live.eval()

    return get


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, DynamicCache):
        return all(torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in zip(a.layers, b.layers, strict=True))
    if isinstance(a, T.EncoderDecoderCache):
        return equal(a.self_attention_cache, b.self_attention_cache) and equal(a.cross_attention_cache, b.cross_attention_cache)
    return a == b


def tokens(model, family, **options):
    inputs = {k: v for k, v in models.example(family, batch=2, length=9).items() if not k.startswith("decoder")}
    if "attention_mask" in inputs and not model.config.is_encoder_decoder:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # decoders are padded on the left
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, **options})


def calls(family):
    """Calls that the original takes, by a word."""
    inputs = models.example(family, batch=2, length=9)
    bare = {k: v for k, v in inputs.items() if "mask" not in k}
    found = {"example": inputs, "no mask": bare, "one": models.example(family, batch=1, length=1)}
    if family not in ("vit", "whisper"):
        found["int32 ids, bool mask"] = {k: v.int() if k.endswith("ids") else v.bool() if "mask" in k else v for k, v in inputs.items()}
    return found


# ---- which calls are captured


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_variant_is_a_call_that_the_model_takes(family):
    model = models.build(family)
    before, state = copy.deepcopy(model.config.to_dict()), torch.random.get_rng_state()
    found = variants(model)
    assert model.config.to_dict() == before and torch.equal(torch.random.get_rng_state(), state) and not model.training
    names = [v.name for v in found]
    assert names == ["forward", "encoder", "first", "next"] if family in SEQ2SEQ else ["forward", "past"] if family in DECODERS else ["forward"]
    for variant in found:
        leaf_names, tensors, tree = leaves(variant.kwargs)
        assert set(variant.dims) <= set(leaf_names)
        with torch.no_grad():
            output = model.get_submodule(variant.owner)(**rebuild(tree, tensors))
        assert ("past_key_values" in output) == (variant.name in ("past", "first", "next"))
        assert ("loss" in output) == bool(variant.labels and variant.loss is None)
    sizes = []
    for variant in found:
        tensors = dict(zip(*leaves(variant.kwargs)[:2]))
        sizes += [(word, tensors[name].shape[dim]) for name, dims in variant.dims.items() for dim, word in dims.items() if "+" not in word]
    assert len({word for word, _ in sizes}) == len({n for _, n in sizes}) == len(set(sizes)), "one size per symbol, one symbol per size"


@pytest.mark.parametrize(
    "family, defaults",
    [
        ("llama", {"attention_mask": "ones", "position_ids": "positions"}),
        ("gpt2", {"attention_mask": "ones", "position_ids": "positions"}),  # its token types are no zeros when left out
        ("roberta", {"attention_mask": "ones", "token_type_ids": "zeros"}),  # its positions come from the ids
        ("distilbert", {"attention_mask": "ones"}),
        ("t5", {"attention_mask": "ones", "decoder_attention_mask": "ones"}),
        ("whisper", {"decoder_attention_mask": "ones", "decoder_position_ids": "positions"}),
        ("vit", {}),
    ],
)
def test_defaults_are_what_the_model_does_itself(family, defaults):
    assert variants(models.build(family))[0].defaults == defaults


def test_a_default_that_the_model_does_not_have_is_not_taken():
    class Odd(T.LlamaForCausalLM):
        step = 2

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, labels=None, **kwargs):
            if position_ids is None:
                past = past_key_values.get_seq_length() if past_key_values is not None else 0
                position_ids = self.step * torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None] + 1
            return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache, labels=labels, **kwargs)

    found = variants(Odd(models.build("llama").config))
    assert "position_ids" not in found[0].kwargs and "position_ids" not in found[0].defaults
    assert "position_ids" in found[1].kwargs, "generate hands them over"
    Odd.step = 1
    found = variants(Odd(models.build("llama").config))
    assert found[0].defaults["position_ids"] == "positions" and found[0].first == 1, "it counts from one on"


def test_positions_behind_padding_and_planes_that_are_alike():
    """RoBERTa's decoder counts the tokens that are no padding, from the padding token's number on; `generate` hands positions over."""
    torch.manual_seed(0)
    config = T.RobertaConfig(**models.SIZES, pad_token_id=1, bos_token_id=0, eos_token_id=2, max_position_embeddings=64, is_decoder=True)
    model = T.RobertaForCausalLM(config).eval()
    live = make_live(capture(model))
    ids = torch.randint(3, 97, (2, 6))
    ids[1, 4:] = 1
    with torch.no_grad():
        assert torch.equal(live(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
        assert torch.equal(live(ids).logits, model(ids).logits)
        planes = torch.arange(2, 8).expand(3, 2, 6).contiguous()
        slot = next(slot for slot in live.graph.signature.entries["forward"].slots if slot.name == "position_ids")
        slot = dataclasses.replace(slot, default="positions")
        assert torch.equal(slot.admit(planes, {}, "a model"), planes[0])
        planes[1, 0, 0] += 1
        with pytest.raises(Refused, match="planes differ"):
            slot.admit(planes, {}, "a model")


def test_models_on_the_meta_device_get_inputs_there():
    with torch.device("meta"):
        model = models.FAMILIES["gpt2"]()
    for variant in variants(model):
        assert all(tensor.device.type == "meta" for tensor in leaves(variant.kwargs)[1])


def test_the_loss_is_recomputed_only_where_it_is_the_models_own_function():
    main = {family: variants(models.build(family))[0] for family in ("llama", "vit", "bert", "clip")}
    assert dict(main["llama"].loss.kwargs)["logits"] == ("output", "logits") and main["vit"].loss.args[2] == ("config",)
    assert main["bert"].loss is None and main["bert"].labels == ("labels",) and "num_items_in_batch" in main["bert"].ignored
    assert main["clip"].labels == ()
    config = models.build("mixtral").config
    config.output_router_logits = True
    balanced = variants(T.MixtralForCausalLM(config))[0]
    assert balanced.loss is None and "labels" in balanced.kwargs, "the loss adds the balance of the router"


@pytest.mark.parametrize(
    "heads, dtype, shape",
    [
        ({"num_labels": 1}, torch.float32, (3,)),
        ({"num_labels": 4, "problem_type": "multi_label_classification"}, torch.float32, (3, 4)),
        ({"num_labels": 4}, torch.int64, (3,)),
    ],
)
def test_labels_fit_the_problem(heads, dtype, shape):
    config = T.BertConfig(**models.SIZES, max_position_embeddings=64, pad_token_id=0, **heads)
    model = T.BertForSequenceClassification(config).eval()
    labels = variants(model)[0].kwargs["labels"]
    assert labels.dtype == dtype and labels.shape[0] == leaves(variants(model)[0].kwargs)[1][0].shape[0] and labels.dim() == len(shape)
    assert model.config.problem_type == heads.get("problem_type"), "the model's config is not written to"


@pytest.mark.parametrize("head", [T.BertForTokenClassification, T.BertForMaskedLM, T.BertForQuestionAnswering, T.BertModel])
def test_other_heads(head):
    torch.manual_seed(0)
    model = head(T.BertConfig(**models.SIZES, max_position_embeddings=64, pad_token_id=0)).eval()
    live = signed(model)
    inputs = models.example("bert", batch=2, length=9)
    labels = {"labels": inputs["input_ids"] % 2} if head in (T.BertForTokenClassification, T.BertForMaskedLM) else {}
    if head is T.BertForQuestionAnswering:
        labels = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 8])}
    assert equal(dict(model(**inputs)), dict(live(**inputs))) and equal(dict(model(**inputs, **labels)), dict(live(**inputs, **labels)))
    assert live._calls == (["unlabelled", "forward"] if labels else ["forward", "forward"])
    if len(labels) == 2:
        refused(live, "end_positions is missing", **inputs, start_positions=labels["start_positions"])


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "vit"])
def test_an_example_handed_over_is_taken_as_it_is(family):
    model, inputs = models.build(family), models.example(family, batch=4, length=6)
    found = variants(model, inputs)
    assert all(torch.equal(found[0].kwargs[name], value) for name, value in inputs.items()) and not found[0].notes
    live = signed(model, inputs)
    other = models.example(family, batch=2, length=9)
    assert equal(dict(model(**other)).get("logits"), dict(live(**other)).get("logits"))
    if family != "vit" and model.can_generate():
        assert torch.equal(tokens(model, family), tokens(live, family))


# ---- the same as the original


@pytest.mark.parametrize("family", models.FAMILIES)
def test_calls_return_what_the_original_returns(family, pair):
    model, live = pair(family)
    for word, inputs in calls(family).items():
        with torch.no_grad():
            original, ours, plain = model(**inputs), live(**inputs), live(**inputs, return_dict=False)
        assert type(original) is type(ours), word
        assert [name for name in original if name != "cache_params"] == list(ours) and equal(original.to_tuple()[0], ours.to_tuple()[0]), word
        cache = original.get("past_key_values")
        assert cache is None or (type(cache) is type(ours.past_key_values) and cache.get_seq_length() == ours.past_key_values.get_seq_length())
        if "cache_params" not in original:  # of a kind that is not captured
            assert type(plain) is tuple and len(plain) == len(original) and equal(plain[0], ours.to_tuple()[0])
    names = list(inspect.signature(model.forward).parameters)
    assert list(inspect.signature(live.forward).parameters) == names
    if not model.config.is_encoder_decoder and "attention_mask" in names[:2]:
        first = models.example(family, batch=2, length=9)
        assert equal(live(first["input_ids"]).logits, live(input_ids=first["input_ids"]).logits) if "logits" in live(**first) else True


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
@pytest.mark.parametrize("family", DECODERS + SEQ2SEQ)
def test_generate_gives_the_same_tokens(family, options, pair):
    model, live = pair(family)
    assert torch.equal(tokens(model, family, **options), tokens(live, family, **options))
    used = set(live._calls)
    if family in DECODERS:
        assert used == {"forward" if options.get("use_cache") is False else "past"}
    else:
        assert used == ({"encoder", "first"} if options.get("use_cache") is False else {"encoder", "first", "next"})


def test_generate_without_a_cache_where_only_that_was_captured(pair):
    model, live = pair("mamba")
    assert torch.equal(tokens(model, "mamba", use_cache=False), tokens(live, "mamba", use_cache=False))
    with pytest.raises(Refused, match="use_cache=False"):
        tokens(live, "mamba")


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_generate_in_other_ways(family, pair):
    model, live = pair(family)
    draft, one = models.build(family, seed=1), {k: v[:1] for k, v in models.example(family, length=9).items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    ways = [{"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 4, "num_return_sequences": 2}]
    for way in ways + ([{"prefill_chunk_size": 4}] if family != "t5" else []):
        assert torch.equal(model.generate(**one, **options, **way), live.generate(**one, **options, **way)), way
    assert torch.equal(draft.generate(**one, **options, assistant_model=model), draft.generate(**one, **options, assistant_model=live))
    torch.manual_seed(0)
    original = model.generate(**one, max_new_tokens=9, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    assert torch.equal(original, live.generate(**one, max_new_tokens=9, do_sample=True, num_return_sequences=3))


def test_a_cache_is_the_users_own_and_goes_past_the_window(pair):
    model, live = pair("gemma3")
    ids = models.example("gemma3", batch=2, length=9)["input_ids"]
    cache, original = DynamicCache(config=live.config), DynamicCache(config=model.config)
    assert cache.is_sliding == [True, False]
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 7), (7, 8), (8, 9)):
            ours, theirs = live(ids[:, start:stop], past_key_values=cache), model(ids[:, start:stop], past_key_values=original)
            assert ours.past_key_values is cache and cache.get_seq_length() == stop == cache.layers[0].keys.shape[2]
            torch.testing.assert_close(ours.logits, theirs.logits)
    cut = DynamicCache(config=model.config)
    model(ids, past_key_values=cut)
    with pytest.raises(Refused, match="let go of all but the last 3 of 9 places"):
        live(ids[:, :1], past_key_values=cut)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "bert", "t5", "bart", "whisper"])
@pytest.mark.parametrize("training", [False, True])
def test_labels_give_the_originals_loss(family, training, pair):
    model, live = pair(family)
    inputs = models.example(family, batch=3, length=9)
    labels = inputs.pop("decoder_input_ids", inputs.get("input_ids"))
    labels = torch.tensor([2, 0, 1]) if family in ("vit", "bert") else labels.masked_fill(labels % 5 == 0, -100)
    model.train(training), live.train(training)
    for extra in ({}, {"num_items_in_batch": torch.tensor(7)}, {"num_items_in_batch": 7}):
        losses = []
        for one in (model, live):
            torch.manual_seed(3)
            losses.append(one(**inputs, labels=labels, **extra, **({} if family in ("vit", "bert") else {"use_cache": False})).loss)
        assert torch.equal(*losses), extra
    assert "loss" not in live(**models.example(family, batch=3, length=9))
    assert live.train()(**inputs, labels=labels).get("past_key_values") is None


def test_logits_to_keep(pair):
    model, live = pair("llama")
    inputs = models.example("llama", batch=2, length=9)
    for keep in (0, 1, 4, torch.tensor([0, 5])):
        original, ours = model(**inputs, logits_to_keep=keep).logits, live(**inputs, logits_to_keep=keep).logits
        torch.testing.assert_close(original, ours)
    with pytest.raises(Refused, match="logits_to_keep of 2 dimensions"):
        live(**inputs, logits_to_keep=torch.ones(2, 9, dtype=torch.bool))


def test_signatures_travel(pair):
    _, live = pair("t5")
    inputs = models.example("t5", batch=2, length=9)
    for found in (copy.deepcopy(live._signature), pickle.loads(pickle.dumps(live._signature))):
        assert isinstance(found, Signature) and found is not live._signature
        assert equal(found.bind(live, (), inputs).values, live._signature.bind(live, (), inputs).values)


def test_torch_compile_traces_bind_and_pack(pair):
    model, live = pair("llama")
    signature, logits = live._signature, torch.randn(2, 9, 99)

    def run(**kwargs):
        call = signature.bind(live, (), kwargs)
        return signature.pack(live, call, [logits * call.values[1][..., None]])

    inputs = models.example("llama", batch=2, length=9) | {"use_cache": False}
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for more in ({}, {"labels": inputs["input_ids"]}, {"labels": inputs["input_ids"], "num_items_in_batch": torch.tensor(5)}):
        assert equal(dict(run(**inputs, **more)), dict(compiled(**inputs, **more)))


# ---- broken twins: what these tests must notice


@pytest.mark.parametrize("broken", ["positions start at 0", "a stale cache", "masks of zeros"])
def test_the_comparison_with_the_original_can_fail(broken, monkeypatch):
    model = models.build("llama")
    live = signed(model)
    ids = models.example("llama", batch=2, length=9)["input_ids"]
    with torch.no_grad():
        original = DynamicCache()
        model(ids[:, :5], past_key_values=original)
        expected = model(ids[:, 5:], past_key_values=original).logits
        make = slots.Slot.make
        if broken == "positions start at 0":
            early = lambda slot, sizes: {**sizes, slot.start: 0} if slot.default == "positions" else sizes
            monkeypatch.setattr(slots.Slot, "make", lambda slot, sizes, *rest: make(slot, early(slot, sizes), *rest))
        if broken == "masks of zeros":
            monkeypatch.setattr(slots.Slot, "make", lambda slot, *rest: make(slot, *rest) * 0 if slot.default == "ones" else make(slot, *rest))
        cache = DynamicCache()
        live(ids[:, :5], past_key_values=cache)
        if broken == "a stale cache":
            for layer in cache.layers:
                layer.values = torch.zeros_like(layer.values)
        assert not torch.allclose(live(ids[:, 5:], past_key_values=cache).logits, expected)


# ---- refusals, in words


def refused(live, words, **kwargs):
    with pytest.raises(Refused, match=words):
        live(**kwargs)


def test_inputs_that_do_not_fit_are_refused(pair):
    _, live = pair("llama")
    inputs = models.example("llama", batch=2, length=9)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    refused(live, r"attention_mask is \(2, 8\), but the other inputs ask for length \+ past = 9 places", input_ids=ids, attention_mask=mask[:, 1:])
    refused(live, r"attention_mask is \(2, 8\), but length is 9 by the other inputs", input_ids=ids, attention_mask=mask[:, 1:], use_cache=False)
    refused(live, r"attention_mask is \(3, 9\), but batch is 2", input_ids=ids, attention_mask=torch.ones(3, 9, dtype=torch.long))
    refused(live, r"A mask of four dimensions", input_ids=ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))
    refused(live, r"attention_mask is a dict", input_ids=ids, attention_mask={"full_attention": None})
    refused(live, r"attention_mask is float32, the graph takes", input_ids=ids, attention_mask=mask.float())
    refused(live, r"position_ids without attention_mask.*packed", input_ids=ids, position_ids=(torch.arange(9) % 5)[None], use_cache=False)
    refused(live, r"inputs_embeds was not captured: the graph begins at the ids", inputs_embeds=torch.randn(2, 9, 24))
    refused(live, r"output_attentions=True", input_ids=ids, output_attentions=True)
    refused(live, r"cu_seq_lens_q was not captured", input_ids=ids, cu_seq_lens_q=torch.tensor([0, 9]))
    refused(live, r"input_ids is missing", attention_mask=mask)
    refused(live, r"input_ids is float32", input_ids=ids.float())
    refused(live, r"input_ids is \(9,\), the graph takes \(batch, length\) of int64", input_ids=ids[0])
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        live(ids, input_ids=ids)
    with pytest.raises(TypeError, match="positional arguments but 20 were given"):
        live(*[ids] * 20)


def test_inputs_that_say_nothing_new_are_taken(pair):
    model, live = pair("llama")
    inputs = models.example("llama", batch=2, length=9)
    more = {"output_attentions": False, "output_hidden_states": None, "inputs_embeds": None, "cache_position": torch.arange(9), "labels": None}
    assert equal(model(**inputs).logits, live(**inputs, **more).logits)
    positions = torch.arange(9)[None]
    assert equal(model(**inputs, position_ids=positions).logits, live(**inputs, position_ids=positions).logits)


def test_positions_are_refused_where_the_model_makes_them(pair):
    _, live = pair("roberta")
    refused(live, "position_ids was not captured: this model makes its positions itself", **models.example("roberta"), position_ids=torch.arange(7)[None])


def test_caches_of_other_kinds_are_refused(pair):
    _, live = pair("llama")
    ids = models.example("llama")["input_ids"]
    refused(live, "StaticCache, the graph keeps a DynamicCache", input_ids=ids, past_key_values=StaticCache(live.config, max_cache_len=16))
    with pytest.raises(Refused, match="StaticCache"):
        live.generate(ids, max_new_tokens=2, cache_implementation="static")
    filled = DynamicCache()
    live(ids, past_key_values=filled)
    refused(live, "past_key_values has batch 2, the other inputs say 1", input_ids=ids[:1], past_key_values=filled)
    filled.layers.pop()
    refused(live, "past_key_values has 1 layers, the model has 2", input_ids=ids, past_key_values=filled)
    _, whole = pair("t5")
    refused(whole, "the graph keeps an EncoderDecoderCache", **models.example("t5"), past_key_values=DynamicCache())


def test_labels_of_another_kind_are_refused(pair):
    _, live = pair("bert")
    inputs = models.example("bert")
    refused(live, r"labels is float32, the graph takes \(batch\) of int64. Labels of another kind", **inputs, labels=torch.rand(2))
    refused(live, r"labels is \(2, 3\), the graph takes \(batch\)", **inputs, labels=torch.rand(2, 3))
    _, whole = pair("t5")
    refused(whole, "labels together with a cache", **models.example("t5"), labels=torch.ones(2, 9, dtype=torch.long), use_cache=True)
    refused(whole, "decoder_input_ids is missing", **{k: v for k, v in models.example("t5").items() if not k.startswith("decoder")}, use_cache=False)
    _, pictures = pair("clip")
    refused(pictures, "return_loss asks for a loss that was not captured", **models.example("clip"), return_loss=True)


def test_a_loss_that_takes_what_the_graph_cannot_is_refused():
    config = models.build("mixtral").config
    config.output_router_logits = True
    live = signed(T.MixtralForCausalLM(config).eval())
    inputs = models.example("mixtral")
    refused(live, "cannot be divided by num_items_in_batch", **inputs, labels=inputs["input_ids"], num_items_in_batch=3)


def test_sizes_of_the_config_are_fixed(pair):
    _, live = pair("vit")
    refused(live, r"pixel_values is \(2, 3, 16, 32\), but it was captured as \(batch, 3, 32, 32\) of float32", pixel_values=torch.randn(2, 3, 16, 32))


def test_a_check_names_the_value_that_violates_it():
    model = models.build("bert")
    live = signed(model, checks=lambda symbols: sympy.Le(symbols["length"], 8))
    live(**models.example("bert", length=8))
    refused(live, r"length is 9, but the graph was captured for length <= 8 \(asked at model.py:7\)", **models.example("bert", length=9))
    least = signed(model, checks=lambda symbols: sympy.Eq(sympy.Min(64, symbols["length"]), symbols["length"]))
    refused(least, "captured for length <= 64", **models.example("bert", length=65))
    found = pickle.loads(pickle.dumps(least._signature)).entries["forward"].checks[0]
    assert found.formula.of({found.formula.symbols[0]: 64}) and not found.formula.of({found.formula.symbols[0]: 65})


class Points(T.PreTrainedModel):
    config_class, main_input_name = T.BertConfig, "point_cloud"

    def __init__(self, config):
        super().__init__(config)
        self.mix = nn.Linear(3, 4)
        self.post_init()

    def forward(self, point_cloud):
        return self.mix(point_cloud)


def test_an_example_that_cannot_be_made_or_taken_is_refused():
    with pytest.raises(Refused, match="hand over an example of its inputs"):
        variants(nn.Linear(3, 4))
    with pytest.raises(Refused, match="does not accept the example given"):
        variants(models.build("bert"), {"input_ids": torch.randn(2, 7)})
    with pytest.raises(Refused, match="no example for 'point_cloud' can be made"):
        variants(Points(T.BertConfig()))


# ---- modules that are no transformers models


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(10, 6), nn.Linear(6, 5)

    def forward(self, ids, scale, pair=None, flag=True):
        hidden = self.mix(self.embed(ids)) * scale[:, None, None]
        if pair is not None:
            hidden = hidden + pair["a"][:, None] + pair["b"][0][:, None]
        return {"hidden": hidden if flag else -hidden, "both": (hidden.sum(-1), [scale])}


def test_a_plain_module_keeps_its_calls():
    model = Tower()
    example = {"ids": torch.randint(0, 10, (3, 7)), "scale": torch.rand(3), "pair": {"a": torch.rand(3, 5), "b": (torch.rand(3, 5),)}, "flag": False}
    variant = variants(model, example)[0]
    assert variant.dims == {"ids": {0: "batch", 1: "length"}, "scale": {0: "batch"}, "pair.a": {0: "batch"}, "pair.b.0": {0: "batch"}}
    live = signed(model, example)
    other = {"ids": torch.randint(0, 10, (2, 4)), "scale": torch.rand(2), "pair": {"a": torch.rand(2, 5), "b": [torch.rand(2, 5)]}, "flag": False}
    assert equal(model(**other), live(**other)) and live(**other)["both"][1][0] is other["scale"]
    assert equal(model(*other.values()), live(*other.values()))
    refused(live, "captured with flag=False, called with flag=True", **{**other, "flag": True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'more'"):
        live(**other, more=1)


def test_a_plain_module_takes_its_inputs_in_order():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    live = signed(model, (torch.rand(3, 4),))
    x = torch.rand(5, 4)
    assert torch.equal(model(x), live(x)) and torch.equal(model(x), live(input=x))
    refused(live, r"input is \(5, 3\), but it was captured as \(batch, 4\)", input=torch.rand(5, 3))
    assert caches.accept(None, False, "") is not None


def test_positions_left_out_follow_the_mask_where_the_model_counts_by_it():
    """OPT counts what its mask lets through; Llama counts places."""
    config = T.OPTConfig(vocab_size=48, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=56, max_position_embeddings=64, word_embed_proj_dim=24)
    torch.manual_seed(0)
    for model in (T.OPTForCausalLM(config).eval(), models.build("llama").eval()):
        live = make_live(capture(model))
        ids, mask = torch.randint(3, 20, (2, 7)), torch.ones(2, 7, dtype=torch.long)
        mask[1, :3], mask[0, 6] = 0, 0
        with torch.no_grad():
            assert torch.equal(live(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids, attention_mask=mask).logits)
            cache = model(input_ids=ids, attention_mask=mask).past_key_values
            more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            wanted = model(input_ids=ids[:, :1], attention_mask=more, past_key_values=copy.deepcopy(cache)).logits
            assert (live(input_ids=ids[:, :1], attention_mask=more, past_key_values=cache).logits - wanted).abs().max() < 2e-6 * wanted.abs().max()


def test_types_left_out_are_those_that_the_model_takes_behind_padding_too():
    """PaliGemma's types say who sees whom: all zero is the same as none at all without padding, and not with it."""
    text = dict(model_type="gemma", vocab_size=48, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=56)
    vision = dict(model_type="siglip_vision_model", hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=28, image_size=8, patch_size=4, projection_dim=24)
    config = T.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=24, image_token_index=40, pad_token_id=0)
    torch.manual_seed(0)
    model = T.PaliGemmaForConditionalGeneration(config).eval()
    ids, mask = torch.randint(3, 20, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[:, :4], mask[1, 7:] = 40, 0
    given = dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 8, 8))
    typed = {**given, "token_type_ids": (torch.arange(9) > 5).long().expand(2, 9).contiguous()}
    zeros = {**given, "token_type_ids": torch.zeros_like(ids)}
    without, of_types = make_live(capture(model)), make_live(capture(model, example=typed))
    with torch.no_grad():
        assert torch.equal(without(**given).logits, model(**given).logits)
        assert not torch.equal(model(**given).logits, model(**zeros).logits)
        for more in (typed, zeros):
            assert torch.equal(of_types(**more).logits, model(**more).logits)
            refused(without, "token_type_ids was not captured", **more)
        refused(of_types, "token_type_ids", **given)


def test_generates_without_a_cache_and_without_padding():
    model = models.build("llama").eval()
    live, ids = make_live(capture(model)), torch.randint(3, 20, (2, 6))
    options = dict(max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(live.generate(ids, **options), model.generate(ids, **options))
