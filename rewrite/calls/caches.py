"""The user's cache of keys and values: taken apart into the leaves of a graph before a call, and brought up to date after it.

The cache is the user's own object (`generate` reorders, crops and repeats it), kept as full layers: one whose layers cut to a sliding
window is given full ones instead, since the captured graph sees all keys and its mask does the window.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from ..errors import Refused
from .leaves import FullLayer


class PromptedLayer(DynamicLayer):
    """A layer that holds `front` places of a prompt before those of the caller's tokens, of which alone it tells."""

    def __init__(self, front):
        super().__init__()
        self.front = front

    def get_seq_length(self):
        return self.keys.shape[-2] - self.front if self.is_initialized else 0

    def crop(self, max_length):
        length = self.get_seq_length()
        kept = max_length if max_length >= 0 else length + max_length
        if kept < length:
            self.keys, self.values = self.keys[..., : kept + self.front, :], self.values[..., : kept + self.front, :]


@dataclass(frozen=True)
class Layers:
    """What one cache's layers look like: (heads, key dim, value dim) each; `length` is the symbol or number of their places."""

    shapes: tuple[tuple[int, int, int], ...]
    batch: str | int
    length: str | int
    dtype: torch.dtype

    def take(self, cache, sizes, what, front=0):
        """The tensors of a filled cache, layer by layer; None if it holds nothing. Enters its length into `sizes`.

        front: how many places of a prompt must stand before the caller's tokens.
        """
        found = cache.layers
        if not found or not _holds(found[0]):
            return None
        if len(found) < len(self.shapes):
            raise Refused(f"{what}: past_key_values has {len(found)} layers, the model has {len(self.shapes)}.")
        length = found[0].keys.shape[2]
        tensors = []
        for index, (heads, key_dim, value_dim) in enumerate(self.shapes):
            layer = found[index]
            if front != getattr(layer, "front", 0):
                raise Refused(f"{what}: past_key_values, layer {index}, was filled by a model with {getattr(layer, 'front', 0)} tokens in front, this one has {front}. Start from an empty cache.")
            if type(layer) not in (DynamicLayer, FullLayer, PromptedLayer):
                _refuse_layer(layer, index, what)
            keys, values = layer.keys, layer.values
            if keys is None or keys.shape[1:] != (heads, length, key_dim) or values.shape[1:] != (heads, length, value_dim):
                shape = None if keys is None else tuple(keys.shape)
                raise Refused(f"{what}: past_key_values, layer {index}: keys are {shape}, the graph takes (batch, {heads}, {length}, {key_dim}).")
            tensors += (keys, values)
        self._enter(self.batch, found[0].keys.shape[0], sizes, what, "batch")
        self._enter(self.length, length, sizes, what, "length")
        return tensors

    def empty(self, live, device, sizes):
        """Layers of length 0: the first call behind nothing."""
        dtype = self.dtype
        if self.dtype.is_floating_point and hasattr(live, "get_input_embeddings"):
            weight = getattr(live.get_input_embeddings(), "weight", None)
            dtype = weight.dtype if weight is not None and weight.dtype.is_floating_point else dtype
        batch = sizes[self.batch] if isinstance(self.batch, str) else self.batch
        sizes[self.length] = 0
        tensors = []
        for heads, key_dim, value_dim in self.shapes:
            tensors.append(torch.empty((batch, heads, 0, key_dim), dtype=dtype, device=device))
            tensors.append(torch.empty((batch, heads, 0, value_dim), dtype=dtype, device=device))
        return tensors

    def _enter(self, size, found, sizes, what, word):
        expected = sizes.setdefault(size, found) if isinstance(size, str) else size
        if expected != found:
            raise Refused(f"{what}: past_key_values has {word} {found}, the other inputs say {expected}.")


def layers_of(leaves, prefix):
    """The Layers of a graph's cache leaves under a prefix, or None. leaves: {name: (shape, dtype)}."""
    names = [name for name in leaves if name.startswith(prefix) and name.endswith(".key") and name[len(prefix)].isdigit()]
    if not names:
        return None
    shapes = []
    for name in names:
        key, value = leaves[name][0], leaves[name.removesuffix("key") + "value"][0]
        shapes.append((key[1], key[3], value[3]))
    shape, dtype = leaves[names[0]]
    return Layers(tuple(shapes), shape[0], shape[2], dtype)


def accept(cache, both, what):
    """The user's cache, or a new one for None; `both`: the model has cross-attention as well. Raises Refused for other kinds.

    Layers of a sliding window that are still whole become full layers.
    """
    if cache is None:
        return EncoderDecoderCache(DynamicCache(), DynamicCache()) if both else DynamicCache()
    if both:
        if not isinstance(cache, EncoderDecoderCache):
            raise Refused(f"{what}: past_key_values is a {type(cache).__name__}, the graph keeps an EncoderDecoderCache of two DynamicCaches.")
        _accept(cache.self_attention_cache, what)
        _accept(cache.cross_attention_cache, what)
        return cache
    _accept(cache, what)
    return cache


def _accept(cache, what):
    if type(cache) is not DynamicCache:
        raise Refused(
            f"{what}: past_key_values is a {type(cache).__name__}, the graph keeps a DynamicCache.\n"
            "Leave cache_implementation at its default."
        )
    if cache.offloading:
        raise Refused(f"{what}: past_key_values moves its layers off the device, which the graph does not. Use a DynamicCache without offloading.")
    layers = cache.layers
    for index in range(len(layers)):
        layer = layers[index]
        if type(layer) is DynamicSlidingWindowLayer:
            if layer.is_initialized and layer.keys.shape[-2] != layer.cumulative_length:
                raise Refused(
                    f"{what}: past_key_values, layer {index}, has let go of all but the last {layer.keys.shape[-2]} of "
                    f"{layer.cumulative_length} places; the captured graph masks the window itself. Start from an empty cache."
                )
            layers[index] = full = DynamicLayer()
            if layer.is_initialized:
                _fill(full, layer.keys, layer.values)


def is_filled(cache):
    """Whether the cross-attention part of a cache holds keys and values."""
    return isinstance(cache, EncoderDecoderCache) and len(cache.cross_attention_cache.layers) > 0 and _holds(cache.cross_attention_cache.layers[0])


def holds(cache):
    """Whether a cache holds keys and values."""
    return cache is not None and len(cache.layers) > 0 and _holds(cache.layers[0])


def store(cache, tree, flat, start, front=0):
    """Bring the cache up to date from a graph's outputs (its `tree`, leaves from `start` on): keys and values as they now are.

    front: how many of their places are a prompt's.
    """
    if tree.kind == "caches":
        start = store(cache.self_attention_cache, tree.children[0], flat, start)
        before = start
        start = store(cache.cross_attention_cache, tree.children[1], flat, start)
        if start > before:
            for index in range(len(tree.children[1].children)):
                cache.is_updated[index] = True
        return start
    layers = cache.layers
    for index, child in enumerate(tree.children):
        if child.kind != "tuple" or child.children[0].kind != "tensor":
            continue  # a layer that was handed through
        while index >= len(layers):
            layers.append(DynamicLayer())
        if front and type(layers[index]) is not PromptedLayer:
            layers[index] = PromptedLayer(front)
        _fill(layers[index], flat[start], flat[start + 1])
        start += 2
    return start


def _fill(layer, keys, values):
    layer.keys, layer.values = keys, values
    if not layer.is_initialized:
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True


def _holds(layer):
    return layer.is_initialized and layer.keys is not None and layer.keys.dim() == 4


def _refuse_layer(layer, index, what):
    raise Refused(f"{what}: past_key_values, layer {index}, is a {type(layer).__name__}; the graph keeps layers of keys and values that grow.")
