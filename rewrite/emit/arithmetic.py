"""The own table, second half: pointwise ops, comparisons, reductions, sorting and new tensors."""

import onnx_ir as ir
import torch
from torch import fx

from . import shapes
from .building import onnx_dtype
from .mutation import short_name
from .shapes import sizes_of
from .sizes import INT64
from .writer import common_dtype, fake, name_of, own

BOOL, FLOAT = ir.DataType.BOOL, ir.DataType.FLOAT


def overload(node):
    return name_of(node.target).partition(".")[2]


def dtype_of(node):
    return onnx_dtype(fake(node).dtype)


def number(w, given, dtype):
    """A value, expression or Python number in a dtype."""
    if isinstance(given, (int, float)) and dtype.is_floating_point():
        given = float(given)
    return w.cast(given, dtype)


# one argument

UNARY = ("abs", "neg", "exp", "log", "sqrt", "cos", "sin", "tanh", "sigmoid", "relu", "erf", "ceil", "floor", "sign", "reciprocal", "round")


def unary(op):
    def translate(w, node, x, **kwargs):
        if kwargs:
            return NotImplemented
        if op in ("Ceil", "Floor", "Round") and not x.dtype.is_floating_point():
            return x
        return w.op(op, w.cast(x, dtype_of(node)), dtype=dtype_of(node))

    return translate


for _name in UNARY:
    own(_name)(unary(_name.capitalize()))
own("sgn")(unary("Sign"))


@own("rsqrt")
def rsqrt(w, node, x):
    dtype = dtype_of(node)
    return w.op("Reciprocal", w.op("Sqrt", w.cast(x, dtype), dtype=dtype), dtype=dtype)


@own("gelu")
def gelu(w, node, x, approximate="none"):
    return w.op("Gelu", x, approximate=approximate, dtype=x.dtype)


@own("silu")
def silu(w, node, x):
    return w.op("Mul", x, w.op("Sigmoid", x, dtype=x.dtype), dtype=x.dtype)


@own("softplus")
def softplus(w, node, x, beta=1, threshold=20):
    return w.op("Softplus", x, dtype=x.dtype) if beta == 1 else NotImplemented


@own("softmax", "_softmax", "special_softmax")
def softmax(w, node, x, dim, *args, **kwargs):
    return w.op("Softmax", w.cast(x, dtype_of(node)), axis=dim, dtype=dtype_of(node))


@own("log_softmax", "_log_softmax", "special_log_softmax")
def log_softmax(w, node, x, dim, *args, **kwargs):
    return w.op("LogSoftmax", w.cast(x, dtype_of(node)), axis=dim, dtype=dtype_of(node))


@own("logical_not")
def logical_not(w, node, x):
    return w.op("Not", w.cast(x, BOOL), dtype=BOOL)


@own("bitwise_not")
def bitwise_not(w, node, x):
    return w.op("Not" if x.dtype == BOOL else "BitwiseNot", x, dtype=x.dtype)


@own("isnan")
def isnan(w, node, x):
    return w.op("IsNaN", x, dtype=BOOL)


@own("isinf")
def isinf(w, node, x):
    return w.op("IsInf", x, dtype=BOOL)


# two arguments

LOGIC = {"Add": "Or", "Mul": "And"}


def binary(op):
    def translate(w, node, x, y, *, alpha=1):
        dtype = dtype_of(node)
        if dtype == BOOL:
            return w.op(LOGIC[op], w.cast(x, BOOL), w.cast(y, BOOL), dtype=BOOL) if op in LOGIC and alpha == 1 else NotImplemented
        x, y = number(w, x, dtype), number(w, y, dtype)
        return w.op(op, x, y if alpha == 1 else w.op("Mul", y, number(w, alpha, dtype), dtype=dtype), dtype=dtype)

    return translate


for _name, _op in {"add": "Add", "sub": "Sub", "subtract": "Sub", "mul": "Mul", "multiply": "Mul", "maximum": "Max", "minimum": "Min"}.items():
    own(_name)(binary(_op))


@own("rsub")
def rsub(w, node, x, y, alpha=1):
    return NotImplemented if alpha != 1 else binary("Sub")(w, node, y, x)


@own("pow")
def power(w, node, x, y):
    return w.op("Pow", number(w, x, dtype_of(node)), number(w, y, dtype_of(node)), dtype=dtype_of(node))


@own("div", "divide", "true_divide")
def div(w, node, x, y, *, rounding_mode=None):
    if rounding_mode == "floor":
        return floor_divide(w, node, x, y)
    dtype = dtype_of(node)
    if rounding_mode == "trunc" and dtype.is_floating_point():
        return NotImplemented
    return w.op("Div", number(w, x, dtype), number(w, y, dtype), dtype=dtype)


@own("floor_divide")
def floor_divide(w, node, x, y):
    dtype = dtype_of(node)
    x, y = number(w, x, dtype), number(w, y, dtype)
    if dtype.is_floating_point():
        return w.op("Floor", w.op("Div", x, y, dtype=dtype), dtype=dtype)
    return w.op("Div", w.op("Sub", x, w.op("Mod", x, y, dtype=dtype), dtype=dtype), y, dtype=dtype)  # ONNX divides towards zero


@own("remainder")
def remainder(w, node, x, y):
    dtype = dtype_of(node)
    x, y = number(w, x, dtype), number(w, y, dtype)
    if not dtype.is_floating_point():
        return w.op("Mod", x, y, dtype=dtype)
    return w.op("Sub", x, w.op("Mul", w.op("Floor", w.op("Div", x, y, dtype=dtype), dtype=dtype), y, dtype=dtype), dtype=dtype)


def comparison(op, negated=False):
    def translate(w, node, x, y):
        dtype = onnx_dtype(common_dtype(*(item.meta["val"] if isinstance(item, fx.Node) else item for item in node.args[:2])))
        if dtype == BOOL and op != "Equal":
            dtype = ir.DataType.INT32
        out = w.op(op, number(w, x, dtype), number(w, y, dtype), dtype=BOOL)
        return w.op("Not", out, dtype=BOOL) if negated else out

    return translate


for _name, _op in {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}.items():
    own(_name)(comparison(_op))
own("ne")(comparison("Equal", negated=True))


def logic(op, of_bits):
    def translate(w, node, x, y):
        dtype = dtype_of(node)
        if of_bits and dtype != BOOL:
            return w.op(f"Bitwise{op}", number(w, x, dtype), number(w, y, dtype), dtype=dtype)
        return w.op(op, w.cast(x, BOOL), w.cast(y, BOOL), dtype=BOOL)

    return translate


for _name, _op in {"and": "And", "or": "Or", "xor": "Xor"}.items():
    own(f"bitwise_{_name}", f"__{_name}__")(logic(_op, of_bits=True))
    own(f"logical_{_name}")(logic(_op, of_bits=False))


# choices


@own("where")
def where(w, node, condition, *values):
    if len(values) != 2:
        return NotImplemented
    return w.op("Where", w.cast(condition, BOOL), *(number(w, value, dtype_of(node)) for value in values), dtype=dtype_of(node))


@own("masked_fill")
def masked_fill(w, node, x, mask, value):
    return w.op("Where", w.cast(mask, BOOL), number(w, value, x.dtype), x, dtype=x.dtype)


@own("clamp", "clip", "clamp_min", "clamp_max")
def clamp(w, node, x, low=None, high=None, **kwargs):
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    if short_name(node.target).startswith("clamp_max"):
        low, high = None, low
    dtype = dtype_of(node)
    x = number(w, x, dtype)
    x = x if low is None else w.op("Max", x, number(w, low, dtype), dtype=dtype)
    return x if high is None else w.op("Min", x, number(w, high, dtype), dtype=dtype)


# reductions


def axes(dim):
    return None if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)


def reduction(op):
    def translate(w, node, x, dim=None, keepdim=False, *, dtype=None):
        return w.op(op, w.cast(x, dtype_of(node)), axes(dim), keepdims=int(keepdim), dtype=dtype_of(node))

    return translate


for _name, _op in {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin", "logsumexp": "ReduceLogSumExp"}.items():
    own(_name)(reduction(_op))


def quantifier(op):
    def translate(w, node, x, dim=None, keepdim=False):
        truth = w.cast(w.cast(x, BOOL), ir.DataType.INT32)
        return w.cast(w.op(op, truth, axes(dim), keepdims=int(keepdim), dtype=ir.DataType.INT32), BOOL)

    return translate


own("any")(quantifier("ReduceMax"))
own("all")(quantifier("ReduceMin"))


def extreme(pointwise, reduce, arg):
    def translate(w, node, x, *args, **kwargs):
        if overload(node) == "other":
            return binary(pointwise)(w, node, x, *args)
        if not args and not kwargs:
            return w.op(reduce, x, keepdims=0, dtype=x.dtype)
        dim, keepdim = args[0] if args else kwargs["dim"], args[1] if len(args) > 1 else kwargs.get("keepdim", False)
        if not isinstance(dim, int):
            return NotImplemented
        return [w.op(reduce, x, [dim], keepdims=int(keepdim), dtype=x.dtype), w.op(arg, x, axis=dim, keepdims=int(keepdim), dtype=INT64)]

    return translate


own("max")(extreme("Max", "ReduceMax", "ArgMax"))
own("min")(extreme("Min", "ReduceMin", "ArgMin"))


def arg_extreme(op):
    def translate(w, node, x, dim=None, keepdim=False):
        if x.dtype == BOOL:
            x = w.cast(x, ir.DataType.INT32)
        if dim is None:
            if keepdim:
                return NotImplemented
            x, dim = w.op("Reshape", x, [-1], dtype=x.dtype), 0
        return w.op(op, x, axis=dim, keepdims=int(keepdim), dtype=INT64)

    return translate


own("argmax")(arg_extreme("ArgMax"))
own("argmin")(arg_extreme("ArgMin"))


@own("cumsum")
def cumsum(w, node, x, dim, *, dtype=None):
    return w.op("CumSum", w.cast(x, dtype_of(node)), dim, dtype=dtype_of(node))


@own("topk")
def topk(w, node, x, k, dim=-1, largest=True, sorted=True):
    values, indices = w.op("TopK", x, w.sizes.one(k), n=2, axis=dim, largest=int(largest), sorted=int(sorted), dtype=x.dtype)
    indices.type = ir.TensorType(INT64)
    return [values, indices]


@own("sort", "argsort")
def sort(w, node, x, dim=-1, descending=False, **kwargs):
    if isinstance(dim, bool) or "dim" in kwargs or "descending" in kwargs:  # sort.stable has `stable` in between, all by name
        dim, descending = kwargs.get("dim", -1), kwargs.get("descending", False)
    whole = sizes_of(fake(node.args[0]))[dim]  # equal values keep their order in ONNX's TopK
    values, indices = topk(w, node, x, whole, dim, largest=descending)
    return indices if isinstance(fake(node), torch.Tensor) else [values, indices]


@own("diff")
def diff(w, node, x, n=1, dim=-1, prepend=None, append=None):
    if n != 1:
        return NotImplemented
    parts = [part for part in (prepend, x, append) if part is not None]
    x = parts[0] if len(parts) == 1 else w.op("Concat", *parts, axis=dim, dtype=x.dtype)
    late = w.op("Slice", x, [1], shapes.index(w, None), [dim], [1], dtype=x.dtype)
    early = w.op("Slice", x, [0], [-1], [dim], [1], dtype=x.dtype)
    if x.dtype == BOOL:
        return w.op("Xor", late, early, dtype=BOOL)
    return w.op("Sub", late, early, dtype=x.dtype)


@own("histc")
def histc(w, node, x, bins=100, min=0, max=0):
    if max <= min:
        return NotImplemented
    dtype, bins = dtype_of(node), int(bins)
    x = w.op("Reshape", w.cast(x, FLOAT), [-1], dtype=FLOAT)
    place = w.op("Div", w.op("Mul", w.op("Sub", x, float(min), dtype=FLOAT), float(bins), dtype=FLOAT), float(max - min), dtype=FLOAT)
    last = w.op("Equal", x, float(max), dtype=BOOL)  # the last bin has both its ends
    place = w.op("Where", last, float(bins - 1), w.op("Floor", place, dtype=FLOAT), dtype=FLOAT)
    hits = w.op("Equal", w.op("Unsqueeze", place, [1], dtype=FLOAT), w.value([float(i) for i in range(bins)]), dtype=BOOL)
    return w.op("ReduceSum", w.cast(hits, dtype), [0], keepdims=0, dtype=dtype)


# new tensors


@own("arange")
def arange(w, node, *given, dtype=None, **kwargs):
    start, end, step = (0, given[0], 1) if len(given) == 1 else (*given, 1)[:3]
    kind = FLOAT if any(isinstance(item, float) or isinstance(item, ir.Value) and item.dtype == FLOAT for item in (start, end, step)) else INT64
    return w.cast(w.op("Range", *(number(w, item, kind) for item in (start, end, step)), dtype=kind), dtype_of(node))


FILL = {"zero": 0, "empty_strided": 0, "new_empty_strided": 0}
for _name, _value in (("zeros", 0), ("ones", 1), ("empty", 0)):
    FILL |= {_name: _value, f"{_name}_like": _value, f"new_{_name}": _value}


@own(*FILL)
def filled(w, node, *args, **kwargs):
    return _fill(w, node, FILL[short_name(node.target).rstrip("_")])


@own("full", "full_like", "new_full", "fill", "scalar_tensor")
def full(w, node, *args, **kwargs):
    value = args[{"new_full": 2, "scalar_tensor": 0}.get(short_name(node.target).rstrip("_"), 1)]
    return _fill(w, node, value)


def _fill(w, node, value):
    value = number(w, value, dtype_of(node))
    return shapes.expand_to(w, value, torch.empty(()), sizes_of(fake(node)))


@own("tril", "triu")
def triangle(w, node, x, diagonal=0):
    return w.op("Trilu", x, w.value(diagonal), upper=int(short_name(node.target).startswith("triu")), dtype=x.dtype)
