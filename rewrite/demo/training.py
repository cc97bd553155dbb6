"""Training one live model, its learning rate chosen on the validation split while it trains.

    seven rates, a tenth of the steps each -> the best two, to a fifth of them -> the best one, to the end

Every way is given the same rates, the same batches and the same steps, so none is tuned longer than another (successive halving, Jamieson & Talwalkar
2016, arXiv:1502.07943). What the winner has learned when the others are dropped is kept: its run is one whole run.
"""

import math
import time
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from . import memory


@dataclass(frozen=True)
class Schedule:
    """rates: those tried. steps: of a whole run. batch: texts per step. warm: share of the steps in which the rate rises."""

    rates: tuple[float, ...] = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 2e-1)
    steps: int = 480
    batch: int = 8
    warm: float = 0.1
    seed: int = 0

    def factor(self, step):
        """Of the rate at a step: a linear rise, then a linear fall to zero."""
        rise = max(1, int(self.warm * self.steps))
        return min((step + 1) / rise, (self.steps - step) / (self.steps - rise))

    def rounds(self):
        """(step at which a round ends, runs that go on from there) for each round."""
        return ((self.steps // 10, 2), (self.steps // 5, 1), (self.steps, 1))

    def work(self):
        """Steps of all runs together."""
        total, start, runs = 0, 0, len(self.rates)
        for end, kept in self.rounds():
            total, start, runs = total + runs * (end - start), end, min(kept, runs)
        return total

    def batches(self, texts):
        """Rows of `texts` for each step: as many shuffled epochs as it takes, the last one cut off."""
        found, epoch = [], 0
        while len(found) < self.steps:
            found += texts.shuffled(self.batch, self.seed + 2 * epoch)
            epoch += 1
        return found[: self.steps]


@dataclass
class Run:
    """One training run that can be set aside and gone on with: all its state but the frozen weights, and its losses on the validation split."""

    rate: float
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    tensors: list[torch.Tensor] | None = None
    optimizer: dict | None = None
    random: torch.Tensor | None = None


@dataclass(frozen=True)
class Trained:
    """What came of it: the rate chosen, what each rate's losses on the validation split were, seconds of the chosen run and of all, peak bytes of the chosen one's last round."""

    rate: float
    tried: dict[float, tuple[float, ...]]
    seconds: float
    seconds_in_all: float
    peak: int | None


def fit(live, train, validation, schedule, tick=lambda: None):
    """Train the parameters of `live` that require a gradient, in place. `tick()` is called after each step."""
    start = time.perf_counter()
    batches = schedule.batches(train)
    initial = [p.detach().clone() for p in _trainable(live)]
    runs = everyone = [Run(rate, tensors=initial) for rate in schedule.rates]
    del initial  # each run lets go of it when it begins
    for end, kept in schedule.rounds():
        for run in runs:
            if end == schedule.steps:
                memory.begin()
            _advance(live, run, lambda step: train.batch(batches[step]), end, schedule, tick)
            run.losses.append(F.cross_entropy(predict(live, validation), validation.labels).item())
        runs = sorted(runs, key=lambda run: math.inf if math.isnan(run.losses[-1]) else run.losses[-1])
        for run in runs[kept:]:
            _forget(run)
        runs = runs[:kept]
    (best,) = runs
    return Trained(best.rate, {run.rate: tuple(run.losses) for run in everyone}, best.seconds, time.perf_counter() - start, memory.peak())


def predict(live, texts, size=64):
    """Logits of all texts in their order: (texts, labels) float32."""
    live.eval()
    logits = torch.empty(len(texts), live.config.num_labels)
    with torch.no_grad():
        for rows in texts.ordered(size):
            inputs = texts.batch(rows)
            del inputs["labels"]
            logits[rows] = live(**inputs).logits.float()
    return logits


def accuracy(logits, texts):
    """Share of texts whose largest logit is their label's."""
    return (logits.argmax(-1) == texts.labels).float().mean().item()


def _trainable(live):
    return [p for p in live.parameters() if p.requires_grad]


def _advance(live, run, batch, end, schedule, tick):
    """Go on with a run up to the step `end`; before the last one its state is kept, so that another can have the model."""
    parameters = _trainable(live)
    optimizer = torch.optim.AdamW(parameters, run.rate, weight_decay=0.0)
    with torch.no_grad():
        for parameter, value in zip(parameters, run.tensors):
            parameter.copy_(value)
    if run.optimizer is not None:
        optimizer.load_state_dict(run.optimizer)
    _forget(run)
    with torch.random.fork_rng(devices=[]):
        if run.random is None:
            torch.manual_seed(schedule.seed)
        else:
            torch.set_rng_state(run.random)
        live.train()
        start = time.perf_counter()
        for step in range(run.step, end):
            for group in optimizer.param_groups:
                group["lr"] = run.rate * schedule.factor(step)
            live(**batch(step)).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tick()
        run.seconds += time.perf_counter() - start
        run.random, run.step = torch.get_rng_state(), end
    if end < schedule.steps:
        run.tensors, run.optimizer = [p.detach().clone() for p in parameters], optimizer.state_dict()


def _forget(run):
    run.tensors = run.optimizer = None
