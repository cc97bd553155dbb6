"""Random small models and random specs, for properties that must hold of all of them.

    a Plan says how a plain torch model is built, `plans` draws one; `steps` draws steps of a spec from the passes' own fields and examples

Sizes are drawn odd and rectangular; norms come before, after or not at all, attention is written out, called or fused, a block may run
twice and a head may be tied to the embedding.
"""

import dataclasses
import importlib
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rewrite.spec.options import common, options_schema
from rewrite.spec.parse import builtin_names, pass_of

# ---- models --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockPlan:
    """How a block is built; `kv` heads of keys serve `heads` of queries, each `head_dim` wide, whatever the width of the model."""

    attention: str
    mlp: str
    norm: str
    after: bool
    bias: bool
    conv: str
    heads: int
    kv: int
    head_dim: int
    inner: int


@dataclass(frozen=True)
class Plan:
    """How a model is built. `stem`: ids, ids with positions, pixels cut into patches, or features as they are."""

    stem: str
    width: int
    blocks: tuple[BlockPlan, ...]
    twice: bool
    head: str
    pooled: bool
    seed: int

    def build(self):
        """The model, in float64 and eval mode; norms and biases are away from ones and zeros."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = Grown(self).double().eval().requires_grad_(False)  # torch's matmul sums in another order where its weight trains
            for value in model.parameters():
                if value.dim() == 1:
                    value.data += 0.1 * torch.randn_like(value)
        return model

    def inputs(self, batch=2, length=5):
        """Inputs at a size; a picture is always of one size, five patches in a row."""
        generator = torch.Generator().manual_seed(101 * batch + length)
        if self.stem.startswith("ids"):
            return {"x": torch.randint(0, VOCAB, (batch, length), generator=generator)}
        shape = (batch, 3, 2, 20) if self.stem == "pixels" else (batch, length, self.width)
        return {"x": torch.randn(shape, generator=generator, dtype=torch.float64)}


VOCAB, LONGEST = 17, 16
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class RMS(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def norm(kind, width):
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "written": RMS, "none": lambda _: nn.Identity()}[kind](width)


class Attention(nn.Module):
    def __init__(self, plan, width):
        super().__init__()
        self.plan, self.wide, self.narrow = plan, plan.heads * plan.head_dim, plan.kv * plan.head_dim
        if plan.attention == "fused":
            self.qkv = nn.Linear(width, self.wide + 2 * self.narrow, bias=plan.bias)
        else:
            self.q, self.k, self.v = (nn.Linear(width, n, bias=plan.bias) for n in (self.wide, self.narrow, self.narrow))
        self.o = nn.Linear(self.wide, width, bias=plan.bias)

    def forward(self, x):
        plan = self.plan
        q, k, v = self.qkv(x).split([self.wide, self.narrow, self.narrow], -1) if plan.attention == "fused" else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.unflatten(-1, (-1, plan.head_dim)).transpose(1, 2) for t in (q, k, v))
        if plan.kv != plan.heads:
            k, v = (t.repeat_interleave(plan.heads // plan.kv, 1) for t in (k, v))
        if plan.attention == "written":
            y = torch.softmax(q @ k.transpose(-1, -2) / plan.head_dim**0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=plan.attention == "causal")
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, plan, width):
        super().__init__()
        self.kind, _, activation = plan.mlp.partition(" ")
        self.activation = ACTIVATIONS[activation]
        self.up, self.down = nn.Linear(width, plan.inner, bias=plan.bias), nn.Linear(plan.inner, width, bias=plan.bias)
        if self.kind == "gated":
            self.gate = nn.Linear(width, plan.inner, bias=plan.bias)

    def forward(self, x):
        if self.kind == "gated":
            return self.down(self.activation(self.gate(x)) * self.up(x))
        return self.down(self.activation(self.up(x)))


class Along(nn.Module):
    """A convolution along the sequence."""

    def __init__(self, plan, width):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding="same" if plan.conv == "same" else 1, groups=width if plan.conv == "depthwise" else 1, bias=plan.bias)

    def forward(self, x):
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, plan, width):
        super().__init__()
        self.after = plan.after
        parts = [Attention(plan, width)] if plan.attention != "none" else []
        parts += [Along(plan, width)] if plan.conv != "none" else []
        parts += [MLP(plan, width)] if plan.mlp != "none" else []
        self.parts = nn.ModuleList(parts)
        self.norms = nn.ModuleList(norm(plan.norm, width) for _ in parts)

    def forward(self, x):
        for part, norm in zip(self.parts, self.norms):
            x = norm(x + part(x)) if self.after else x + part(norm(x))
        return x


class Grown(nn.Module):
    def __init__(self, plan):
        super().__init__()
        self.plan, width = plan, plan.width
        if plan.stem.startswith("ids"):
            self.tokens = nn.Embedding(VOCAB, width)
        if plan.stem == "ids with positions":
            self.positions = nn.Embedding(LONGEST, width)
        if plan.stem == "pixels":
            self.patches = nn.Conv2d(3, width, (2, 4), stride=(2, 4), bias=False)
        self.blocks = nn.ModuleList(Block(block, width) for block in plan.blocks)
        if plan.head != "none":
            self.head = nn.Linear(width, VOCAB if plan.head == "tied" else 5, bias=plan.head == "biased")
        if plan.head == "tied":
            self.head.weight = self.tokens.weight

    def forward(self, x):
        if self.plan.stem == "ids with positions":
            x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        elif self.plan.stem == "ids":
            x = self.tokens(x)
        elif self.plan.stem == "pixels":
            x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            for _ in range(2 if self.plan.twice else 1):
                x = block(x)
        if self.plan.pooled:
            x = x.mean(1)
        return self.head(x) if self.plan.head != "none" else x


@st.composite
def block_plans(draw):
    kv = draw(st.sampled_from([1, 2, 3]))
    return BlockPlan(
        attention=draw(st.sampled_from(["none", "written", "sdpa", "causal", "fused"])),
        mlp=draw(st.sampled_from(["plain gelu", "plain relu", "gated silu", "gated tanh", "none"])),
        norm=draw(st.sampled_from(["layer", "rms", "written", "none"])),
        after=draw(st.booleans()),
        bias=draw(st.booleans()),
        conv=draw(st.sampled_from(["none", "none", "same", "padded", "depthwise"])),
        heads=kv * draw(st.sampled_from([1, 2])),
        kv=kv,
        head_dim=draw(st.sampled_from([3, 4, 5])),
        inner=draw(st.sampled_from([9, 14, 28])),
    )


@st.composite
def plans(draw):
    """A Plan with at least one weight."""
    stem = draw(st.sampled_from(["ids", "ids with positions", "pixels", "features"]))
    return Plan(
        stem=stem,
        width=draw(st.sampled_from([10, 12, 15])),
        blocks=tuple(draw(st.lists(block_plans(), min_size=1, max_size=2))),
        twice=draw(st.booleans()),
        head=draw(st.sampled_from(["plain", "biased", *(["tied"] if stem.startswith("ids") else [])])),
        pooled=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


# ---- specs ---------------------------------------------------------------------------------------------------------------


def _values(part, schema, usual):
    """A strategy of small values for one option's JSON Schema; `usual` (its default, or the example's value) where there is no telling."""
    while "$ref" in part:
        part = schema["$defs"][part["$ref"].rsplit("/", 1)[-1]]
    if "anyOf" in part:
        return st.one_of(*(_values(one, schema, usual) for one in part["anyOf"]))
    if "const" in part or "enum" in part:
        return st.sampled_from(part.get("enum") or [part["const"]])
    kind, above = part.get("type"), part.get("exclusiveMinimum")
    low, high = part.get("minimum"), part.get("maximum", part.get("exclusiveMaximum"))
    if kind == "boolean":
        return st.booleans()
    if kind == "null":
        return st.none()
    if kind == "integer":
        low = low if low is not None else above + 1 if above is not None else 0
        return st.integers(low, min(low + 5, high if high is not None else low + 5))
    if kind == "number":
        low = low if low is not None else above + 0.125 if above is not None else -2.0
        high = min(low + 4, high) if high is not None else low + 4
        return st.one_of(st.just(usual), st.integers(0, 7).map(lambda eighths: low + eighths * (high - low) / 8))
    return st.just(usual)


CLASSES = {name: pass_of(importlib.import_module(f"rewrite.passes.{name}")) for name in builtin_names()}
#: passes with sites of their own; those that mix what others make; all that stand by themselves
WORKING = [name for name, cls in CLASSES.items() if not hasattr(cls, "apply") and not cls.mixes()]
MIXING = [name for name, cls in CLASSES.items() if cls.mixes()]
ALONE = [name for name in CLASSES if name not in MIXING]
#: role → the working passes that are made for it
MADE_FOR = {}
for _name in WORKING:
    for _role in [CLASSES[_name].role] if isinstance(CLASSES[_name].role, str) else CLASSES[_name].role:
        MADE_FOR.setdefault(_role, []).append(_name)


@st.composite
def steps(draw, names, roles, number, where=None):
    """Steps of a spec: what a pass of `names` wants before it and the pass itself, at its own example's sites, at some of `roles` or at `where`, its options drawn."""
    name = draw(st.sampled_from(names))
    cls = CLASSES[name]
    step, schema = {"pass": name, **cls.example}, options_schema(cls)
    for field in dataclasses.fields(cls):
        part = schema["properties"][field.name]
        usual = cls.example.get(field.name, part.get("default"))
        if draw(st.booleans()):
            step[field.name] = draw(_values(part, schema, usual))
    if "where" in common(cls):
        own = draw(st.sampled_from([True, True, False])) and (cls.role or "where" in cls.example) and where is None
        step |= {} if own else {"where": where or draw(st.sampled_from(roles))}
        if not own and where is None and draw(st.booleans()):
            step["where"] = {"role": step["where"], "not": {"path": "blocks.1.**"}}
    if "allow_refusals" in common(cls):
        step |= {"allow_refusals": draw(st.sampled_from([True, True, False]))}
    before = draw(st.sampled_from([list(cls.shown_after), []]))
    return [{**one, "name": f"n{number}"} if "name" in common(CLASSES[one["pass"]]) else one for one in [*before, step]]


@st.composite
def parts(draw, roles, number):
    """A part of a spec: steps, or steps side by side on the same sites."""
    form = draw(st.sampled_from(["alone", "alone", "parallel", "choose", "batch"]))
    if form == "alone":
        return draw(steps(ALONE, roles, number))
    where = draw(st.sampled_from([role for role in roles if len(MADE_FOR.get(role, ())) > 1] or roles))
    first = draw(st.sampled_from(MADE_FOR.get(where, WORKING)))
    kin = [name for name in MADE_FOR.get(where, WORKING) if CLASSES[name].nouns() == CLASSES[first].nouns()]
    each = [draw(steps(names, roles, f"{number}{letter}", where))[-1] for letter, names in (("a", [first]), ("b", draw(st.sampled_from([kin, kin, WORKING]))))]
    if form == "parallel":
        return [{"parallel": each}]
    if form == "batch":
        return [{"batch": {"one": each[:1], "two": each[1:]}}]
    by = {key: value for key, value in draw(steps(MIXING, roles, number))[-1].items() if key != "where"}
    return [{"choose": each, "by": by}]
