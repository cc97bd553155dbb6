"""What can be learnt of a model by calling it: the shape of what it returns, its own defaults, how it comes to its loss.

Nothing here reads names of architectures. The model is called as a twin (shallow clones, configs copied, eval mode), on the meta
device where it can, so that a large model costs a fraction of a second and the model given stays as it is.
"""

import copy
import functools
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph import clone_tree

# what a model may say to arguments that it does not take
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError, NotImplementedError, StopIteration)


@dataclass(frozen=True)
class Loss:
    """How the loss follows from what the model returns: `loss_function(*args, **kwargs)`, as the model itself calls it.

    Each argument is ("output", name), ("label", name), ("config",) or ("value", constant).
    """

    args: tuple[tuple, ...]
    kwargs: tuple[tuple[str, tuple], ...]


class Untouched:
    """An argument that must not be looked at: a model that ignores it runs, one that reads it fails."""


class Arrived(BaseException):
    """Ends a call at the first block; not an Exception, so that no model code takes it for one of its own."""


def twin(model):
    """A shallow clone in eval mode with configs of its own: what a call writes into a config or a buffer stays there."""
    clone = clone_tree(model)
    configs = {}
    for module in clone.modules():
        config = module.__dict__.get("config")
        if config is not None and not hasattr(config, "to_dict"):  # those that have it are the clone's own
            module.__dict__["config"] = copy.deepcopy(config, configs)
    for module in clone.modules():
        module.__dict__["training"] = False
    return clone


def call(model, kwargs, loss_function=None, owner="", seen=None, attempts=None):
    """What a call returns, as tensors without values → (output, the arguments that it was given, the config at hand).

    Runs on the meta device; where the model asks a value, on fake tensors; where that fails too, for real. `loss_function`, if
    given, stands in for the model's own. `seen`, a list, gets (path, first tensor in, first tensor out) of every module that ran. attempts: these ways alone.
    Raises what the real call raises.
    """
    failures = []
    for attempt in attempts or (_on_meta, _on_fakes, _for_real):
        clone = twin(model)
        if loss_function is not None:
            clone.__dict__["_loss_function"] = loss_function
        if attempt is not _for_real and hasattr(clone, "set_experts_implementation"):
            clone.set_experts_implementation("batched_mm")  # the grouped product has no meta kernel for every dtype
        if seen is not None:
            del seen[:]
            for path, module in clone.named_modules():
                module.register_forward_hook(functools.partial(_see, seen, path), with_kwargs=True)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                return *attempt(clone.get_submodule(owner), clone, kwargs), clone.__dict__.get("config")
        except FAILURES as failure:
            failures.append(failure)
    raise failures[-1]


def _see(seen, path, module, args, kwargs, output):
    first = lambda *values: next((tensor for value in values for _, tensor in _tensors("", value)), None)
    seen.append((path, first(*args, *kwargs.values()), first(output)))


def hidden_of(output, seen):
    """Where the hidden states that a call returns come from: field → for each of them (takes, gives, made).

    takes: paths that take it in. gives: paths that give it out. made: (path, paths) where a module makes it of what others gave out.
    `seen` is what `call` noted.
    """
    givers = {}
    for path, taken, given in seen:
        givers.setdefault(_whole(given), []).append((path, taken))
    found = {}
    for field, states in output.items():
        if field.endswith("hidden_states") and isinstance(states, tuple):
            found[field] = tuple(
                (
                    tuple(path for path, taken, _ in seen if taken is state),
                    tuple(path for path, _ in givers.get(_whole(state), ())),
                    tuple((path, tuple(before for before, _ in givers.get(_whole(taken), ()))) for path, taken in givers.get(_whole(state), ())),
                )
                for state in states
            )
    return found


def _whole(tensor):
    """The identity of a tensor, or of the one that it is a view of, whole and in the same shape."""
    base = None if tensor is None else tensor._base
    return id(base if base is not None and base.shape == tensor.shape and base.stride() == tensor.stride() else tensor)


def _map(function, value):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict) and type(value) is dict:
        return {key: _map(function, item) for key, item in value.items()}
    if hasattr(value, "to_tuple"):
        return type(value)(**{key: _map(function, item) for key, item in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_map(function, item) for item in value)
    return value


class _Once(TorchDispatchMode):
    """On the meta device the shape of what an op gives follows from the shapes that it takes: each question is asked once, however many blocks ask it."""

    def __init__(self):
        super().__init__()
        self.known, self.fresh = {}, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op not in self.fresh:
            returned = op._schema.returns
            self.fresh[op] = bool(returned) and all(str(value.type) == "Tensor" for value in returned) and not any(a.alias_info for a in (*op._schema.arguments, *returned))
        key = _question((args, tuple(kwargs.items()))) if self.fresh[op] else None
        if key is None:
            return op(*args, **kwargs)
        made = self.known.get((op, key))
        if made is None:
            result = op(*args, **kwargs)
            tensors = result if isinstance(result, tuple) else (result,)
            if all(type(tensor) is torch.Tensor and tensor.is_meta for tensor in tensors):
                self.known[op, key] = type(result), [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
            return result
        kind, shapes = made
        tensors = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in shapes]
        return tuple(tensors) if kind is tuple else tensors[0]


def _question(value):
    """What an op on the meta device is given, as something to look it up by; None where that is more than shapes and constants."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta and type(value) in (torch.Tensor, nn.Parameter) else None
    if isinstance(value, (tuple, list)):
        parts = tuple(map(_question, value))
        return None if None in parts else parts
    return type(value), repr(value)


def _on_meta(module, clone, kwargs):
    if not all(tensor.is_meta for tensor in (*clone.parameters(), *clone.buffers())):
        clone._apply(lambda t: t.to("meta"))
    kwargs = _map(lambda t: t.to("meta"), kwargs)
    with _Once():
        return module(**kwargs), kwargs


def _on_fakes(module, clone, kwargs):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        kwargs = _map(mode.from_tensor, kwargs)
        return module(**kwargs), kwargs


def _for_real(module, clone, kwargs):
    kwargs = _map(torch.Tensor.clone, kwargs)
    return module(**kwargs), kwargs


def loss_of(model, kwargs, labels):
    """Whether a call with these labels gives a loss, and how → (given, Loss or None, ignores).

    given: the output has a loss. Loss: it is the model's own `loss_function` of outputs, labels, the config and constants, and
    nothing else; None where it is computed inside the forward. ignores: a `num_items_in_batch` is never looked at.
    """
    record = []

    def stand_in(*args, **rest):
        value = torch.zeros(())
        record.append((args, rest, value))
        return value

    def attempt(extra):
        del record[:]
        return call(model, {**kwargs, **labels, **extra}, stand_in)

    marker = Untouched()
    try:
        (out, given, config), ignores = attempt({"num_items_in_batch": marker}), True
    except FAILURES:
        try:
            (out, given, config), ignores = attempt({}), False
        except FAILURES:
            return False, None, False
    if getattr(out, "loss", None) is None:
        return False, None, ignores
    if len(record) != 1 or out.loss is not record[0][2] or out.loss._version:  # something may have been added in place
        return True, None, ignores and not record
    args, rest, _ = record[0]
    passed = rest.pop("num_items_in_batch", None) is marker
    refer = functools.partial(_refer, out=out, labels={name: given[name] for name in labels}, config=config)
    found = Loss(tuple(map(refer, args)), tuple((name, refer(value)) for name, value in rest.items()))
    if not passed or None in found.args or None in dict(found.kwargs).values():
        return True, None, False
    return True, found, False


def _refer(value, out, labels, config):
    """What a recorded argument stands for; None where that cannot be told."""
    if value is config:
        return ("config",)
    for kind, place in (("output", out), ("label", labels)):
        for name, item in place.items():
            if item is value and isinstance(value, torch.Tensor):
                return (kind, name)
    if value is None or isinstance(value, (bool, int, float, str)):
        return ("value", value)
    return None


def arrival(model, kwargs):
    """Everything that reaches the first repeated block in a call of the model, or what it returns if it has none.

    Real tensors, flat: ((name, tensor), …). Only what stands before the first block is computed.
    """
    clone = twin(model)
    reached = []

    def stop(module, args, kwargs):
        reached.append({**{str(i): a for i, a in enumerate(args)}, **kwargs})
        raise Arrived

    for module in list(clone.modules()):
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0:
            module[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            reached.append({"output": clone(**_map(torch.Tensor.clone, kwargs))})
    except Arrived:
        pass
    return [entry for name, value in reached[0].items() for entry in _tensors(name, value)]


def _tensors(name, value):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}.{index}", item)


def is_default(model, kwargs, name, value, aside=()):
    """Whether leaving `name` out is the same, bit for bit, as giving this value (up to the first block, sizes 1 broadcast).

    False as well where the call fails with it. `aside`: names whose own arrival does not count. On the meta device nothing can be
    compared; there the answer is yes if the call accepts the value.
    """
    if value.device.type == "meta":
        return True
    try:
        without, given = arrival(model, {k: v for k, v in kwargs.items() if k != name}), arrival(model, {**kwargs, name: value})
    except FAILURES:
        return False
    if not _alike(without, given, aside):
        return False
    try:
        if not _alike(given, arrival(model, {**kwargs, name: _other(value)}), aside=()):
            return True
    except FAILURES:  # it looks at the value, and takes no other
        return True
    try:  # what reached the first block (of an image's encoder) had nothing to do with it
        pair = {k: v for k, v in kwargs.items() if k != name}, {**kwargs, name: value}
        without, given = (list(_tensors("", call(model, values, attempts=(_for_real,))[0])) for values in pair)
    except FAILURES:
        return False
    return _alike(without, given, aside)


def _other(value):
    """Another value of its kind: a mask with one place more or less, positions one further."""
    other = value.clone()
    other[..., -1] = 1 - other[..., -1] if other.max() <= 1 else other[..., -1] + 1
    return other


def _alike(first, second, aside):
    first, second = ({place: tensor for place, tensor in entries if place not in aside} for entries in (first, second))
    return first.keys() == second.keys() and all(_same(first[place], second[place]) for place in first)


def _same(a, b):
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        return False
    return torch.equal(a, b)
