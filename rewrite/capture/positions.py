"""Numbers that say which of its siblings a module is, and what is done with them.

    layers.0.self_attn.layer_idx = 0    layers.1.self_attn.layer_idx = 1    …    in a ModuleList: positions

Two blocks that differ in nothing else do the same, as long as the number only chooses the block's slot of a cache. While a block is
watched, its positions are `Position`s, which say so when they are used for anything else, and its caches hand out slots by them alone.
"""

import builtins
import contextlib
import math
import operator
import sys
from collections import defaultdict

from torch import nn
from transformers import cache_utils
from transformers.cache_utils import EncoderDecoderCache

_CACHE_CODE = cache_utils.__file__
kind_of = type  # while something is watched, the builtin of that name is a stand-in


class Position:
    """An int under watch: every use of its value is noted with `watchers` (lists of words), but that as the number of a slot in the cache's own code.

    To `isinstance` and, while it is watched, to `type` it is an int.
    """

    def __init__(self, value, watchers):
        self.value, self.watchers = value, watchers

    __class__ = property(lambda self: int)

    def used(self):
        frame = sys._getframe(2)
        if not _chooses(frame, self):
            tell(self.watchers, f"{frame.f_code.co_filename}:{frame.f_lineno} computes with the block's number")
        return self.value

    def __index__(self):
        return self.used()

    def __int__(self):
        return self.used()

    def __float__(self):
        return float(self.used())

    def __bool__(self):
        return bool(self.used())

    def __hash__(self):
        return hash(self.used())

    def __repr__(self):
        return repr(self.used())

    def __format__(self, form):
        return format(self.used(), form)

    def __getattr__(self, name):
        return getattr(self.used(), name)

    def __reduce_ex__(self, protocol):  # a copy would be out of sight
        return int, (self.used(),)


def _chooses(frame, position=None):
    """Whether code of the cache is at work for the slot of one number under watch (this one)."""
    if frame.f_code.co_filename != _CACHE_CODE:
        return False
    asked = frame.f_locals.get("layer_idx")
    return asked is position if position is not None else kind_of(asked) is Position


def _bare(value):
    return value.value if kind_of(value) is Position else value


def _operation(name):
    function = getattr(operator, name, None) or getattr(builtins, name, None) or getattr(math, name)
    return lambda self, *others: function(self.used(), *map(_bare, others)), lambda self, other: function(other, self.used())


_ONE_WAY = ("neg", "pos", "invert", "abs", "round", "trunc", "floor", "ceil", "complex", "eq", "ne", "lt", "le", "gt", "ge")
for _name in (*_ONE_WAY, "add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "and_", "or_", "xor", "lshift", "rshift"):
    _forward, _backward = _operation(_name)
    setattr(Position, f"__{_name.strip('_')}__", _forward)
    if _name not in _ONE_WAY:
        setattr(Position, f"__r{_name.strip('_')}__", _backward)


class _Types:
    """Stands for the builtin `type` while something is watched: of a Position it says int, as without a watch; all else is as ever."""

    def __call__(self, *given, **rest):
        found = kind_of(*given, **rest)
        return int if found is Position else found

    def __getattr__(self, name):
        return getattr(kind_of, name)

    def __instancecheck__(self, value):
        return isinstance(value, kind_of)

    def __subclasscheck__(self, kind):
        return issubclass(kind, kind_of)

    def __mro_entries__(self, bases):
        return (kind_of,)

    def __getitem__(self, key):
        return kind_of[key]

    def __or__(self, other):
        return kind_of | other

    def __ror__(self, other):
        return other | kind_of

    def __eq__(self, other):
        return other is kind_of or other is self

    def __hash__(self):
        return hash(kind_of)


@contextlib.contextmanager
def _types():
    before, builtins.type = builtins.type, _Types()
    try:
        yield
    finally:
        builtins.type = before


def tell(watchers, words):
    for watcher in watchers:
        watcher.append(words)


_OTHERS = "it reads other slots of the cache than its own"


class _Slots(list):
    """The layers of a cache under watch: a Position chooses one unseen, and the cache's own code may ask whether that one is there."""

    watchers = ()

    def __getitem__(self, index):
        if kind_of(index) is not Position:
            tell(self.watchers, _OTHERS)
        return list.__getitem__(self, _bare(index))

    def __len__(self):
        if not _chooses(sys._getframe(1)):
            tell(self.watchers, _OTHERS)
        return list.__len__(self)


class _Flags(dict):
    """Which slots of a cache were filled, under watch."""

    watchers = ()

    def _key(self, index):
        if kind_of(index) is not Position:
            tell(self.watchers, _OTHERS)
        return _bare(index)

    def get(self, index, default=None):
        return dict.get(self, self._key(index), default)

    def __getitem__(self, index):
        return dict.__getitem__(self, self._key(index))

    def __setitem__(self, index, value):
        dict.__setitem__(self, self._key(index), value)

    def __contains__(self, index):
        return dict.__contains__(self, self._key(index))


def _telling(kind, name):
    function = getattr(kind, name)

    def told(self, *given, **rest):
        tell(self.watchers, _OTHERS)
        return function(self, *given, **rest)

    return told


# everything else that can be asked of them or done to them; the cache appends the slot that it was asked for
_UNSEEN = {"__getattribute__", "__new__", "__init__", "__class_getitem__", "__getstate__", "append", "__hash__", "__sizeof__", "__setattr__", "__delattr__"}
for _watch in (_Slots, _Flags):
    for _name in set(dir(_watch.__base__)) - _UNSEEN - set(vars(_watch)) - set(dir(object)) | {"__eq__", "__repr__", "__reduce_ex__"}:
        setattr(_watch, _name, _telling(_watch.__base__, _name))


def positions(tree):
    """{(id(module), attribute)}: ints that differ between all siblings of one class in a ModuleList, at the same place inside of them."""
    found = set()
    for parent in tree.modules():
        kinds = defaultdict(list)
        for child in parent.children() if isinstance(parent, nn.ModuleList) else ():
            kinds[type(child)].append(dict(child.named_modules()))
        for siblings in kinds.values():
            if len(siblings) < 2:
                continue
            for place in siblings[0]:
                column = [modules[place] for modules in siblings if place in modules]
                for name, value in vars(column[0]).items():
                    values = [vars(module).get(name) for module in column] if type(value) is int else ()
                    if len(values) > 1 and all(type(value) is int for value in values) and len(set(values)) == len(values):
                        found.update((id(module), name) for module in column)
    return found


def parts(cache):
    """The DynamicCaches of a cache: itself, or the two of an EncoderDecoderCache."""
    return (cache.self_attention_cache, cache.cross_attention_cache) if isinstance(cache, EncoderDecoderCache) else (cache,)


@contextlib.contextmanager
def watched(places, caches, words):
    """While inside: the positions at `places` [(module, attribute)] and the slots of the caches tell `words` (a list) of other uses."""
    with contextlib.ExitStack() as stack:
        if places:
            stack.enter_context(_types())
        for module, name in places:
            value = vars(module)[name]
            if kind_of(value) is not Position:
                vars(module)[name] = position = Position(value, [])
                stack.callback(vars(module).__setitem__, name, value)
            else:
                position = value
            position.watchers.append(words)
            stack.callback(_leave, position, words)
        for cache in caches:
            holders = [(part, "layers", _Slots) for part in parts(cache)]
            holders += [(cache, "is_updated", _Flags)] if isinstance(cache, EncoderDecoderCache) else []
            for holder, name, kind in holders:
                held = vars(holder)[name]
                if kind_of(held) is not kind:
                    vars(holder)[name] = slots = kind(held)
                    slots.watchers = []
                    stack.callback(_give_back, holder, name, held, slots)
                else:
                    slots = held
                slots.watchers.append(words)
                stack.callback(_leave, slots, words)
        yield


def _leave(watched, words):
    watched.watchers[:] = [watcher for watcher in watched.watchers if watcher is not words]


def _give_back(holder, name, held, slots):
    held.clear()
    if isinstance(held, dict):
        held.update(dict.items(slots))
    else:
        held.extend(list.__iter__(slots))
    vars(holder)[name] = held
