"""A model without its values: fake tensors in place of its own, symbols in place of the sizes of its inputs, randomness of its own."""

import contextlib
import gc
import random
import sys

import numpy
import torch
from torch import nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from ..graph import own_state, shallow


class Symbols:
    """The sizes of the example, made symbols: "batch" and "length" are at least 1, everything else at least 0."""

    def __init__(self, fake_mode, least):
        self.env, self.known, self.least = fake_mode.shape_env, {}, least

    def size(self, name, hint):
        """The SymInt of a name or of a sum of names ("past+length"); a new name takes the hint as its example."""
        if "+" in name:
            parts = [part.strip() for part in name.split("+")]
            return sum((self.size(part, None) for part in parts[1:]), self.size(parts[0], None))
        if name in self.known:
            return self.known[name]
        if hint is None:
            raise KeyError(f"{name}: no dimension of its own gives this symbol a value")
        least = 0 if name.startswith("past") else 1
        hint = least if self.least else hint
        symbol = self.env.create_symbol(
            hint, ConstantSource(name), DimDynamic.DYNAMIC, constraint_dim=None, positive=True if least else None, do_not_specialize_zero_one=True
        )
        self.env.var_to_range[symbol] = ValueRanges(least, int_oo)
        if not self.least:
            self.env.size_like.add(symbol)
        self.known[name] = self.env.create_symintnode(symbol, hint=hint, source=ConstantSource(name))
        return self.known[name]


def fake_inputs(fake_mode, names, tensors, dims, cast, least):
    """Fake tensors of the shapes of `tensors`, their dims (leaf name → {dim: symbol}) made symbols → (fakes, {name: SymInt})."""
    symbols = Symbols(fake_mode, least)
    for name, tensor in zip(names, tensors):
        for dim, symbol in dims.get(name, {}).items():
            if "+" not in symbol:
                symbols.size(symbol, tensor.shape[dim])
    fakes, made = [], {}
    for name, tensor in zip(names, tensors):
        named = dims.get(name, {})
        shape = [symbols.size(named[dim], size) if dim in named else size for dim, size in enumerate(tensor.shape)]
        kind = cast(tensor.dtype), _device(tensor)
        key = (*(size.node.expr if isinstance(size, torch.SymInt) else size for size in shape), *kind)
        if key not in made:  # a cache has many of one shape, and a shape of symbols is slow to lay out
            made[key] = torch.empty(shape, dtype=kind[0], device="meta")
        fakes.append(FakeTensor(fake_mode, made[key], kind[1]))
    return fakes, symbols.known


def _device(tensor):
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def fake_tree(model, fake_mode, cast):
    """Shallow clones of a model's modules that hold fake tensors (`cast`: dtype → dtype) → (tree, {id(fake): path})."""

    fakes, paths, modules = {}, {}, {}

    def tensor(value, path):
        if value is None:
            return None
        if id(value) not in fakes:
            bare = torch.empty_strided(value.shape, value.stride(), dtype=cast(value.dtype), device="meta")
            fakes[id(value)] = fake = FakeTensor(fake_mode, bare, _device(value))  # as the mode makes it, without its questions: there are many
            fake._is_param = isinstance(value, nn.Parameter)
            paths[id(fakes[id(value)])] = path
        return fakes[id(value)]

    def visit(module, path):
        if id(module) in modules:
            return modules[id(module)]
        twin = modules[id(module)] = shallow(module)
        at = path + "." if path else ""
        for held in ("_parameters", "_buffers"):
            for name, value in getattr(module, held).items():
                getattr(twin, held)[name] = tensor(value, at + name)
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else visit(child, at + name)
        return twin

    return own_state(visit(model, "")), paths


@contextlib.contextmanager
def uncollected():
    """No search for garbage inside: a capture, or a rewrite, makes many objects that stay, and would be searched again and again with all that is loaded."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def own_randomness(seed):
    """Seeds of its own for torch, numpy and random inside; the caller's state comes back untouched."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        numpy.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


@contextlib.contextmanager
def export_patches(model):
    """What transformers itself replaces while it exports one of its models, for files that are imported already."""
    if not hasattr(model, "config"):
        yield
        return
    from transformers.exporters import exporter_dynamo  # noqa: F401  (registers the patches)
    from transformers.exporters.utils import _PATCHES, patch_attributes

    found = []
    for owner, name, factory in _PATCHES.get("dynamo", ()):
        if isinstance(owner, str):  # newer transformers: a dotted path, so that nothing is imported for it; older: the object itself
            parts = owner.split(".")
            depth = next((k for k in range(len(parts), 0, -1) if ".".join(parts[:k]) in sys.modules), 0)
            owner = sys.modules.get(".".join(parts[:depth]))
            for part in parts[depth:]:
                owner = vars(owner).get(part) if owner is not None else None
        if owner is not None and name in vars(owner):
            found.append((owner, name, factory))
    with patch_attributes(found):
        yield
