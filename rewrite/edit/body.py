"""A noun's body, the paper's equation in plain torch, as ATen nodes: traced once per distinct shape, pasted at every site.

    output(self, x, y, down, up)   --trace-->   a small graph with x, y, down, up as placeholders   --paste-->   nodes of the model's graph
"""

import contextlib

import sympy
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import Refused
from ..graph import device_of, dtype_of, expression, select

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


class Body:
    """A traced body: `graph` with one placeholder per value given, in order; `flags` are the arguments that depend on training."""

    def __init__(self, function, values, fake_mode, *, training, marker, place, dispatched=False):
        """Trace `function(*values, training=…)`; `marker` is the dtype that stands for the model's own in the graph (or None).

        dispatched: follow it beneath vmap, to the ops that then run.

        Raises Refused with `place` for what cannot be traced or does not fit (a wrong shape).
        """
        env = fake_mode.shape_env
        known, ranges = (len(env.guards), dict(env.var_to_range)) if env is not None else (0, {})
        before = len(getattr(env, "asked", None) or ())
        replaced = dict(env.replacements) if env is not None else {}
        try:
            with _no_custom_backward(place):
                self.graph = _trace(lambda *v: function(*v, training=False), values, fake_mode, dispatched)
                self.flags = _differences(self.graph, _trace(lambda *v: function(*v, training=True), values, fake_mode, dispatched), place) if training else []
        except Refused:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise Refused(f"{place}: the body does not fit here: {type(error).__name__}: {str(error).splitlines()[0]}") from error
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
        constants = [n.target for n in self.graph.nodes if n.op == "get_attr"]
        if constants:
            raise Refused(f"{place}: the body makes tensor constants ({', '.join(constants)}); give them as new tensors in `params`.")
        self.marker = marker

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
                env[node] = made(target.create_node("call_function", node.target, tuple(args), kwargs), node.meta.get("val"))
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], lambda n: env[n])
        return result, own

