"""The inputs of one graph, each with what it must look like and what leaving it out means, and the conditions on their sizes."""

import math
from dataclasses import dataclass, field, replace

import sympy
import torch
from torch.utils._sympy.functions import Min
from torch.utils._sympy.printers import PythonPrinter

from ..errors import Refused
from ..graph import expression
from .leaves import leaves

CACHE = "past_key_values"


@dataclass(frozen=True)
class Formula:
    """A number or a condition over the symbols of the sizes, as Python source that is compiled where it is read."""

    source: str
    symbols: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "run", eval(f"lambda {', '.join(self.symbols)}: {self.source}", {"math": math}))

    def __getstate__(self):
        return {"source": self.source, "symbols": self.symbols}

    def __setstate__(self, state):
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def of(self, sizes):
        """Its value where `sizes` maps each symbol to a number."""
        return self.run(*[sizes[symbol] for symbol in self.symbols])

    @classmethod
    def over(cls, value):
        return cls(PythonPrinter().doprint(value), tuple(sorted(str(symbol) for symbol in value.free_symbols)))


@dataclass(frozen=True)
class Check:
    """A condition that tracing met: `words` says it with the names of the dimensions, `where` the line of the model that asked."""

    formula: Formula
    words: str
    where: str

    def hold(self, sizes, names, what):
        if not self.formula.of(sizes):
            found = ", ".join(f"{names.get(symbol, symbol)} is {sizes[symbol]}" for symbol in self.formula.symbols)
            raise Refused(f"{what}: {found}, but the graph was captured for {self.words}" + (f" (asked at {self.where})." if self.where else "."))


def unpadded(ids, padding, start=0):
    """Positions that count the tokens that are no padding, behind `start` of them, from the place after the padding token's number on (RoBERTa)."""
    shown = (ids != padding).long()
    return (shown.cumsum(1) + start) * shown + padding


@dataclass(frozen=True)
class Slot:
    """One tensor input.

    name: the argument it comes from; path: the way to it inside a nested argument, as (key, index) pairs. sizes: (dimension, number
    or symbol) of its shape; derived: (dimension, Formula) where a dimension follows from others. words: symbol → "batch", "length", ….
    default: "ones", "zeros", "unpadded" (see there; the token is `padding`), "positions" (from `start` on, of which `front` places are no tokens of the caller's; the first token's is `first`), a number, or None where it
    must be given, "label" where a loss asks for it. unused: the graph never reads it, so nothing is asked of it. values: the integers that it
    may hold; looked at once for each tensor, since reading one that is on a GPU waits for it. counted: positions count what the attention mask lets through.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[tuple[int, int | str], ...]
    rank: int
    path: tuple[tuple[str, int], ...] = ()
    derived: tuple[tuple[int, Formula], ...] = ()
    words: dict[str, str] = field(default_factory=dict)
    default: str | int | float | None = None
    start: str | None = None
    unused: bool = False
    values: range | None = None
    front: int = 0
    counted: bool = False
    first: int = 0
    padding: int | None = None

    def take(self, given):
        """The tensor among the arguments given, or None."""
        value = given.get(self.name)
        for key, index in self.path:
            if value is None:
                return None
            value = value[index] if isinstance(value, (tuple, list)) else value.get(key) if isinstance(value, dict) else getattr(value, key)
        return value

    def admit(self, value, sizes, what):
        """The value as the graph takes it; enters its sizes into `sizes`. Raises Refused for another rank, kind or size."""
        if self.unused and isinstance(value, torch.Tensor):
            return value
        if not isinstance(value, torch.Tensor):
            raise Refused(f"{what}: {self.name} is a {type(value).__name__}, the graph takes a tensor {self.picture()}.")
        if self.default == "positions" and value.dim() == self.rank + 1:
            value = self._plane(value, what)
        shape = value.shape
        if len(shape) != self.rank:
            raise Refused(f"{what}: {self.name} is {tuple(shape)}, the graph takes {self.picture()}.{self._hint(value)}")
        if self.default == "positions" and shape[0] == 1 and sizes.get(self.sizes[0][1], 1) != 1:
            value = value.expand(sizes[self.sizes[0][1]], -1)
            shape = value.shape
        for dim, size in self.sizes:
            if size.__class__ is str:
                if size not in sizes:
                    sizes[size] = shape[dim]
                elif sizes[size] != shape[dim]:
                    raise Refused(
                        f"{what}: {self.name} is {tuple(shape)}, but {self._say(size)} is {sizes[size]} "
                        f"by the other inputs: {self.picture()}."
                    )
            elif shape[dim] != size:
                raise Refused(
                    f"{what}: {self.name} is {tuple(shape)}, but it was captured as {self.picture()}.\n"
                    "Capture again with an example of that size."
                )
        if value.dtype is not self.dtype:
            value = self._cast(value, what)
        if self.values is not None and not torch.compiler.is_compiling():
            self._refuse_strangers(value, what)
        return value

    def _plane(self, value, what):
        """Of positions that count time, height and width each in a plane of its own, as `generate` hands text over too, the one that all are."""
        if value.stride(0) != 0 and value.shape[0] > 1 and (torch.compiler.is_compiling() or not (value[1:] == value[:1]).all()):
            raise Refused(f"{what}: {self.name} is {tuple(value.shape)} and its planes differ, as with images; the graph takes {self.picture()}, those of text alone.")
        return value[0]

    def _refuse_strangers(self, value, what):
        """Refuse numbers that are none of `values`: on any device, once for each tensor and again when it has been written to, so that of the calls
        of a `generate` only the first one waits. Where nothing can be waited for (compiled code, a CUDA graph) the lookup itself fails."""
        version = None if value.is_inference() else value._version
        seen = getattr(value, "_looked_at", None)
        if value.device.type == "meta" or (seen is not None and seen == (self.values, version)) or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        known = self.values
        strange = value[(value < known.start) | (value >= known.stop)]
        if version is not None:
            value._looked_at = (known, version) if not len(strange) else None
        if len(strange):
            raise Refused(f"{what}: {self.name} holds {strange[0].item()}; its entries are {known.start} to {known.stop - 1}, one for each row of the batch.")

    def agree(self, value, sizes, what):
        """Raise Refused where a dimension that follows from others is not what they say."""
        for dim, formula in self.derived:
            if value.shape[dim] != formula.of(sizes):
                raise Refused(
                    f"{what}: {self.name} is {tuple(value.shape)}, but the other inputs ask for "
                    f"{self._say(formula.source)} = {formula.of(sizes)} places: {self.picture()}."
                )

    def make(self, sizes, device, mask=None, ids=None):
        """The value that leaving this input out stands for, once all sizes are known; `mask` and `ids` are the attention mask and ids that were given."""
        if self.default is None:
            return torch.empty(0, device=device)  # the graph never reads it
        shape = [0] * self.rank
        for dim, size in self.sizes:
            shape[dim] = sizes[size] if size.__class__ is str else size
        for dim, formula in self.derived:
            shape[dim] = formula.of(sizes)
        if self.default == "unpadded":
            return unpadded(ids, self.padding, sizes[self.start] if self.start is not None else 0)
        if self.counted and mask is not None:
            mask = mask.long()
            return (mask.cumsum(-1) * mask - 1)[:, -shape[-1] :]
        if self.default == "positions":
            start = self.first + (sizes[self.start] - self.front if self.start is not None else 0)
            return torch.arange(start, start + shape[-1], device=device).expand(shape)
        filling = {"ones": 1, "zeros": 0, "label": 0}.get(self.default, self.default)
        return torch.full(shape, filling, dtype=self.dtype, device=device)

    def picture(self):
        """Its shape in words: "(batch, past + length) of int64"."""
        dims = dict(self.sizes) | {dim: formula.source for dim, formula in self.derived}
        return f"({', '.join(self._say(str(dims[dim])) for dim in range(self.rank))}) of {str(self.dtype).removeprefix('torch.')}"

    def _say(self, source):
        return " ".join(self.words.get(part, part) for part in source.replace("+", " + ").split())

    def _cast(self, value, what):
        """Masks and ids may come as other integers; floats keep the dtype that they have."""
        if self.dtype.is_floating_point and value.dtype.is_floating_point:
            return value
        if self.dtype.is_floating_point or self.dtype.is_complex or value.dtype.is_floating_point or value.dtype.is_complex:
            raise Refused(f"{what}: {self.name} is {str(value.dtype).removeprefix('torch.')}, the graph takes {self.picture()}.{self._hint(value)}")
        return value.to(self.dtype)

    def _hint(self, value):
        if self.default == "label":
            return " Labels of another kind ask for another loss: capture again with an example that has them."
        if self.name.endswith("attention_mask") and value.dim() == 4:
            return " A mask of four dimensions replaces the model's own and was not captured: say what is padding with two."
        return ""


def slots_of(graph, variant):
    """The slots of a graph in order, the cache's leaves as one slot named `past_key_values` → (slots, symbols of the cache).

    symbols: {leaf name: shape as numbers, symbol names or None}, for the cache's leaves.
    """
    places = _places(variant.kwargs)
    words, found, cache, seen = {}, [], {}, set()
    for name, node in zip(graph.inputs, graph.placeholders):
        for dim, symbol in variant.dims.get(name, {}).items():
            size = expression(node.meta["val"].shape[dim])
            if not isinstance(size, int) and size.is_Symbol:
                words.setdefault(str(size), symbol)
    start = None
    for name, node in zip(graph.inputs, graph.placeholders):
        if places[name][0] == CACHE:
            shape = [expression(size) for size in node.meta["val"].shape]
            cache[name] = ([size if isinstance(size, int) else str(size) for size in shape], node.meta["val"].dtype)
            if start is None:
                start = cache[name][0][2]
    for name, node in zip(graph.inputs, graph.placeholders):
        root, path = places[name]
        if root == CACHE:
            if CACHE not in seen:
                seen.add(CACHE)
                found.append(Slot(CACHE, torch.float32, (), 0))
            continue
        value = node.meta["val"]
        sizes, derived = _sizes(value)
        found.append(
            Slot(
                root,
                value.dtype,
                sizes,
                value.dim(),
                path,
                derived,
                words,
                variant.defaults.get(name) or ("label" if name in variant.labels else None),
                start,
                not node.users,
                counted=name in variant.counted,
                first=variant.first,
                padding=variant.padding,
            )
        )
    return tuple(found), cache, words


def _sizes(value):
    """(dimension, number or symbol) of a fake value's shape, and (dimension, Formula) where a dimension follows from others."""
    sizes, derived = [], []
    for dim, size in enumerate(value.shape):
        size = expression(size)
        if isinstance(size, int):
            sizes.append((dim, size))
        elif size.is_Symbol:
            sizes.append((dim, str(size)))
        else:
            derived.append((dim, Formula.over(size)))
    return tuple(sizes), tuple(derived)


def resized(slots, graph):
    """The slots of a graph whose inputs have other sizes by now."""
    values = {name: node.meta["val"] for name, node in zip(graph.inputs, graph.placeholders)}
    found = []
    for slot in slots:
        if slot.name in values and not slot.path:
            sizes, derived = _sizes(values[slot.name])
            behind = graph.front if slot.default == "positions" and graph.name == "past" else 0
            slot = replace(slot, sizes=sizes, derived=derived, front=behind)
        found.append(slot)
    return tuple(found)


def checks_of(graph, words):
    """The conditions of a graph on its sizes, ready to run."""
    found = []
    for check in graph.checks:
        formula = Formula.over(check.condition)
        text = Formula.over(_plainly(check.condition)).source
        for symbol in sorted(formula.symbols, key=len, reverse=True):
            text = text.replace(symbol, words.get(symbol, symbol))
        found.append(Check(formula, text, check.where))
    return tuple(found)


def _plainly(condition):
    """`a == min(a, b)`, which is how tracing asks whether a table is long enough, as `a <= b`."""
    if isinstance(condition, sympy.Eq):
        for side, other in (condition.args, condition.args[::-1]):
            if isinstance(other, sympy.Min | Min) and side in other.args and len(other.args) == 2:
                return sympy.Le(side, next(arg for arg in other.args if arg != side))
    return condition


def _places(kwargs):
    """Leaf name → (argument, path inside it)."""
    found = {}
    for name, value in kwargs.items():
        names, _, tree = leaves({name: value})
        steps = iter(_steps(tree.children[0]))
        for leaf in names:
            found[leaf] = (name, next(steps))
    return found


def _steps(tree, path=()):
    if tree.kind == "tensor":
        yield path
    for index, child in enumerate(tree.children):
        key = str(tree.names[index]) if tree.names else str(index)
        yield from _steps(child, (*path, (key, index)))
