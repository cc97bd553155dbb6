"""HF PEFT beside every method of ours that it has, from one table: outputs, gradients and twenty training steps from copied weights, and how far each falls from its own start.

    (our steps, their config, how names map)  -->  equal outputs, gradients, losses; the loss falls at least 90 % as far as theirs

What passes do in hooks (AdaLoRA's budget, the penalty) is in tests/test_acting.py, dropout in tests/test_peft.py, folders in tests/test_peft_folders.py.
"""

import copy
from dataclasses import dataclass
from typing import Callable

import peft
import pytest
import torch
from checks import captured, close, rejects, rounding, tensor_of, wake
from loops import base, batch, ce
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from rewrite.kernels import dequant_nf4

from rewrite import pipeline, rewrite, training
from rewrite.peft.methods import METHODS

STEPS, BATCHES, RATE = 20, 2, 0.02
PLACES, RANK = 5, 4
AS_FAR = 0.9  # share of PEFT's way down
EXACT = rounding(torch.float64)
#: a singular value decomposition in float32, and twenty steps behind it
SINGLE = 8 * rounding(torch.float32)
DECODER = "CAUSAL_LM"

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


# ---- how names map -----------------------------------------------------------------------------------------------------------
# Each gives (ours, theirs, ours in the layout of theirs) for every tensor that one side has made and the other must have.


def of_modules(live, wrapped, kind=None):
    """Methods that sit in modules, by the table with which folders are written."""
    name = next(iter(live.report.made.values()))
    method = next(one for one in METHODS if one.name == (kind or name))
    known = {path.removeprefix("base_model.model.").replace(".default", ""): tensor for path, tensor in (*wrapped.named_parameters(), *wrapped.named_buffers(remove_duplicate=False))}
    options, roles = live.spec.passes[-1].options, {site: role for one in live.report.applied for site, role in one.sites}
    for path in live.report.made:
        module, _, ours = path.partition(f".{name}.default.")
        if ours in method.tensors:
            theirs = known.get(f"{module}.{method.tensors[ours]}", known.get(f"{module}.{method.tensors[ours]}.weight"))
            weight = wrapped.get_submodule(f"base_model.model.{module}.base_layer").weight
            yield tensor_of(live, path), theirs, lambda t, o=ours, w=weight, m=module: method.laid(o, t, w, {**vars(options), "role": roles[m]})
    for ours, theirs in method.shared:
        yield tensor_of(live, f"{name}.default.{ours}"), known[f"base_model.{theirs}"], as_it_is


def of_lora(live, wrapped):
    """What is LoRA to PEFT, whatever it stands on."""
    yield from of_modules(live, wrapped, "lora")


def of_table(live, wrapped):
    """Prefixes and prompts, of which PEFT has all in one table: of each layer the keys, then the values."""
    table, at = wrapped.prompt_encoder.default.embedding.weight, 0
    for path in live.report.made:
        value = tensor_of(live, path)
        width = value[0].numel()
        yield value, Part(table, slice(at, at + width)), lambda t: t.flatten(1)
        at += width
    assert at == table.shape[1]


def of_network(live, wrapped):
    """The two-layer network of a prefix: PEFT makes the prefixes of all layers at once, we the part of each site."""
    encoder, width = wrapped.prompt_encoder.default, 12
    shared = {"tokens": encoder.embedding.weight, "inner_weight": encoder.transform[0].weight, "inner_bias": encoder.transform[0].bias}
    for ours, theirs in shared.items():
        yield live.get_parameter(f"prefix_tuning.default.{ours}"), theirs, as_it_is
    for layer, (site, _) in enumerate(live.report.applied[0].sites):
        for at, name in enumerate(("keys", "values")):
            rows = slice((2 * layer + at) * width, (2 * layer + at + 1) * width)
            for ours, theirs in ((name, encoder.transform[2].weight), (f"{name}_bias", encoder.transform[2].bias)):
                yield live.get_parameter(f"{site}.prefix_tuning.default.{ours}"), Part(theirs, (rows,)), as_it_is


def of_norms(live, wrapped):
    for path in sorted(live.report.trains):
        yield live.get_parameter(path), wrapped.get_parameter("base_model.model." + path.replace(".weight", ".ln_tuning_layers.default.weight")), as_it_is


def of_biases(live, wrapped):
    """PEFT adds a vector to the frozen bias."""
    for path in sorted(live.report.trains):
        theirs = wrapped.get_parameter("base_model.model." + path.replace(".bias", ".beft_bias.default"))
        yield live.get_parameter(path), Shifted(theirs, tensor_of(base(), path).detach()), as_it_is


def as_it_is(tensor):
    return tensor


@dataclass
class Part:
    """Columns of one of PEFT's tensors (a slice), or rows of it (a tuple of one)."""

    whole: torch.Tensor
    at: object

    def take(self, tensor):
        return tensor[self.at] if isinstance(self.at, tuple) else tensor[:, self.at]

    @property
    def data(self):
        return self.take(self.whole.data)

    @property
    def grad(self):
        return self.take(self.whole.grad)

    requires_grad = True


@dataclass
class Shifted:
    """One of PEFT's tensors that is a difference from `start`."""

    difference: torch.Tensor
    start: torch.Tensor

    @property
    def data(self):
        return self.difference.data + self.start

    @property
    def grad(self):
        return self.difference.grad.reshape(self.start.shape)

    requires_grad = True


# ---- optimizers ----------------------------------------------------------------------------------------------------------------


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=0.0)


def lora_plus(model):
    if hasattr(model, "peft_config"):
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=8.0)
    return training(model).optimizer(torch.optim.AdamW, RATE, weight_decay=0.0)


def lora_fa(model):
    """PEFT's optimizer, which turns the gradient of `up` by the frozen `down`; it knows the two by their names."""
    if hasattr(model, "peft_config"):
        return create_lorafa_optimizer(model, r=RANK, lora_alpha=16, lr=RATE)
    named = [(path.replace(".lora_fa.default.down", ".lora_A").replace(".lora_fa.default.up", ".lora_B"), tensor_of(model, path)) for path in model.report.made]
    pairs = sorted(named, key=lambda one: one[0])
    group = {"names": [name for name, _ in pairs], "params": [tensor for _, tensor in pairs], "scaling_factors": [16 / RANK] * len(pairs), "lr": RATE}
    return LoraFAOptimizer([group])


# ---- the table -----------------------------------------------------------------------------------------------------------------

LINEARS = ["q_proj", "v_proj", "down_proj"]
WHERE = ["attention.{q,v}", "mlp.down"]


@dataclass(frozen=True)
class Case:
    """One method: our step, PEFT's config, how names map, and with what both train. `starts`: over how many random starts it is compared how far they fall."""

    step: dict
    config: peft.PeftConfig
    names: Callable
    optimizer: Callable
    starts: int


def case(method, config, names=of_modules, optimizer=adam, starts=1, **options):
    return Case({"pass": method, **options}, config, names, optimizer, starts)


LORA = dict(r=RANK, lora_alpha=16, target_modules=LINEARS)
CASES = {
    "lora": case("lora", peft.LoraConfig(**LORA), where=WHERE, rank=RANK),
    "lora plus": case("lora", peft.LoraConfig(**LORA), optimizer=lora_plus, where=WHERE, rank=RANK, lr_ratio=8.0),
    "lora_fa": case("lora_fa", peft.LoraConfig(**LORA), of_lora, lora_fa, where=WHERE, rank=RANK),
    "pissa": case("pissa", peft.LoraConfig(**LORA, init_lora_weights="pissa"), of_lora, where=WHERE, rank=RANK),
    "loftq": case("loftq", peft.LoraConfig(**LORA), of_lora, where=WHERE, rank=RANK),
    "dora": case("dora", peft.LoraConfig(**LORA, use_dora=True), where=WHERE, rank=RANK),
    "adalora": case("adalora", peft.AdaLoraConfig(init_r=RANK, target_r=2, total_step=100, lora_alpha=8, target_modules=LINEARS), where=WHERE, rank=RANK, target=2, steps=100, alpha=8 * RANK / (RANK + 1e-5)),
    "ia3": case("ia3", peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "vera": case("vera", peft.VeraConfig(r=RANK, target_modules=LINEARS), starts=3, where=WHERE, rank=RANK),
    "loha": case("loha", peft.LoHaConfig(r=RANK, alpha=16, target_modules=LINEARS), where=WHERE, rank=RANK),
    "hira": case("hira", peft.HiraConfig(r=RANK, target_modules=LINEARS), where=WHERE, rank=RANK, alpha=float(RANK)),
    "prefix": case("prefix_tuning", peft.PrefixTuningConfig(task_type=DECODER, num_virtual_tokens=PLACES), of_table, starts=3, length=PLACES, shift=True),
    "prefix of a network": case("prefix_tuning", peft.PrefixTuningConfig(task_type=DECODER, num_virtual_tokens=PLACES, prefix_projection=True, encoder_hidden_size=10), of_network, starts=3, length=PLACES, shift=True, inner=10),
    "p_tuning_v2": case("p_tuning_v2", peft.PrefixTuningConfig(task_type=DECODER, num_virtual_tokens=PLACES), of_table, starts=6, length=PLACES, shift=True),
    "prompt": case("prompt_tuning", peft.PromptTuningConfig(task_type=DECODER, num_virtual_tokens=PLACES), of_table, length=PLACES),
    "norms": case("unfreeze", peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]), of_norms, where={"role": "norm", "path": "model.layers.**"}),
    "bitfit": case("bitfit", peft.BeftConfig(target_modules=["v_proj"]), of_biases, where="attention.v"),
}  # fmt: skip


def ours(one, seed=0):
    return rewrite(base(), {"seed": seed, "passes": [one.step]}).train()


def theirs(one, seed=0):
    torch.manual_seed(seed)
    config = copy.deepcopy(one.config)
    if hasattr(config, "projection_prng_key"):
        config.projection_prng_key = seed
    wrapped = peft.get_peft_model(copy.deepcopy(base()).float(), config).double()
    for name, value in wrapped.named_parameters():
        value.requires_grad_(value.requires_grad and "ranknum" not in name)  # a number of AdaLoRA's that PEFT lets train
    return wrapped.train()


def moved(live, module):
    """The weight that a pass has given a module of the base, or None where it left it alone."""
    if f"{module}.weight" in live.report.derived:
        return tensor_of(live, f"{module}.weight")
    if f"{module}.weight" in live.report.released:
        codes, scales, nested = (tensor_of(live, f"{module}.loftq.default.{part}") for part in ("codes", "scales", "nested"))
        return dequant_nf4.dequant_nf4(codes, scales, nested, list(tensor_of(base(), f"{module}.weight").shape), torch.float64)


def copied(one, live, wrapped):
    """Our values, put into PEFT's tensors; where a pass has moved the base, that too."""
    for module in {path.partition(f".{one.step['pass']}.")[0] for path in live.report.made}:
        if (weight := moved(live, module)) is not None:
            wrapped.get_submodule(f"base_model.model.{module}.base_layer").weight.data.copy_(weight.detach())
    pairs = list(one.names(live, wrapped))
    for mine, other, lay in pairs:
        if isinstance(other, Shifted):
            other.difference.data.copy_((mine.data - other.start).reshape(other.difference.shape))
        else:
            other.data.copy_(lay(mine.detach()).reshape(other.data.shape))
    assert {id(mine) for mine, _, _ in pairs} >= {id(p) for p in live.parameters() if p.requires_grad}
    return pairs


def logits(model, seed=0):
    """What it says of the tokens; PEFT hands those of a prompt back too."""
    return model(input_ids=batch(seed)["input_ids"]).logits[:, -7:]


def losses(model, optimizer, start=0):
    found, optimizer = [], optimizer(model)
    for step in range(start, start + STEPS):
        loss = ce(logits(model, step % BATCHES), batch(step % BATCHES)["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("name", CASES)
def test_from_copied_weights(name):
    one = CASES[name]
    live, wrapped = ours(one), theirs(one)
    wake(live)
    for path in live.report.trains:
        with torch.no_grad():
            live.get_parameter(path).add_(0.1)
    pairs = copied(one, live, wrapped)
    close(reference=logits(wrapped), result=logits(live), drift=EXACT)
    rejects(reference=logits(base()), result=logits(live), drift=EXACT)
    for model in (wrapped, live):
        ce(logits(model), batch(0)["labels"]).backward()
    trained = [(mine, other, lay) for mine, other, lay in pairs if mine.requires_grad]
    for mine, other, lay in trained:
        assert other.grad.any()
        close(reference=other.grad, result=lay(mine.grad).reshape(other.grad.shape), drift=EXACT)
    rejects(reference=other.grad, result=1.001 * lay(mine.grad).reshape(other.grad.shape), drift=EXACT)
    for model in (wrapped, live):
        model.zero_grad()
    broken = copy.deepcopy(live)
    next(p for p in broken.parameters() if p.requires_grad).data.mul_(1.001)
    wanted, found = losses(wrapped, one.optimizer), losses(live, one.optimizer)
    close(reference=wanted, result=found, drift=EXACT)
    rejects(reference=wanted, result=losses(broken, one.optimizer), drift=EXACT)
    for mine, other, lay in pairs:
        close(reference=other.data, result=lay(mine.detach()).reshape(other.data.shape), drift=STEPS * EXACT)


def fall(run):
    return run[:BATCHES].mean() - run[-BATCHES:].mean()


@pytest.mark.parametrize("name", CASES)
def test_falls_as_far_from_its_own_start(name):
    one = CASES[name]
    wanted, found = ([losses(side(one, seed), one.optimizer) for seed in range(one.starts)] for side in (theirs, ours))
    far, own = (torch.stack([fall(run) for run in runs]).mean() for runs in (wanted, found))
    assert far > 0 and own >= AS_FAR * far, f"{own:.4f} of {far:.4f}"
    if name == "pissa":  # its start is no draw
        close(reference=wanted[0], result=found[0], drift=SINGLE)
    slowly = lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE / 100, weight_decay=0.0)  # noqa: E731
    assert fall(losses(ours(one), slowly)) < AS_FAR * far
