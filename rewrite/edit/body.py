"""A noun's body, the paper's equation in plain torch, as ATen nodes: traced once, or per distinct shape where it asks for one, pasted at every site.

    output(self, x, y, down, up)   --trace-->   a small graph with x, y, down, up as placeholders   --paste-->   nodes of the model's graph
"""

import contextlib
import copy
import types

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import Refused
from ..graph import add_node, device_of, dtype_of, expression, select

aten = torch.ops.aten

#: what a body may ask of a tensor that is the same whatever its sizes
_FREE_OF_SIZES = frozenset({"dtype", "device", "ndim", "dim", "requires_grad", "is_floating_point"})
#: functions of Python that become one op, with the arguments that they are given
_ONE_OP = frozenset({F.dropout, F.relu, F.silu})
_ELEMENTWISE = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor})
#: what `fits` takes for a body that does not fit; the rest is our fault
_UNFIT = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
#: sizes at which a question about one is tried
_SIZES = (2, 3, 4, 5, 7, 8, 16, 17, 64, 101, 4096)


def signature(value):
    """A hashable description of a fake value: shape, dtype, device; sizes as their expressions."""
    if isinstance(value, torch.Tensor):
        return (tuple(expression(size) for size in value.shape), value.dtype, value.device)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    if isinstance(value, (list, tuple)):
        return tuple(signature(v) for v in value)
    return value


@contextlib.contextmanager
def _no_custom_backward(place):
    """A `torch.autograd.Function` would be traced through its forward and lose its backward silently: refuse it."""
    original = torch.autograd.Function.__dict__["apply"]

    def refuse(cls, *args, **kwargs):
        raise Refused(f"{place}: {cls.__name__} is a torch.autograd.Function, whose backward a traced body would lose. Write it as plain torch; straight-through: hard + s - s.detach().")

    torch.autograd.Function.apply = classmethod(refuse)
    try:
        yield
    finally:
        torch.autograd.Function.apply = original


def _trace(function, values, fake_mode, dispatched=False):
    # Pre-dispatch: linear, dropout and the like stay one node, as in the captured graph. Not under no_grad, which would be recorded.
    with fake_mode, torch.enable_grad():
        graph = make_fx(function, pre_dispatch=not dispatched, tracing_mode="real")(*values).graph
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable):
            graph.erase_node(node)
    return graph


def _differences(eval_graph, train_graph, place):
    """(node, position or keyword, train value) for each argument in which the two traces of one body differ."""
    ours, theirs = list(eval_graph.nodes), list(train_graph.nodes)
    if [(n.op, str(n.target)) for n in ours] != [(n.op, str(n.target)) for n in theirs]:
        raise Refused(f"{place}: the body takes other steps in training than in eval. Use `training` only as an argument of an op (dropout, batch_norm).")
    twin = dict(zip(theirs, ours))
    found = []
    for a, b in zip(ours, theirs):
        args, kwargs = fx.node.map_arg(b.args, lambda n: twin[n]), fx.node.map_arg(b.kwargs, lambda n: twin[n])
        found += [(a, i, new) for i, (old, new) in enumerate(zip(a.args, args)) if repr(old) != repr(new)]
        found += [(a, k, kwargs[k]) for k, old in a.kwargs.items() if repr(old) != repr(kwargs[k])]
    return found


def _holds_at_all_sizes(question, ranges):
    """Is what tracing took for granted about one size true of others too? (1 aside: it broadcasts, and its strides mean nothing.)"""
    if len(question.free_symbols) != 1:
        return True
    if isinstance(question, (sympy.Eq, sympy.Ne)) and sympy.S.One in question.args:
        return True
    (symbol,) = question.free_symbols
    limits = ranges.get(symbol)
    sizes = [size for size in _SIZES if limits is None or limits.lower <= size <= limits.upper]
    return all(question.xreplace({symbol: sympy.Integer(size)}) != sympy.false for size in sizes)


class _Calls(TorchFunctionMode):
    """What a body itself calls, in order: (function, arguments, keywords, result); not what torch calls in turn."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made.append((function, args, kwargs or {}, result))
        return result


class _Otherwise(Exception):
    """A body has called something else than before."""


class _Again(TorchFunctionMode):
    """Nothing is computed: each call gets the result that the same call had before, and must be the same call."""

    def __init__(self, made):
        super().__init__()
        self.left = iter(made)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        before, its_args, its_kwargs, result = next(self.left, (None,) * 4)
        if function != before or not _is_same((args, kwargs or {}), (its_args, its_kwargs)):
            raise _Otherwise
        return result


def _is_same(a, b):
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_same(a[k], b[k]) for k in a)
    return isinstance(a, (bool, int, float, str, torch.dtype, torch.device)) and repr(a) == repr(b)


def _is_blind(calls, graph):
    """Has a body never asked for a size, and does each of its calls stand in the graph as the op it is? Then its nodes are the same at all sizes."""
    ops = []
    for function, _, _, result in calls:
        name = getattr(function, "__name__", "")
        if (getattr(function.__self__, "__name__", "") if name == "__get__" else name) in _FREE_OF_SIZES:
            continue
        if (isinstance(function, types.FunctionType) and function not in _ONE_OP) or name == "__getitem__" or not isinstance(result, torch.Tensor):
            return False
        ops.append(function)
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    return len(ops) == len(nodes) and all(isinstance(node.target, torch._ops.OpOverload) for node in nodes)


def _is_contiguous(value):
    """Told by the expressions of the sizes, so that no guard is asked for."""
    sizes, strides, step = signature(value)[0], tuple(map(expression, value.stride())), 1
    for size, stride in zip(reversed(sizes), reversed(strides)):
        if stride != step:
            return False
        step = step * size
    return True


def _result(target, args, kwargs):
    """What an op gives for fake values. A product with a matrix, and arithmetic on values of one shape, without asking the op: symbolic sizes make that slow."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    if not kwargs and len({value.dtype for value in tensors}) == 1 and tensors[0].is_floating_point() and len({value.device for value in tensors}) == 1:
        if target is aten.linear.default and len(args) == 2:
            x, w = args
            if w.dim() == 2 and x.dim() > 1 and type(x.shape[-1]) is int and x.shape[-1] == w.shape[-1]:
                return torch.empty((*x.shape[:-1], w.shape[0]), dtype=x.dtype, device=x.device)
        if target in _ELEMENTWISE and all(isinstance(a, (torch.Tensor, int, float)) for a in args):
            if len({signature(value) for value in tensors}) == 1 and all(map(_is_contiguous, tensors)):
                return tensors[0]
    with enable_python_dispatcher():
        return target(*args, **kwargs)


@contextlib.contextmanager
def _free_sizes(env, place):
    """What is followed inside may not fix a size that varies; Refused with `place` where it does."""
    known, ranges = (len(env.guards), dict(env.var_to_range)) if env is not None else (0, {})
    before = len(getattr(env, "asked", None) or ())
    replaced = dict(env.replacements) if env is not None else {}
    yield
    asked = [guard.expr for guard in env.guards[known:]] if env is not None else ()
    # torch's own questions about strides and broadcasting are none of the body's, unless they have fixed a size
    fixed = env is not None and env.replacements != replaced
    own = [guard.condition for guard in (getattr(env, "asked", None) or ())[before:] if guard.torch_asked]
    idle = {question for question in own if not fixed or not isinstance(question, sympy.Eq)}
    asked = [question for question in asked if question not in idle]
    lost = next((question for question in asked if not _holds_at_all_sizes(question, ranges)), None)
    if lost is not None:
        env.replacements.clear()  # a size must stay free for whoever asks next
        env.replacements.update(replaced)
        env.var_to_range.update(ranges)
        del env.guards[known:]
        env._update_version_counter()
        raise Refused(f"{place}: the body was followed where {lost}, and batch and length vary from call to call. Write it for all sizes.")


class Body:
    """A traced body: `graph` with one placeholder per value given, in order; `flags` are the arguments that depend on training."""

    def __init__(self, function, values, fake_mode, *, training, marker, place, dispatched=False):
        """Trace `function(*values, training=…)`; `marker` is the dtype that stands for the model's own in the graph (or None).

        dispatched: follow it beneath vmap, to the ops that then run.

        Raises Refused with `place` for what cannot be traced or does not fit (a wrong shape).
        """
        calls = _Calls()

        def followed(*given):
            calls.made.clear()
            calls.given = given
            with calls:
                return function(*given, training=False)

        with _free_sizes(fake_mode.shape_env, place):
            try:
                with _no_custom_backward(place):
                    self.graph = _trace(followed, values, fake_mode, dispatched)
                    is_flagged = training and not self._is_same_in_training(function, calls)
                    self.flags = _differences(self.graph, _trace(lambda *v: function(*v, training=True), values, fake_mode, dispatched), place) if is_flagged else []
            except Refused:
                raise
            except _UNFIT as error:
                raise Refused(f"{place}: the body does not fit here: {type(error).__name__}: {str(error).splitlines()[0]}") from error
        constants = [n.target for n in self.graph.nodes if n.op == "get_attr"]
        if constants:
            raise Refused(f"{place}: the body makes tensor constants ({', '.join(constants)}); give them as new tensors in `params`.")
        self.marker = marker
        self.values = {node: node.meta.get("val") for node in self.graph.nodes}
        is_told = all(isinstance(value, torch.Tensor) for value in values) and all(value in (True, False) for _, _, value in self.flags)
        self.is_general = is_told and not dispatched and _is_blind(calls.made, self.graph)

    @staticmethod
    def _is_same_in_training(function, calls):
        """Does the body call the same with `training`? Its calls are compared one by one, and nothing is traced again."""
        again = _Again(calls.made)
        try:
            with again:
                function(*calls.given, training=True)
        except _Otherwise:
            return False
        return next(again.left, None) is None

    def at(self, values, fake_mode, place):
        """A general body (`is_general`) for other sizes: the same nodes with values of their own; None where an op does not take these."""
        body, given = copy.copy(self), iter(values)
        body.values = {}
        try:
            with _free_sizes(fake_mode.shape_env, place), fake_mode, torch.no_grad():
                for node in self.graph.nodes:
                    if node.op == "placeholder":
                        body.values[node] = next(given)
                    elif node.op == "call_function":
                        args, kwargs = fx.node.map_arg((node.args, node.kwargs), body.values.get)
                        body.values[node] = _result(node.target, args, kwargs)
        except _UNFIT:
            return None
        return body

    @property
    def output(self):
        """What the body returns: a node, or a tuple of them."""
        return next(iter(reversed(self.graph.nodes))).args[0]

    def paste(self, target, inputs, flag, meta):
        """Copy the nodes at the graph's insertion point; `inputs` stand for the placeholders, `flag()` gives the training node.

        Returns (the node or tuple that carries the result, the set of new nodes). Every new node gets a copy of `meta` beside its own value.
        """
        env, source, own = {}, iter(inputs), set()
        # a constant that the body asked for its shape alone must not be read for its dtype: a weight that codes replace leaves memory
        unread = {given for given, node in zip(inputs, self.graph.nodes) if given.op == "get_attr" and not node.users}
        tensors = sorted((n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)), key=lambda n: n in unread)
        own_dtype = next((n for n in tensors if n.meta["val"].dtype is self.marker), None)

        def made(node, value):
            node.meta = {**meta, "val": value}
            own.add(node)
            return node

        def live(value):
            # dtype and device of the value at hand, as capture does it; the dtype of one that has the model's own, not of ids or an upcast
            if value is self.marker and own_dtype is not None:
                return made(target.call_function(dtype_of, (own_dtype,)), None)
            if isinstance(value, torch.device):
                return made(target.call_function(device_of, (tensors[0],)), None)
            return value

        for node in self.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(source)
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg(node.args, lambda n: env[n]), fx.node.map_arg(node.kwargs, lambda n: env[n])
                args, kwargs = list(args), dict(kwargs)
                for at, where, value in self.flags:
                    if at is node:
                        holder = args if isinstance(where, int) else kwargs
                        holder[where] = flag() if value is True and holder[where] is False else made(target.call_function(select, (flag(), value, holder[where])), None)
                args = [live(a) for a in args]
                kwargs = {k: live(a) for k, a in kwargs.items()}
                env[node] = made(add_node(target, "call_function", node.target, tuple(args), kwargs), self.values[node])
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], lambda n: env[n])
        return result, own

