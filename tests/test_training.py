"""What passes do while training: hooks in their order and once per optimizer step, resumed as if never interrupted, equal in Trainer and in a plain loop."""

import copy
import functools
import pickle
from dataclasses import dataclass

import pytest
import torch
import transformers as T
from checks import captured, close, rejects, rounding, tensor_of
from loops import base, batch, ours, run, same, state, stir, tuned
from models import build, example

from rewrite import Pass, Refused, Spec, compact, load, merge, pipeline, rewrite, save, training
from rewrite.contract import frozen

EXACT = rounding(torch.float64)
#: transformers computes losses in float32 whatever the model is in
SINGLE = rounding(torch.float32)
#: the loops of a few steps in which a pass does something at most of them
STEPS = 10
ADALORA = {"pass": "adalora", "where": "attention.{q,v}", "steps": STEPS, "rank": 6, "target": 3, "warmup": 2, "final": 3, "every": 2}
PERIODIC = {"pass": "periodic_lora", "where": "attention.{q,v}", "rank": 2, "every": 1}


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


# ---- hooks -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told(Pass):
    """Writes down which hook was called, and when."""

    role = "attention.q"
    log = []

    def shared(self, sites):
        return {"choice": frozen(sites[0].w.new_ones(()))}

    def params(self, w):
        return {"gain": w.new_ones(w.shape[0])}

    def remembers(self, gain):
        return {"total": torch.zeros_like(gain)}

    def output(self, y, gain, choice):
        return y * gain * choice

    def prepare(self, sites, forwards):
        self.log.append(("prepare", len(forwards)))

    def before_forward(self, sites, choice, done, generator):
        choice.copy_(1 + 0.1 * torch.rand((), generator=generator, dtype=choice.dtype))
        self.log.append(("before_forward", done, [site.path for site in sites]))

    def penalty(self, sites):
        return 0.1 * sum((site.gain - 1).square().sum() for site in sites)

    def after_backward(self, sites):
        self.log.append(("after_backward", all(site.gain.grad.any() for site in sites)))
        for site in sites:
            site.gain.grad[0] = 0

    def after_step(self, sites, lr, done):
        self.log.append(("after_step", done, lr(sites[0].gain)))
        for site in sites:
            site.total.add_(site.gain.grad)

    def groups(self):
        return {"gain": 3.0}


Q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def test_hooks_run_in_order_and_once_per_optimizer_step():
    Told.log.clear()
    live = tuned({"pass": "told"}, {"pass": "told", "name": "second", "where": {"role": "attention.q", "path": "model.layers.1.**"}}, classes=[Told])
    training(live).prepare(lambda: None, lambda: None)
    assert Told.log == [("prepare", 2)] * 2
    Told.log.clear()
    run(live, 2, lr=0.25, micro=3)
    step = lambda i: [("before_forward", i, Q), ("before_forward", i, Q[1:]), *[("after_backward", True)] * 2, *[("after_step", i, 0.75)] * 2]  # noqa: E731
    assert Told.log == step(0) + step(1)
    gains = [value for name, value in live.named_parameters() if name.endswith("gain")]
    assert len(gains) == 3 and all(gain[0] == 1 and (gain[1:] != 1).all() for gain in gains)
    assert training(live).done == 2


def test_the_penalty_is_a_part_of_the_gradient_once():
    """Three micro-batches or one: the gradient is that of the mean loss plus the penalty."""
    live = tuned({"pass": "told"}, classes=[Told])
    gains = [value for name, value in live.named_parameters() if name.endswith("gain")]
    for gain in gains:
        gain.data.mul_(1.5)
    t = training(live)
    batches = [batch(seed) for seed in range(3)]
    t.before_forward()
    for one in batches:
        (live(**one).loss / 3).backward()
    t.after_backward()
    found = [gain.grad.clone() for gain in gains]
    live.zero_grad()
    for factor, check in ((1, close), (3, rejects)):
        total = sum(live(**one).loss for one in batches) / 3 + factor * 0.1 * sum((gain - 1).square().sum() for gain in gains)
        for gain, grad, expected in zip(gains, found, torch.autograd.grad(total, gains)):
            check(reference=expected[1:], result=grad[1:], drift=EXACT)


@pytest.mark.parametrize("way", ["folder", "state"])
def test_resumed_is_as_if_never_interrupted(way, tmp_path):
    spec = {"pass": "told"}
    whole = tuned(spec, classes=[Told])
    losses = run(whole, 6)
    first = tuned(spec, classes=[Told])
    optimizer = training(first).optimizer(torch.optim.AdamW, 0.02, weight_decay=0.0)
    begun = run(first, 3, optimizer=optimizer)
    if way == "folder":
        again = load(base(), save(first, tmp_path / "half"), passes=[Told]).train()
    else:
        again = tuned(spec, classes=[Told])
        again.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed = training(again).optimizer(torch.optim.AdamW, 0.02, weight_decay=0.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert losses == begun + run(again, 3, start=3, optimizer=resumed)
    same(state(whole), state(again))
    forgetful = tuned(spec, classes=[Told])
    forgetful.load_state_dict({**copy.deepcopy(first.state_dict()), "steps_done": torch.tensor(0)})
    assert losses[3:] != run(forgetful, 3, start=3)


def test_copies_and_merged_models_have_hooks_of_their_own():
    live = tuned({"pass": "told"}, {"pass": "told", "name": "second", "where": "attention.k"}, classes=[Told])
    run(live, 1)
    twin = copy.deepcopy(live)
    before = state(live)
    run(twin, 1)
    same(before, state(live))
    assert training(twin).done == 2 and training(live).done == 1
    merged = merge(live)
    assert not merged.report.hooked and not merged.report.memory and "steps_done" not in merged.state_dict()
    assert not [name for name in merged.state_dict() if "total" in name]
    assert training(merged).done == 0 and len(live.report.hooked) == 2
    again = tuned({"pass": "told"}, {"pass": "merge"}, {"pass": "told"}, classes=[Told])
    assert list(again.report.hooked) == ["passes[2]"] and len(again.report.memory) == 3
    run(again, 1)


def test_a_pickled_model_goes_on():
    live = tuned({"pass": "told"}, classes=[Told])
    run(live, 1)
    twin = pickle.loads(pickle.dumps(live))
    assert [run(live, 2, start=1), training(live).done] == [run(twin, 2, start=1), training(twin).done]


@dataclass(frozen=True)
class Fisher(Pass):
    """Trains the entries of a weight that the loss feels most, found before training."""

    role = "linear"

    def trains(self):
        return ("w",)

    def remembers(self, w):
        return {"mask": torch.zeros_like(w, dtype=torch.bool)}

    def prepare(self, sites, forwards):
        totals = [torch.zeros_like(site.w) for site in sites]
        for forward in forwards:
            forward().loss.backward()
            for site, total in zip(sites, totals):
                total += site.w_grad.square()
                site.w_grad = torch.zeros_like(total)
        for site, total in zip(sites, totals):
            site.mask.copy_(total >= total.flatten().kthvalue(total.numel() - 10).values)

    def after_backward(self, sites):
        for site in sites:
            site.w_grad = site.w_grad * site.mask


@functools.cache
def fused(family):
    return build(family).double().eval()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_hooks_see_base_weights_out_by_in(family):
    """A mask over a fused, turned or interleaved weight: eleven entries of each part move, none of another part."""
    model = fused(family)
    live = rewrite(model, Spec.parse({"passes": [{"pass": "fisher", "where": "attention.{q,k,v}"}]}, [Fisher])).train()
    t, inputs = training(live), example(family)
    forward = lambda: live(**inputs, labels=inputs["input_ids"])  # noqa: E731
    t.prepare(forward, forward)
    t.step(t.optimizer(torch.optim.SGD, 0.1), forward)
    (hooked,) = live.report.hooked.values()
    assert len(hooked.sites) == 6
    for held, site in zip(hooked.sites.values(), hooked.views(live)):
        moved = site.w != held.base.read(tensor_of(model, held.base.path))
        assert moved.sum() == 11 and torch.equal(moved, site.mask)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_part_of_a_fused_weight_is_folded_and_compacted(family):
    model, inputs = fused(family), example(family)
    logits = lambda one: one(**inputs).logits.detach()  # noqa: E731
    live = stir(rewrite(model, {"passes": [PERIODIC]}))
    before = logits(live)
    rejects(reference=before, result=logits(model), drift=EXACT)
    t = training(live)
    t.after_step(t.optimizer(torch.optim.SGD, 0.1))
    close(reference=before, result=logits(live), drift=EXACT)
    assert not any(tensor_of(live, path).any() for path in live.report.made if path.endswith("up"))
    live = stir(rewrite(model, {"passes": [{"pass": "sora", "where": "attention.{q,v}", "rank": 4}]}))
    with torch.no_grad():
        for site, zeros in zip(next(iter(live.report.hooked.values())).views(live), (1, 2, 4, 0)):
            site.gate[:zeros] = 0
    small = compact(live)
    close(reference=logits(live), result=logits(small), drift=EXACT)
    assert sorted(len(tensor_of(small, path)) for path in small.report.made if path.endswith("gate")) == [2, 3, 4]


def test_finished_training_leaves_what_it_remembered(tmp_path):
    live = tuned({"pass": "told"}, classes=[Told])
    run(live, 2)
    training(live).finish()
    assert not [name for name in live.state_dict() if "total" in name or "steps_done" in name]
    again = load(base(), save(live, tmp_path / "done"), passes=[Told]).train()
    close(reference=live(**batch(1)).logits, result=again(**batch(1)).logits, drift=0.0)


def test_mistakes_are_told_in_words():
    live = tuned({"pass": "told"}, classes=[Told])
    t = training(live)
    with pytest.raises(Refused, match="at least one function that runs the model"):
        t.step(t.optimizer(torch.optim.SGD, 0.1))
    with pytest.raises(Refused, match=r"dylora makes choices for each step, .* it is in eval mode. Call live.train\(\) first"):
        chosen = training(tuned({"pass": "dylora", "where": "attention.q", "rank": 2}).eval())
        chosen.step(chosen.optimizer(torch.optim.SGD, 0.1), lambda: ours(chosen.live))
    with pytest.raises(Refused, match="no pass of this model has a choice rank. Its passes with hooks: told"):
        t.choose(rank=3)
    with pytest.raises(Refused, match=r"passes\[0\]: told: after_step\(\) asks for 'lr'; it may ask for sites, done, generator, choice"):
        t._call("after_step")
    with pytest.raises(Refused, match="training: this Linear did not come from rewrite"):
        training(torch.nn.Linear(2, 2))


# ---- Trainer ---------------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """The batches of `run`, one row each time."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trainer(live, folder, rows, micro=1, callbacks=None, **options):
    options = {"learning_rate": 0.02, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no", **options}
    args = T.TrainingArguments(str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=micro, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, num_train_epochs=1, data_seed=0, **options)

    class InOrder(T.Trainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(rows)

    return InOrder(live, args, train_dataset=rows, callbacks=[training(live).callback()] if callbacks is None else callbacks)


def rows_of(steps, micro=1):
    return Rows([{k: v[i] for k, v in batch(100 * step + j).items()} for step in range(steps) for j in range(micro) for i in range(2)])


@pytest.mark.parametrize("micro", [1, 2])
def test_trainer_and_plain_loop_are_one(micro, tmp_path):
    plain, live, without = tuned(ADALORA), tuned(ADALORA), tuned(ADALORA)
    losses = run(plain, STEPS, micro=micro)
    made = trainer(live, tmp_path, rows_of(STEPS, micro), micro)
    made.train()
    for loss, entry in zip(losses, made.state.log_history):
        assert abs(loss.item() - entry["loss"]) < 1e-3
    for path in plain.report.made:
        close(reference=tensor_of(plain, path), result=tensor_of(live, path), drift=EXACT)
    assert training(live).done == STEPS
    trainer(without, tmp_path, rows_of(STEPS, micro), micro, callbacks=[]).train()
    rejects(reference=tensor_of(plain, path), result=tensor_of(without, path), drift=EXACT)


def test_trainer_resumes(tmp_path):
    whole, live = tuned(ADALORA), tuned(ADALORA)
    trainer(whole, tmp_path / "whole", rows_of(STEPS)).train()
    trainer(live, tmp_path / "half", rows_of(STEPS), save_strategy="steps", save_steps=4).train()
    again = tuned(ADALORA)
    trainer(again, tmp_path / "half", rows_of(STEPS)).train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-4"))
    same(state(whole), state(again))


@pytest.mark.parametrize("micro", [1, 2])
def test_trainer_and_plain_loop_are_one_for_a_loss_of_its_own(micro, tmp_path):
    spec = {"pass": "adamix", "where": "mlp", "copies": 3, "width": 5}
    plain, live, without = tuned(spec), tuned(spec), tuned({**spec, "consistency": 0.0})
    run(plain, 4, micro=micro)
    for one in (live, without):
        trainer(one, tmp_path, rows_of(4, micro), micro).train()
    for path in plain.report.made:
        close(reference=tensor_of(plain, path), result=tensor_of(live, path), drift=SINGLE)
    rejects(reference=tensor_of(plain, "model.layers.0.mlp.adamix.default.up"), result=tensor_of(without, "model.layers.0.mlp.adamix.default.up"), drift=SINGLE)


def test_trainer_refuses_what_it_cannot_do(tmp_path):
    live, other = tuned(ADALORA), tuned(ADALORA)
    with pytest.raises(Refused, match="trains another model than the callback is for"):
        trainer(live, tmp_path, rows_of(1), callbacks=[training(other).callback()]).train()
    with pytest.raises(Refused, match="takes steps of its own, which Trainer has no place for"):
        trainer(tuned({"pass": "lora", "where": "attention.q", "rank": 2}, {"pass": "mezo"}), tmp_path, rows_of(1)).train()
    told = tuned({"pass": "told"}, {"pass": "unfreeze", "where": "head"}, classes=[Told])
    with pytest.raises(Refused, match="was to have 3.0 times the learning rate of others"):
        trainer(told, tmp_path, rows_of(1)).train()
    mine = training(told).optimizer(torch.optim.AdamW, 0.02)
    one = trainer(told, tmp_path, rows_of(1))
    one.optimizer = mine
    one.train()
    assert [group["lr"] for group in mine.param_groups] == [pytest.approx(0.06), pytest.approx(0.02)]
