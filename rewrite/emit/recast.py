"""A graph whose tensors were cast after capture (`live.to(torch.float16)`): the same nodes, with fake values of the dtypes at hand."""

import operator
from dataclasses import replace

import torch
from torch import fx

from ..errors import Refused
from ..graph import HOST, attribute, count, dtype_of, least, select, unless


def recast(graph, place):
    """The graph itself if its tensors have the dtypes that they were captured in, else a copy for the dtypes that they have now."""
    casts = {}
    for node in graph.nodes:
        captured = node.meta.get("val")
        if node.op != "get_attr" or not isinstance(captured, torch.Tensor):
            continue
        now = attribute(graph.root, node.target).dtype
        if casts.setdefault(captured.dtype, now) != now:
            raise Refused(
                f"{place}: of the tensors captured as {captured.dtype}, some are {casts[captured.dtype]} now and {node.target} is {now}."
                " Cast the whole model with one .to(dtype)."
            )
    if all(captured == now for captured, now in casts.items()):
        return graph
    copied, new = fx.Graph(), {}
    for node in graph.nodes:
        new[node] = copied.node_copy(node, new.get)
    with graph.fake_mode, torch.no_grad():
        for node in copied.nodes:
            value = node.meta.get("val")
            if node.op in ("placeholder", "get_attr") and isinstance(value, torch.Tensor):
                node.meta["val"] = value.to(casts.get(value.dtype, value.dtype))
            elif node.op == "call_function" and node.target is not count:
                node.meta["val"] = _value(node, value)
            elif node.op == "call_module" and node.target in graph.training_only:
                node.meta["val"] = node.args[0].meta["val"]
    return replace(graph, fx=copied)


def _value(node, before):
    """The fake value of a call, from the new values of its arguments; sizes stay as they were."""
    is_size = isinstance(before, (torch.SymInt, torch.SymFloat, torch.SymBool))
    if is_size or node.target in HOST and node.target not in (select, unless, dtype_of, least, operator.getitem):
        return before
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _static(source))
    if node.target is select:
        return args[2]
    return getattr(node.target, "reference", node.target)(*args, **kwargs)


def _static(source):
    if source.op == "get_attr" and source.target.rpartition(".")[2] == "training":
        return False
    return source.meta["val"]
