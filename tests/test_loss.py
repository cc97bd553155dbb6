"""The head with its loss: against its formula in float64, what backward keeps, the Triton body, and `fuse` on models beside transformers' own loss.

An error may be twice that of the plain ops in the same dtype, plus one rounding of it (test_kernels).
"""

import copy
import functools
import json
import subprocess
import sys

import aot_loss
import loss as cases
import pytest
import torch
import transformers as T
from aot import fault
from checks import captured, close, rejects, rounding, wake
from interpreted import error
from models import build
from rewrite.kernels import linear_cross_entropy as k
from test_kernels import allowed

from rewrite import Refused, adapters, load, merge, pipeline, rewrite, save, show, source
from rewrite import kept as keeps

CASES = cases.CASES


@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_the_plain_ops(case):
    arguments, dtype = cases.given(case), CASES[case][3]
    exact = cases.run(cases.plainly, arguments, torch.float64)
    plain = cases.run(k.reference, arguments)
    chunked = lambda *a: k.launch(*a, rows=cases.ROWS)  # noqa: E731
    for function in (chunked, k.launch, k.linear_cross_entropy):
        for reference, usual, ours in zip(exact, plain, cases.run(function, arguments), strict=True):
            assert reference.shape == ours.shape and error(reference, ours) <= allowed(error(reference, usual), dtype)
    with torch.no_grad():
        assert error(exact[0], chunked(*arguments)) <= allowed(error(exact[0], plain[0]), dtype)
    if exact[0]:
        broken = cases.run(cases.mistaken(chunked), arguments)
        assert all(error(a, c) > allowed(error(a, b), dtype) for a, b, c in zip(exact, plain, broken, strict=True))


@pytest.mark.parametrize("case", ["odd", "strided"])
def test_gradients(case):
    x, w, b, labels, items = cases.given(case)
    leaves = [t if t is None else t.double().requires_grad_() for t in (x, w, b)]
    for function in (k.reference, lambda *a: k.launch(*a, rows=cases.ROWS), k.linear_cross_entropy):
        assert torch.autograd.gradcheck(lambda *a: function(*a, labels, items), leaves, fast_mode=True)  # noqa: B023


@pytest.mark.parametrize("case", ["odd", "no label"])
def test_registered_ops_are_whole(case):
    x, w, b, labels, items = (t.detach() if isinstance(t, torch.Tensor) else t for t in cases.given(case))
    torch.library.opcheck(k.gradients.overload, (x, w, b, labels, [True, False, b is not None]))
    torch.library.opcheck(k.linear_cross_entropy.overload, (x.requires_grad_(), w.requires_grad_(), b, labels, items))


def test_where_nothing_is_labelled_it_is_as_in_pytorch():
    x, w, b, labels, items = cases.given("odd")
    nothing = x, w, b, torch.full_like(labels, k.IGNORED), 0 * items
    for function in (k.reference, k.launch, k.linear_cross_entropy):
        loss, *found = cases.run(function, nothing)
        assert loss.isnan() and not any(t.any() for t in found)


def test_labels_that_are_no_classes_fail():
    x, w, b, labels, items = cases.given("odd")
    for wrong in (len(w), -1):
        labels[1] = wrong
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            k.launch(x, w, b, labels, items)


def kept(function, arguments, trains):
    """Shapes and dtypes of what backward keeps beside the arguments themselves."""
    leaves = [a.requires_grad_(i in trains) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for i, a in enumerate(arguments)]
    own, found = {t.untyped_storage().data_ptr() for t in leaves if t is not None}, []

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            found.append((tuple(t.shape), t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(*leaves)
    return [entry for entry in found if entry[0]]


def test_backward_keeps_the_gradients_and_no_logits():
    arguments = cases.given("bf16")
    assert kept(k.launch, arguments, {0}) == [((15, 34), torch.bfloat16)]
    assert kept(k.launch, arguments, {0, 1}) == [((15, 34), torch.bfloat16), ((77, 34), torch.bfloat16)]
    assert ((15, 77), torch.float32) in kept(k.reference, arguments, {0})


def test_no_more_than_a_chunk_of_logits_is_there():
    x, w, b, labels, items = cases.given("bf16")
    seen = []

    def way(logits, *given):
        seen.append(len(logits))
        return k.by_library(logits, *given)

    k.launch(x.requires_grad_(), w, b, labels, items, way, 4)
    assert seen == [4, 4, 4, 3]
    assert k.rows_of(4096, 32000, 4096) == 1024 and k.rows_of(8, 32000, 4096) == k.LEAST


def test_autocast():
    x, w, b, labels, items = cases.given("odd")
    exact = cases.run(cases.plainly, (x, w, b, labels, items), torch.float64)
    cast = lambda f: lambda *a: torch.autocast("cpu", torch.bfloat16)(f)(*a)  # noqa: E731
    plain, ours = (cases.run(cast(f), (x, w, b, labels, items)) for f in (k.reference, k.launch))
    for reference, usual, own in zip(exact, plain, ours, strict=True):
        assert own.dtype == torch.float32 and error(reference, own) <= allowed(error(reference, usual), "bfloat16")


# ---- Triton ----------------------------------------------------------------------------------------------------------------


def test_triton_body_under_the_interpreter():
    done = subprocess.run([sys.executable, cases.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report.pop("nothing over nothing") == ["nan", 0, 0, 0] and report.pop("no such class") == "nan"
    assert report.keys() == CASES.keys()
    for case, found in report.items():
        limits = [allowed(plain, found["dtype"]) for plain in found["plain"]]
        assert all(ours <= limit for ours, limit in zip(found["ours"], limits)) and found["alone"] <= limits[0], case
        assert case in ("no label", "no tokens") or all(broken > limit for broken, limit in zip(found["broken"], limits)), case


@pytest.mark.parametrize("dtype, wanted", [("bf16", True), ("fp32", False)])
def test_body_compiles_for_hopper(dtype, wanted):
    found = aot_loss.compiled(90, dtype, wanted)
    assert fault(90, found) is None, fault(90, found)


# ---- the pass ------------------------------------------------------------------------------------------------------------

FUSE, LORA = {"pass": "fuse", "logits": False}, {"pass": "lora", "where": "attention.{q,v}", "rank": 3}
NOTE = "in training mode a call with labels gives the loss and no logits"


@functools.cache
def tiny(family):
    """Without dropout, so that two runs in training mode are alike."""
    torch.manual_seed(0)
    if family == "gpt2":
        return T.GPT2LMHeadModel(T.GPT2Config(vocab_size=99, n_embd=24, n_layer=1, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    sizes = dict(vocab_size=99, hidden_size=24, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    return T.LlamaForCausalLM(T.LlamaConfig(**sizes, tie_word_embeddings=False)).eval()


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


def batch(length=7):
    """Ids with a padded row, and labels of which some count nothing."""
    generator = torch.Generator().manual_seed(length)
    ids, mask = torch.randint(3, 97, (2, length), generator=generator), torch.ones(2, length, dtype=torch.long)
    mask[1, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pair(model, *steps):
    """The same passes without and with the loss fused, alike in training mode."""
    return [wake(rewrite(model, {"passes": [*steps, *more]})).train() for more in ([], [FUSE])]


def gradients(live, **given):
    live.zero_grad()
    loss = live(**given).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in live.parameters() if p.requires_grad)]


def agree(plain, fused, drift=5, **given):
    for reference, result in zip(gradients(plain, **given), gradients(fused, **given), strict=True):
        close(reference=reference, result=result, drift=drift * rounding(torch.float32))
        rejects(reference=reference, result=1.01 * result, drift=drift * rounding(torch.float32))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_gradients_of_the_original_model(family):
    """Every tensor trains, in gpt2 with a head that is the embedding: the model as transformers runs it is the oracle."""
    original = copy.deepcopy(tiny(family)).train()
    live = rewrite(tiny(family), {"passes": [{"pass": "unfreeze", "where": "linear"}, {"pass": "unfreeze", "where": "head"}, FUSE]})
    assert any(NOTE in note for note in live.report.notes) and ("lm_head", "linear_cross_entropy") in live.report.applied[-1].sites
    given = batch()
    out = live.train()(**given)
    assert out.logits is None and list(out.keys()) == ["loss"]
    out.loss.backward()
    reference = original(**given).loss
    reference.backward()
    close(reference=reference, result=out.loss, drift=rounding(torch.float32))
    rejects(reference=reference, result=live(**given | {"labels": given["input_ids"]}).loss, drift=rounding(torch.float32))
    trains = [(path, p) for path, p in live.named_parameters() if p.requires_grad]
    assert len(trains) > 4 and any("head" in path or "wte" in path for path, _ in trains)
    for path, p in trains:
        if family == "gpt2" and "wte" in path:
            continue  # there the original's gradient is that of the embedding too, which the live model does not train
        close(reference=original.get_parameter(path).grad, result=p.grad, drift=5 * rounding(torch.float32))
        rejects(reference=original.get_parameter(path).grad, result=1.01 * p.grad, drift=5 * rounding(torch.float32))


def test_all_else_is_as_it_was():
    plain, fused = pair(tiny("llama"), LORA)
    given = batch()
    assert "linear_cross_entropy(" in source(fused)
    agree(plain, fused, **given)
    ids = {name: given[name] for name in ("input_ids", "attention_mask")}
    assert fused(**ids).logits is not None  # without labels
    for model in (plain, fused):
        model.eval()
    assert torch.equal(plain(**given).logits, fused(**given).logits) or error(plain(**given).logits, fused(**given).logits) < 1e-6
    assert fused(**given).loss is not None
    same = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids["input_ids"], **same), fused.generate(ids["input_ids"], **same))
    twin = copy.deepcopy(fused).train()
    assert twin(**given).logits is None


@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": 29},
        {"num_items_in_batch": torch.tensor(29)},
        {"shift_labels": torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(3))},
        {"return_dict": False},
    ],
)
def test_what_a_call_may_add(more):
    plain, fused = pair(tiny("llama"), LORA)
    given = batch() | more
    one, two = plain(**given), fused(**given)
    if more.get("return_dict") is False:
        assert len(two) == 1 and error(one[0].detach(), two[0].detach()) < 1e-6
        return
    assert two.logits is None
    agree(plain, fused, **given)


def test_calls_that_ask_for_logits_get_them():
    plain, fused = pair(tiny("llama"), LORA)
    own = lambda logits, labels, vocab_size, **more: logits.square().mean()  # noqa: E731
    given = batch()
    out = fused(**given | {"ignore_index": 3, "labels": given["input_ids"]})
    assert out.logits is not None and error(plain(**given | {"ignore_index": 3, "labels": given["input_ids"]}).loss.detach(), out.loss.detach()) < 1e-6
    assert fused(**{name: value for name, value in given.items() if name != "labels"}, logits_to_keep=2).logits.shape[1] == 2
    fused.loss_function = plain.loss_function = own  # another loss, put in afterwards
    assert fused(**given).logits is not None
    agree(plain, fused, **given)


def test_labels_of_another_length_are_refused():
    _, fused = pair(tiny("llama"), LORA)
    given = batch()
    with pytest.raises(ValueError, match="14 tokens and 12 labels"):
        fused(**given | {"labels": given["labels"][:, :-1]})


def test_behind_a_prompt():
    plain, fused = pair(tiny("llama"), {"pass": "prompt_tuning", "length": 3})
    agree(plain, fused, **batch())


@pytest.mark.parametrize("steps", [[LORA, {"pass": "lora", "where": "head", "rank": 3}], [LORA, {"pass": "adamix", "where": "mlp"}]])
def test_a_head_that_something_else_reads_or_makes_keeps_its_logits(steps):
    fused = pair(tiny("llama"), *steps)[1]
    [(_, reason)] = [(path, reason) for path, reason in fused.report.applied[-1].refused if "the loss stays" in reason]
    assert any(word in reason for word in ("what lora_linear", "adamix")), reason
    assert "linear_cross_entropy" not in source(fused) and fused(**batch()).logits is not None


def softcapped():
    torch.manual_seed(0)
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    return T.Gemma2ForCausalLM(T.Gemma2Config(**sizes, final_logit_softcapping=5.0)).eval()


def with_own_loss():
    model = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=64)).eval()
    model.loss_function = lambda logits, labels, vocab_size, **more: logits.square().mean()
    return model


@pytest.mark.parametrize(
    "make, reason",
    [
        (softcapped, "logits: the loss stays as it is: its logits are not a plain linear of what the head reads, but what aten.mul.Tensor gives"),
        (with_own_loss, "lm_head: the loss stays as it is: it is <lambda>, not that of causal language models"),
        (functools.partial(build, "bert"), "the loss stays as it is: there is none"),
    ],
)
def test_models_without_such_a_loss_are_refused(make, reason):
    with pytest.raises(Refused, match="nothing to fuse") as error:
        rewrite(make(), {"passes": [FUSE]})
    assert reason in str(error.value)


def test_it_comes_last_and_merges():
    with pytest.raises(Refused, match="the head and its loss are one op"):
        rewrite(tiny("llama"), {"passes": [FUSE, LORA]})
    _, fused = pair(tiny("llama"), LORA)
    merged = merge(fused).train()
    given = batch()
    assert merged(**given).logits is None and error(fused(**given).loss.detach(), merged(**given).loss) < 1e-5
    for ours, theirs in zip(merged.graph.all(), rewrite(tiny("llama"), {"passes": []}).graph.all(), strict=True):
        assert show(ours) == show(theirs)


def test_saved_and_switched(tmp_path):
    _, fused = pair(tiny("llama"), LORA | {"name": "de"})
    given, expected = batch(), fused.eval()(**batch()).loss.detach()
    save(fused, tmp_path)
    again = load(tiny("llama"), tmp_path).train()
    assert again(**given).logits is None
    assert error(expected, again.eval()(**given).loss.detach()) < 1e-6
    handle = adapters(fused.train())
    handle.use()
    assert fused(**given).logits is None and error(expected, fused(**given).loss.detach()) > 1e-4
    handle.use("de")
    assert fused(**given).logits is None and error(expected, fused(**given).loss.detach()) < 1e-6


def test_a_step_keeps_no_logits():
    plain, fused = pair(tiny("llama"), LORA)
    given, sizes = batch(33), []
    for model in (plain, fused):
        with keeps(model) as saved:
            model(**given).loss
        sizes.append(saved.bytes)
    assert sizes[0] - sizes[1] == pytest.approx(2 * 33 * ((99 - 24) * 4 + 8), rel=0.01)  # log softmax and labels, and the gradient of the head's input in their place


def test_compiled():
    plain, fused = pair(tiny("llama"), LORA)
    given = batch()
    reference = gradients(plain, **given)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    loss = compiled(**given).loss
    fused.zero_grad()
    loss.backward()
    result = [loss.detach(), *(p.grad for p in fused.parameters() if p.requires_grad)]
    for one, two in zip(reference, result, strict=True):
        close(reference=one, result=two, drift=5 * rounding(torch.float32))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(tmp_path, smoothing):
    """Two micro-batches a step, with `num_items_in_batch`; label smoothing calls the model without labels, for its logits."""
    plain, fused = pair(tiny("llama"), LORA)
    rows = [{name: value[i] for name, value in batch(length).items()} for length in (7,) for i in (0, 1)] * 4
    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2, learning_rate=0.01, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no")
    losses = []
    for model in (plain, fused):
        arguments = T.TrainingArguments(str(tmp_path), label_smoothing_factor=smoothing, **options)
        losses.append(T.Trainer(model=model, args=arguments, train_dataset=rows).train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (path, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        if a.requires_grad:
            close(reference=a.detach(), result=b.detach(), drift=1e-4)
