"""Numbers that say which of its siblings a module is, and what is done with them.

    layers.0.self_attn.layer_idx = 0    layers.1.self_attn.layer_idx = 1    …    in a ModuleList: positions

Two blocks that differ in nothing else do the same, as long as the number only chooses the block's slot of a cache. While a block is
watched, its positions are `Position`s, which say so when they are used for anything else, and its caches hand out slots by them alone.
"""

import contextlib
import operator
import sys
from collections import defaultdict

from torch import nn
from transformers import cache_utils
from transformers.cache_utils import EncoderDecoderCache

_CACHE_CODE = cache_utils.__file__


class Position:
    """An int under watch: every use of its value outside of the cache's own code is noted with `watchers` (lists of words).

    It says that it is an int to `isinstance`; only `type(index) is int` sees the difference, and goes unnoticed.
    """

    def __init__(self, value, watchers):
        self.value, self.watchers = value, watchers

    __class__ = property(lambda self: int)

    def used(self):
        frame = sys._getframe(2)
        if frame.f_code.co_filename != _CACHE_CODE:
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


def _bare(value):
    return value.value if type(value) is Position else value


def _operation(name):
    function = getattr(operator, name)
    return lambda self, *others: function(self.used(), *map(_bare, others)), lambda self, other: function(other, self.used())


_ONE_WAY = ("neg", "abs", "eq", "ne", "lt", "le", "gt", "ge")
for _name in (*_ONE_WAY, "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift"):
    _forward, _backward = _operation(_name)
    setattr(Position, f"__{_name.strip('_')}__", _forward)
    if _name not in _ONE_WAY:
        setattr(Position, f"__r{_name.strip('_')}__", _backward)


def tell(watchers, words):
    for watcher in watchers:
        watcher.append(words)


class _Slots(list):
    """The layers of a cache under watch: a Position chooses one unseen, everything else is told."""

    watchers = ()

    def __getitem__(self, index):
        if type(index) is not Position:
            tell(self.watchers, "it reads other slots of the cache than its own")
        return list.__getitem__(self, _bare(index))

    def __iter__(self):
        tell(self.watchers, "it reads other slots of the cache than its own")
        return list.__iter__(self)


class _Flags(dict):
    """Which slots of a cache were filled, under watch."""

    watchers = ()

    def _key(self, index):
        if type(index) is not Position:
            tell(self.watchers, "it reads other slots of the cache than its own")
        return _bare(index)

    def get(self, index, default=None):
        return dict.get(self, self._key(index), default)

    def __getitem__(self, index):
        return dict.__getitem__(self, self._key(index))

    def __setitem__(self, index, value):
        dict.__setitem__(self, self._key(index), value)

    def __contains__(self, index):
        return dict.__contains__(self, self._key(index))


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
        for module, name in places:
            value = vars(module)[name]
            if type(value) is not Position:
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
                if type(held) is not kind:
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
        held.update(slots)
    else:
        list.extend(held, list.__getitem__(slots, slice(None)))
    vars(holder)[name] = held
