"""Nested values, taken apart into named tensors and put together again.

    {"input_ids": t, "past_key_values": DynamicCache(…)}
    -->
    ("input_ids", "past_key_values.0.key", "past_key_values.0.value", …), [t, k, v, …], Tree(…)

A graph knows flat tensors; people hand over dictionaries, `ModelOutput`s and caches. A `Tree` is what lies between: it holds no
tensor, can be pickled, copied and compared, and needs no registration with torch's pytrees.
"""

import dataclasses
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.utils import ModelOutput

from ..errors import Refused

VALUES = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Tree:
    """How one value is put together.

    `kind`: "tensor" (one leaf), "input" (the input leaf named `value`, handed through unchanged), "value" (a constant, `value`),
    "tuple", "list", "dict", "output" (a ModelOutput or dataclass: `cls`, `names`), "cache" (a DynamicCache; one child per layer:
    a tuple of key and value, or the value None for a layer that holds nothing yet), "caches" (an EncoderDecoderCache: the
    self-attention's and the cross-attention's cache).
    """

    kind: str
    cls: type | None = None
    names: tuple[str, ...] = ()
    children: tuple["Tree", ...] = ()
    value: object = None

    def child(self, name):
        """The subtree of a key or field; None where there is none."""
        return self.children[self.names.index(name)] if name in self.names else None


TENSOR = Tree("tensor")


class FullLayer(DynamicLayer):
    """A layer of a cache whose length is the size of its keys and nothing else.

    The original answers 0 where `numel() == 0`: a question about a size that a trace would have to decide once and for all.
    """

    def __init__(self, keys, values):
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def get_seq_length(self):
        return self.keys.shape[-2]


def leaves(value, known=None):
    """Take a value apart → (names, tensors, Tree), names and tensors in the same order.

    value: a tensor, a constant, or tuples, lists, dicts, dataclasses, `ModelOutput`s and dynamic caches of these. The keys of a dict
    or `ModelOutput` at the top name its leaves as they stand ("logits", "past_key_values.0.key"); other values are named "output".
    known: {id(tensor): name} of the inputs; an output that *is* one of them gets no leaf of its own.
    Raises Refused for anything else, with the name of the place.
    """
    names, tensors = [], []
    known = known or {}

    def visit(value, place):
        if isinstance(value, torch.Tensor):
            if id(value) in known:
                return Tree("input", value=known[id(value)])
            names.append(place or "output")
            tensors.append(value)
            return TENSOR
        if isinstance(value, VALUES):
            return Tree("value", value=value)
        if isinstance(value, ModelOutput) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            fields = dict(value) if isinstance(value, ModelOutput) else {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return branch("output", fields, place, type(value))
        if isinstance(value, EncoderDecoderCache):
            return branch("caches", {"self": value.self_attention_cache, "cross": value.cross_attention_cache}, place)
        if isinstance(value, DynamicCache):
            return Tree("cache", children=tuple(layer(entry, f"{place}.{i}" if place else str(i)) for i, entry in enumerate(value.layers)))
        if isinstance(value, dict):
            return branch("dict", value, place)
        if isinstance(value, (tuple, list)):
            cls = type(value) if hasattr(value, "_fields") else None
            kind = "list" if isinstance(value, list) else "tuple"
            return branch(kind, dict(enumerate(value)), place or "output", cls)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise Refused(f"{place or 'the value'}: {kind} is neither a tensor nor made of tensors that can be named.")

    def branch(kind, entries, place, cls=None):
        children = tuple(visit(child, f"{place}.{key}" if place else str(key)) for key, child in entries.items())
        return Tree(kind, cls, tuple(entries) if kind not in ("tuple", "list") else (), children)

    def layer(entry, place):
        if type(entry) not in (DynamicLayer, DynamicSlidingWindowLayer, FullLayer):
            raise Refused(f"{place}: a cache layer of type {type(entry).__name__} is not captured; only layers of keys and values that grow are.")
        if not entry.is_initialized:
            return Tree("value")
        return Tree("tuple", children=(visit(entry.keys, f"{place}.key"), visit(entry.values, f"{place}.value")))

    tree = visit(value, "")
    return tuple(names), tensors, tree


def rebuild(tree, tensors, inputs=None):
    """The inverse of `leaves`: tensors in its order, and `inputs` ({name: tensor}) for what was handed through.

    Caches come back as a DynamicCache of `FullLayer`s (an EncoderDecoderCache of two), new objects that are the caller's own.
    """
    stream = iter(tensors)
    value = _rebuild(tree, stream, inputs or {})
    rest = len(list(stream))
    if rest:
        raise ValueError(f"{rest} tensors more than the tree has leaves")
    return value


def _rebuild(tree, stream, inputs):
    kind = tree.kind
    if kind == "tensor":
        return next(stream)
    if kind == "value":
        return tree.value
    if kind == "input":
        return inputs[tree.value]
    children = [_rebuild(child, stream, inputs) for child in tree.children]
    if kind == "tuple":
        return tree.cls(*children) if tree.cls else tuple(children)
    if kind == "list":
        return children
    if kind == "dict":
        return dict(zip(tree.names, children))
    if kind == "output":
        return tree.cls(**dict(zip(tree.names, children)))
    if kind == "cache":
        cache = DynamicCache()
        for child in children:
            cache.layers.append(DynamicLayer() if child is None else FullLayer(*child))
        return cache
    both = EncoderDecoderCache(children[0], DynamicCache())
    both.cross_attention_cache = children[1]  # not through its constructor, which would ask for the sizes
    both.is_updated = {index: layer.is_initialized for index, layer in enumerate(children[1].layers)}
    return both
