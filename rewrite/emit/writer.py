"""From the canonical graph to ONNX, node by node, in one loop.

    own table  ->  torchlib's translation of the one op  ->  a decomposition of the one op  ->  an error with node, op and source

The table (translate.py) decides quality, the two others breadth. What depends on constants alone is computed here, sizes are written
from their expressions, and an op that works in place becomes its functional twin and a new name for the tensor that it changed.
"""

import operator
from collections import Counter

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..graph import HOST, attribute, count, device_of, dtype_of, expression, least, path_of, select
from . import mutation
from .shapes import sizes_of
from .sizes import INT64, Sizes, Unknown

OPSET, IR_VERSION = 23, 11
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


def onnx_dtype(dtype):
    return tensor_adapters.from_torch_dtype(dtype)


def fake(node):
    return node.meta["val"]


def name_of(target):
    """`aten::add.Tensor` of an overload; a plain function's own name."""
    return target.name() if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


class Value(ir.Value):
    """An ONNX value on which Python's operators write nodes: torchlib's functions are plain Python that says `x + 1`."""

    def __init__(self, writer, **kwargs):
        super().__init__(**kwargs)
        self.writer = writer

    __hash__ = ir.Value.__hash__


def _operator(name, result=None, flipped=False):
    def write(self, *other):
        operands = [self.writer.value(value, self.dtype) for value in ((*other, self) if flipped else (self, *other))]
        attributes = {"fmod": 1} if name == "Mod" and self.dtype is not None and self.dtype.is_floating_point() else {}
        return self.writer.op(name, *operands, dtype=result or self.dtype, **attributes)

    return write


for _python, _onnx in dict(add="Add", sub="Sub", mul="Mul", truediv="Div", matmul="MatMul", pow="Pow", mod="Mod", neg="Neg").items():
    setattr(Value, f"__{_python}__", _operator(_onnx))
    if _python in ("add", "sub", "mul", "truediv"):
        setattr(Value, f"__r{_python}__", _operator(_onnx, flipped=True))
for _python, _onnx in dict(lt="Less", le="LessOrEqual", gt="Greater", ge="GreaterOrEqual").items():
    setattr(Value, f"__{_python}__", _operator(_onnx, ir.DataType.BOOL))


class Writer:
    """One graph on its way to ONNX. `fallen` counts the ops that went to torchlib or were decomposed, for the report."""

    def __init__(self, graph, nodes):
        self.graph = graph
        self.onnx = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="main")
        self.sizes = Sizes(self)
        self.values = {}  # fx node -> ir.Value, expression, list of these, or a constant (torch.Tensor, dtype, number)
        self.scope = ""
        self.fallen = {"torchlib": Counter(), "decomposed": Counter(), "torchlib failed": Counter()}
        self._names, self._literals, self._initializers, self._made, self._decomposed = Counter(), {}, {}, {}, {}
        self._library = None
        self._uses = Counter()
        nodes = set(nodes)
        for node in nodes:
            if node.op == "get_attr" and isinstance(constant := self.constant(node), torch.Tensor):
                self._uses[_memory(constant)] += sum(user in nodes for user in node.users)

    # building

    def op(self, name, *inputs, n=1, dtype=None, domain="", **attributes):
        """Append a node; equal nodes are written once. Returns its value, or the list of its `n` values."""
        inputs = [self.value(value) for value in inputs]
        while inputs and inputs[-1] is None:
            inputs.pop()
        attributes = {key: value for key, value in attributes.items() if value is not None}
        key = (domain, name, n, tuple(map(id, inputs)), repr(sorted(attributes.items())))
        if key in self._made:
            return self._made[key]
        label = self._unique(f"{self.scope}.{name}")
        types = {"type": None if dtype is None else ir.TensorType(dtype)}
        outputs = [Value(self, name=label if n == 1 else f"{label}.{i}", **types) for i in range(n)]
        self.onnx.append(ir.node(name, inputs, attributes, domain=domain, outputs=outputs, name=label))
        self._made[key] = outputs[0] if n == 1 else outputs
        return self._made[key]

    def scoped(self, scope, name, *inputs, **attributes):
        """`op` under another name than the one of the node at work (sizes belong to nobody)."""
        self.scope, kept = scope, self.scope
        try:
            return self.op(name, *inputs, **attributes)
        finally:
            self.scope = kept

    def copy(self, value):
        """The same value under a name of its own, for an output that is also an input, a constant or another output."""
        out = Value(self, name=self._unique(f"{value.name}.copy"), type=ir.TensorType(value.dtype), shape=value.shape)
        self.onnx.append(ir.node("Identity", [value], outputs=[out], name=out.name))
        return out

    def forget(self, length):
        """Take back the nodes after the first `length` (a translation that failed half way)."""
        late = list(self.onnx)[length:]
        gone = {id(value) for node in late for value in node.outputs}
        for node in reversed(late):
            self.onnx.remove(node)
        self._made = {key: made for key, made in self._made.items() if id(made[0] if isinstance(made, list) else made) not in gone}
        self.sizes.known = {size: value for size, value in self.sizes.known.items() if id(value) not in gone}

    def value(self, given, dtype=None):
        """The ONNX value of whatever a translator hands over: a value, an expression, a literal, a list of these, a tensor."""
        if given is None or isinstance(given, ir.Value):
            return given
        if hasattr(given, "free_symbols"):
            return self.cast(self.sizes.scalar(given), dtype or INT64) if given.is_integer else self.sizes.real(given)
        if isinstance(given, (list, tuple)) and any(isinstance(item, ir.Value) or hasattr(item, "free_symbols") for item in given):
            return self.sizes.vector([self.op("Reshape", item, [-1], dtype=INT64) if isinstance(item, ir.Value) else item for item in given])
        if isinstance(given, (torch.Tensor, ir.TensorProtocol)):
            tensor = given if isinstance(given, ir.TensorProtocol) else tensor_adapters.TorchTensor(given.detach().cpu().contiguous())
            if tensor.size > 64 or dtype is not None and tensor.dtype != dtype:
                return self.cast(self.initializer(self._unique(f"{self.scope}.constant"), tensor), dtype or tensor.dtype)
            given, dtype, shape = tensor.numpy().tolist(), tensor.dtype, tuple(tensor.shape)
        else:
            shape = (len(given),) if isinstance(given, (list, tuple)) else ()
            first = (given[0] if given else 0) if shape else given
            dtype = dtype or {bool: ir.DataType.BOOL, float: ir.DataType.FLOAT, str: ir.DataType.STRING}.get(type(first), INT64)
        key = (repr(given), dtype, shape)
        if key not in self._literals:
            name = f"literal_{dtype.name.lower()}_{len(self._literals)}"
            if dtype == ir.DataType.STRING:
                self._literals[key] = self.initializer(name, ir.tensor(given))
            else:
                tensor = torch.tensor(given, dtype=tensor_adapters.to_torch_dtype(dtype)).reshape(shape)
                self._literals[key] = self.initializer(name, tensor_adapters.TorchTensor(tensor))
        return self._literals[key]

    def initializer(self, name, tensor):
        """A constant of the file, by name."""
        if name in self.onnx.initializers:
            return self.onnx.initializers[name]
        tensor.name = name
        kind = {"type": ir.TensorType(tensor.dtype), "shape": ir.Shape(tuple(tensor.shape)), "const_value": tensor}
        value = Value(self, name=name, **kind)
        self.onnx.register_initializer(value)
        return value

    def weight(self, name, tensor):
        """The initializer of a tensor of the model; tensors that are one in memory (tied weights) are one in the file."""
        key = _memory(tensor)
        if key not in self._initializers:
            tensor = tensor.detach().cpu()
            lazy = ir.LazyTensor(lambda: tensor_adapters.TorchTensor(tensor.contiguous()), dtype=onnx_dtype(tensor.dtype), shape=ir.Shape(tensor.shape))
            self._initializers[key] = self.initializer(name, lazy), tensor
        return self._initializers[key][0]

    def transposed(self, weight):
        """A weight's transpose: stored so if nothing else reads the weight, else a node (a tied weight would be in the file twice)."""
        key = next((key for key, (value, _) in self._initializers.items() if value is weight), None)
        if key is None or self._uses[key] != 1:
            return self.op("Transpose", weight, perm=[1, 0], dtype=weight.dtype)
        tensor = self._initializers[key][1]
        lazy = ir.LazyTensor(lambda: tensor_adapters.TorchTensor(tensor.t().contiguous()), dtype=weight.dtype, shape=ir.Shape(tuple(tensor.shape)[::-1]))
        return self.initializer(f"{weight.name}.transposed", lazy)

    def cast(self, given, dtype):
        value = self.value(given, None if isinstance(given, ir.Value) else dtype)
        if value.dtype == dtype:
            return value
        out = self.op("Cast", value, to=dtype, dtype=dtype)
        out.shape = value.shape  # torchlib asks for ranks
        return out

    def _unique(self, name):
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}.{self._names[name]}"

    # the loop

    def run(self, nodes, prefix=""):
        """Write nodes in order; returns what the output node holds, if it is among them."""
        for node in nodes:
            if node.op == "output":
                return self.argument(node.args[0])
            if node.op == "call_function":
                self.scope = prefix + node.name
                self._step(node, prefix)

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
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) and name.split(".")[0] not in OWN:
            raise Untranslatable(f"{name} draws random numbers")
        args, kwargs = self.argument(list(node.args)), {key: self.argument(value) for key, value in node.kwargs.items()}
        complex_ = any(isinstance(value, torch.Tensor) and value.is_complex() for value in _fakes(node))
        if not complex_ and (translator := OWN.get(name.split(".")[0])):
            out = translator(self, node, *args, **kwargs)
            if out is not NotImplemented:
                return out
        if isinstance(target, torch._ops.OpOverload):
            out = self._torchlib(node, target, name, args, kwargs, complex_)
            if out is not NotImplemented:
                return out
        return self._decompose(node, target, name)

    def argument(self, given):
        """What an argument of a node stands for here."""
        if isinstance(given, fx.Node):
            out = self.values[given] if given in self.values else self.constant(given)
            if isinstance(out, torch.Tensor):
                if given.op == "get_attr":
                    return self.weight(given.target, out)
                return self.value(out) if out.numel() <= 64 else self.weight(given.name, out)
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
        if size > SMALL and (any(self._uses[_memory(t)] != 1 for t in tensors) or size > sum(t.numel() * t.element_size() for t in tensors)):
            return None
        with torch.no_grad():
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), read.get)
            out = target(*args, **{key: "cpu" if key == "device" and not tensors else value for key, value in kwargs.items()})
        self._uses[_memory(out)] = len(node.users)
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
            dtype = torch.result_type(*(1 if isinstance(item, torch.SymInt) else 1.0 if isinstance(item, torch.SymFloat) else item for item in compared[:2]))
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
            dims = [size if isinstance(size, int) else str(size) for size in sizes_of(value)] + [2] * value.is_complex()
            out.type, out.shape = ir.TensorType(dtype), ir.Shape(dims)
            self.sizes.learn(out, value)
        elif isinstance(value, torch.SymInt):  # a size that only the data tells, from `item()`
            self.sizes.known.setdefault(expression(value), self.op("Reshape", out, [-1], dtype=INT64))
        return out

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
        self.values.update(zip((n for n in traced.graph.nodes if n.op == "placeholder"), (self.argument(leaves[i]) for i in free)))
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
        function = getattr(target, "reference", target)
        table = _decompositions(self)
        if target in table[1]:
            table = {**table[0], target: table[1][target]}  # the op itself is opened, also when torchlib knows it and failed
        else:
            table = table[0]

        def call(*given):
            full = list(values)
            for i, value in zip(free, given):
                full[i] = value
            args, kwargs = pytree.tree_unflatten(full, spec)
            return function(*args, **kwargs)

        given = [values[i] for i in free]
        mode = next((value.fake_mode for value in given if isinstance(value, FakeTensor)), None) or self.graph.fake_mode
        with mode:
            traced = make_fx(call, decomposition_table=table)(*given)
            if any(mutation.is_mutating(step) for step in traced.graph.nodes):
                traced = make_fx(torch.func.functionalize(call, remove="mutations_and_views"), decomposition_table=table)(*given)
        return traced


def _decompositions(writer):
    """(decompositions of the ops that neither the table nor torchlib writes, all decompositions)."""
    if not hasattr(writer, "_tables"):
        every = {**torch._decomp.decomposition_table, **torch.export.default_decompositions()}
        every = {op: body for op, body in every.items() if isinstance(op, torch._ops.OpOverload)}
        known = lambda op: op.name().split(".")[0] in OWN or writer._library is not None and writer._library.find(op.name(), False) is not None
        writer._tables = {op: body for op, body in every.items() if not known(op)}, every
    return writer._tables


def _memory(tensor):
    """What makes two tensors one: the same memory, read in the same way."""
    if tensor.numel() == 0:
        return id(tensor)
    return (tensor.data_ptr(), str(tensor.dtype), tuple(tensor.shape), tensor.stride())


def _fakes(node):
    return [leaf.meta.get("val") if isinstance(leaf, fx.Node) else None for leaf in pytree.tree_leaves((node.args, node.kwargs))] + pytree.tree_leaves(node.meta.get("val"))


def _place(node, reason):
    """`layers.0.mlp: %foo (aten::foo.default): reason`, then the last line of the model's source."""
    source = [line for line in (node.meta.get("source") or "").splitlines() if line.strip()]
    where = f"{path_of(node)}: " if path_of(node) else ""
    return "\n".join([f"{where}%{node.name} ({name_of(node.target)}): {reason}", *(f"    {line.strip()}" for line in source[-2:])])

