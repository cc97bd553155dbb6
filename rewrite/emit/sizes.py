"""Sizes in ONNX, written from their expressions.

Every dimension of a graph input names a sympy expression, so any size is written from the inputs' own `Shape`s, once per model. The
size arithmetic that the graph happens to carry is never followed.
"""

import onnx_ir as ir
import sympy

from ..graph import expression

INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
LAST = 2**62  # "to the end" of a Slice

FOLDS = {"Add": "Add", "Mul": "Mul", "Max": "Max", "Min": "Min", "CleanDiv": "Div", "Mod": "Mod", "PythonMod": "Mod"}
SAME = {"CeilToInt", "FloorToInt", "RoundToInt", "TruncToInt", "ToFloat", "Identity"}


class Unknown(Exception):
    """A size that no input gives, or an expression that has no ONNX form."""


class Sizes:
    """The expressions known so far, each with the value that holds it: an INT64 tensor of shape (1,)."""

    def __init__(self, writer):
        self.writer = writer
        self.known = {}

    def learn(self, value, fake):
        """Take the dimensions of a value (an input, or the result of an op with a data-dependent size) as the names that they carry."""
        for axis, size in enumerate(map(expression, fake.shape)):
            if isinstance(size, int) or size in self.known or not (size.is_Symbol or not self.can(size)):
                continue
            self.known[size] = self.writer.scoped(f"size_{size}".replace(" ", ""), "Shape", value, start=axis, end=axis + 1, dtype=INT64)

    def can(self, size):
        """Whether the symbols of an expression are known by now."""
        return isinstance(size, int) or all(symbol in self.known for symbol in size.free_symbols) or size in self.known

    def one(self, size):
        """The size as an INT64 tensor of shape (1,)."""
        if isinstance(size, (int, sympy.Integer)):
            return self.writer.value([int(size)])
        if size not in self.known:
            self.known[size] = self._write(size)
        return self.known[size]

    def scalar(self, size):
        """The size as an INT64 scalar."""
        if isinstance(size, (int, sympy.Integer)):
            return self.writer.value(int(size))
        return self.writer.scoped("size", "Squeeze", self.one(size), [0], dtype=INT64)

    def vector(self, sizes):
        """Several sizes as one INT64 tensor of shape (n,)."""
        if all(isinstance(size, (int, sympy.Integer)) for size in sizes):
            return self.writer.value([int(size) for size in sizes], INT64)
        parts, run = [], []
        for size in (*sizes, None):
            if isinstance(size, (int, sympy.Integer)):
                run.append(int(size))
                continue
            if run:
                parts.append(self.writer.value(run))
                run = []
            if size is not None:
                parts.append(size if isinstance(size, ir.Value) else self.one(size))
        return parts[0] if len(parts) == 1 else self.writer.scoped("size", "Concat", *parts, axis=0, dtype=INT64)

    def real(self, size):
        """The expression as a FLOAT scalar (what `x.shape[0] ** 0.5` asks for)."""
        if size.is_number:
            return self.writer.value(float(size))
        name, op = type(size).__name__, lambda op, *args: self.writer.scoped("size", op, *args, dtype=FLOAT)
        if name in ("IntTrueDiv", "FloatTrueDiv"):
            return op("Div", *map(self.real, size.args))
        if name in ("Pow", "FloatPow", "PowByNatural"):
            return op("Pow", *map(self.real, size.args))
        if name == "OpaqueUnaryFn_sqrt":
            return op("Sqrt", self.real(size.args[0]))
        if name == "Mul" and not size.is_integer:
            first, *rest = map(self.real, size.args)
            for factor in rest:
                first = op("Mul", first, factor)
            return first
        if name == "ToFloat":
            size = size.args[0]
        return self.writer.scoped("size", "Cast", self.scalar(size), to=FLOAT, dtype=FLOAT)

    def _write(self, size):
        missing = sorted(str(symbol) for symbol in size.free_symbols if symbol not in self.known)
        if missing:
            raise Unknown(f"size {size}: no input gives {', '.join(missing)}")
        name, op = type(size).__name__, lambda op, *args, **attributes: self.writer.scoped("size", op, *args, dtype=INT64, **attributes)
        if name in FOLDS:
            first, *rest = map(self.one, size.args)
            for other in rest:
                first = op(FOLDS[name], first, other)
            return first
        if name == "FloorDiv":
            over, by = size.args
            a, b = self.one(over), self.one(by)
            if over.is_nonnegative:
                return op("Div", a, b)
            return op("Div", op("Sub", a, op("Mod", a, b)), b)  # ONNX divides towards zero, its Mod has the sign of the divisor
        if name in ("Pow", "PowByNatural"):
            return op("Pow", *map(self.one, size.args))
        if name in SAME and size.args[0].is_integer:
            return self.one(size.args[0])
        if name in ("CeilToInt", "FloorToInt", "TruncToInt"):
            whole = self.real(size.args[0])
            whole = self.writer.scoped("size", {"C": "Ceil", "F": "Floor"}.get(name[0], "Floor"), whole, dtype=FLOAT)
            return op("Reshape", op("Cast", whole, to=INT64), [1])
        raise Unknown(f"size {size}: {name} has no ONNX form")
