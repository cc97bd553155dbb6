"""Rows of a batch with different adapters: each row is what the model with its adapter alone gives, in serving and in training."""

import functools

import pytest
import torch
from checks import TOYS, captured, close, model_of, rejects, rounding, tensor_of
from models import build, example
from test_sequence import Attends
from torch import nn
from torch.nn import functional as F

from rewrite import Refused, Spec, SpecError, export_onnx, load, pipeline, rewrite, save, training
from rewrite import graph as g
from rewrite.edit import lengthen
from rewrite.edit.batch import alone

EXACT = 1e-12
ONE = {
    "lora": [{"pass": "lora", "where": "attention.{q,v}", "rank": 4}],
    "ia3": [{"pass": "ia3"}],
    "adapter": [{"pass": "adapter", "bottleneck": 6, "activation": "gelu"}],
    "bitfit": [{"pass": "bitfit", "where": ["linear", "norm"], "create": True}],
    "dora": [{"pass": "dora", "where": ["attention.{q,v}", "mlp.down"], "rank": 3}],
    "hira": [{"pass": "hira", "where": "attention.{q,v}", "rank": 3}],
    "diff_pruning": [{"pass": "diff_pruning", "where": "mlp.up", "initial": 0.3}],
    "vera": [{"pass": "vera", "where": "attention.{q,v}", "rank": 5}],
    "compacter": [{"pass": "compacter", "bottleneck": 8, "n": 2}],
    "prefix_tuning": [{"pass": "prefix_tuning", "length": 4}],
    "inner": [{"pass": "prefix_tuning", "length": 3, "inner": 6}],
    "p_tuning_v2": [{"pass": "p_tuning_v2", "length": 3}],
    "prompt_tuning": [{"pass": "prompt_tuning", "length": 3}],
    "dropout": [{"pass": "lora", "where": "mlp.down", "rank": 4, "dropout": 0.5}],
}


def batch_of(adapters):
    return {"passes": [{"batch": adapters}]}


def awake(live, seed=0):
    """Other values for all that was made, an adapter's entry of a stacked tensor the same as alone under (seed, adapter, own path)."""
    with torch.no_grad():
        for path in live.report.made:
            tensor = tensor_of(live, path)
            for entry, (adapter, own) in enumerate(live.report.stacked[path].items()):
                generator = torch.Generator().manual_seed(hash((seed, adapter, own)) % 2**31)
                tensor[entry] += 0.3 * torch.randn(tensor.shape[1:], generator=generator, dtype=torch.float64)
    return live


def entries(live, adapter):
    """own path → the adapter's entry of the stacked tensor."""
    return {own: tensor_of(live, path)[list(of).index(adapter)] for path, of in live.report.stacked.items() for name, own in of.items() if name == adapter}


_SINGLES = {}


def by_itself(model, live, adapter, example=None):
    """The model with that adapter alone, holding its tensors of the batch. Adapters that are alike share one model, so use it before the next."""
    spec = alone(live.spec, adapter)
    key = (id(model), spec.to_json().replace(f'"{adapter}"', '""'))
    if key not in _SINGLES:
        _SINGLES[key] = model, rewrite(model, spec, example)
    single = _SINGLES[key][1]
    mine = entries(live, adapter)
    assert mine.keys() == {path for path in single.report.made} | single.report.trains
    with torch.no_grad():
        for path, value in mine.items():
            tensor_of(single, path).copy_(value)
    single.zero_grad()
    return single.eval()


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


@functools.cache
def double(family):
    return build(family).double()


@functools.cache
def rewritten(family, method, count):
    names = [f"a{i}" for i in range(count)]
    return awake(rewrite(double(family), batch_of({name: ONE[method] for name in names}))).eval()


@functools.cache
def mixed(family):
    return awake(rewrite(double(family), batch_of(MIXED))).eval()


def ids_of(rows, length=7):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(rows))


# ---- each row is its own model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ONE)
def test_eight_adapters_of_one_method(method):
    live, chosen = rewritten("llama", method, 8), torch.tensor([5, -1, 7])
    ids = ids_of(len(chosen))
    logits = live(input_ids=ids, adapter_ids=chosen).logits
    for row, number in enumerate(chosen.tolist()):
        single = double("llama") if number < 0 else by_itself(double("llama"), live, f"a{number}")
        close(reference=single(input_ids=ids[row : row + 1]).logits, result=logits[row : row + 1], drift=EXACT)
    others = live(input_ids=ids, adapter_ids=chosen.roll(1)).logits
    for row in range(len(chosen)):
        rejects(reference=others[row : row + 1], result=logits[row : row + 1], drift=EXACT)


MIXED = {"lo": ONE["lora"], "do": ONE["dora"], "ad": [*ONE["adapter"], *ONE["ia3"]], "bi": ONE["bitfit"], "di": [*ONE["diff_pruning"], *ONE["lora"]]}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_different_methods_in_one_batch(family):
    live = mixed(family)
    given, chosen = example(family, batch=6), torch.tensor([4, 2, 0, 3, -1, 1])
    logits = live(**given, adapter_ids=chosen).logits
    for row, number in enumerate(chosen.tolist()):
        single = double(family) if number < 0 else by_itself(double(family), live, [*MIXED][number])
        one = {name: value[row : row + 1] for name, value in given.items()}
        close(reference=single(**one).logits, result=logits[row : row + 1], drift=EXACT)
        rejects(reference=double(family)(**one).logits if number >= 0 else logits[:1], result=logits[row : row + 1], drift=EXACT)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate(beams):
    live = mixed("llama")
    ids, chosen = ids_of(4), torch.tensor([1, 3, -1, 0])
    asked = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=beams, return_dict_in_generate=True, output_logits=True, output_scores=True)

    def found(model, **given):
        made = model.generate(**given, **asked)
        return made.sequences_scores if beams > 1 else torch.stack(made.logits, 1)

    together = found(live, input_ids=ids, adapter_ids=chosen)
    for row, number in enumerate(chosen.tolist()):
        single = double("llama") if number < 0 else by_itself(double("llama"), live, [*MIXED][number])
        close(reference=found(single, input_ids=ids[row : row + 1]), result=together[row : row + 1], drift=1e-6)  # generate casts scores to float32
    rejects(reference=together, result=found(live, input_ids=ids, adapter_ids=chosen.roll(1)), drift=1e-6)


def test_an_encoder_decoder():
    prompt = {"pass": "prompt_tuning", "where": {"role": "embed", "path": "encoder.**"}, "length": 3}
    adapters = {"fr": [{"pass": "lora", "rank": 3}], "de": [{"pass": "hira", "where": "attention.{q,v}", "rank": 3}], "es": [prompt]}
    live = awake(rewrite(double("t5"), batch_of(adapters))).eval()
    given, chosen = example("t5", batch=4), torch.tensor([1, -1, 0, 2])
    logits = live(**given, adapter_ids=chosen, use_cache=True).logits
    for row, name in enumerate(("de", None, "fr", "es")):
        single = by_itself(double("t5"), live, name) if name else double("t5")
        close(reference=single(**{k: v[row : row + 1] for k, v in given.items()}).logits, result=logits[row : row + 1], drift=EXACT)
    assert live.generate(given["input_ids"], adapter_ids=chosen, num_beams=2, max_new_tokens=3).shape[0] == 4


# ---- training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [{name: ONE["lora"] for name in ("a", "b", "c")}, MIXED], ids=["alike", "mixed"])
def test_each_adapter_gets_the_gradients_of_its_rows(adapters):
    live = mixed("llama") if adapters is MIXED else awake(rewrite(double("llama"), batch_of(adapters))).eval()
    ids, chosen = ids_of(7), torch.tensor([1, 0, 1, -1, 2, 0, 0])
    losses = lambda logits, ids: F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")  # noqa: E731
    losses(live(input_ids=ids, adapter_ids=chosen).logits, ids).backward()
    for number, name in enumerate(adapters):
        rows = ids[chosen == number]
        single = by_itself(double("llama"), live, name)
        if len(rows):
            losses(single(input_ids=rows).logits, rows).backward()
        for path, of in live.report.stacked.items():
            wanted = g.attribute(single, of[name]) if name in of else None
            if wanted is None or not wanted.requires_grad:
                continue
            found = tensor_of(live, path).grad[list(of).index(name)]
            if not len(rows):
                assert not found.any()
                continue
            close(reference=wanted.grad, result=found, drift=1e-9)
            if wanted.grad.any():
                rejects(reference=wanted.grad, result=found * 1.001, drift=1e-9)


def test_hooks_see_each_adapter_as_if_it_were_alone():
    adapters = {name: ONE["diff_pruning"] for name in ("a", "b")}
    live = awake(rewrite(model_of("gated"), batch_of(adapters)).double()).train()  # a model without dropout of its own
    single = by_itself(model_of("gated"), live, "b").double().train()
    with torch.no_grad():
        for path, value in entries(live, "b").items():
            tensor_of(single, path).copy_(value)
    ids = TOYS["gated"].inputs(2, 7)["input_ids"]
    for model in (live, single):
        training(model).before_forward()
    together = live(input_ids=ids, adapter_ids=torch.tensor([0, 1])).logits[1:]
    close(reference=single(input_ids=ids[1:]).logits, result=together, drift=EXACT)
    rejects(reference=single.eval()(input_ids=ids[1:]).logits, result=together, drift=EXACT)
    training(live).after_backward()
    both = live.model.layers[0].mlp.up_proj.diff_pruning.a_b.openness.grad
    training(single).after_backward()
    close(reference=single.model.layers[0].mlp.up_proj.diff_pruning.default.openness.grad, result=both[1], drift=EXACT)
    training(live).choose(kept=0.1)
    assert 0.05 < (live.model.layers[0].mlp.up_proj.diff_pruning.a_b.diff[0] != 0).double().mean() < 0.15


def test_dropout_falls_on_each_row_apart():
    live = awake(rewrite(model_of("gated"), batch_of({"a": ONE["dropout"], "b": ONE["dropout"]})))  # a model without dropout of its own
    ids, chosen = TOYS["gated"].inputs(1, 7)["input_ids"].expand(4, -1), torch.tensor([0, 0, -1, -1])
    made = live.train()(input_ids=ids, adapter_ids=chosen).logits
    assert not torch.equal(made[0], made[1]) and torch.equal(made[2], made[3])
    made = live.eval()(input_ids=ids, adapter_ids=chosen).logits
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


# ---- at the start ---------------------------------------------------------------------------------------------------------


def test_a_slot_starts_as_the_adapter_alone_would():
    spec = {"seed": 3, "passes": [{"batch": {"a": ONE["lora"], "b": ONE["vera"], "c": [{**ONE["lora"][0], "name": "own"}]}}]}
    live = rewrite(double("llama"), spec)
    for name in "abc":
        single = rewrite(double("llama"), alone(live.spec, name))
        for path, value in entries(live, name).items():
            assert torch.equal(tensor_of(single, path), value), path
    close(reference=double("llama")(input_ids=ids_of(3)).logits, result=live(input_ids=ids_of(3), adapter_ids=torch.arange(3)).logits, drift=EXACT)


def test_one_stack_for_what_is_alike():
    spec = batch_of({"a": ONE["lora"], "b": [*ONE["ia3"], *ONE["lora"]], "c": ONE["lora"], "d": [{**ONE["lora"][0], "rank": 2}]})
    steps = Spec.parse(spec).passes[0].grouped()
    assert [(step.method, step.members.adapters) for step in steps] == [("lora", ("a", "c")), ("ia3", ("b",)), ("lora", ("b",)), ("lora", ("d",))]
    assert [step.name for step in steps] == ["a_c", "b", "b", "d"]
    live = rewrite(double("llama"), spec)
    assert live.model.layers[0].self_attn.q_proj.lora.a_c.down.shape == (2, 4, 24)
    nodes = [len(rewritten("llama", "ia3", count).graph.nodes) for count in (8, 3)]
    assert nodes[0] == nodes[1]


# ---- words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, words",
    [
        ({"fr": ONE["lora"], "de": [*ONE["ia3"], {"pass": "lora", "rank": 0}]}, r'passes\[0\]\.batch\.de\[1\]\.rank: expected int ≥ 1, got 0'),
        ({"fr": [{"pass": "lorra"}]}, r'passes\[0\]\.batch\.fr\[0\]: "lorra" is not a pass\. Did you mean "lora"'),
        ({}, r"passes\[0\]\.batch: expected an object of adapters"),
        ([ONE["lora"]], r"passes\[0\]\.batch: expected an object of adapters"),
        ({"fr": []}, r"passes\[0\]\.batch\.fr: expected list of at least 1 step"),
        ({"f r": ONE["lora"]}, r'passes\[0\]\.batch: "f r" cannot be part'),
        ({"fr": [{"pass": "unfreeze", "where": "head"}]}, r"passes\[0\]\.batch\.fr\[0\]: unfreeze changes the model for all rows alike"),
        ({"fr": [{"pass": "adalora", "rank": 2, "target": 1, "steps": 100}]}, r"passes\[0\]\.batch\.fr\[0\]: adalora does something to its tensors while training"),
        ({"fr": [*ONE["lora"], *ONE["lora"]]}, r'passes\[0\]\.batch\.fr\[1\]: "lora" stands at .* already'),
    ],
)
def test_words_for_what_is_wrong_in_a_spec(form, words):
    with pytest.raises(SpecError, match=words):
        Spec.parse(batch_of(form))


def test_a_second_batch_and_other_keys_are_told():
    form = {"batch": {"fr": ONE["lora"]}}
    with pytest.raises(SpecError, match=r"passes\[1\]: there is a batch at passes\[0\] already"):
        Spec.parse({"passes": [form, form]})
    with pytest.raises(SpecError, match='"where" is not a key of "batch"'):
        Spec.parse({"passes": [{**form, "where": "linear"}]})


def test_a_spec_with_a_batch_is_a_spec(tmp_path):
    spec = Spec.parse({"seed": 2, **batch_of(MIXED)})
    assert Spec.parse(spec.to_dict()) == spec == Spec.parse(spec.to_dict(full=True))
    (tmp_path / "spec.json").write_text(spec.to_json())
    assert Spec.parse(tmp_path / "spec.json") == spec
    assert Spec.parse(batch_of({"fr": ONE["lora"]})) != Spec.parse(batch_of({"de": ONE["lora"]}))


def test_ids_are_asked_for_and_looked_at():
    live, ids = rewritten("llama", "ia3", 3), ids_of(2)
    for wrong, words in [({}, "adapter_ids is missing"), ({"adapter_ids": torch.tensor([0, 3])}, "adapter_ids holds 3; its entries are -1 to 2"), ({"adapter_ids": torch.tensor([0, -2])}, "adapter_ids holds -2")]:
        with pytest.raises(Refused, match=words):
            live(input_ids=ids, **wrong)
    chosen = torch.tensor([0, 1])
    live(input_ids=ids, adapter_ids=chosen)
    chosen[1] = 3  # looked at again when it has been written to
    with pytest.raises(Refused, match="adapter_ids holds 3"):
        live(input_ids=ids, adapter_ids=chosen)


def test_what_has_other_rows_is_refused():
    with pytest.raises(Refused, match="its rows are tokens sorted by expert, not those of the batch"):
        rewrite(build("mixtral"), batch_of({"fr": [{"pass": "lora", "where": "expert.up", "rank": 2}]}))
    with pytest.raises(Refused, match="padded, which a model must be told by an attention mask, and this one takes none"):
        rewrite(model_of("looped"), batch_of({"fr": [{"pass": "prompt_tuning", "length": 3}]}), TOYS["looped"].inputs(3, 7))
    with pytest.raises(Refused, match="tokens that stand in front and are changed further on"):
        rewrite(double("llama"), batch_of({"fr": [{"pass": "prefix_propagation", "length": 3}]}))
    with pytest.raises(Refused, match="one value of positions serves all rows here"):
        rewrite(double("bert"), batch_of({"fr": [{"pass": "prefix_tuning", "length": 3, "shift": True}]}))
    with pytest.raises(Refused, match="a whole table for each row would be made"):
        rewrite(double("gpt2"), batch_of({"fr": [{"pass": "diff_pruning", "where": "embed.position"}]}))
    with pytest.raises(Refused, match="an earlier step of 'fr' has replaced the weight"):
        rewrite(double("llama"), batch_of({"fr": [*ONE["dora"], *ONE["hira"]]}))


class Picture(nn.Module):
    """A convolution, and a linear over its places."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 10, 3, padding=1), nn.Linear(10, 5)

    def forward(self, pixels):
        return self.head(F.gelu(self.conv(pixels)).flatten(2).transpose(1, 2))


def test_convolutions():
    torch.manual_seed(0)
    model, given = Picture().double(), torch.randn(4, 3, 5, 7, dtype=torch.float64)
    step = {"pass": "bitfit", "where": ["conv", "head"]}
    live = awake(rewrite(model, batch_of({"a": [step], "b": [step]}), {"pixels": given}))
    chosen = torch.tensor([1, -1, 0, 1])
    made = live(given, adapter_ids=chosen)
    for row, name in enumerate(("b", None, "a", "b")):
        single = by_itself(model, live, name, {"pixels": given}) if name else model
        close(reference=single(given[row : row + 1]), result=made[row : row + 1], drift=EXACT)
        rejects(reference=made[1:2] if name else made[:1], result=made[row : row + 1], drift=EXACT)
    with pytest.raises(Refused, match="a convolution with other weights for each row"):
        rewrite(model, batch_of({"a": [{"pass": "lora", "where": "conv", "rank": 2}]}), {"pixels": given})


# ---- what leaves the process ----------------------------------------------------------------------------------------------


def test_saved_and_exported(tmp_path):
    spec = batch_of({"fr": ONE["lora"], "de": ONE["dora"], "it": ONE["bitfit"]})
    base = build("llama")
    live = awake(rewrite(base, spec)).eval()
    again = load(base, save(live, tmp_path / "saved"))
    ids, chosen = ids_of(4), torch.tensor([0, 1, 2, -1])
    close(reference=live(input_ids=ids, adapter_ids=chosen).logits, result=again(input_ids=ids, adapter_ids=chosen).logits, drift=0.0)
    report = export_onnx(live, tmp_path / "live.onnx")
    assert "adapter_ids" in report.inputs


def test_the_toys_too():
    """Fused projections, tied heads, a block that is called twice."""
    for toy in ("written", "looped"):
        model, given = model_of(toy), TOYS[toy].inputs(3, 7)["ids"]
        adapters = {"a": ONE["lora"], "b": ONE["ia3"], "c": ONE["adapter"]}
        live = awake(rewrite(model, batch_of(adapters), {"ids": given}).double()).eval()
        made = live(given, adapter_ids=torch.tensor([2, 0, 1]))
        for row, name in enumerate("cab"):
            single = by_itself(model, live.float(), name, {"ids": given}).double()
            live.double()
            close(reference=single(given[row : row + 1]), result=made[row : row + 1], drift=rounding(torch.float32))


# ---- prefixes: a row sees that of its own adapter alone ---------------------------------------------------------------------

PREFIXED = {"lo": ONE["lora"], "ia": ONE["ia3"], "ad": ONE["adapter"], "pr": ONE["prefix_tuning"]}
TWO = {"fr": ONE["prefix_tuning"], "de": [{"pass": "prefix_tuning", "length": 2}], "it": ONE["prefix_tuning"]}
PROMPTED = {"p3": ONE["prompt_tuning"], "lo": [*ONE["lora"], {"pass": "prompt_tuning", "length": 5}], "ia": ONE["ia3"], "p4": ONE["prompt_tuning"]}


@functools.cache
def prefixed(*names, family="llama"):
    return awake(rewrite(double(family), batch_of({name: {**PREFIXED, **TWO, **PROMPTED}[name] for name in names}))).eval()


def padded(rows, length=7):
    """Ids, and a mask that pads one row on the left."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids_of(rows, length), "attention_mask": mask}


def row_of(given, row):
    return {name: value[row : row + 1] for name, value in given.items()}


def shown_to_all(monkeypatch):
    """From now on the masks hide no place in front."""
    monkeypatch.setattr(lengthen, "_seen", lambda rows, length, places: torch.ones(rows.shape[0], 1, 1, length, dtype=torch.bool, device=rows.device))


@pytest.mark.parametrize("adapters", [PREFIXED, TWO], ids=["methods", "lengths"])
def test_rows_see_their_own_prefix(adapters, monkeypatch):
    live, given, chosen = prefixed(*adapters), padded(5), torch.tensor([len(adapters) - 1, 0, -1, 1, 2])
    logits = live(**given, adapter_ids=chosen).logits
    if adapters is TWO:
        shown_to_all(monkeypatch)
        broken = awake(rewrite(double("llama"), batch_of(adapters))).eval()(**given, adapter_ids=chosen).logits
    else:
        broken = live(**given, adapter_ids=torch.full((5,), 3)).logits
    for row, number in enumerate(chosen.tolist()):
        single = double("llama") if number < 0 else by_itself(double("llama"), live, [*adapters][number])
        wanted, found, kept = single(**row_of(given, row)).logits, logits[row : row + 1], given["attention_mask"][row].bool()
        close(reference=wanted[:, kept], result=found[:, kept], drift=EXACT)
        if adapters is TWO or number != 3:
            rejects(reference=wanted[:, kept], result=broken[row : row + 1][:, kept], drift=EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_rows_have_their_own_prompt(family):
    """Decoders are padded in front, by positions; an encoder that looks at its first token, behind."""
    live, given, chosen = prefixed(*PROMPTED, family=family), padded(5), torch.tensor([1, 0, -1, 2, 3])
    if family == "bert":
        given["attention_mask"] = given["attention_mask"].flip(1)
    logits, broken = live(**given, adapter_ids=chosen).logits, live(**given, adapter_ids=torch.tensor([0, 3, 0, -1, 0])).logits
    assert {tuple(tensor_of(live, path).shape[:2]) for path in live.report.made if "prompt_tuning" in path} == {(2, 3), (1, 5)}
    for row, number in enumerate(chosen.tolist()):
        single = double(family) if number < 0 else by_itself(double(family), live, [*PROMPTED][number])
        wanted, found, other = single(**row_of(given, row)).logits, logits[row : row + 1], broken[row : row + 1]
        if family != "bert":
            wanted, found, other = (values[:, given["attention_mask"][row].bool()] for values in (wanted, found, other))
        close(reference=wanted, result=found, drift=EXACT)
        rejects(reference=wanted, result=other, drift=EXACT)


OTHERS = {
    "gpt2": {"em": [{"pass": "lora", "where": ["embed", "embed.position"], "rank": 2}], "sh": [{"pass": "prefix_tuning", "length": 3, "shift": True}]},
    "bert": {"no": [{"pass": "adapter", "where": "mlp", "bottleneck": 4, "read": "normed"}], "ap": [{"pass": "apt", "length": 3}]},
}


@pytest.mark.parametrize("family", OTHERS)
def test_tables_positions_norms_and_first_tokens(family):
    adapters = OTHERS[family]
    live, ids, chosen = awake(rewrite(double(family), batch_of(adapters))).eval(), ids_of(3), torch.tensor([1, -1, 0])
    logits = live(input_ids=ids, adapter_ids=chosen).logits
    logits.square().sum().backward()
    for row, number in enumerate(chosen.tolist()):
        single = double(family) if number < 0 else by_itself(double(family), live, [*adapters][number])
        wanted = single(input_ids=ids[row : row + 1]).logits
        close(reference=wanted, result=logits[row : row + 1], drift=EXACT)
        if number < 0:
            continue
        rejects(reference=double(family)(input_ids=ids[row : row + 1]).logits, result=logits[row : row + 1], drift=EXACT)
        wanted.square().sum().backward()
        for path, of in live.report.stacked.items():
            for own in of.values() if [*adapters][number] in of else ():
                grad = g.attribute(single, own).grad
                close(reference=grad, result=tensor_of(live, path).grad[0], drift=1e-9)
                if grad.any():  # a relu may be shut
                    rejects(reference=grad, result=tensor_of(live, path).grad[0] * 1.001, drift=1e-9)


@pytest.mark.parametrize("adapters", [PREFIXED, TWO, PROMPTED], ids=["methods", "lengths", "prompts"])
def test_prefixes_generate(adapters):
    live, given, chosen = prefixed(*adapters), padded(4), torch.tensor([len(adapters) - 1, -1, 1, 0])
    asked = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    found = lambda model, **given: torch.stack(model.generate(**given, **asked).logits, 1)  # noqa: E731
    together = found(live, **given, adapter_ids=chosen)
    for row, number in enumerate(chosen.tolist()):
        single = double("llama") if number < 0 else by_itself(double("llama"), live, [*adapters][number])
        close(reference=found(single, **row_of(given, row)), result=together[row : row + 1], drift=1e-6)  # generate casts scores to float32
    rejects(reference=together, result=found(live, **given, adapter_ids=chosen.roll(1)), drift=1e-6)


@pytest.mark.parametrize("adapters", [PREFIXED, TWO, PROMPTED], ids=["methods", "lengths", "prompts"])
def test_prefixes_get_the_gradients_of_their_rows(adapters):
    live, ids, chosen = prefixed(*adapters), ids_of(5), torch.tensor([1, len(adapters) - 1, 1, -1, 0])
    loss = lambda logits, ids: F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")  # noqa: E731
    live.zero_grad()
    loss(live(input_ids=ids, adapter_ids=chosen).logits, ids).backward()
    for number, name in enumerate(adapters):
        rows, single = ids[chosen == number], by_itself(double("llama"), live, name)
        if len(rows):
            loss(single(input_ids=rows).logits, rows).backward()
        for path, of in live.report.stacked.items():
            if name not in of:
                continue
            wanted, found = g.attribute(single, of[name]).grad, tensor_of(live, path).grad[list(of).index(name)]
            if not len(rows):
                assert not found.any()
                continue
            assert wanted.any()
            close(reference=wanted, result=found, drift=EXACT)
            rejects(reference=wanted, result=found * 1.001, drift=EXACT)


@pytest.mark.parametrize(
    "kind, grouped", [("none", False), ("causal", False), ("native", True), ("bool", True), ("float", False), ("added", True), ("filled", False), ("chosen", False)]
)
def test_prefixes_under_every_mask(kind, grouped, monkeypatch):
    torch.manual_seed(0)
    model, x, chosen = Attends(kind, grouped).double(), torch.randn(4, 7, 24, dtype=torch.float64), torch.tensor([1, 2, -1, 0])
    live = awake(rewrite(model, batch_of(TWO), {"x": x}))
    made = [live(x=given, adapter_ids=chosen) for given in (x, x[:, :1])]
    shown_to_all(monkeypatch)
    broken = awake(rewrite(model, batch_of(TWO), {"x": x}))(x=x, adapter_ids=chosen)
    for row, number in enumerate(chosen.tolist()):
        single = model if number < 0 else by_itself(model, live, [*TWO][number], {"x": x})
        for given, found in zip((x, x[:, :1]), made):
            close(reference=single(x=given[row : row + 1]), result=found[row : row + 1], drift=EXACT)
        rejects(reference=single(x=x[row : row + 1]), result=broken[row : row + 1], drift=EXACT)
