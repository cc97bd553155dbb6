"""The invariants of a graph after a pass. Each is a short function `(graph, record) -> reason or None`; what it says is our fault.

`record` is the Record of the graph before the passes: its signature, its tied tensors, what the passes made and let train.
"""

from dataclasses import dataclass, field

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from . import graph as g
from .edit.body import signature
from .errors import Broken
from .report import Report
from .text import diff, line


@dataclass
class Record:
    """What must stay: the inputs and outputs of the captured graph, the tied parameters; what the passes declared (`report`); `graphs` are all variants over the tree."""

    inputs: tuple
    outputs: int
    tied: tuple[tuple[str, ...], ...]
    report: Report
    graphs: list
    known: dict = field(default_factory=dict)

    @staticmethod
    def of(graph, report, graphs):
        groups = {}
        for name, parameter in graph.root.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        tied = tuple(tuple(names) for names in groups.values() if len(names) > 1)
        return Record(tuple(n.target for n in graph.placeholders), len(_output(graph).args[0]), tied, report, graphs, graphs[0].known.setdefault(("shapes", graph.fake_mode), {}))


def _output(graph):
    return next(iter(reversed(graph.nodes)))


def lint(graph, record):
    """Every value is made before it is read, names are unique."""
    try:
        graph.fx.lint()
    except RuntimeError as error:
        return str(error).splitlines()[0]


def canonical(graph, record):
    """Only the node kinds of a canonical graph."""
    for node in graph.nodes:
        if node.op == "call_function" and not (isinstance(node.target, torch._ops.OpOverload) or node.target in g.HOST or hasattr(node.target, "reference")):
            return f"{line(node)}: {node.target} is neither an ATen op, nor one of ours, nor size arithmetic"
        if node.op == "call_module" and node.target not in graph.opaque and node.target not in graph.training_only:
            return f"{line(node)}: calls a module that is not opaque"
        if node.op == "call_method":
            return f"{line(node)}: a method call"
    if _output(graph).op != "output" or not isinstance(_output(graph).args[0], tuple):
        return "the last node is not one flat tuple of outputs"


def constants_exist(graph, record):
    """Every get_attr finds its tensor or flag on the module tree, once."""
    seen = set()
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        if not g.has_attribute(graph.root, node.target):
            return f"@{node.target} is not on the module tree"
        if g.attribute(graph.root, node.target) is None:
            return f"@{node.target} has left memory, and %{node.name} still reads it"
        if node.target in seen:
            return f"@{node.target} stands twice"
        seen.add(node.target)


def shapes_agree(graph, record):
    """Running each op on the fake values of its arguments gives the fake value that it carries (once per distinct op and shapes)."""
    mode, told = graph.fake_mode, {}

    def signature_of(value):  # sites share their values
        if isinstance(value, torch.Tensor):
            if id(value) not in told:
                told[id(value)] = signature(value)
            return told[id(value)]
        return tuple(map(signature_of, value)) if isinstance(value, (list, tuple)) else signature(value)

    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if "made" not in node.meta and not any("made" in n.meta for n in node.all_input_nodes):
            continue  # as it was captured
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        key = (node.target, signature_of(args), tuple((k, signature_of(v)) for k, v in kwargs.items()))
        try:
            found = record.known.get(key)
        except TypeError:
            continue
        if found is None:
            if any(n.meta.get("val") is None for n in node.all_input_nodes) or torch.Tag.data_dependent_output in node.target.tags or torch.Tag.dynamic_output_shape in node.target.tags:
                continue  # a flag, a live dtype, or a size that only the data gives
            try:
                with mode, torch.no_grad(), enable_python_dispatcher():
                    found = signature(node.target(*args, **kwargs))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                return f"{line(node)}: {str(error).splitlines()[0]}"
            record.known[key] = found
        wanted = signature_of(node.meta.get("val"))
        if found != wanted and _at_hint(found, mode) != _at_hint(wanted, mode):
            return f"%{node.name} gives {found}, its users were written for {wanted}"


def _at_hint(found, mode):
    """A signature at the sizes of the example: `Min(64, s)` and `s` are one where s was 7."""
    if isinstance(found, tuple):
        return tuple(_at_hint(part, mode) for part in found)
    if not isinstance(found, sympy.Basic):
        return found
    hints = getattr(mode.shape_env, "backed_var_to_val", None)  # its name since PyTorch 2.13
    return found.xreplace(mode.shape_env.var_to_val if hints is None else hints)


def signature_kept(graph, record):
    """The same inputs in the same order, then those that passes declared; as many outputs."""
    inputs = tuple(n.target for n in graph.placeholders)
    kept = inputs[: len(record.inputs)] == record.inputs and set(inputs[len(record.inputs) :]) <= record.report.inputs.keys()
    if not kept:
        return f"inputs were {record.inputs}, now {inputs}"
    if len(_output(graph).args[0]) != record.outputs:
        return f"{record.outputs} outputs before, now {len(_output(graph).args[0])}"


def no_orphans(graph, record):
    """Every new tensor is read by some variant of the graph."""
    used = {node.target for part in record.graphs for node in part.nodes if node.op == "get_attr" and node.users}
    for path in record.report.made:
        if path not in used and path not in record.report.feeds:
            return f"@{path} was made, and nothing reads it"


def aliases_kept(graph, record):
    """Tied parameters are still one tensor."""
    for names in record.tied:
        found = {id(g.attribute(graph.root, name)) for name in names if g.has_attribute(graph.root, name)}
        if len(found) > 1:
            return f"{' and '.join(names)} were one tensor, now they are {len(found)}"


def grads_declared(graph, record):
    """Exactly what passes made or named may train."""
    for path, parameter in graph.root.named_parameters(remove_duplicate=False):
        declared = path in record.report.made or path in record.report.trains
        if parameter.requires_grad and not declared:
            return f"@{path} would train, and no pass said so"
        if path in record.report.trains and not parameter.requires_grad:
            return f"a pass said that @{path} trains, and it does not"


INVARIANTS = (lint, canonical, constants_exist, shapes_agree, signature_kept, no_orphans, aliases_kept, grads_declared)


def verify(graph, record, after, before=None):
    """Check every invariant. Raises Broken naming the pass (`after`) and the invariant, with the difference to `before` (a `Picture`, or a text of `show`)."""
    for invariant in INVARIANTS:
        reason = invariant(graph, record)
        if reason:
            changed = "\n" + diff(before, graph, (f"before {after}", f"after {after}")) if before is not None else ""
            raise Broken(f'after pass "{after}": {invariant.__name__}: {reason}{changed}')
