"""How an ATen op is written in Python so that the same overload is reached without the dispatcher's detour.

    aten.add.Tensor(x, y) -> x + y      aten.view.default(x, [a, b]) -> x.view(a, b)      aten.cos.default(x) -> torch.cos(x)

Found by looking: an operator, else a method in C, else a builtin of torch, else `torch.ops.aten`.
"""

import types
from functools import lru_cache

import torch

INFIX = {
    "add.Tensor": "+", "sub.Tensor": "-", "mul.Tensor": "*", "div.Tensor": "/", "matmul.default": "@",
    "eq.Tensor": "==", "ne.Tensor": "!=", "lt.Tensor": "<", "le.Tensor": "<=", "gt.Tensor": ">", "ge.Tensor": ">=",
    "eq.Scalar": "==", "ne.Scalar": "!=", "lt.Scalar": "<", "le.Scalar": "<=", "gt.Scalar": ">", "ge.Scalar": ">=",
    "__and__.Tensor": "&", "__or__.Tensor": "|", "__xor__.Tensor": "^", "bitwise_and.Tensor": "&", "bitwise_or.Tensor": "|",
}  # fmt: skip
OPEN_END = 2**63 - 1


@lru_cache(maxsize=None)
def native(op):
    """How an ATen overload is reached fastest: ("infix", "+"), ("method", "view") or ("function", "torch.cos")."""
    namespace, _, name = op._schema.name.partition("::")
    overload = op._overloadname or "default"
    if namespace != "aten":
        return "function", f"torch.ops.{namespace}.{name}.{overload}"
    if f"{name}.{overload}" in INFIX:
        return "infix", INFIX[f"{name}.{overload}"]
    arguments = op._schema.arguments
    method = torch.Tensor.__dict__.get(name, torch._C.TensorBase.__dict__.get(name))
    if arguments and arguments[0].name == "self" and isinstance(method, types.MethodDescriptorType):
        return "method", name
    for place, holder in (("torch", torch), ("torch._C._nn", torch._C._nn)):
        if isinstance(getattr(holder, name, None), types.BuiltinFunctionType):
            return "function", f"{place}.{name}"
    return "function", f"torch.ops.aten.{name}.{overload}"


def with_reduction(op, args, kwargs):
    """Losses say their reduction: the native binding of cross_entropy_loss takes another default than its schema (torch 2.13)."""
    schema = op._schema.arguments
    place = next((i for i, a in enumerate(schema) if a.name == "reduction"), None)
    if place is None or len(args) > place or "reduction" in kwargs:
        return args, kwargs
    filled = [kwargs.get(a.name, a.default_value) for a in schema[len(args) : place + 1]]
    spelled = {a.name for a in schema[: place + 1]}
    return (*args, *filled), {name: value for name, value in kwargs.items() if name not in spelled}


def with_keywords(op, args, kwargs):
    """A memory format is an argument by name in Python's methods, wherever it stands in the schema."""
    place = next((i for i, a in enumerate(op._schema.arguments) if a.name == "memory_format"), len(args))
    return args[:place], ({**kwargs, "memory_format": args[place]} if len(args) > place and args[place] is not None else kwargs)


def _slice(writer, node):
    x, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    if node.kwargs:
        return None
    start, end = (None if start == 0 and isinstance(start, int) else start), (None if isinstance(end, int) and end >= OPEN_END else end)
    text = f"{'' if start is None else writer.value(start)}:{'' if end is None else writer.value(end)}{'' if step == 1 else ':' + writer.value(step)}"
    around = [":"] * dim + [text] if dim >= 0 else ["...", text] + [":"] * (-dim - 1)
    return f"{writer.value(x)}[{', '.join(around)}]"


def _index(writer, node):
    x, indices = node.args
    if not all(i is None or (isinstance(i.meta.get("val"), torch.Tensor) and i.meta["val"].dim() > 0) for i in indices):
        return None
    return f"{writer.value(x)}[{', '.join(':' if i is None else writer.value(i) for i in indices)}]"


def _index_put(writer, node):
    """Python's method takes no list with None in it, the op does."""
    if None not in node.args[1]:
        return None
    return f"torch.ops.{node.target}({', '.join(map(writer.value, node.args))})"


def _size(writer, node):
    return f"{writer.value(node.args[0])}.shape[{node.args[1]}]"


SPECIAL = {
    torch.ops.aten.slice.Tensor: _slice,
    torch.ops.aten.index.Tensor: _index,
    torch.ops.aten.index_put.default: _index_put,
    torch.ops.aten.index_put_.default: _index_put,
    torch.ops.aten.sym_size.int: _size,
}
