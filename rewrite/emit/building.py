"""Putting an ONNX graph together: values, nodes, literals, weights. Equal nodes, equal literals and tied weights are written once."""

from collections import Counter

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from .sizes import INT64, Sizes

OPSET, IR_VERSION = 23, 11


def onnx_dtype(dtype):
    return tensor_adapters.from_torch_dtype(dtype)


def memory(tensor):
    """What makes two tensors one: the same memory, read in the same way."""
    if tensor.numel() == 0:
        return id(tensor)
    return (tensor.data_ptr(), str(tensor.dtype), tuple(tensor.shape), tensor.stride())


def _later(tensor):
    """The tensor as ONNX data, laid out in memory only when the file is written."""
    return ir.LazyTensor(lambda: tensor_adapters.TorchTensor(tensor.contiguous()), dtype=onnx_dtype(tensor.dtype), shape=ir.Shape(tensor.shape))


class Value(ir.Value):
    """An ONNX value on which Python's operators write nodes: torchlib's functions are plain Python that says `x + 1`."""

    def __init__(self, writer, **kwargs):
        super().__init__(**kwargs)
        self.writer = writer

    __hash__ = ir.Value.__hash__

    def __bool__(self):
        raise TypeError("what an ONNX value holds is not known while it is written")  # else an `if` or `while` of torchlib's would guess


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


class Builder:
    """An ONNX graph that grows. `scope` names the nodes that are written now, `sizes` writes sizes, `uses` counts who reads a weight."""

    def __init__(self):
        self.onnx = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="main")
        self.sizes = Sizes(self)
        self.scope = ""
        self.uses = Counter()
        self._names, self._literals, self._weights, self._stored, self._made = Counter(), {}, {}, {}, {}

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
        if not isinstance(given, (bool, int, float, str, list, tuple)):
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
        key = memory(tensor)
        if key not in self._weights:
            tensor = tensor.detach().cpu()
            value = self._weights[key] = self.initializer(name, _later(tensor))
            self._stored[id(value)] = key, tensor
        return self._weights[key]

    def transposed(self, weight):
        """A weight's transpose: stored so if nothing else reads the weight, else a node (a tied weight would be in the file twice)."""
        key, tensor = self._stored.get(id(weight), (None, None))
        if key is None or self.uses[key] != 1:
            return self.op("Transpose", weight, perm=[1, 0], dtype=weight.dtype)
        return self.initializer(f"{weight.name}.transposed", _later(tensor.t()))

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
