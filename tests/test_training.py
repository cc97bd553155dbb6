"""What passes do while training: hooks in their order and once per optimizer step, resumed as if never interrupted, equal in Trainer and in a plain loop."""

import copy
import functools
from dataclasses import dataclass

import peft
import pytest
import torch
import transformers as T
from checks import TOYS, captured, close, model_of, rejects, rounding, tensor_of, unchanged
from torch.nn import functional as F

from rewrite import Pass, Refused, Spec, load, merge, pipeline, rewrite, save, training
from rewrite.contract import frozen

EXACT = rounding(torch.float64)
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


@functools.cache
def base():
    return copy.deepcopy(model_of("gated")).double()


def batch(seed, rows=2, length=7):
    ids = torch.randint(3, 20, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def tuned(*passes, classes=(), seed=0):
    return rewrite(base(), Spec.parse({"seed": seed, "passes": list(passes)}, classes)).train()


def run(live, steps, start=0, lr=0.02, optimizer=None, micro=1, **options):
    """Losses of a plain loop over batches of its own."""
    t = training(live)
    optimizer = optimizer or t.optimizer(torch.optim.AdamW, lr, weight_decay=0.0, **options)
    return [t.step(optimizer, *(functools.partial(live, **batch(100 * i + j)) for j in range(micro))) for i in range(start, start + steps)]


def state(live):
    return {name: value.clone() for name, value in live.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


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
    with pytest.raises(Refused, match="no pass of this model has a choice rank. Its passes with hooks: told"):
        t.choose(rank=3)
    with pytest.raises(Refused, match=r"passes\[0\]: told: after_step\(\) asks for 'lr'; it may ask for sites, done, generator, choice"):
        t._call("after_step")
    with pytest.raises(Refused, match="training: this Linear did not come from rewrite"):
        training(torch.nn.Linear(2, 2))
