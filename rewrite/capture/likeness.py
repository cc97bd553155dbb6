"""What two calls must have in common to write the same nodes, up to paths and cache slots: a hashable description of a call.

    (class, attributes, shapes of tensors, children …), (shapes, strides, dtypes, which inputs are one value …), (the cache's slot)
"""

import enum
import functools
import types
from collections import Counter

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_slot
from torch.utils import _pytree as pytree
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, EncoderDecoderCache

from .positions import kind_of, parts, positions

PLAIN = (kind_of(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
_OWN = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = tuple(name for name in _OWN if name.endswith("_hooks"))


class Unlike(Exception):
    """Why a call is not compared with others."""


class Given:
    """A call that may be like others: its module, its arguments taken apart, and `key`, equal for calls that write equal nodes.

    leaves: the arguments, flat. caches: those of them that are caches. slot: the block's place in them. nodes: leaf number → its node.
    """

    def __init__(self, likeness, tracer, module, path, args, kwargs):
        self.module, self.path = module, path
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda value: isinstance(value, Cache))
        self.caches = [value for value in self.leaves if isinstance(value, Cache)]
        self.places = likeness.places(module)
        self.slot = self._slot()
        self.nodes, self._alike = {}, {}
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.is_inference_mode_enabled()
        structure = likeness.structure(module, tracer)
        self.key = structure, modes, self.spec, tuple(self._leaf(tracer, place, value) for place, value in enumerate(self.leaves))
        hash(self.key)

    def _slot(self):
        numbers = {getattr(value, "value", value) for value in (vars(module)[name] for module, name in self.places)}
        if self.caches and len(numbers) != 1:
            raise Unlike("it takes a cache and has no number of its own that could be its slot")
        return numbers.pop() if len(numbers) == 1 else None

    def _leaf(self, tracer, place, value):
        if kind_of(value) in PLAIN or isinstance(value, (enum.Enum, type)):
            return kind_of(value), repr(value) if kind_of(value) in (float, complex) else value
        if isinstance(value, SIZES):
            self.nodes[place] = get_proxy_slot(value, tracer, None, lambda proxy: proxy.force().node) if value.node.is_symbolic() else None
            return kind_of(value), value.node.expr
        if isinstance(value, torch.Tensor):
            return self._tensor(tracer, place, value)
        if isinstance(value, Cache):
            own = [(part, self.slot) for part in parts(value)]
            held = [item for holder in (value, *parts(value)) for item in vars(holder).items() if item[0] not in ("layers", "is_updated")]
            rest = sorted((name, id(item)) for name, item in held)
            flags = dict.get(value.is_updated, self.slot) if isinstance(value, EncoderDecoderCache) else None
            return id(value), tuple(self._layer(tracer, place, number, slot_of(*slot)) for number, slot in enumerate(own)), flags, tuple(rest)
        if isinstance(value, (PretrainedConfig, nn.Module, types.FunctionType, types.BuiltinFunctionType)):
            return "object", id(value)
        raise Unlike(f"it takes a {kind_of(value).__name__}")

    def _tensor(self, tracer, place, value):
        slot = get_proxy_slot(value, tracer, None)
        if slot is None and id(value) not in tracer.tensors:
            raise Unlike("it takes a tensor from outside of the trace")
        if slot is not None and slot.constant is not None:
            raise Unlike("it takes a constant")
        node = self.nodes[place] = slot.proxy.node if slot is not None else None
        same = self._alike.setdefault(id(value) if node is None else node, len(self._alike))
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        shape = tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)
        return kind_of(value), same, tracer.tensors.get(id(value)), shape, value.dtype, value.device, value.requires_grad

    def _layer(self, tracer, place, number, layer):
        if layer is None:
            return None
        return kind_of(layer), tuple((name, self._leaf(tracer, (place, number, name), value)) for name, value in vars(layer).items())


def slot_of(part, index):
    """The layer of a cache at a place; None if it has none there."""
    return list.__getitem__(part.layers, index) if index < list.__len__(part.layers) else None


class Likeness:
    """Descriptions of the modules of a tree, made anew at each call, as code may write into them."""

    def __init__(self, tree):
        self._positions = positions(tree)
        self._kinds = Counter(kind_of(module) for module in tree.modules())
        holders = Counter(id(tensor) for module in tree.modules() for held in (module._parameters, module._buffers) for tensor in held.values())
        self._tied = {key for key, count in holders.items() if count > 1}
        self._held = {}  # what is told apart by identity is kept alive
        self.siblings = {child for parent in tree.modules() if isinstance(parent, (nn.ModuleList, nn.Sequential)) for child in parent.children()}
        self._worth = {module for module in tree.modules() if any(module.children()) and next(module.parameters(), None) is not None}

    def is_repeated(self, module, calls):
        """Whether another call like this one may come: several modules of its class, or this very one again."""
        return module in self._worth and (self._kinds[kind_of(module)] > 1 or calls > 0)

    def places(self, module):
        """The positions inside a module: [(module, attribute)]."""
        if not self._positions:
            return []
        return [(part, name) for part in module.modules() for name in vars(part) if (id(part), name) in self._positions]

    def structure(self, module, tracer):
        """A module as its code sees it: class, attributes, tensors, children. Raises Unlike where hooks could see the calls."""
        values = vars(module)
        for name in _HOOKS:
            if values[name]:
                raise Unlike("it has hooks")
        place = lambda name: (id(module), name) in self._positions
        own = tuple((name, None if place(name) else self._described(value, module)) for name, value in values.items() if name not in _OWN)
        tensors = tuple((name, self._stored(value, tracer)) for held in (module._parameters, module._buffers) for name, value in held.items())
        children = tuple((name, self.structure(child, tracer)) for name, child in module._modules.items() if child is not None)
        return kind_of(module), tracer.paths.get(module) in tracer.opaque, own, tensors, children

    def _stored(self, tensor, tracer):
        if tensor is None:
            return None
        if id(tensor) not in tracer.tensors:
            raise Unlike("it registers tensors while it runs")
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, kind_of(tensor), id(tensor) if id(tensor) in self._tied else None

    def _described(self, value, module):
        if kind_of(value) in PLAIN:
            return kind_of(value), repr(value) if kind_of(value) in (float, complex) else value
        if isinstance(value, (tuple, list)):
            return kind_of(value), tuple(self._described(entry, module) for entry in value)
        if isinstance(value, dict):
            return kind_of(value), tuple((self._described(key, module), self._described(entry, module)) for key, entry in value.items())
        if isinstance(value, types.MethodType) and value.__self__ is module:
            return "method", value.__func__
        if isinstance(value, functools.partial):
            return "partial", *(self._described(part, module) for part in (value.func, value.args, value.keywords))
        self._held[id(value)] = value
        return kind_of(value), id(value)
