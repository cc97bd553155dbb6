"""What the checks of every pass share: one comparison, three small models, one capture of each per process.

    gated     a Hugging Face decoder: gated MLP, grouped heads, biases on q, k, v alone
    written   plain torch: LayerNorm, GELU, biases everywhere, attention written out, a classifier
    looped    plain torch: the head tied to the embedding, one block used twice, a causal kernel of attention

Sizes are odd, distinct and rectangular, so that a transposed weight cannot pass.
"""

import contextlib
import functools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Callable

import pytest
import torch
import transformers as T
from torch import nn
from torch.nn import functional as F

from rewrite import capture
from rewrite import graph as g

#: Modules of passes from elsewhere, to be checked in place of the built-in ones (`--pass`).
OUTSIDE = []

# ---- comparing -----------------------------------------------------------------------------------------------------------

#: A training run has learned something when its loss has come down to this share of where it began.
LEARNED = 0.9


def rounding(dtype):
    """How far two orders of the same sums may lie apart after some layers, relative to their RMS."""
    return (2**5 if dtype == torch.bfloat16 else 2**10) * torch.finfo(dtype).eps


def error(*, reference, result):
    """Largest difference relative to the RMS of the reference; infinite where shapes, dtypes or what is not finite differ."""
    if reference.shape != result.shape or reference.dtype != result.dtype or not torch.equal(reference.isfinite(), result.isfinite()):
        return float("inf")
    known = reference.isfinite()
    a, b = reference[known].double(), result[known].double()
    if torch.equal(a, b):
        return 0.0
    return float((a - b).abs().max() / a.square().mean().sqrt())


def close(*, reference, result, drift):
    """Fail unless `result` is within `drift` of `reference` (0.0: bit-equal)."""
    found = error(reference=reference.detach(), result=result.detach())
    if not found <= drift:
        raise AssertionError(f"error {found:.2e} relative to the RMS of the reference, allowed {drift:.2e}")


def rejects(*, reference, result, drift):
    """Fail if `close` would let this broken twin pass."""
    with pytest.raises(AssertionError, match="relative to the RMS"):
        close(reference=reference, result=result, drift=drift)


def same_gradients(*, reference, result, drift):
    """Each trainable tensor of a model has the gradient that it has in another model; one that is off by a hundredth is told."""
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            close(reference=parameter.grad, result=result.get_parameter(name).grad, drift=drift)
            rejects(reference=parameter.grad, result=1.01 * result.get_parameter(name).grad, drift=drift)


def learned(losses):
    """Whether a run of losses came down."""
    return losses[-1] <= LEARNED * losses[0]


# ---- models --------------------------------------------------------------------------------------------------------------


class WrittenBlock(nn.Module):
    def __init__(self, width=24, heads=4, inner=56):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Written(nn.Module):
    def __init__(self, vocab=20, width=24, classes=3):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(WrittenBlock(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, ids):
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class LoopedBlock(nn.Module):
    def __init__(self, width=24, heads=4, inner=56):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, 40, bias=False) for _ in range(3))
        self.out = nn.Linear(40, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Looped(nn.Module):
    def __init__(self, vocab=20, width=24):
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.block, self.norm = LoopedBlock(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        for _ in range(2):
            x = self.block(x)
        return self.head(self.norm(x))


def _ids(batch, length, seed=0):
    return torch.randint(3, 20, (batch, length), generator=torch.Generator().manual_seed(1009 * seed + 101 * batch + length))


def _gated():
    sizes = dict(vocab_size=20, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=56, max_position_embeddings=64)
    return T.Qwen2ForCausalLM(T.Qwen2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2, tie_word_embeddings=False))


@dataclass(frozen=True)
class Toy:
    """A small model: how it is made, its inputs at a size, its output tensor, and a task on a fixed batch."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict]
    classifies: bool = False

    def output(self, model, batch=2, length=7):
        """The output tensor without gradients, at a size."""
        with torch.no_grad():
            return self.run(model, batch, length)

    def run(self, model, batch=2, length=7):
        inputs = {k: v.to(_device(model)) for k, v in self.inputs(batch, length).items()}
        made = model(**inputs, **added(model, batch))
        return made if isinstance(made, torch.Tensor) else made.logits

    def loss(self, model, batch=4, length=9):
        """Cross-entropy of the next token, or of an arbitrary class for each row."""
        return self.forward(model, batch, length).loss

    def forward(self, model, batch=4, length=9):
        """The loss with the logits that it is of."""
        logits = self.run(model, batch, length)
        if self.classifies:
            return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, torch.arange(batch, device=logits.device) % logits.shape[-1]))
        ids = next(iter(self.inputs(batch, length).values())).to(logits.device)
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def added(model, batch):
    """A value for each input that passes have added and a call must give: other entries in neighbouring rows."""
    wanted = {name: one for name, one in model.report.inputs.items() if one.default is None} if hasattr(model, "report") else {}
    rows = {name: torch.arange(batch) % len(one.values) + one.values.start for name, one in wanted.items()}
    return {name: value.to(_device(model)) for name, value in rows.items()}


def _device(model):
    return next(model.parameters()).device


TOYS = {
    toy.name: toy
    for toy in (
        Toy("gated", _gated, lambda batch, length: {"input_ids": _ids(batch, length)}),
        Toy("written", Written, lambda batch, length: {"ids": _ids(batch, length)}, classifies=True),
        Toy("looped", Looped, lambda batch, length: {"ids": _ids(batch, length)}),
    )
}


@functools.cache
def model_of(name):
    """The model of a toy, one per process: tests leave it as it is."""
    torch.manual_seed(0)
    model = TOYS[name].build().eval()
    for module in model.modules():  # norms and biases that are ones and zeros would hide mistakes
        for key, value in module.named_parameters(recurse=False):
            if value.dim() == 1:
                value.data += 0.1 * torch.randn_like(value)
    return model


_CAPTURES = {}


def captured(model, example=None):
    """`capture`, with the graph of each model made once per process; every caller gets a copy of its own."""
    if id(model) not in _CAPTURES:
        _CAPTURES[id(model)] = (model, capture(model, example))  # the model too: its id stays its own
    return _CAPTURES[id(model)][1].copy()


@contextlib.contextmanager
def unchanged(model):
    """Fail if the model given is another one afterwards: tensors, flags, mode, attributes, the way it runs."""

    def state():
        tensors = {name: (id(t), t.detach().clone(), t.requires_grad, t.dtype, None if t.grad is None else t.grad.clone()) for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
        modules = {name: (type(m), m.training, sorted(m.__dict__), sorted(m._modules), [len(m.__dict__[h]) for h in sorted(m.__dict__) if "_hooks" in h]) for name, m in model.named_modules(remove_duplicate=False)}
        return tensors, modules, repr(getattr(model, "config", None))

    before = state()
    yield
    after = state()
    assert after[1:] == before[1:]
    assert before[0].keys() == after[0].keys()
    for name, (kind, value, *rest) in before[0].items():
        other, now, *more = after[0][name]
        assert kind == other and rest == more and torch.equal(value, now), name


# ---- live models ---------------------------------------------------------------------------------------------------------


def tensor_of(live, path):
    """The parameter or buffer at a path."""
    return g.attribute(live, path)


def changeable(live):
    """The new tensors whose values are a start: not what follows from the base, nor what that was made from."""
    return [path for path in live.report.made if path not in live.report.derived and path not in live.report.feeds]


def wake(live, seed=0, size=0.3):
    """Give every tensor that passes have made another value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path in changeable(live):
            tensor = tensor_of(live, path)
            tensor.copy_(size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return live


def train(live, loss, steps=40, lr=0.03):
    """Losses of AdamW on whatever trains."""
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(live)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
