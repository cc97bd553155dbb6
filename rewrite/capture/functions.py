"""A `torch.autograd.Function` of a model's code is traced through where autograd finds its gradient by itself; elsewhere its module stays one call.

    forward: round(x)        its backward: dy        autograd through round: 0        -->  what applies it is opaque

A trace holds what the forward does, and autograd goes back through that: a backward of its own would be lost, and the model would train
otherwise without a word. So each use is run both ways on numbers, in float64, and the gradients are compared. torch's own are taken as they
are; a checkpoint is the function that it runs.
"""

import contextlib
import threading

import torch
from torch.autograd.function import Function, FunctionCtx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from .fakes import own_randomness
from .opaque import CONSTANTS, SIZES, alone, sized, symbols_of
from .questions import source_line

_FEWEST = 3  # of each size that is no number: what comes of one row alone may agree by accident
_MOST = 2**24  # elements of its inputs
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6  # of the gradient, of its largest entry: a forward may compute in float32, constants have few digits


class OwnGradient(Exception):
    """A function has another gradient than autograd finds, or it could not be asked."""


@contextlib.contextmanager
def own_gradients(tracer):
    """Functions applied inside, by this thread, raise OwnGradient where their gradient is one of their own."""
    apply, thread, asked = vars(Function)["apply"], threading.get_ident(), set()

    @classmethod
    def asking(cls, *args, **kwargs):
        if threading.get_ident() == thread:
            if cls is CheckpointFunction:
                return args[0](*args[2:])  # (the function, whether it keeps the random state, its arguments)
            if not cls.__module__.startswith("torch."):
                _require_plain(tracer, asked, cls, args, kwargs)
                return _plain(cls, args, kwargs)  # by `apply` it would run below no_grad, which a region of its own then leaves behind
        return apply.__get__(None, cls)(*args, **kwargs)

    Function.apply = asking
    try:
        yield
    finally:
        Function.apply = apply


def _require_plain(tracer, asked, function, args, kwargs):
    given, spec = pytree.tree_flatten((args, kwargs))
    words = f"{source_line()}: {function.__name__} has a backward of its own"
    if torch._C._are_functorch_transforms_active():
        raise OwnGradient(f"{words}; below a transform it cannot be compared with that of its forward")
    other = [value for value in given if not isinstance(value, (torch.Tensor, *CONSTANTS, *SIZES))]
    if other:
        raise OwnGradient(f"{words}, and takes a {type(other[0]).__name__}, so it cannot be compared with that of its forward")
    symbols = {symbol for value in given for symbol in symbols_of(value)}
    inputs = sized(given, {symbol: max(tracer.hints.get(symbol, 0), _FEWEST) for symbol in symbols})
    use = function, spec, tuple(inputs)
    if use in asked:
        return
    if sum(torch.Size(value[0]).numel() for value in inputs if isinstance(value, tuple)) > _MOST:
        raise OwnGradient(f"{words}, of inputs too large to compare it with that of its forward")
    try:
        same = alone(lambda: all(map(_is_close, _gradients(_applied, function, inputs, spec), _gradients(_plain, function, inputs, spec))))
    except Exception as failure:  # a model's own code may raise anything
        raise OwnGradient(f"{words}, which could not be run ({type(failure).__name__}: {failure}) to compare it with that of its forward") from failure
    if not same:
        raise OwnGradient(f"{words}, which differs from that of its forward")
    asked.add(use)


def _applied(function, args, kwargs):
    return function.apply(*args, **kwargs)


def _plain(function, args, kwargs):
    """The forward alone, as a trace has it."""
    if function.setup_context is not Function.setup_context:
        return function.forward(*args, **kwargs)
    context = FunctionCtx()
    context.needs_input_grad = (False,) * len(args)  # as fakes have it
    return function.forward(context, *args, **kwargs)


def _gradients(run, function, inputs, spec):
    """Gradients of the float inputs, from random ones of the outputs; everything drawn from one seed."""
    with own_randomness(0):
        made = [_made(*value) if isinstance(value, tuple) else value for value in inputs]
        asked = [value for value in made if isinstance(value, torch.Tensor) and value.requires_grad]
        # a function may write into its inputs, which no leaf allows
        args, kwargs = pytree.tree_unflatten([value.clone() if isinstance(value, torch.Tensor) else value for value in made], spec)
        outputs = [value for value in pytree.tree_leaves(run(function, args, kwargs)) if isinstance(value, torch.Tensor) and value.is_floating_point()]
        torch.manual_seed(1)
        pairs = [(value, torch.randn_like(value)) for value in outputs]
        pairs = [pair for pair in pairs if pair[0].requires_grad]
        if not pairs:
            return [torch.zeros_like(value) for value in asked]
        outputs, towards = zip(*pairs)
        found = torch.autograd.grad(outputs, asked, towards, allow_unused=True)
        return [torch.zeros_like(value) if gradient is None else gradient for value, gradient in zip(asked, found)]


def _made(shape, dtype, device):
    """Numbers of several magnitudes and signs, some of them zero; for whole numbers zeros and ones, which may be indices."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(0, 2, shape).to(dtype)
    values = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    scale = torch.pow(10.0, torch.randint(-5, 3, shape)).double() * (torch.rand(shape) > 0.1)
    return (values * scale).requires_grad_()


def _is_close(own, plain):
    largest = plain.abs().nan_to_num(0, 0, 0).max() if plain.numel() else 0
    return torch.allclose(own, plain, rtol=_RELATIVE, atol=float(_ABSOLUTE * largest), equal_nan=True)
