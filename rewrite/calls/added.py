"""Inputs beside the model's own, which a pass declares: a placeholder behind the others, and a place in the signature.

    live(input_ids=…)   -->   live(input_ids=…, task_ids=…)

A call binds, checks and defaults them as it does the model's own; `generate`, trainers and exports find them in the signature.
"""

from dataclasses import replace

import torch

from ..errors import Refused
from ..graph import expression


def batch_of(graph):
    """The size of a graph's batch as its fake values carry it, or None where there is none or it is not free."""
    entry = getattr(graph.signature, "entries", {}).get(graph.name)
    words = {symbol: word for slot in (entry.slots if entry else ()) for symbol, word in slot.words.items()}
    sizes = (size for node in graph.placeholders for size in node.meta["val"].shape if not isinstance(expression(size), int))
    return next((size for size in sizes if words.get(str(expression(size))) == "batch"), None)


def add(graph, graphs, name, wanted, place):
    """The placeholder of an input of a pass's own (`wanted`, an Input) in one of the `graphs` of a model; made where it is not there yet.

    Raises Refused, with `place`, where the model has an input of that name, and where a graph has no free batch or is no call from outside.
    """
    found = dict(zip(graph.inputs, graph.placeholders)).get(name)
    if found is not None and "added" not in found.meta:
        raise Refused(f"{place}: the model has an input {name!r} of its own. Call the pass's another name.")
    if found is not None:
        return found
    batch = batch_of(graph)
    if batch is None:
        reason = "is called from inside an opaque module" if graph.is_inner else "was captured for one batch size"
        raise Refused(f"{place}: it reads the input {name!r}, an entry for each row of the batch, and {graph.name!r} {reason}.")
    if name in graph.signature.names:
        raise Refused(f"{place}: the model has an argument {name!r} of its own. Call the pass's another name.")
    with graph.fx.inserting_after(graph.placeholders[-1]):
        node = graph.fx.placeholder(name)
    with graph.fake_mode:
        value = torch.empty((batch, *wanted.shape), dtype=wanted.dtype, device=graph.placeholders[0].meta["val"].device)
    node.meta = {"path": "", "made": "input", "val": value, "added": wanted}
    graph.inputs = (*graph.inputs, name)
    _sign(graph, graphs, name, wanted, str(expression(batch)))
    return node


def _sign(graph, graphs, name, wanted, symbol):
    """Give every module that is called a signature that knows the input; the whole model hands it on to its encoder where that one reads it."""
    grown = {id(graph.signature): graph.signature.grown(name, wanted, graph.name, symbol)}
    for other in graphs:
        if other.signature is not None and id(other.signature) not in grown:
            encodes = (name,) if other.signature.encoder == graph.owner else ()
            grown[id(other.signature)] = replace(other.signature.grown(name), encodes=(*other.signature.encodes, *encodes))
    for other in graphs:
        other.signature = grown.get(id(other.signature), other.signature)
