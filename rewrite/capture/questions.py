"""What a model's code asks of sizes and values while it is traced: who asked, on which line, and the answer that it gets.

    if x.shape[1] > 16: …                 a condition on a size: answered from the example, kept with its place
    assert lengths.max() <= length        a condition on values: taken to hold, asked at each call
    if torch.rand([]) < 0.1: continue     a layer left out by chance: no, and the draw is written down
"""

import dis
import sys
from dataclasses import dataclass
from pathlib import Path

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

_LIBRARY, _OURS = torch.__path__[0], f"{Path(__file__).parent.parent}/"


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that the run took for true: the modules at work, the line of the model's code, and whether it was torch's
    own arithmetic on fake tensors that asked (it then decides about strides and broadcasting, never about which op runs)."""

    condition: sympy.Basic
    stack: tuple[str, ...]
    place: str
    torch_asked: bool


def source_line():
    """The line of the model's own code that is running, as text; None outside of it."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_LIBRARY, _OURS, "<")):
            return f"{name}:{frame.f_lineno}, in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def asserted():
    """The answer with which the `assert` whose test is being decided goes on; None where other code decides."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith((_LIBRARY, _OURS, "<")):
        frame = frame.f_back
    if frame is None:
        return None
    at = [step for step in dis.get_instructions(frame.f_code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    place = next((i for i, step in enumerate(at) if step.offset == frame.f_lasti), len(at))
    while place < len(at) - 1 and at[place].opname in ("COMPARE_OP", "TO_BOOL"):
        place += 1
    if place >= len(at) - 1 or not (at[place + 1].opname == "LOAD_ASSERTION_ERROR" or at[place + 1].argrepr == "AssertionError"):
        return None
    return "IF_TRUE" in at[place].opname if "POP_JUMP" in at[place].opname else None


_ASKING = (
    "symbolic_shapes.py", "sym_node.py", "recording.py", "proxy_tensor.py", "torch/__init__.py", "capture/trace.py", "capture/questions.py", "functools.py", "contextlib.py",
)  # fmt: skip
_OPERATORS = torch.__file__
# where torch computes the shapes of fakes; the rest of torch (functional, nn) decides which ops run, as a model's code does
_FAKING = tuple(f"{_LIBRARY}/{name}" for name in ("_subclasses/", "_meta_registrations.py", "_refs/", "_decomp/", "_prims/", "_prims_common/"))


def _asked_by_torch():
    frame, by_code = sys._getframe(2), False
    while frame.f_back is not None and frame.f_code.co_filename.endswith(_ASKING):
        by_code |= frame.f_code.co_filename == _OPERATORS  # Python code asks a size through its operators, compiled code asks the node itself
        frame = frame.f_back
    return not by_code or frame.f_code.co_filename.startswith(_FAKING)


class Shapes(ShapeEnv):
    """A ShapeEnv that remembers which module and which line asked for a condition on a size.

    Whether a size that depends on values (the number of labels that count) is zero is answered with no, and kept in `filled`; whether a
    number drawn is so small that a layer is left out, with no, and the draw is written down as `drops`. What an `assert` line asks of a
    value (`lengths.max().item() <= length`) is taken to hold, and the graph asks it at each call.
    """

    asked, tracer = None, None

    def _evaluate_expr(self, asked, *args, **kwargs):
        try:
            return super()._evaluate_expr(asked, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            if self.tracer.meets_drop():
                return sympy.false
            held = asserted()
            if held is not None and self.tracer.keep_assert(asked, held, source_line()):
                return sympy.sympify(held)
            symbol = _asks_for_nothing(asked)
            if symbol is None:
                raise
            self.filled[symbol] = source_line()
            return sympy.sympify(asked.subs(symbol, 1))

    def _log_guard(self, prefix, guard, forcing_spec):
        if self.asked is not None and not self._suppress_guards_tls():
            self.asked.append(Guard(guard, tuple(path for path, _ in self.tracer.stack), source_line(), _asked_by_torch()))
        return super()._log_guard(prefix, guard, forcing_spec)


def _asks_for_nothing(condition):
    """The symbol of a condition that is otherwise at 0 than at every larger value; None for other conditions."""
    symbols = condition.free_symbols
    if len(symbols) != 1 or not isinstance(condition, sympy.core.relational.Relational):
        return None
    (symbol,) = symbols
    values = [condition.subs(symbol, value) for value in (0, 1, 2, 10**9)]
    return symbol if values[0] != values[1] and len(set(values[1:])) == 1 else None
