"""A live model as a `.pt2` file: what `torch.export.load` reads in a process that knows torch alone.

    live.graph, printed  -->  ExportedProgram(input_ids, attention_mask) -> {"logits": …}

The flat graph is printed without blocks over a shallow copy of the tree, in eval mode, and torch.export traces that: names of tensors stay,
sizes that the capture left free stay free. The file is read back and compared before it gets its name.
"""

import inspect
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import Broken, Refused
from ..graph import clone_tree, expression
from .live import compiled
from .outline import outline
from .source import top_source
from .unlabelled import unlabelled


def export_program(live, path, variant="forward"):
    """Write one variant of a live model ("forward", "past", …) to `path`, atomically; gives the path.

    What needs labels (the loss) is left out. Raises Refused for opaque modules, unknown variants and folders that cannot be written.
    """
    graph = live.graph
    if graph is None:
        raise Refused("this live model came out of a pickle, which carries no graph.  Load it with load(model, folder), then export.")
    found = {g.name: g for g in graph.all()}
    if variant not in found:
        raise Refused(f'this model has no variant "{variant}".  It has: {", ".join(found)}.')
    graph = found[variant]
    if graph.opaque:
        place, reason = next(iter(graph.opaque.items()))
        raise Refused(f"{place} could not be captured ({reason}), so no program can hold it.  Use the live model itself, or save(live, folder).")
    path = Path(path)
    if not path.parent.is_dir():
        raise Refused(f"{path.parent} is not a folder.  Make it first.")
    graph = replace(unlabelled(graph) or graph, blocks=(), root=clone_tree(live))
    module = _module(graph)
    inputs = example(graph)
    free = torch.export.Dim.DYNAMIC
    shapes = {n.name: {d: free for d, size in enumerate(n.meta["val"].shape) if not isinstance(expression(size), int)} for n in graph.placeholders}
    with torch.no_grad():
        program = torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True)
        _write(program, path, inputs, module(**inputs))
    return path


def example(graph):
    """One small tensor for each input, of a graph's dtypes and of sizes that the capture met: node name → tensor."""

    def made(node):
        value, values = node.meta["val"], getattr(node.meta.get("added"), "values", None)
        sizes = [int(size.node.hint) if isinstance(size, torch.SymInt) else size for size in value.shape]
        filling = values[-1] if values else 0 if value.is_floating_point() else 1
        return torch.full(sizes, filling, dtype=value.dtype, device=value.device)

    return {node.name: made(node) for node in graph.placeholders}


def _module(graph):
    """A module with the tree of a graph's root (so that tensors keep their names) whose forward is the whole graph; outputs by name."""
    run = compiled(top_source(outline(graph), graph.root, graph.name, regions=False))
    names = [node.name for node in graph.placeholders]

    def forward(self, **inputs):
        return dict(zip(graph.outputs, run(self, *(inputs[name] for name in names))))

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(parameters)
    module = type("Program", (nn.Module,), {"forward": forward})()
    module._modules, module._parameters, module._buffers = graph.root._modules, graph.root._parameters, graph.root._buffers
    module._non_persistent_buffers_set = graph.root._non_persistent_buffers_set
    return module.eval()


def _write(program, path, inputs, wanted):
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".pt2", dir=path.parent)
    except OSError as reason:
        raise Refused(f"{path.parent} cannot be written ({reason.strerror}).  Choose another folder.") from None
    os.close(handle)
    try:
        torch.export.save(program, name)
        found = torch.export.load(name).module()(**inputs)
        for key, value in wanted.items():
            if not torch.allclose(found[key], value, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise Broken(f"{path}: the program that was read back gives another {key}.")
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
