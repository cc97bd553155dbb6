"""A module, or a method of one, that stays one call: what it returns, learnt by running it alone.

    y = mixer(x)        x: (batch, length, 24)
    -->
    %mixer = call_module[backbone.layers.0.mixer](%x)        (batch, length, 24)

It is run at the sizes of the example, and again with each size a little larger: how its outputs grow gives their shapes as sums of
symbols, and a run far off that none of them is frozen. Fake tensors do where the module never asks for a value; else small random ones. One that hands its very input on in eval mode
(stochastic depth, masks drawn by numpy) does something in training alone.
"""

import math
import threading
from itertools import chain

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, track_tensor_tree
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..graph import attribute, clone_tree
from .fakes import fake_tree

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
_JUMPS = (641, 127, 31)  # beyond the steps by which sizes are learnt; frames of audio are 320 samples
_MOST = 2**14  # elements of the inputs in a run with numbers at such a jump: what is made of them may grow with their square
_MADE = 2**26  # elements of any tensor made on the way there
_LARGEST = 2**27  # elements that are made up for a module whose own tensors have no values


def stand_in(tracer, path, args, kwargs):
    """Write a call of the module or method at `path` and return fake outputs. Raises TypeError where it takes or gives more than tensors."""
    given, spec = pytree.tree_flatten((args, kwargs))
    for value in given:
        if not isinstance(value, (torch.Tensor, *CONSTANTS, *SIZES)):
            raise TypeError(f"{path} takes a {type(value).__name__}, which a single call cannot hand over")
    outputs, made = _outputs(tracer, path, given, spec)
    proxies = pytree.tree_unflatten([tracer.unwrap_proxy(value) for value in given], spec)
    proxy = tracer.create_proxy("call_module", path, *proxies)
    proxy.node.meta["path"] = path
    with disable_proxy_modes_tracing(), tracer.fake_mode:
        if outputs is None:  # of the input's own sizes, whatever they are made of
            values = [torch.empty(given[0].shape, dtype=given[0].dtype, device=given[0].device)]
        else:
            values = [_fake(tracer, *entry) if type(entry) is tuple else entry for entry in outputs]
    result = pytree.tree_unflatten(values, made)
    track_tensor_tree(_noted(result), proxy, constant=None, tracer=tracer)
    return result


def _noted(result):
    """A result as fx can note it: plain tuples for those that have names, nothing for what no graph can hold."""
    if type(result) is Unread:
        return None
    return tuple(map(_noted, result)) if isinstance(result, tuple) else result


class Unread:
    """What a single call cannot hand back (a cache of the model's own): it may be carried along and dropped, and no code may look at it."""

    def __init__(self, words):
        object.__setattr__(self, "words", words)

    def _refuse(self, *_):
        raise TypeError(object.__getattribute__(self, "words"))

    __getattr__ = __setattr__ = __bool__ = __eq__ = __len__ = __iter__ = __getitem__ = __contains__ = __call__ = _refuse
    __class__ = property(_refuse)  # isinstance asks it
    __hash__ = object.__hash__


def _fake(tracer, shape, dtype, device):
    return torch.empty([_symint(tracer, size) for size in shape], dtype=dtype, device=device)


def _symint(tracer, size):
    """An int, or a linear expression of the example's symbols as a SymInt."""
    if isinstance(size, int):
        return size
    value = int(size.as_coeff_Add()[0])
    for symbol, factor in size.as_coefficients_dict().items():
        if symbol != 1:
            value = value + int(factor) * tracer.sizes[symbol]
    return value


def _outputs(tracer, path, given, spec):
    """→ ([(shape of ints and linear expressions, dtype, device) or a constant, …], their tree); None for a list where the first input itself is handed on."""
    hints = dict(tracer.hints)
    symbols = sorted({s for value in given for s in symbols_of(value)} & hints.keys(), key=str)
    run = _runner(tracer, path, spec)
    first, tree = run(sized(given, hints))
    inner = dict(run.calls)
    larger = {symbol: hints[symbol] + 3 + 2 * place for place, symbol in enumerate(symbols)}
    if run.hands_on and not (isinstance(part := attribute(tracer.model, path), torch.nn.Module) and any(True for _ in chain(part.parameters(), part.buffers()))):
        run(sized(given, hints | larger))
        if run.hands_on:
            tracer.training_only.add(path)
            return None, tree
    shapes = [list(value.shape) if isinstance(value, torch.Tensor) else None for value in first]
    grown = [[sympy.Integer(size) for size in shape] if shape is not None else None for shape in shapes]
    for symbol in symbols:
        step = 2
        other, _ = run(sized(given, hints | {symbol: hints[symbol] + step}))
        for shape, sums, value in zip(shapes, grown, other):
            if shape is None:
                continue
            for dim, size in enumerate(value.shape):
                factor = sympy.Rational(size - shape[dim], step)
                if not factor.is_Integer:
                    raise TypeError(f"{path} returns a size that does not grow evenly with its inputs")
                sums[dim] += factor * (symbol - hints[symbol])
    check, _ = run(sized(given, hints | larger)) if symbols else (first, tree)
    tracer.inner.update((f"{path}.{name}", (*inner[name][:2], run.calls[name][0], inner[name][2])) for name in inner if name in run.calls)
    for sums, value in zip(grown, check):
        if sums is not None and [int(size.subs(hints | larger)) for size in map(sympy.sympify, sums)] != list(value.shape):
            raise TypeError(f"{path} returns sizes that depend on more than sums of its inputs' sizes")
    for symbol in symbols if "." in path else ():  # what the model itself calls is the last that can be one call: its reader may need no size
        _require_still(path, symbol, hints, grown, _far(run, given, hints, symbol))
    described = []
    for value, sums in zip(first, grown):
        if sums is None and not isinstance(value, CONSTANTS):
            value = Unread(f"{path} returns a {type(value).__name__}, which a single call cannot hand back")
        if sums is not None:
            value = tuple(int(size) if size.is_Integer else sympy.expand(size) for size in sums), value.dtype, value.device
        described.append(value)
    return described, tree


def _far(run, given, hints, symbol):
    """(The symbol's size, what the module returns there) at the largest jump that it goes along with, None where it takes none."""
    far = _runner(run.tracer, run.path, run.spec)
    far.attempts = run.attempts[:1]
    for jump in _JUMPS:
        inputs = sized(given, hints | {symbol: hints[symbol] + jump})
        taken = sum(math.prod(value[0]) for value in inputs if isinstance(value, tuple))
        made = run.largest * (hints[symbol] + jump) // max(hints[symbol], 1)  # windows and paddings may make much of few inputs
        if run.attempts[0] is _numbers and (taken > _MOST or made > _MADE):
            continue
        try:
            return hints[symbol] + jump, far(inputs)[0]
        except Exception:  # longer than the module can take: what it raises then is its own
            continue
    return None


def _require_still(path, symbol, hints, grown, far):
    """Raise where a size is more, far off, than its sum says: one that few steps do not move (`length // 320`) would be frozen.

    Less is what a table that ends gives (`positions[:length]`), for inputs that the model does not take.
    """
    if far is None:
        return
    for sums, value in zip(grown, far[1]):
        for dim, size in enumerate(sums if sums is not None else ()):
            if value.shape[dim] > size.subs(hints | {symbol: far[0]}):
                raise TypeError(f"{path} returns a size that grows with {symbol} by steps; a single call's sizes are sums of its inputs'")


def symbols_of(value):
    if isinstance(value, torch.Tensor):
        return {s for size in value.shape for s in symbols_of(size)}
    return value.node.expr.free_symbols if isinstance(value, SIZES) else set()


def _number(size, hints):
    return size if not isinstance(size, SIZES) else int(sympy.sympify(size.node.expr).subs(hints))


def sized(given, hints):
    """The inputs at sizes of one's own: (shape, dtype, device) for tensors, numbers for sizes."""
    return [
        (tuple(_number(size, hints) for size in value.shape), value.dtype, value.device) if isinstance(value, torch.Tensor) else _number(value, hints)
        for value in given
    ]


class _runner:
    """inputs as `sized` gives them → (flat outputs, tree); on fake tensors, from the first failure on with random ones.

    `calls`: name of a leaf module inside → (shape, dtype) of the one tensor that the last run gave it, and its part (`_Trail`).
    `hands_on`: whether it gave back its first input itself. `largest`: the most elements that a tensor made on the way had.
    """

    def __init__(self, tracer, path, spec):
        self.tracer, self.path, self.spec = tracer, path, spec
        self.attempts, self.calls, self.hands_on, self.largest = [_fakes, _numbers], {}, False, 0

    def __call__(self, inputs):
        while True:
            self.calls = {}
            try:
                outputs, tree, self.hands_on, self.largest = alone(lambda: self.attempts[0](self.tracer, self.path, self.spec, inputs, self.calls))
                return outputs, tree
            except Exception:  # a model's own code may raise anything; with numbers it may go on
                if len(self.attempts) == 1:
                    raise
                del self.attempts[0]


class _Trail(TorchFunctionMode):
    """Which leaf modules stand behind each tensor of a run: who reads what the module was given is `in`, who makes what it returns is `out`.

    Weights that sum up to one, and picks, are those of an attention or of experts: no parts of a mixer are told then.
    """

    def __init__(self):
        super().__init__()
        self.behind, self.kept, self.reads, self.is_mixer, self.largest = {}, [], {}, True, 0

    def of(self, values):
        return frozenset().union(*(self.behind.get(id(value), ()) for value in pytree.tree_leaves(values)))

    def put(self, values, names):
        for value in pytree.tree_leaves(values):
            if isinstance(value, torch.Tensor):
                self.behind[id(value)] = names
                self.kept.append(value)  # no other tensor takes its place, and its id, while the run lasts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, math.prod(result.shape))
        name = getattr(func, "__name__", "")
        self.is_mixer = self.is_mixer and name not in ("softmax", "scaled_dot_product_attention", "topk")
        if names := self.of((args, kwargs)):
            self.put(args[0] if name == "__setitem__" else result, names)
        return result

    def part(self, name, outputs):
        if not self.is_mixer:
            return ""
        return "out" if name in self.of(outputs) else "inner" if self.reads[name] else "in"


def _listen(module, calls, trail):
    """Note what each leaf module with parameters of its own is given, where that is one tensor."""

    def before(name):
        def note(leaf, args, kwargs):
            if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
                calls[name] = tuple(args[0].shape), args[0].dtype
                trail.reads[name] = trail.reads.get(name, frozenset()) | trail.of(args)

        return note

    for name, leaf in module.named_modules():
        if name and not leaf._modules and any(parameter is not None for parameter in leaf._parameters.values()):
            leaf.register_forward_pre_hook(before(name), with_kwargs=True)
            leaf.register_forward_hook(lambda leaf, args, result, name=name: trail.put(result, frozenset((name,))))


def alone(function):
    """Run in a thread of its own: tracing modes belong to a thread."""
    found = {}

    def target():
        try:
            found["value"] = function()
        except Exception as error:  # raised again in the thread that asked
            found["error"] = error

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if "error" in found:
        raise found["error"]
    return found["value"]


def _fakes(tracer, path, spec, inputs, calls):
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module, method = called(tracer.model, path)
        module, _ = fake_tree(module, mode, tracer.cast)
        values = [torch.empty(value[0], dtype=value[1], device=value[2]) if isinstance(value, tuple) else value for value in inputs]
        return _call(module, method, spec, values, calls)


def _numbers(tracer, path, spec, inputs, calls):
    generator = torch.Generator().manual_seed(0)

    def made(shape, dtype, device):
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(device, dtype)
        return torch.ones(shape, dtype=dtype, device=device)

    with torch.no_grad():
        module, method = called(tracer.model, path)
        module = clone_tree(module)
        size = sum(t.numel() for t in (*module.parameters(), *module.buffers()) if t.is_meta)
        if size > _LARGEST:
            raise TypeError(f"{path} asks for values, and its own {size:,} have none on the meta device")
        module._apply(lambda t: made(t.shape, tracer.cast(t.dtype), "cpu") if t.is_meta else t.to(tracer.cast(t.dtype)))
        values = [made(*value) if isinstance(value, tuple) else value for value in inputs]
        return _call(module, method, spec, values, calls)


def called(tree, path):
    """(the module, the name of its method) that a call by path runs."""
    found = attribute(tree, path)
    return (found, "__call__") if isinstance(found, torch.nn.Module) else (attribute(tree, path.rpartition(".")[0]), found.__name__)


def _call(module, method, spec, values, calls):
    trail = _Trail()
    _listen(module, calls, trail)
    for part in module.modules():
        part.__dict__["training"] = False
    args, kwargs = pytree.tree_unflatten(values, spec)
    with trail:
        outputs, tree = pytree.tree_flatten(getattr(module, method)(*args, **kwargs))
    calls.update({name: (*given, trail.part(name, outputs)) for name, given in calls.items()})
    return outputs, tree, len(outputs) == 1 and outputs[0] is values[0], trail.largest
