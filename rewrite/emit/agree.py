"""Does a written ONNX file compute what the graph computes? Asked of ONNX Runtime, at other sizes than the captured ones.

The inputs are made up from the graph alone: ids within the tables that they index, masks of zeros and ones with padding on either side.
"""

import contextlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx

from ..errors import Broken, Refused
from ..graph import attribute, count, expression, select
from .mutation import short_name

# how much further from float64 than PyTorch another order of float32 sums may end up: 3.4 was seen (a tiny GPT-2, merged after six steps)
ROUNDING = 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the RMS of what PyTorch gives
SMALL = 2**28  # bytes of weights up to which one thread is enough: on busy cores, waiting for others took 5 s where the work takes 20 ms
OFFSETS = (4, -2, 1, 2, -1, 8, 3, 16, 32)
PASSES_ON = {
    "view", "reshape", "unsqueeze", "squeeze", "flatten", "expand", "slice", "contiguous", "clone", "alias", "to", "_to_copy", "type_as",
    "add", "sub", "clamp",
}  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """The worst error over outputs and sizes, the sizes that were tried, and the optimisers that ONNX Runtime must leave out."""

    error: float
    sizes: tuple[str, ...]
    disabled_optimizers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One try: the sizes in words, the inputs for PyTorch and for ONNX Runtime, what PyTorch gives."""

    sizes: str
    given: dict
    feeds: dict
    wanted: list


def execute(root, nodes, given, outputs, double=False):
    """Run nodes of a graph in PyTorch, in evaluation; `given` maps placeholders to tensors. Returns the tensors of `outputs`.

    With `double` everything that is float32 is float64: a second opinion on what rounding does.
    """
    raised = lambda value: value.double() if double and isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value
    values = {node: raised(value.clone()) for node, value in given.items()}  # a graph may write into its inputs
    last = {source: node for node in nodes for source in node.all_input_nodes}
    kept = {out for out in outputs if isinstance(out, fx.Node)}
    with torch.no_grad():
        for node in nodes:
            if node.op == "get_attr":
                is_flag = node.target.rpartition(".")[2] == "training"
                values[node] = False if is_flag else raised(attribute(root, node.target))
            elif node.op == "call_function" and node.target is not count:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.get)
                if double:
                    widen = lambda item: torch.float64 if item is torch.float32 else item
                    args, kwargs = torch.utils._pytree.tree_map(widen, (args, kwargs))
                if node.target is select:
                    values[node] = args[2]
                else:
                    values[node] = getattr(node.target, "reference", node.target)(*args, **kwargs)
            elif node.op == "call_module":  # of those that remain each hands its input on
                values[node] = values[node.args[0]]
            for source in node.all_input_nodes:
                if last[source] is node and source not in kept:
                    values.pop(source, None)
    return [values[out] if isinstance(out, fx.Node) else out for out in outputs]


def symbols(placeholders):
    """The symbols of the inputs' sizes, in order, each with the size that it was captured at."""
    found = {}
    for node in placeholders:
        for size in node.meta["val"].shape:
            form = expression(size)
            if not isinstance(form, int):
                for symbol in sorted(form.free_symbols, key=str):
                    found.setdefault(symbol, None)
                if form.is_Symbol:
                    found[form] = size.node.hint if size.node.has_hint() else 4
    return {symbol: 4 if hint is None else hint for symbol, hint in found.items()}


def points(graph, placeholders, names):
    """Sizes to try, as {symbol: int}, an empty cache first, then those that differ most; each meets the graph's checks."""
    hints = symbols(placeholders)
    if not hints:
        return [{}]
    bare = lambda wanted: {
        form for node, name in zip(placeholders, names) for form in map(expression, node.meta["val"].shape)
        if name.startswith("past_key_values.") == wanted and not isinstance(form, int) and form.is_Symbol
    }  # fmt: skip
    cached = bare(True) - bare(False)  # the length of what is cached, and of nothing else
    out = []
    for i, offset in enumerate(OFFSETS):
        point = {symbol: max(1, hint + offset + (j if offset > 0 else 0)) for j, (symbol, hint) in enumerate(hints.items())}
        if i == 2 and cached:
            out.insert(0, {symbol: 0 if symbol in cached else size for symbol, size in point.items()})
        out.append(point)
    fits = lambda point: point != hints and all(bool(check.condition.subs(point)) for check in graph.checks)
    return [point for point in out if fits(point)]


def bound(node):
    """One more than the largest id that an integer input may hold: the rows of the smallest table that it indexes; None for a mask."""
    smallest, seen, open_ = None, {node}, [node]
    while open_:
        current = open_.pop()
        for user in current.users:
            name = short_name(user.target) if user.op == "call_function" else ""
            if name == "embedding" and user.args[1] is current:
                rows = user.args[0].meta["val"].shape[0]
                smallest = rows if smallest is None else min(smallest, rows)
            elif name in PASSES_ON and user not in seen and not user.meta["val"].dtype.is_floating_point and user.meta["val"].dtype != torch.bool:
                seen.add(user)
                open_.append(user)
    return smallest


def sample(node, point, generator):
    """A tensor for an input at the sizes of a point."""
    value = node.meta["val"]
    shape = [form if isinstance(form := expression(size), int) else int(form.subs(point)) for size in value.shape]
    values = getattr(node.meta.get("added"), "values", None)
    if values is not None:
        return torch.randint(values.start, values.stop, shape, generator=generator).to(value.dtype)
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(value.dtype)
    rows = None if value.dtype == torch.bool else bound(node)
    if rows is not None:
        return torch.randint(0, int(rows), shape, generator=generator).to(value.dtype)
    mask = torch.ones(shape, dtype=value.dtype)
    if len(shape) == 2 and shape[1] > 2:
        for i in range(1, shape[0]):  # the first row stays whole, the others are padded on the right or on the left
            mask[i, :2] = 0 if i % 2 == 0 else 1
            mask[i, -2:] = 0 if i % 2 else 1
    return mask


def difference(wanted, got):
    """The largest difference, relative to the RMS of what is wanted; infinite where shapes, or what is finite, differ."""
    if wanted.shape != got.shape:
        return float("inf")
    if wanted.dtype.kind != "f":
        return 0.0 if np.array_equal(wanted, got) else float("inf")
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(got)) or not np.array_equal(wanted[~finite], got[~finite], equal_nan=True):
        return float("inf")
    wanted, got = wanted[finite].astype(np.float64), got[finite].astype(np.float64)
    if not wanted.size:
        return 0.0
    return float(np.abs(wanted - got).max() / (np.sqrt(np.mean(np.square(wanted))) or 1.0))


@contextlib.contextmanager
def threads(number):
    """Run PyTorch with that many threads (0: as it is set) for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def session(path, disabled=(), optimised=True, threads=0):
    """An ONNX Runtime session on the CPU, with that many threads (0: as many as there are cores)."""
    import onnxruntime  # only who exports needs it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled))


@dataclass(frozen=True)
class Comparison:
    """A written file beside the graph that it was written from.

    `nodes`, `placeholders` and `outputs` are those that went into the file, `names` its (inputs, outputs), `words` name the symbols of
    the sizes, `place` begins each message.
    """

    path: object
    graph: object
    nodes: list
    placeholders: list
    outputs: list
    names: tuple
    words: dict
    place: str

    def agree(self):
        """Compare at two sizes or more (an empty cache in addition): an Agreement, or Broken / Refused in words."""
        with threads(self._threads()):
            return self._verdict(self._cases())

    def _threads(self):
        tensors = [*self.graph.root.parameters(), *self.graph.root.buffers()]
        return 1 if sum(tensor.numel() * tensor.element_size() for tensor in tensors) < SMALL else 0

    def _cases(self):
        cases, reasons, full = [], [], 0
        device = next((parameter.device for parameter in self.graph.root.parameters()), torch.device("cpu"))
        for i, point in enumerate(points(self.graph, self.placeholders, self.names[0])):
            generator = torch.Generator().manual_seed(i)
            given = {node: sample(node, point, generator).to(device) for node in self.placeholders}
            feeds = {name: _numpy(tensor) for name, tensor in zip(self.names[0], given.values())}
            try:
                wanted = self._wanted(given)
            except (RuntimeError, IndexError, ValueError) as error:
                reasons.append(f"{self._text(point)}: {error}")
                continue
            cases.append(Case(self._text(point), given, feeds, wanted))
            full += 0 not in point.values()
            if full == 2:
                break
        if not cases:
            tried = "; ".join(reasons[:2])
            raise Refused(f"{self.place}: the graph itself does not run at made-up sizes: {tried}. Pass check=False to write the file unchecked.")
        return cases

    def _verdict(self, cases):
        sizes = tuple(case.sizes for case in cases)
        worst, where, excess = self._worst(self._load(), cases)
        if excess <= 1:
            return Agreement(worst, sizes)
        error, _, rest = self._worst(self._load(disabled=("Pad_Fusion",)), cases)  # it moves a zero padding into a MaxPool, which pads with -inf
        if rest <= 1:
            note = "ONNX Runtime's Pad_Fusion is wrong here: InferenceSession(…, disabled_optimizers=['Pad_Fusion'])"
            return Agreement(error, sizes, ("Pad_Fusion",), (note,))
        error, _, rest = self._worst(self._load(optimised=False), cases)
        if rest <= 1:
            note = f"ONNX Runtime's optimisations are wrong here ({where}): use GraphOptimizationLevel.ORT_DISABLE_ALL"
            return Agreement(error, sizes, (), (note,))
        exact = [replace(case, wanted=self._wanted(case.given, double=True)) for case in cases]
        torch_is = max(difference(_numpy(e), _numpy(w)) for case, other in zip(exact, cases) for e, w in zip(case.wanted, other.wanted))
        this_is = self._worst(self._load(), exact)[0]
        if this_is <= ROUNDING * torch_is < 0.1:
            return Agreement(worst, sizes, (), (f"rounding: against float64 the error is {this_is:.1e} here and {torch_is:.1e} in PyTorch",))
        found = f"ONNX Runtime and PyTorch differ at {where}: error {worst:.1e} of the RMS"
        raise Broken(f"{self.place}: {found}. Nothing was written; please report this.")

    def _wanted(self, given, double=False):
        return execute(self.graph.root, self.nodes, given, self.outputs, double)

    def _load(self, **options):
        try:
            return session(self.path, threads=self._threads(), **options)
        except Exception as error:  # ONNX Runtime's own exceptions have no public parent
            words = str(error).strip()[:400]
            raise Refused(f"{self.place}: ONNX Runtime cannot load the file: {words}\nCast the model to float32, or pass check=False.") from error

    def _worst(self, runner, cases):
        """(worst error, where, worst error as a multiple of what is allowed)."""
        worst, where, excess = 0.0, "", 0.0
        taken = {item.name for item in runner.get_inputs()}
        for case in cases:
            try:
                got = runner.run(None, {name: value for name, value in case.feeds.items() if name in taken})
            except Exception as error:  # as above
                raise Broken(f"{self.place}: ONNX Runtime fails at {case.sizes}: {str(error).strip()[:400]}") from error
            for name, want, have in zip(self.names[1], case.wanted, got, strict=True):
                want = _tensor(want)
                error = difference(_numpy(want), have)
                ratio = error / TOLERANCE.get(want.dtype, 2e-5)
                if ratio > excess:
                    worst, where, excess = error, f"{name} ({case.sizes})", ratio
        return worst, where, excess

    def _text(self, point):
        return ", ".join(f"{self.words.get(str(symbol), symbol)}={size}" for symbol, size in point.items()) or "the captured sizes"


def _tensor(value):
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def _numpy(value):
    value = _tensor(value).detach().cpu()
    return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
