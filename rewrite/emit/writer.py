"""From the canonical graph to ONNX, node by node, in one loop.

    own table  ->  torchlib's translation of the one op  ->  a decomposition of the one op  ->  an error with node, op and source

The table (translate.py) decides quality, the two others breadth. What depends on constants alone is computed here, sizes are written
from their expressions, and an op that works in place becomes its functional twin and a new name for the tensor that it changed.
"""

import operator
from collections import Counter

import onnx_ir as ir
import sympy
import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..graph import HOST, attribute, count, device_of, dtype_of, expression, least, path_of, select, unless
from . import mutation
from .building import Builder, memory, onnx_dtype
from .shapes import sizes_of
from .sizes import INT64, Unknown

SMALL = 64 * 1024  # bytes of a constant that may be computed here although it is larger than what it is made of
ASSERTIONS = {"_assert_scalar", "_assert_tensor_metadata", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size"}
WITH_DTYPE = {"sum", "cumsum", "prod", "cumprod", "mean", "logsumexp", "softmax", "log_softmax"}  # compute in the dtype that they return
OWN = {}  # "aten::linear" -> translator(writer, node, *args, **kwargs); NotImplemented sends the node on to the next level


class Untranslatable(Exception):
    """A node that none of the three levels can write; the message says why."""


def own(*names):
    """Enter a translator under the names of the ops that it writes (all their overloads)."""

    def enter(function):
        OWN.update({name if "::" in name else f"aten::{name}": function for name in names})
        return function

    return enter


def fake(node):
    return node.meta["val"]


def name_of(target):
    """`aten::add.Tensor` of an overload; a plain function's own name."""
    return target.name() if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def common_dtype(x, y):
    """The dtype in which two fake values or numbers are compared."""
    plain = lambda item: 1 if isinstance(item, torch.SymInt) else 1.0 if isinstance(item, torch.SymFloat) else item
    return torch.result_type(plain(x), plain(y))


class Writer(Builder):
    """One graph on its way to ONNX. `fallen` counts the ops that went to torchlib or were decomposed, for the report."""

    def __init__(self, graph, nodes, words=()):
        super().__init__()
        self.words, self._said = dict(words), {}
        self.graph = graph
        self.paths = {}  # placeholder of a decomposed op that stands for a constant -> the constant's path
        self.values = {}  # fx node -> ir.Value, expression, list of these, or a constant (torch.Tensor, dtype, number)
        self.fallen = {"torchlib": Counter(), "decomposed": Counter(), "torchlib failed": Counter()}
        self._decomposed, self._library, self._tables = {}, None, None
        members = set(nodes)
        for node in nodes:
            if node.op == "get_attr" and isinstance(constant := self.constant(node), torch.Tensor):
                self.uses[memory(constant)] += sum(user in members for user in node.users)

    # the loop

    def run(self, nodes, prefix=""):
        """Write nodes in order; returns what the output node holds, if it is among them."""
        for node in nodes:
            if node.op == "output":
                return self.argument(node.args[0])
            if node.op == "call_function":
                self.scope = prefix + node.name
                self._step(node, prefix)
            if node.op == "call_module":  # of those that can be written each hands its input on
                self.values[node] = self.argument(node.args[0])

    def _step(self, node, prefix):
        try:
            mutation.enter(self, node, self.node(node, node.target))
        except (Untranslatable, Unknown, mutation.Unwritable) as reason:
            if prefix:
                raise
            raise Untranslatable(_place(node, str(reason))) from reason

    def node(self, node, target):
        """Write one call; returns its value(s), typed as the fake values say."""
        value = node.meta.get("val")
        name = name_of(target)
        short = name.removeprefix("aten::").split(".")[0]
        if short in ASSERTIONS or target is count:
            return None
        if target in HOST or isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            known, out = self._host(node, target, value)
            if known:
                return out
        folded = self._fold(node, target)
        if folded is not None:
            return folded
        if hasattr(target, "_schema") and target._schema.is_mutable:
            target = mutation.functional(target)
            name = name_of(target)
        out = self._translate(node, target, name)
        if isinstance(out, (list, tuple)) and isinstance(value, (list, tuple)):
            return [self.annotate(item, like) for item, like in zip(out, value)]
        return self.annotate(out, value)

    def _translate(self, node, target, name):
        if not isinstance(target, torch._ops.OpOverload) and not hasattr(target, "reference"):
            raise Untranslatable(f"{name} has no meaning in a graph of tensors")
        args, kwargs = self.argument(list(node.args)), {key: self.argument(value) for key, value in node.kwargs.items()}
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) and name.split(".")[0] not in OWN and not _is_still(target, args, kwargs):
            raise Untranslatable(f"{name} draws random numbers")
        complex_ = [isinstance(value, torch.Tensor) and value.is_complex() for value in _fakes(node)]
        if not any(complex_) and (translator := OWN.get(name.split(".")[0])):
            out = translator(self, node, *args, **kwargs)
            if out is not NotImplemented:
                return out
        if isinstance(target, torch._ops.OpOverload):
            out = self._torchlib(node, target, name, args, kwargs, any(complex_[: len(node.args)]))
            if out is not NotImplemented:
                return out
        return self._decompose(node, target, name)

    def argument(self, given):
        """What an argument of a node stands for here."""
        if isinstance(given, fx.Node):
            out = self.values[given] if given in self.values else self.constant(given)
            if isinstance(out, torch.Tensor):
                out = torch.view_as_real(out) if out.is_complex() else out
                if given in self.paths or given.op == "get_attr" and given.graph is self.graph.fx:
                    return self.weight(self.paths.get(given, given.target), out)
                own = given.name if given.graph is self.graph.fx else f"{self.scope}.{given.name}"  # the names of a decomposed op's nodes come again
                return self.value(out) if out.numel() <= 64 else self.weight(own, out)
            return out
        if isinstance(given, (list, tuple)):
            return type(given)(map(self.argument, given))
        if isinstance(given, slice):
            return slice(*map(self.argument, (given.start, given.stop, given.step)))
        return given

    def constant(self, node):
        """What a get_attr reads: a tensor of the root, or False for a module's `training`."""
        if node.op != "get_attr":
            raise Untranslatable(f"%{node.name} is used before it is written")
        if node.target.rpartition(".")[2] == "training":
            return False
        owner = node.graph.owning_module if node.graph is not self.graph.fx else None
        self.values[node] = attribute(owner if owner is not None else self.graph.root, node.target)
        return self.values[node]

    def _host(self, node, target, value):
        """(True, result) of what Python computes beside the graph: sizes by expression, flags of the evaluation branch, dtypes."""
        if target is dtype_of:
            return True, fake(node.args[0]).dtype
        if target is device_of:
            return True, torch.device("cpu")
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            size = expression(value) if isinstance(value, torch.SymInt) else value.node.expr
            if isinstance(size, int) or size.is_number or self.sizes.can(size):
                return True, float(size) if not isinstance(size, int) and size.is_number else size
        args = self.argument(list(node.args))
        if target is select:
            return True, args[2]
        if target is unless:
            return True, args[0]
        if target is operator.getitem and isinstance(args[0], (list, tuple)):
            return True, args[0][args[1]]
        if target is least:
            return True, torch.finfo(args[0]).min
        if all(isinstance(item, (int, float, bool)) for item in args) and target in HOST:
            return True, target(*args)
        if target in HOST and target is not operator.getitem:
            if not node.users:
                return True, None
            raise Untranslatable(f"{name_of(target)} of {value} has no ONNX form")
        return False, None

    def _fold(self, node, target):
        """The tensor that a node computes from constants alone, or None: rotary tables are kept, a weight is not stored twice."""
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        if torch.Tag.nondeterministic_seeded in target.tags:
            return None
        read = {}
        for source in node.all_input_nodes:
            read[source] = self.values[source] if source in self.values else self.constant(source) if source.op == "get_attr" else None
            if not isinstance(read[source], (torch.Tensor, torch.dtype, torch.device, int, float, bool)):
                return None
        if not all(isinstance(size, int) for size in sizes_of(fake(node))):
            return None
        tensors = [value for value in read.values() if isinstance(value, torch.Tensor)]
        size = fake(node).numel() * fake(node).element_size()
        if size > SMALL and (any(self.uses[memory(t)] != 1 for t in tensors) or size > sum(t.numel() * t.element_size() for t in tensors)):
            return None
        with torch.no_grad():
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), read.get)
            out = target(*args, **{key: "cpu" if key == "device" and not tensors else value for key, value in kwargs.items()})
        self.uses[memory(out)] = len(node.users)
        return out

    # dtypes: ATen promotes inside an op, ONNX never does

    def promote(self, node, args, target=None):
        """The tensor arguments of a pointwise op (or of a reduction with a dtype) in the dtype that it computes in."""
        target, value = target or node.target, node.meta["val"]
        short = name_of(target).removeprefix("aten::").split(".")[0]
        if not isinstance(value, torch.Tensor):
            return args
        if short in WITH_DTYPE and not value.is_complex():
            return [self.cast(args[0], onnx_dtype(value.dtype)), *args[1:]]
        if torch.Tag.pointwise not in getattr(target, "tags", ()) or short.startswith(("to", "_to")):
            return args
        raw = [item.meta["val"] if isinstance(item, fx.Node) else item for item in node.args]
        dtype, apart = value.dtype, {"where": 0, "masked_fill": 1}.get(short)
        if dtype == torch.bool:
            compared = [item for item in raw if isinstance(item, (torch.Tensor, int, float, torch.SymInt, torch.SymFloat))]
            if len(compared) < 2:
                return args
            dtype = common_dtype(*compared[:2])
        out = list(args)
        for i, item in enumerate(raw):
            if isinstance(item, torch.Tensor) and i != apart and item.dtype != dtype and not item.is_complex():
                out[i] = self.cast(args[i], onnx_dtype(dtype))
        return out

    def annotate(self, out, value):
        """Give a value the dtype and shape that its fake value has; a dtype that the translation got otherwise is cast."""
        if not isinstance(out, ir.Value) or out.is_initializer() or out.producer() is None:
            return out
        if isinstance(value, torch.Tensor):
            dtype = onnx_dtype(value.dtype.to_real() if value.is_complex() else value.dtype)
            if out.dtype is not None and out.dtype != dtype:
                out = self.op("Cast", out, to=dtype, dtype=dtype)
            out.type, out.shape = ir.TensorType(dtype), self.shape(value)
            self.sizes.learn(out, value)
        elif isinstance(value, torch.SymInt):  # a size that only the data tells, from `item()`
            self.sizes.known.setdefault(expression(value), self.op("Reshape", out, [-1], dtype=INT64))
        return out

    def shape(self, value):
        """The shape of a fake value for the file, its sizes by their words: ("batch", "length + past", 10)."""
        return ir.Shape([size if isinstance(size, int) else self._in_words(size) for size in sizes_of(value)] + [2] * value.is_complex())

    def _in_words(self, size):
        if size not in self._said:
            self._said[size] = str(size.xreplace({symbol: sympy.Symbol(self.words.get(str(symbol), str(symbol))) for symbol in size.free_symbols}))
        return self._said[size]

    # levels two and three

    def _torchlib(self, node, target, name, args, kwargs, complex_):
        if self._library is None:
            from .torchlib import Torchlib  # 0.7 s, and most models never need it

            self._library = Torchlib(self)
        function = self._library.find(name, complex_)
        if function is None:
            return NotImplemented
        length = len(self.onnx)
        out = self._library.call(function, self.promote(node, args, target), kwargs)
        if out is NotImplemented:
            self.forget(length)
            self.fallen["torchlib failed"][f"{name}: {self._library.reason}"] += 1
            return out
        self.fallen["torchlib"][name] += 1
        return out

    def _decompose(self, node, target, name):
        """Trace the one op (or the reference that it carries) on its own fake values, and write what it is made of."""
        leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
        values = [self.static(leaf) for leaf in leaves]
        free = [i for i, value in enumerate(values) if isinstance(value, (torch.Tensor, torch.SymInt))]
        key = (name, str(spec), tuple((str(v.dtype), str(tuple(v.shape))) if isinstance(v, torch.Tensor) else str(v) for v in values))
        if key not in self._decomposed:
            self._decomposed[key] = self._trace(target, values, free, spec)
        traced = self._decomposed[key]
        inner = [step for step in traced.graph.nodes if step.op == "call_function"]
        if any(step.target == target for step in inner):
            raise Untranslatable(f"no ONNX translation for {name}")
        self.fallen["decomposed"][f"{name} -> {', '.join(dict.fromkeys(name_of(s.target) for s in inner if 'sym_' not in name_of(s.target)))}"] += 1
        for inner, leaf in zip((n for n in traced.graph.nodes if n.op == "placeholder"), (leaves[i] for i in free)):
            known = self.constant(leaf) if leaf.op == "get_attr" else None
            is_tensor = isinstance(known, torch.Tensor) and not known.is_complex()
            self.values[inner] = known if is_tensor else self.argument(leaf)  # a constant stays one: what is made of constants alone is computed here
            self.paths[inner] = leaf.target
        scope = self.scope
        out = self.run(traced.graph.nodes, prefix=f"{scope}/")
        self.scope = scope
        return out

    def static(self, leaf):
        """The fake value of a node, or what Python knows of it here (a flag, a dtype)."""
        if not isinstance(leaf, fx.Node):
            return leaf
        known = self.values.get(leaf, self.constant(leaf) if leaf.op == "get_attr" else None)
        return known if isinstance(known, (bool, int, float, torch.dtype, torch.device)) else leaf.meta["val"]

    def _trace(self, target, values, free, spec):
        def call(*given):
            full = list(values)
            for i, value in zip(free, given):
                full[i] = value
            args, kwargs = pytree.tree_unflatten(full, spec)
            return function(*args, **kwargs)

        function = getattr(target, "reference", target)
        given = [values[i].detach() if isinstance(values[i], torch.Tensor) else values[i] for i in free]  # tensors of one shape may share a fake, which would be one argument
        mode = next((value.fake_mode for value in given if isinstance(value, FakeTensor)), None) or self.graph.fake_mode
        with mode:
            if function is not target:  # a reference keeps its linears and its attention, for the table to write
                return make_fx(call, pre_dispatch=True)(*given)
            table, every = _decompositions(self)
            if target in every:
                table = {**table, target: every[target]}  # the op itself is opened, also when torchlib knows it and failed
            traced = make_fx(call, decomposition_table=table)(*given)
            if any(mutation.is_mutating(step) for step in traced.graph.nodes):
                traced = make_fx(torch.func.functionalize(call, remove="mutations_and_views"), decomposition_table=table)(*given)
        return traced


def _decompositions(writer):
    """(decompositions of the ops that neither the table nor torchlib writes, all decompositions)."""
    if writer._tables is None:
        every = {**torch._decomp.decomposition_table, **torch.export.default_decompositions()}
        every = {op: body for op, body in every.items() if isinstance(op, torch._ops.OpOverload)}
        known = lambda op: op.name().split(".")[0] in OWN or writer._library is not None and writer._library.find(op.name(), False) is not None
        writer._tables = {op: body for op, body in every.items() if not known(op)}, every
    return writer._tables


def _is_still(target, args, kwargs):
    """Whether an op that may draw random numbers is told not to: an LSTM in evaluation."""
    given = dict(zip((argument.name for argument in target._schema.arguments), args)) | kwargs
    return given.get("train", given.get("training")) is False


def _fakes(node):
    """The fake values of a node's arguments, one per positional argument first, then those of the others and of the results."""
    of = lambda item: item.meta.get("val") if isinstance(item, fx.Node) else None
    nested = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if leaf not in node.args]
    return [*map(of, node.args), *map(of, nested), *pytree.tree_leaves(node.meta.get("val"))]


def _place(node, reason):
    """`layers.0.mlp: %foo (aten::foo.default): reason`, then the last line of the model's source."""
    source = [line for line in (node.meta.get("source") or "").splitlines() if line.strip()]
    where = f"{path_of(node)}: " if path_of(node) else ""
    return "\n".join([f"{where}%{node.name} ({name_of(node.target)}): {reason}", *(f"    {line.strip()}" for line in source[-2:])])

