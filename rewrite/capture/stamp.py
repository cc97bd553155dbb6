"""Calls that were seen before, written down without running them again.

    layers.0(x0)  traced: linear(x0, @layers.0.up.weight) · cat(@slot 0, …) · …
    -->
    layers.1(x1)  stamped: linear(x1, @layers.1.up.weight) · cat(@slot 1, …) · …

A call is like another if `likeness` describes both alike: then the model's code would do the same again, with other tensors, at another
place, in another slot of the cache. What could make this untrue is watched while the first one is traced; where something does, calls of
that kind are traced one by one, and a note says why.
"""

import gc
import random
import sys
import types
from collections import Counter

import numpy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import _ProxyTensor, get_proxy_slot, set_proxy_slot, snapshot_fake
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..graph import HOST, add_node
from .likeness import PLAIN, Given, Likeness, Unlike, slot_of
from .positions import kind_of, parts, watched
from .tidy import ASSERTS, has_effect, written


class Stamps:
    """The recorded calls of one run. `notes`: why calls were traced again. `watching`: a failure may be due to watching."""

    def __init__(self, tracer, tree):
        self.tracer, self.likeness = tracer, Likeness(tree)
        self.recordings, self.notes, self.stamped, self.watching = {}, [], 0, False

    def call(self, module, path, run, args, kwargs):
        """Run the call (`run()`), or stamp it from one like it."""
        if not self.likeness.is_repeated(module, self.tracer.calls[path]):
            return run()
        try:
            with torch._C.DisableTorchFunction():  # looking at a tensor is no read of the model's code
                given = Given(self.likeness, self.tracer, module, path, args, kwargs)
        except Unlike as reason:
            self._note(module, reason)
            return run()
        recording = self.recordings.get(given.key)
        if recording is None:
            recording = self.recordings[given.key] = Recording(self.tracer, given)
            return recording.record(self, run)
        reason = recording.reason or recording.misfit(given)
        if reason:
            self._note(module, reason)
            return run()
        self.stamped += 1
        with torch._C.DisableTorchFunction():
            return recording.stamp(given)

    def _note(self, module, reason):
        words = f"each {kind_of(module).__name__} is traced by itself: {reason}"
        if module in self.likeness.siblings and words not in self.notes:
            self.notes.append(words)


class Recording:
    """One call and the nodes that it wrote. `reason`: why none can be stamped from it, or None.

    A value is told as ("given", leaf), ("slot", cache, part, attribute), ("made", node, fake) or ("value", constant).
    """

    def __init__(self, tracer, given):
        self.tracer, self.given, self.reason = tracer, given, "it calls itself"

    # -- the first call

    def record(self, stamps, run):
        tracer, given = self.tracer, self.given
        last = next(iter(reversed(tracer.graph.nodes)))
        calls, called, constants, inner = Counter(tracer.calls), set(tracer.called), len(tracer.constants), set(tracer.inner)
        training_only = set(tracer.training_only)
        with torch._C.DisableTorchFunction():
            before = self._state()
        symbols, words = tracer.fake_mode.shape_env.unbacked_symint_counter, []
        with watched(given.places, given.caches, words):
            try:
                result = run()
            except Exception:  # a model's own code may raise anything; it goes on its way
                stamps.watching = stamps.watching or bool(given.places or given.caches)
                raise
        self.read = tracer.read
        self.nodes, node = [], last.next
        while node.op != "root":
            self.nodes.append(node)
            node = node.next
        self._number = {node: place for place, node in enumerate(self.nodes)}
        self.calls = {path: (calls[path], tracer.calls[path] - calls[path]) for path in tracer.calls if tracer.calls[path] != calls[path]}
        self.called = tracer.called - called | set(self.calls)
        self.inner = {path: found for path, found in tracer.inner.items() if path not in inner}
        self.training_only = tracer.training_only - training_only
        try:
            if words:
                raise Unlike(words[0])
            if tracer.fake_mode.shape_env.unbacked_symint_counter != symbols:
                raise Unlike("it makes sizes that depend on values")
            with torch._C.DisableTorchFunction():
                self._unchanged(before, stamps.likeness)
                self._constants(list(tracer.constants)[constants:])
                self._results(result, before)
                self._sources()
                self._escapes()
            self.reason = None
        except Unlike as reason:
            self.reason = str(reason)
        self._known = given.leaves = given.caches = None  # nothing that is recorded keeps tensors alive
        return result

    def _state(self):
        """What a call could change besides its outputs."""
        given, tracer = self.given, self.tracer
        layers = {}
        for number, place, part in _parts(given):
            layers[number, place] = [(layer, dict(vars(layer))) for layer in list.__getitem__(part.layers, slice(None))]
        slots = {place: _proxy(tracer, value) for place, value in enumerate(given.leaves) if isinstance(value, torch.Tensor)}
        return {"layers": layers, "slots": slots, "random": (random.getstate(), numpy.random.get_state()[1:3]), "around": _around(given.module)}

    def _unchanged(self, before, likeness):
        given, tracer, after = self.given, self.tracer, self._state()
        if any(node is not None and after["slots"][place] is not node for place, node in before["slots"].items()):
            raise Unlike("it changes an argument in place")
        (state, (numbers, place)), (old, (old_numbers, old_place)) = after["random"], before["random"]
        if state != old or place != old_place or not (numbers == old_numbers).all():
            raise Unlike("it draws random numbers outside of torch")
        if likeness.structure(given.module, tracer) != given.key[0]:
            raise Unlike("it writes into its own attributes")
        for name, held in before["around"].items():
            if not _is_same(held, after["around"].get(name)):
                raise Unlike(f"it writes into {name[0]}")
        flat, spec = pytree.tree_flatten(pytree.tree_unflatten(given.leaves, given.spec), is_leaf=lambda value: isinstance(value, Cache))
        if spec != given.spec or any(a is not b for a, b in zip(flat, given.leaves)):
            raise Unlike("it changes a container that it was given")
        for key, held in before["layers"].items():
            for index, (layer, values) in enumerate(after["layers"][key]):
                if index == given.slot:
                    continue
                if index >= len(held) or held[index][0] is not layer or held[index][1].keys() != values.keys():
                    raise Unlike("it changes other slots of the cache than its own")
                if any(values[name] is not value for name, value in held[index][1].items()):
                    raise Unlike("it changes other slots of the cache than its own")

    def _constants(self, paths):
        self.constants = set(paths)
        # beside the tracer's and the count's own: someone holds it, and the next call may find another there
        if any(sys.getrefcount(self.tracer.constants[path]) > 2 for path in paths):
            raise Unlike("it uses a tensor that no module of the model holds")

    def _results(self, result, before):
        given = self.given
        self._known = {id(value): ("given", place) for place, value in enumerate(given.leaves) if isinstance(value, (torch.Tensor, Cache))}
        for key, held in before["layers"].items():
            if given.slot is not None and given.slot < len(held):
                for name, value in held[given.slot][1].items():
                    if isinstance(value, torch.Tensor):
                        self._known.setdefault(id(value), ("slot", *key, name))
        flat, self.spec = pytree.tree_flatten(result, is_leaf=lambda value: isinstance(value, Cache))
        self.outputs = [self._told(value) for value in flat]
        self.slots, self.flags = {}, {}
        for number, place, part in _parts(given):
            layer = slot_of(part, given.slot)
            if layer is not None:
                self.slots[number, place] = kind_of(layer), {name: self._told(value) for name, value in vars(layer).items()}
        for number, value in enumerate(given.leaves):
            if isinstance(value, EncoderDecoderCache):
                self.flags[number] = dict.get(value.is_updated, given.slot)
        kept = {value for _, values in self.slots.values() for value in values.values()}
        self.kept = {told[1] for told in (*self.outputs, *kept) if told[0] == "made"}

    def _told(self, value):
        if id(value) in self._known:
            return self._known[id(value)]
        if isinstance(value, torch.Tensor):
            slot = get_proxy_slot(value, self.tracer, None)
            if slot is None or slot.constant is not None or slot.proxy.node not in self._number or kind_of(value) is torch.nn.Parameter:
                raise Unlike("it returns a tensor that it did not make")
            self._known[id(value)] = ("made", self._number[slot.proxy.node], snapshot_fake(value))
            return self._known[id(value)]
        if kind_of(value) in PLAIN or isinstance(value, type) or (isinstance(value, torch.SymInt) and value.node.expr.is_Symbol):
            return "value", value
        raise Unlike(f"it returns a {kind_of(value).__name__}")

    def _sources(self):
        """Which nodes a stamp needs, and where it finds what they read."""
        tracer, given = self.tracer, self.given
        self.tensors = {tracer.tensors[id(tensor)]: name for name, tensor in _tensors(given.module).items()}
        needed, foreign = set(self.kept), {}
        outside = {node: ("given", place) for place, node in given.nodes.items() if node is not None and not isinstance(place, tuple)}
        for (place, number, name), node in ((place, node) for place, node in given.nodes.items() if isinstance(place, tuple)):
            outside.setdefault(node, ("slot", place, number, name))
        storages = None
        for place in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[place]
            if node.op == "placeholder":
                raise Unlike("it makes an input")
            if place not in needed and not _has_effect(node):
                continue
            needed.add(place)
            for source in node.all_input_nodes:
                if source in self._number:
                    needed.add(self._number[source])
                else:
                    foreign[source] = outside.get(source)
        for source, told in foreign.items():
            if told is None and source.op == "get_attr" and source.target in self.tensors:
                foreign[source] = ("tensor", self.tensors[source.target])
            elif told is None and source.op not in ("get_attr", "placeholder") and isinstance(source.meta.get("val"), torch.Tensor):
                raise Unlike("it reads a tensor that it was not given")
        self.foreign = {node: told for node, told in foreign.items() if told is not None}
        self.needed = [self.nodes[place] for place in sorted(needed)]
        for node in self.needed:
            target = written(node) if node.op == "call_function" and node.target is not torch.ops.aten.detach_.default else None
            if target is not None:
                storages = storages or {_storage(source) for source in (*foreign, *(n for n in self.nodes if n.op == "get_attr"))}
                if target not in self._number or _storage(target) in storages:
                    raise Unlike("it changes a tensor in place that it did not make")

    def _escapes(self):
        """Tensors that live on without being returned: someone keeps them, and the next call might meet them."""
        for attempt in range(3):
            found = [
                (tensor, proxy.proxy.node) for tensor, proxy in list(self.tracer.tensor_tracker.items())
                if proxy.proxy.node in self._number and proxy.proxy.node.op != "get_attr" and id(tensor) not in self._known
            ]  # fmt: skip
            # a view keeps what it is a view of
            bases = {id(tensor._base) for tensor in list(self.tracer.tensor_tracker) if id(tensor) in self._known and tensor._base is not None}
            found = [node for tensor, node in found if id(tensor) not in bases]
            if not found:
                return
            if attempt < 2:
                gc.collect(attempt)
        raise Unlike(f"something keeps a tensor that it made ({found[0].name})")

    # -- the calls like it

    def misfit(self, given):
        """Why a call that is like the recorded one cannot be stamped all the same; None if it can."""
        if any(given.slot > list.__len__(parts(given.leaves[number])[place].layers) for number, place in self.slots):
            return "its slot of the cache is not the next one"
        return None

    def stamp(self, given):
        """Write the nodes of the recorded call for another one, and return what it would."""
        tracer, first = self.tracer, self.given
        modules = {tracer.paths[old]: tracer.paths[new] for old, new in zip(first.module.modules(), given.module.modules())}
        tensors = _tensors(given.module)
        methods = {path: path.rpartition(".") for path in (*self.called, *self.training_only) if path in tracer.opaque and path not in modules}
        modules |= {path: f"{modules[owner]}.{name}" for path, (owner, _, name) in methods.items() if owner in modules}
        base = {path: tracer.calls[modules.get(path, path)] for path in self.calls}
        renamed = {old: tracer.tensors[id(tensors[name])] for old, name in self.tensors.items()}
        reads, made, fakes = {}, {}, {}

        def read(recorded):
            if id(recorded) not in reads:
                reads[id(recorded)] = {dtype: renamed.get(path, path) for dtype, path in recorded.items()}
            return reads[id(recorded)]

        def value_of(told):
            kind, *where = told
            if kind == "given":
                return given.leaves[where[0]]
            if kind == "slot":
                return before[where[0], where[1]][where[2]]
            if kind == "value":
                return where[0]
            if where[0] not in fakes:
                fakes[where[0]] = fake = snapshot_fake(where[1])
                set_proxy_slot(fake, tracer, _ProxyTensor(fx.Proxy(made[self.nodes[where[0]]], tracer), None))
            return fakes[where[0]]

        def source(node):
            if node in made:
                return made[node]
            told = self.foreign.get(node)
            if told is None:
                return node
            kind, *where = told
            if kind == "tensor":
                made[node] = tensor_node(tensors[where[0]], node)
            else:
                made[node] = given.nodes[where[0] if kind == "given" else tuple(where)]
            return made[node]

        def tensor_node(tensor, like):
            slot = get_proxy_slot(tensor, tracer, None)
            if slot is None:
                slot = tracer.proxy_of(tensor)
                slot.proxy.node.meta.update(source=like.meta.get("source"), read=read(like.meta.get("read", {})))
            return slot.proxy.node

        before = {(number, place): dict(vars(layer)) for number, place, part in _parts(given) if (layer := slot_of(part, given.slot)) is not None}
        for node in self.needed:
            path = node.meta.get("path", "")
            if node.op == "get_attr" and node.target not in self.constants:
                if node.target in self.tensors:
                    made[node] = tensor_node(tensors[self.tensors[node.target]], node)
                continue  # else one of another module, written down already
            args, kwargs = fx.map_arg(node.args, source), fx.map_arg(node.kwargs, source) if node.kwargs else {}
            made[node] = copy = add_node(tracer.graph, node.op, node.target, args, kwargs, node.name)
            copy.meta.update(node.meta)
            copy.meta.update(path=modules.get(path, path), read=read(node.meta.get("read", {})))
            call = node.meta.get("call", 0) - self.calls.get(path, (0, 0))[0] + base.get(path, 0)
            copy.meta.pop("call", None)
            if call:
                copy.meta["call"] = call
            if node.op == "call_module":
                copy.target = modules[node.target]
            if node.op == "get_attr":
                tracer.name_constant(copy, tracer.constants[node.target])
        for path, (_, count) in self.calls.items():
            tracer.calls[modules.get(path, path)] += count
        tracer.called |= {modules.get(path, path) for path in self.called}
        tracer.inner.update((modules.get(path, path), found) for path, found in self.inner.items())
        tracer.training_only |= {modules.get(path, path) for path in self.training_only}
        tracer.read = read(self.read)
        result = [value_of(told) for told in self.outputs]
        for (number, place), (kind, values) in self.slots.items():
            part = parts(given.leaves[number])[place]
            layer = slot_of(part, given.slot)
            if layer is None:
                layer = kind.__new__(kind)
                part.layers.append(layer)
            vars(layer).update({name: value_of(told) for name, told in values.items()})
        for number, flag in self.flags.items():
            if flag is not None:
                dict.__setitem__(given.leaves[number].is_updated, given.slot, flag)
        return pytree.tree_unflatten(result, self.spec)


def _parts(given):
    """(number of the leaf, number of the part, DynamicCache) of the caches of a call."""
    return [(number, place, part) for number, value in enumerate(given.leaves) if isinstance(value, Cache) for place, part in enumerate(parts(value))]


def _around(module):
    """What the code of a block could write into besides: globals of its files, attributes of its classes, objects that it holds; two levels deep."""
    found = {}
    for part in module.modules():
        for kind in kind_of(part).__mro__:
            if not kind.__module__.startswith(("torch.", "builtins")):
                found[kind.__qualname__, kind] = vars(kind)
                found[f"a global of {kind.__module__}", kind.__module__] = vars(sys.modules.get(kind.__module__, types))
        for name, value in vars(part).items():
            if hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, torch.nn.Module, Cache, kind_of)):
                found[f"its {name}", id(value)] = vars(value)
    return {name: {key: (value, _copied(value)) for key, value in held.items()} for name, held in found.items()}


def _copied(value):
    return value.copy() if kind_of(value) in (list, dict, set) else None


def _is_same(before, after):
    if after is None or before.keys() != after.keys():
        return False
    for key, (value, held) in before.items():
        other, now = after[key]
        if value is not other or held is not None and (len(held) != len(now) or any(a is not b for a, b in zip(held, now))):
            return False
        if kind_of(held) is dict and any(held[name] is not now[name] for name in held):
            return False
    return True


def _proxy(tracer, tensor):
    slot = get_proxy_slot(tensor, tracer, None)
    return None if slot is None else slot.proxy.node


def _tensors(module):
    """{path inside the module: tensor}, tied ones under each of their paths."""
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _storage(node):
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else id(node)


def _has_effect(node):
    if node.op != "call_function" or node.target in ASSERTS:
        return node.op == "call_module"
    return has_effect(node) or (node.target not in HOST and not isinstance(node.target, torch._ops.OpOverload))
