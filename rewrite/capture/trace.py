"""One run of a model on fake tensors, written down as a flat graph of ATen ops.

    model(**fakes)  -->  placeholder · get_attr · call_function · call_module · output

The loop is torch's own pre-dispatch proxy tracing, as `torch.export` uses it, without its passes over the program: symbols are named
before tracing (one per named dimension, sums included), modules that stay one call are left out while the rest is traced, and every
condition on a size that was asked is kept with the place that asked.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._export.non_strict_utils import _NonStrictTorchFunctionHandler, _override_builtin_ops
from torch._export.utils import _compiling_state_context
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental import _config as shapes_config
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import (
    PreDispatchTorchFunctionMode,
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    _ProxyTensor,
    decompose,
    disable_autocast_cache,
    disable_proxy_modes_tracing,
    fake_signature,
    get_proxy_slot,
    maybe_disable_thunkify,
    set_proxy_slot,
    wrap_key,
)
from torch.overrides import TorchFunctionMode

from ..calls.leaves import leaves, rebuild
from ..graph import attribute, drops
from .fakes import export_patches, fake_inputs, fake_tree, own_randomness
from .functions import own_gradients
from .opaque import stand_in
from .questions import Guard, Shapes, source_line
from .stamp import Stamps

aten = torch.ops.aten
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten.contiguous.default}
_DTYPE = torch.Tensor.dtype.__get__
_PRE_DISPATCH = torch._C.DispatchKeySet(torch._C.DispatchKey.PreDispatch)


@dataclass
class Trace:
    """What one run gave.

    `constants`: path → tensor made while tracing. `tree`: how the outputs are put together. `symbols`: name → sympy symbol. `hints`:
    symbol → its size in the example. `replacements`: what tracing put in a symbol's place. `called`: paths of the modules that ran.
    `inner`: path of a leaf inside a module that stays one call → (shape, dtype, shape at larger sizes) of what it was given, its part.
    `filled`: sizes that depend on values and were taken not to be zero → the line that asked. `stamped`: calls that were written down
    from one like them; `notes`: why others of them were not. `training_only`: calls that hand their input on in eval mode.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tree: object
    constants: dict[str, torch.Tensor]
    guards: list[Guard]
    symbols: dict[str, sympy.Symbol]
    hints: dict[sympy.Symbol, int]
    replacements: dict[sympy.Symbol, sympy.Expr]
    called: set[str]
    filled: dict[sympy.Symbol, str]
    inner: dict[str, tuple]
    stamped: int
    notes: list[str]
    training_only: frozenset[str]


class CannotTrace(Exception):
    """Tracing failed: `stack` are the modules at work, `method` is the innermost method of the last one that was, if any; the cause is chained."""

    def __init__(self, stack, cause, method=None):
        self.stack, self.method = tuple(stack), method
        self.reason = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"
        super().__init__(f"{self.stack[-1] if self.stack else 'the model'}: {self.reason}")


class Casts(ProxyTorchDispatchMode):
    """A cast that changes nothing returns its own input, and a later use of the input would read the cast: give it a tensor of its own.

    In another dtype the cast is real, and the two values differ.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in _CASTS or not isinstance(args[0], torch.Tensor):
            return super().__torch_dispatch__(func, types, args, kwargs)
        value = args[0]
        before = get_proxy_slot(value, self.tracer, None)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is not value or before is None:
            return result
        after = get_proxy_slot(value, self.tracer)
        with disable_proxy_modes_tracing(), torch._C._ExcludeDispatchKeyGuard(_PRE_DISPATCH):
            fresh = value.view_as(value)
        set_proxy_slot(value, self.tracer, before)
        set_proxy_slot(fresh, self.tracer, after)
        return fresh


@contextlib.contextmanager
def without_metadata():
    """Tracing notes each value's layout a second time (`tensor_meta`, beside `val`), asking sizes for every memory format: nothing here reads it."""
    extract = proxy_tensor._extract_tensor_metadata
    proxy_tensor._extract_tensor_metadata = lambda value: None
    try:
        yield
    finally:
        proxy_tensor._extract_tensor_metadata = extract


class Reads(TorchFunctionMode):
    """Remembers, by dtype, which tensor of the tree was last asked for it (`x.to(self.weight.dtype)`); any other tensor takes it back."""

    def __init__(self, tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function == _DTYPE:
            self.tracer.read = {**self.tracer.read, result: self.tracer.tensors.get(id(args[0]))}
        return result


class Tracer(PythonKeyTracer):
    """Writes nodes with the module they come from; tensors of the tree become `get_attr` by path, everything else stays a fake."""

    def __init__(self, tree, paths, opaque):
        super().__init__()
        self.paths = {module: path for path, module in tree.named_modules()}
        self.tensors = paths
        self.opaque = opaque
        self.calls, self.stack, self.constants, self.called = Counter(), [], {}, set()
        self.made, self._constant_nodes = Counter(), {}
        self.failed, self.read, self.inner, self.stamps, self.training_only, self.drawn = None, {}, {}, None, set(), []

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        make = self.graph if kind == "get_attr" else super()
        node = make.create_node(kind, target, args, kwargs, name, type_expr)
        path, call = self.stack[-1] if self.stack else ("", 0)
        node.meta.update(path=path, source=source_line(), read=self.read)
        if call:
            node.meta["call"] = call
        return node

    def proxy_of(self, fake):
        """The proxy of a fake tensor of the tree, its `get_attr` written at first use."""
        path = self.tensors[id(fake)]
        node = self.create_node("get_attr", path, (), {})
        node.meta.update(val=fake, path=path.rpartition(".")[0])
        node.meta.pop("call", None)
        proxy = _ProxyTensor(fx.Proxy(node, self), None)
        set_proxy_slot(fake, self, proxy)
        return proxy

    def getattr(self, attr, value, cache):
        if isinstance(value, torch.Tensor) and id(value) in self.tensors and get_proxy_slot(value, self, None) is None:
            self.proxy_of(value)
        return value

    def create_arg(self, value):
        if isinstance(value, torch.Tensor):
            if id(value) in self.tensors:
                return (get_proxy_slot(value, self, None) or self.proxy_of(value)).proxy.node
            return self.constant(value)
        return super().create_arg(value)

    def constant(self, value):
        """A tensor that the model's code made out of nothing, or holds without registering it."""
        if isinstance(value, FakeTensor):
            raise RuntimeError("a tensor of another trace, or one that no module of the model holds, is used here")
        for path, tensor in self.constants.items():
            if tensor is value:
                return self._constant_nodes[path]
        node = self.create_node("get_attr", "constant", (), {})
        self.name_constant(node, value)
        with disable_proxy_modes_tracing():
            node.meta["val"] = self.fake_mode.from_tensor(value, static_shapes=True)
        return node

    def name_constant(self, node, value):
        """Give a constant the next path of the module that its node comes from."""
        owner = node.meta["path"]
        path = f"{owner}.constant_{self.made[owner]}" if owner else f"constant_{self.made[owner]}"
        self.made[owner] += 1
        node.target, self.constants[path], self._constant_nodes[path] = path, value, node

    def meets_drop(self):
        """Whether the question asked last is `torch.rand([]) < probability`, in training; its ops are marked then."""
        chain, node = [], next((n for n in reversed(self.graph.nodes) if n.target is aten.item.default), None)
        for target in (aten.item.default, aten.ne.Scalar, aten.lt.Scalar, aten.rand.default):
            if node is None or node.target is not target:
                return False
            chain.append(node)
            node = node.args[0] if isinstance(node.args[0], fx.Node) else None
        if chain[-1].args[0] != [] or not isinstance(chain[2].args[1], float):
            return False
        again = any(chain[-1] is known[-1] for known, _ in self.drawn)  # asked twice of one draw (a layer is left out, and so is what follows it)
        self.drawn.append((chain, None if again else chain[2].args[1]))
        return True

    def keep_assert(self, asked, held, place):
        """Write down that each call asks whether this holds; False where it is no value of the graph."""
        node = next((n for n in reversed(self.graph.nodes) if isinstance(n.meta.get("val"), torch.SymBool) and n.meta["val"].node._expr == asked), None)
        if node is None:
            return False
        if not held:
            with disable_proxy_modes_tracing():
                value = torch.sym_not(node.meta["val"])
            node = self.create_node("call_function", torch.sym_not, (node,), {})
            node.meta["val"] = value
        words = f"{place}: what is asserted here does not hold"
        self.create_node("call_function", aten._assert_scalar.default, (node, words), {}).meta.update(val=None, asked=True)
        return True

    def write_drops(self, graph):
        """Each draw that was met becomes one node."""
        for chain, probability in self.drawn:
            if probability is not None:
                with graph.inserting_before(chain[0]):
                    made = graph.call_function(drops, (True, probability))
                made.meta = dict(chain[0].meta) | {"val": False}
            for node in chain:
                if not node.users:
                    graph.erase_node(node)

    def stand_in(self, path, args, kwargs):
        """One node for the call of a module or method that is left out; what cannot be handed over sends the failure to its parent."""
        self.called.add(path)
        try:
            return stand_in(self, path, args, kwargs)
        except Exception:  # which modules were at work when it was raised
            if self.failed is None:
                self.failed = [entry[0] for entry in self.stack]
            raise

    def call_module(self, module, forward, args, kwargs):
        path = self.paths.get(module)
        if path is None:
            return forward(*args, **kwargs)
        if path in self.opaque:
            return self.stand_in(path, args, kwargs)
        if self.stamps is None:
            return self.enter(path, forward, args, kwargs)
        return self.stamps.call(module, path, lambda: self.enter(path, forward, args, kwargs), args, kwargs)

    def enter(self, path, forward, args, kwargs):
        """Run a module's own code."""
        call = self.calls[path]
        self.calls[path] += 1
        self.stack.append((path, call))
        self.called.add(path)
        try:
            return forward(*args, **kwargs)
        except Exception:  # which modules were at work when it was raised
            if self.failed is None:
                self.failed = [entry[0] for entry in self.stack]
            raise
        finally:
            self.stack.pop()


def is_method(module, name):
    """Whether a module's class has a method of a name that is its own; a call of its `forward` is one of the module."""
    return not hasattr(torch.nn.Module, name) and hasattr(type(module), name)


def _method(module, error):
    """The innermost method of a module that was at work when an error was raised, or None."""
    found, step = None, error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_name
        if step.tb_frame.f_locals.get("self") is module and is_method(module, name):
            found = name
        step = step.tb_next
    return found


def trace(model, variant, *, training=False, cast=lambda dtype: dtype, seed=0, least=False, opaque=(), stamp=True):
    """Run the call of `variant` on fake tensors and write it down.

    training: the mode of every module. cast: dtype → dtype of all tensors of the model and of the inputs. least: every symbol takes its
    least size as its example. seed: of torch, numpy and random while tracing. opaque: paths of modules and methods that stay one call.
    stamp: calls like earlier ones are not run again, see `stamp`.
    Raises CannotTrace with the modules at work. The model is not touched.
    """
    with torch._functorch.config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        env = Shapes(tracked_fakes=[], trace_asserts=True)
        fake_mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, export=True)
    fake_mode.cache_enabled = False
    tree, paths = fake_tree(model, fake_mode, cast)
    for module in tree.modules():
        module.__dict__["training"] = training
        if module.__dict__.get("gradient_checkpointing"):
            module.__dict__["gradient_checkpointing"] = False
    names, tensors, spec = leaves(variant.kwargs)
    with shapes_config.patch(backed_size_oblivious=not least):
        fakes, sizes = fake_inputs(fake_mode, names, tensors, variant.dims, cast, least)
        tracer = Tracer(tree, paths, opaque)
        env.tracer, env.asked, env.filled = tracer, [], {}
        tracer.model, tracer.cast, tracer.fake_mode = model, cast, fake_mode
        for path in opaque:
            if not isinstance(attribute(tree, path), torch.nn.Module):
                owner, _, name = path.rpartition(".")
                attribute(tree, owner).__dict__[name] = lambda *args, path=path, **kwargs: tracer.stand_in(path, args, kwargs)
        tracer.stamps = Stamps(tracer, tree) if stamp else None
        tracer.sizes = {size.node._expr: size for size in sizes.values()}
        tracer.hints = {symbol: int(size.node.hint) for symbol, size in tracer.sizes.items()}
        owner = attribute(tree, variant.owner)
        found = {}

        def run(*values):
            with maybe_disable_thunkify():
                result = owner(**rebuild(spec, values))
                found["names"], flat, found["tree"] = leaves(result, {id(value): name for value, name in zip(values, names)})
            return tuple(flat)

        decompositions = {aten.sym_numel.default: torch._decomp.decompositions.sym_numel}
        mode = Casts(tracer, "real", pre_dispatch=True)
        holes = tuple(fx._symbolic_trace.PH for _ in fakes)
        with contextlib.ExitStack() as stack:
            for context in (
                own_randomness(seed), torch.enable_grad(), export_patches(model), fake_mode,
                _NonStrictTorchFunctionHandler(), tracing(TracingContext(fake_mode)), _override_builtin_ops(), _compiling_state_context(),
                enable_python_dispatcher(), PreDispatchTorchFunctionMode(tracer), Reads(tracer),
                mode, decompose(decompositions), disable_autocast_cache(), without_metadata(), own_gradients(tracer),
            ):  # fmt: skip
                stack.enter_context(context)
            try:
                graph = tracer.trace(wrap_key(fake_signature(run, len(fakes)), tuple(fakes), tracer, True), concrete_args=holes)
            except Exception as error:  # a model's own code may raise anything: the module at work becomes opaque
                stack = tracer.failed or []
                failure = CannotTrace(stack, error, _method(attribute(tree, stack[-1]), error) if stack else None)
                failure.__cause__ = error
            else:
                failure = None
    if failure is not None and tracer.stamps is not None and tracer.stamps.watching:  # it may be the watching that failed
        return trace(model, variant, training=training, cast=cast, seed=seed, least=least, opaque=opaque, stamp=False)
    if failure is not None:
        raise failure
    tracer.write_drops(graph)
    for node, name in zip([n for n in graph.nodes if n.op == "placeholder"], names):
        node.meta["leaf"] = name
    symbols = {name: size.node._expr for name, size in sizes.items()}
    return Trace(
        graph=graph,
        inputs=names,
        outputs=found["names"],
        tree=found["tree"],
        constants=tracer.constants,
        guards=env.asked,
        symbols=symbols,
        hints=tracer.hints,
        replacements=dict(env.replacements),
        called=tracer.called,
        filled=env.filled,
        inner=tracer.inner,
        stamped=tracer.stamps.stamped if tracer.stamps is not None else 0,
        notes=tracer.stamps.notes if tracer.stamps is not None else [],
        training_only=frozenset(tracer.training_only),
    )
