"""HF PEFT is the oracle of `lora`: the same outputs and gradients on every kind of layer, the same losses step by step with dropout. All methods are in test_peft_steps.py."""

import copy
import functools

import peft
import pytest
import torch
from checks import captured, close, rejects, rounding
from models import build, example
from torch import nn

from rewrite import pipeline, rewrite

STEPS = 50
RANK, ALPHA = 4, 12
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


class Picture(nn.Module):
    """Convolutions with stride and padding, with and without bias (PEFT leaves out dilation: its adapter is another function then than what it merges)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(5, 10, (3, 5), stride=2, padding=(1, 2)), nn.Conv2d(10, 7, 3, padding="same", bias=False)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.tanh(self.first(x)))).mean((2, 3)))


def inputs_of(family, batch=3, length=9, seed=0):
    if family == "picture":
        return {"x": torch.randn(batch, 5, 14, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}
    given = example(family, batch, length, seed)
    return {k: v.double() if v.is_floating_point() else v for k, v in given.items()}


@functools.cache
def base(family):
    """The model of a family, in float64, so that what differs after 50 steps is a mistake and not rounding; matrices as large as trained ones."""
    torch.manual_seed(0)
    model = (Picture().eval() if family == "picture" else build(family)).double()
    with torch.no_grad():
        for value in {id(p): p for p in model.parameters() if p.dim() == 2}.values():
            value.mul_(value.shape[1] ** -0.5 / value.std())
    return model


def twin(family, rank=RANK, alpha=ALPHA, **config):
    """PEFT's model over a copy of the base, its `up` matrices away from zero."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(copy.deepcopy(base(family)), peft.LoraConfig(r=rank, lora_alpha=alpha, **config)).double().eval()
    for name, value in wrapped.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(value, std=0.1)
    return wrapped


def ours(family, where, **options):
    return rewrite(base(family), {"passes": [{"pass": "lora", "where": where, "rank": RANK, "alpha": ALPHA, **options}]}, example=inputs_of(family))


PARTS = {"lora_A": "down", "lora_B": "up", "lora_embedding_A": "down", "lora_embedding_B": "up"}


def pairs(wrapped, live):
    """(PEFT's parameter, ours) for each low-rank matrix; every one of ours has its partner."""
    found = []
    for name, value in wrapped.named_parameters():
        if ".lora_" in name:
            owner, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default").rpartition(".")
            found.append((value, live.get_parameter(f"{owner}.lora.default.{PARTS[kind]}")))
    assert {id(p) for _, p in found} == {id(live.get_parameter(path)) for path in live.report.made}
    return found


def copied(wrapped, live):
    """`live` with PEFT's low-rank matrices."""
    with torch.no_grad():
        for theirs, mine in pairs(wrapped, live):
            mine.copy_(theirs.reshape(mine.shape))
    return live


def logits(model, inputs):
    made = model(**inputs)
    return made if isinstance(made, torch.Tensor) else made.logits


# ---- losses --------------------------------------------------------------------------------------------------------------


def losses(model, family, seed=0):
    """AdamW's losses, each on data of its own; dropout, the model's own and that of `lora`, draws from the same seed each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    found = []
    for step in range(STEPS):
        batch = inputs_of(family, seed=step)
        labels = torch.tensor([0, 1, 2]) if family == "bert" else batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        torch.manual_seed(seed + step)
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


CASES = {
    "decoder": ("llama", "linear", dict(target_modules=LINEARS)),
    "encoder": ("bert", "attention.{q,v}", dict(target_modules=["query", "value"])),
}


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_have_equal_losses(case):
    """With dropout, which draws in the same order."""
    (family, where, config), dropout = CASES[case], 0.2
    wrapped = twin(family, lora_dropout=dropout, **config)
    live = copied(wrapped, ours(family, where, dropout=dropout))
    broken = copied(wrapped, ours(family, where, dropout=dropout, alpha=ALPHA * 1.001))
    theirs = losses(wrapped, family)
    mine = losses(live, family)
    for step in range(STEPS):
        close(reference=theirs[step], result=mine[step], drift=rounding(theirs.dtype))
    for a, b in pairs(wrapped, live):
        close(reference=a, result=b.reshape(a.shape), drift=rounding(theirs.dtype) * STEPS)
    rejects(reference=theirs, result=losses(broken, family), drift=rounding(theirs.dtype))
    rejects(reference=theirs, result=losses(live, family, seed=1), drift=rounding(theirs.dtype))


# ---- outputs and gradients -------------------------------------------------------------------------------------------------

ONCE = {
    "llama linears": ("llama", "linear", dict(target_modules=LINEARS)),
    "llama embedding": ("llama", "embed", dict(target_modules=["embed_tokens"])),
    "llama head": ("llama", "head", dict(target_modules=["lm_head"])),
    "gpt2 whole c_attn": ("gpt2", "attention.qkv", dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    "gpt2 Conv1D": ("gpt2", ["attention.o", "mlp.*"], dict(target_modules=["c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt_neox fused": ("gpt_neox", ["attention.qkv", "mlp.up"], dict(target_modules=["query_key_value", "dense_h_to_4h"])),
    "vit patches": ("vit", ["embed.patch", "attention.q"], dict(target_modules=["projection", "q_proj"])),
    "convolutions": ("picture", "conv", dict(target_modules=["first", "second"])),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", ONCE)
def test_outputs_and_gradients(case):
    family, where, config = ONCE[case]
    wrapped = twin(family, **config)
    live = copied(wrapped, ours(family, where))
    inputs = inputs_of(family)
    theirs, mine = logits(wrapped, inputs), logits(live, inputs)
    close(reference=theirs, result=mine, drift=rounding(theirs.dtype))
    rejects(reference=theirs, result=logits(base(family), inputs), drift=rounding(theirs.dtype))
    for made in (theirs, mine):
        made.square().mean().backward()
    for a, b in pairs(wrapped, live):
        assert a.grad.any()
        close(reference=a.grad, result=b.grad.reshape(a.shape), drift=rounding(theirs.dtype))
    rejects(reference=a.grad, result=1.001 * b.grad.reshape(a.shape), drift=rounding(theirs.dtype))


def test_parts_of_a_fused_projection_are_one_block_diagonal_adapter():
    """PEFT adapts GPT-2's c_attn as a whole: three adapters on q, k, v are one of three times the rank with `up` block by block."""
    live = ours("gpt2", "attention.{q,k,v}")
    for path in live.report.made:
        nn.init.normal_(live.get_parameter(path), std=0.1)
    wrapped = twin("gpt2", rank=3 * RANK, alpha=3 * ALPHA, target_modules=["c_attn"], fan_in_fan_out=True)
    layers = [(n, m) for n, m in wrapped.base_model.model.named_modules() if hasattr(m, "lora_A")]
    for name, layer in layers:
        down, up = ([live.get_parameter(f"{name}.lora.default.{part}.{kind}") for part in "qkv"] for kind in ("down", "up"))
        layer.lora_A["default"].weight.data = torch.cat([d.detach() for d in down])
        layer.lora_B["default"].weight.data = torch.block_diag(*(u.detach() for u in up))
    inputs = inputs_of("gpt2")
    theirs, mine = logits(wrapped, inputs), logits(live, inputs)
    close(reference=theirs, result=mine, drift=rounding(theirs.dtype))
    for made in (theirs, mine):
        made.square().mean().backward()
    for name, layer in layers:
        for at, part in enumerate("qkv"):
            rows, ranks = slice(24 * at, 24 * at + 24), slice(RANK * at, RANK * at + RANK)
            close(reference=layer.lora_A["default"].weight.grad[ranks], result=live.get_parameter(f"{name}.lora.default.{part}.down").grad, drift=rounding(theirs.dtype))
            close(reference=layer.lora_B["default"].weight.grad[rows, ranks], result=live.get_parameter(f"{name}.lora.default.{part}.up").grad, drift=rounding(theirs.dtype))
    layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.roll(24, 0)
    rejects(reference=logits(wrapped, inputs), result=mine, drift=rounding(theirs.dtype))
