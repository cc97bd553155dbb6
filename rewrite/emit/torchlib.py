"""The second level: torchlib's translation of one op, traced into the graph that is being written.

torchlib's functions are plain Python over onnxscript's ops. Under an evaluator of our own each op that they call becomes a node, and a
function that they call is simply run, so that no local functions are left to inline. torchlib is written for opset 18: what was renamed
until 23 is renamed here.
"""

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from onnxscript import evaluator, values
from onnxscript.function_libs.torch_lib import ops as _ops  # noqa: F401  (fills the registry)
from onnxscript.function_libs.torch_lib import registration

ALIASES = {"__lshift__": "bitwise_left_shift", "__rshift__": "bitwise_right_shift"}
MODES = {"bilinear": "linear", "bicubic": "cubic"}  # GridSample's, renamed in opset 20


class Torchlib(evaluator.Evaluator):
    """An evaluator that writes. `reason` is why the last call gave NotImplemented."""

    def __init__(self, writer):
        self.writer, self.reason = writer, ""
        self._signatures, self._opset = {}, values.Opset("", max(writer.onnx.opset_imports.values()))

    def find(self, name, complex_):
        """The function of an overload such as `aten::cumsum`, or None."""
        registry = registration.default_registry
        namespace, _, rest = name.partition("::")
        short, dot, overload = rest.removesuffix(".default").partition(".")
        for candidate in (short, ALIASES.get(short)):
            full = f"{namespace}::{candidate}{dot}{overload}"
            if candidate and full in registry:
                entry = registry[full]
                functions = entry.complex if complex_ else entry.overloads
                return functions[0] if functions else None
        return None

    def call(self, function, args, kwargs):
        """Write the function's nodes; NotImplemented, with `reason`, where its Python gives up on these arguments."""
        kwargs = {key: self._plain(value) for key, value in kwargs.items()}
        if kwargs.get("dtype", 0) is None:
            kwargs["dtype"] = -1
        try:
            with evaluator.default_as(self):
                return function(*map(self._plain, args), **kwargs)
        except Exception as error:  # whatever a library of five hundred translations raises: counted, reported, and the next level is asked
            self.reason = f"{type(error).__name__}: {str(error)[:120]}"
            return NotImplemented

    def _plain(self, given):
        """An argument as torchlib wants it."""
        if hasattr(given, "free_symbols"):
            return self.writer.value(given)
        if isinstance(given, (list, tuple)):
            return [self._plain(item) for item in given]
        if isinstance(given, torch.dtype):
            return tensor_adapters.from_torch_dtype(given)
        return str(given) if isinstance(given, (torch.device, torch.layout, torch.memory_format)) else given

    def eval_function(self, function, args, kwargs):
        return function.function(*args, **kwargs)

    def eval_op(self, op, args, kwargs):
        if op.name == "Constant":
            [(key, value)] = [(key, value) for key, value in kwargs.items() if value is not None]
            return self.writer.value(value.value if isinstance(value, ir.Attr) else value, ir.DataType.FLOAT if "float" in key else None)
        signature = self._signature(op)
        inputs, attributes = _sort(signature, list(args), dict(kwargs))
        bound = {}
        for parameter, value in inputs:
            if isinstance(value, ir.Value) and value.dtype is not None:
                bound.setdefault(parameter.type_constraint.name, value.dtype)
        if op.name == "GridSample":
            attributes["mode"] = MODES.get(attributes.get("mode"), attributes.get("mode"))
        count = len(signature.outputs)
        if op.name == "Split":
            count = attributes["num_outputs"]
        elif op.name == "BatchNormalization" and not attributes.get("training_mode"):
            count = 1
        dtype = lambda constraint: bound.get(constraint.name) or _only(constraint)
        given = [self.writer.value(value, dtype(parameter.type_constraint)) for parameter, value in inputs]
        out = self.writer.op(op.name, *given, n=count, domain=op.domain, **attributes)
        for value, parameter in zip([out] if count == 1 else out, signature.outputs):
            constraint = parameter.type_constraint
            kind = ir.DataType(attributes["to"]) if op.name == "Cast" else dtype(constraint)
            if kind is not None and not isinstance(next(iter(constraint.allowed_types)), ir.SequenceType):
                value.type = ir.TensorType(kind)
        return out

    def _signature(self, op):
        if op.name not in self._signatures:
            self._signatures[op.name] = (self._opset[op.name] if op.domain == "" else op).op_signature
        return self._signatures[op.name]


def _sort(signature, args, kwargs):
    """The inputs of a call as (parameter, value), and its attributes; arguments are bound by name against the opset that is written."""
    inputs, attributes = [], {}
    for parameter in signature.params:
        if parameter.is_param() and parameter.variadic:
            inputs += [(parameter, value) for value in args]
            args = []
        elif args or parameter.name in kwargs:
            value = args.pop(0) if args else kwargs.pop(parameter.name)
            if parameter.is_param():
                inputs.append((parameter, value))
            else:
                attributes[parameter.name] = value
        elif parameter.is_param():
            inputs.append((parameter, None))
    return inputs, attributes | kwargs


def _only(constraint):
    """The dtype of a type constraint that allows one alone."""
    return next(iter(constraint.allowed_types)).dtype if len(constraint.allowed_types) == 1 else None
