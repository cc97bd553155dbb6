"""The graph as text: one line a node, no addresses, constants by path; what reports, errors, goldens and reviews look at.

    %linear = linear(%x, @layers.0.mlp.up.weight ❄, @layers.0.mlp.up.bias ❄)    (b, s, 56)  mlp.up
"""

import difflib
import functools
from typing import NamedTuple

import torch
from torch import fx

from . import graph as g


def _target(node):
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name, overload = target._schema.name, target._overloadname
        name = name.removeprefix("aten::").replace("::", ".")
        return name if overload == "default" else f"{name}.{overload}"
    return getattr(target, "__name__", str(target))


@functools.lru_cache(4096)
def _size(expression):
    return str(expression)


def _type(value):
    if isinstance(value, torch.Tensor):
        return f"({', '.join(_size(g.expression(s)) for s in value.shape)})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_type(v) for v in value)}]"
    return ""


class _Drawn(NamedTuple):
    op: str
    target: object
    name: str
    args: tuple
    kwargs: dict
    meta: dict


def _is_frozen(value):
    return isinstance(value, torch.Tensor) and not value.requires_grad


def line(node, root=None, roles=None):
    """One node as text. `root` (a tree, or the paths themselves) tells which constants are frozen (❄), `roles` maps nodes to their role."""

    def arg(a):
        if isinstance(a, fx.Node):
            if a.op != "get_attr":
                return f"%{a.name}"
            is_frozen = a.target in root if isinstance(root, set) else root is not None and _is_frozen(g.attribute(root, a.target))
            return f"@{a.target}" + (" ❄" if is_frozen else "")
        if isinstance(a, (list, tuple)):
            return f"[{', '.join(arg(v) for v in a)}]"
        return str(a).removeprefix("torch.")

    if node.op == "placeholder":
        text = f"%{node.name}: input"
    elif node.op == "output":
        text = f"return {', '.join(arg(a) for a in node.args[0])}"
    else:
        given = ", ".join([*(arg(a) for a in node.args), *(f"{k}={arg(v)}" for k, v in node.kwargs.items())])
        text = f"%{node.name} = {'self.' + node.target if node.op == 'call_module' else _target(node)}({given})"
    role = node.meta.get("role") or (roles.get(node, "") if roles else "")
    return f"{text}  {_type(node.meta.get('val'))}  {role}  {node.meta.get('region', '')}".rstrip()


def show(graph, roles=None):
    """The whole graph as text, one line a node in graph order (constants stand where they are used)."""
    return "\n".join(line(node, graph.root, roles) for node in graph.nodes if node.op != "get_attr") + "\n"


class Picture:
    """A graph as it is now, printed only where it is asked for: most pictures of a graph before a pass are never looked at."""

    def __init__(self, graph):
        self.nodes = [_Drawn(n.op, n.target, n.name, n.args, n.kwargs, dict(n.meta)) for n in graph.nodes if n.op != "get_attr"]
        self.frozen = {n.target for n in graph.nodes if n.op == "get_attr" and _is_frozen(g.attribute(graph.root, n.target))}

    def __str__(self):
        return "\n".join(line(node, self.frozen) for node in self.nodes) + "\n"


def diff(before, after, names=("before", "after"), context=2):
    """The difference of two graphs (or of two texts of `show`) as a unified diff."""
    lines = [(str(g_) if isinstance(g_, (str, Picture)) else show(g_)).splitlines() for g_ in (before, after)]
    return "\n".join(difflib.unified_diff(*lines, *names, n=context, lineterm=""))


def to_networkx(graph):
    """The dataflow as a networkx.DiGraph: nodes are names with `op`, `target`, `path`, `role`; edges run from value to user."""
    import networkx as nx

    result = nx.DiGraph(name=graph.name)
    for node in graph.nodes:
        result.add_node(node.name, op=node.op, target=str(node.target), path=g.path_of(node), role=node.meta.get("role", ""))
        result.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return result
