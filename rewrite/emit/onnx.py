"""A graph as an ONNX file.

The file is written straight from the captured graph, in evaluation mode, into a folder of its own beside the target, compared there with
PyTorch in ONNX Runtime, and only then moved to where it was asked for. What cannot be exported is refused by node before that.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import fx

from ..errors import Refused
from ..graph import Graph, attribute, reached
from . import arithmetic, mutation, translate
from .agree import Comparison
from .building import IR_VERSION, OPSET, Value, onnx_dtype
from .recast import recast
from .writer import Untranslatable, Writer

LARGE = 1536 * 2**20  # bytes of weights from which they go into a file of their own: one protobuf ends at 2 GB
TRAINING_ONLY = ("loss", "labels")
TABLES = (translate, arithmetic)  # importing them fills the table


@dataclass(frozen=True)
class ExportReport:
    """What was written: the file, its inputs and outputs by name, and the worst error against PyTorch (None: not checked).

    `notes` says which ops went to torchlib or were decomposed, and what ONNX Runtime must be told; `disabled_optimizers` are its
    optimisers to leave out when this file is loaded.
    """

    path: str
    bytes: int
    nodes: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float | None
    sizes: tuple[str, ...] = ()
    disabled_optimizers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self):
        checked = "not checked" if self.error is None else f"error {self.error:.1e} of the RMS in ONNX Runtime ({'; '.join(self.sizes)})"
        head = f"{self.path}: {self.bytes / 1e6:.1f} MB, {self.nodes} nodes, opset {self.opset}, {checked}"
        ends = f"  inputs   {', '.join(self.inputs)}", f"  outputs  {', '.join(self.outputs)}"
        return "\n".join([head, *ends, *(f"  {note}" for note in self.notes)])


def export_onnx(live, path, variant=None, cache=False, check=True):
    """Write a live model (or a Graph) as ONNX; returns an ExportReport.

    `variant` names another graph of the model than the one without a cache ("past", "encoder", …); `cache=True` is `variant="past"`:
    the decoder with its KV cache as inputs and outputs, an empty one included. The loss and its labels are left out. Weights above
    1.5 GB go into `path` + ".data". Raises Refused (what cannot be exported, an unwritable folder) and Broken (the file does not
    compute what PyTorch does); then nothing is left behind.
    """
    path = Path(path)
    graph = _variant(live, variant, cache)
    place = f"export_onnx of {graph.name!r}"
    graph = recast(graph, place)
    nodes, placeholders, outputs = _kept(graph)
    _refuse(graph, nodes, place)
    folder = _workplace(path)
    try:
        model, writer = _model(graph, nodes, placeholders, outputs, place)
        target = folder / path.name
        _save(model, target)
        names = tuple(value.name for value in model.graph.inputs), tuple(value.name for value in model.graph.outputs)
        found = Comparison(target, graph, nodes, placeholders, [out for _, out in outputs], names, words_of(graph), place).agree() if check else None
        size = sum(file.stat().st_size for file in folder.iterdir())
        for file in sorted(folder.iterdir(), key=lambda file: file == target):  # the weights first, the file that names them last
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    notes = (*(found.notes if found else ()), *_fallen(writer))
    checked = (found.error, found.sizes, found.disabled_optimizers) if found else (None, (), ())
    return ExportReport(str(path), size, len(model.graph), OPSET, *names, *checked, notes)


def _variant(live, variant, cache):
    graph = live if isinstance(live, Graph) else getattr(live, "graph", None)
    if not isinstance(graph, Graph):
        raise Refused(f"export_onnx: {type(live).__name__} is not a rewritten model and carries no graph. Pass what rewrite() or capture() returned.")
    if cache and variant is None:
        variant = "past"
    if variant is None or variant == graph.name:
        return graph
    if variant not in graph.variants:
        has = ", ".join(repr(name) for name in (graph.name, *graph.variants))
        asked = f"{variant!r} (cache=True)" if cache else repr(variant)
        raise Refused(f"export_onnx: this model has no graph {asked}. It has: {has}. Choose one with variant=….")
    return graph.variants[variant]


def _kept(graph):
    """(nodes in order, placeholders, [(name, node)]) of what remains without the loss and its labels."""
    every = list(graph.nodes)
    [returned] = every[-1].args
    outputs = [(name, out) for name, out in zip(graph.outputs, returned) if name not in TRAINING_ONLY and out is not None]
    needed, stack = set(), [out for _, out in outputs if isinstance(out, fx.Node)]
    changed = {}
    for node in every:
        above = node if mutation.is_mutating(node) else None
        while above is not None and (above := mutation.source(above)) is not None:
            changed.setdefault(above, []).append(node)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [*node.all_input_nodes, *changed.get(node, ())]
    names = dict(zip(graph.placeholders, graph.inputs))
    lost = {node for name, out in zip(graph.outputs, returned) if name in TRAINING_ONLY and isinstance(out, fx.Node) for node in reached(out, lambda n: n.all_input_nodes)}
    placeholders = [node for node in graph.placeholders if isinstance(node.meta.get("val"), torch.Tensor) and (node in needed or node not in lost)]
    placeholders = [node for node in placeholders if names[node] not in TRAINING_ONLY]
    return [node for node in every if node in needed and node.op != "placeholder"], placeholders, outputs


def _refuse(graph, nodes, place):
    """Say what no export can hold: modules that stayed opaque, weights that are not there."""
    opaque = [node for node in nodes if node.op == "call_module" and node.target not in graph.training_only]
    if opaque:
        lines = [f"  {node.target}: {graph.opaque.get(node.target, 'it could not be captured')}" for node in opaque]
        head = f"{place}: {len(opaque)} part(s) of the model could not be captured and have no ONNX form:"
        raise Refused("\n".join([head, *lines, "Put modules in their place that run without loops over sizes or data, then rewrite and export again."]))
    for node in nodes:
        if node.op != "get_attr" or node.target.rpartition(".")[2] == "training":
            continue
        value = attribute(graph.root, node.target)
        if value.is_meta:
            raise Refused(f"{place}: {node.target} is on the meta device, so there are no weights to write. Load the model with its weights.")


def _workplace(path):
    """A folder beside the target, in which the file is made."""
    if path.is_dir():
        raise Refused(f"export_onnx: {path} is a folder. Name the file, such as {path / 'model.onnx'}.")
    try:
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        where = path.parent.resolve()
        raise Refused(f"export_onnx: cannot write in {where}: {error.strerror}. Choose a folder that exists and is writable.") from error


def _model(graph, nodes, placeholders, outputs, place):
    writer = Writer(graph, nodes, words_of(graph))
    names = dict(zip(graph.placeholders, graph.inputs))
    for node in placeholders:
        fake = node.meta["val"]
        value = Value(writer, name=names[node], type=ir.TensorType(onnx_dtype(fake.dtype)), shape=writer.shape(fake))
        writer.onnx.inputs.append(value)
        writer.values[node] = value
        writer.sizes.learn(value, fake)
    try:
        writer.run(nodes)
        results = [(name, out, writer.argument(out)) for name, out in outputs]
    except Untranslatable as reason:
        raise Refused(f"{place}: {reason}\nNothing was written.") from reason
    taken = set(names.values())
    for name, out, result in results:
        value = writer.value(result)
        name = name.replace("past_key_values", "present", 1) if name.startswith("past_key_values.") else name
        name = f"{name}.out" if name in taken else name
        if value.producer() is None or value in writer.onnx.outputs:
            value = writer.copy(value)
        value.name = name
        taken.add(name)
        writer.onnx.outputs.append(value)
    model = ir.Model(writer.onnx, ir_version=IR_VERSION, producer_name="rewrite")
    RemoveUnusedNodesPass()(model)  # also empties optional outputs that nobody reads, which would be computed
    return model, writer


def words_of(graph):
    """{symbol of a size, as text: "batch", "length", …}, as the signature of the captured call names them."""
    entry = getattr(graph.signature, "entries", {}).get(graph.name)
    words = {symbol: word for slot in (entry.slots if entry else ()) for symbol, word in slot.words.items()}
    taken = list(words.values())
    return {symbol: word for symbol, word in words.items() if taken.count(word) == 1}


def _save(model, target):
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size < LARGE:
        ir.save(model, target)
    else:
        ir.save(model, target, external_data=f"{target.name}.data")


def _fallen(writer):
    """Notes on the ops that the own table did not write."""
    words = {"torchlib": "by torchlib", "decomposed": "decomposed", "torchlib failed": "torchlib gave up on"}
    for kind, found in writer.fallen.items():
        if found:
            yield f"{words[kind]}: " + "; ".join(f"{name} ×{number}" if number > 1 else name for name, number in sorted(found.items()))
