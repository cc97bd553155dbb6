"""Blocks that can be computed backwards: two streams, each added to what the other one gives.

    y = a * c + F(x); d = b * x + G(y)    -->    x = (d - G(y)) / b; c = (y - F(x)) / a

Read off the nodes of a block as they stand after all passes: F must not depend on c, G on x and c through y alone. So a pass that changes a block
further is either part of F or G, or the block is none of these.
"""

from dataclasses import dataclass

import torch
from torch import fx

from ..training.backward import REVERSIBLE
from .outline import Piece, has_effect

aten = torch.ops.aten


@dataclass(eq=False)
class Chain(Piece):
    """Consecutive calls of blocks that are run again for backward: `pieces`, in order; `inverses` are theirs, None where the inputs are kept: of the first, the last, and as often as the pass says."""

    pieces: tuple = ()
    inverses: tuple = ()


def chains(outline):
    """The chains of a cut graph, and a note for each value that asks for a reversible block and does not get one. At least three blocks make one."""
    found, notes, run = [], [], []
    for step in [*outline.steps, None]:
        if run and not _continues(run[-1], step):
            if len(run) > 2:
                found.append(_chain(run))
            elif len(run) == 1 and isinstance(step, Piece):
                notes.append(f"{step.path} is kept for backward as any other: it is no reversible block")
            run = []
        if not isinstance(step, Piece):
            continue
        if run and not (len(step.outputs) == 2 and inverse(step, *run[-1].outputs) is not None):
            run.append(step)  # the last one of a chain is run again from its inputs, whatever it gives
            if len(run) > 2:
                found.append(_chain(run))
            run = []
        elif run or _is_start(step):
            run.append(step)
    return found, notes


def _is_start(piece):
    return len(piece.outputs) == 2 and REVERSIBLE in piece.outputs[1].meta and not _writes(piece)


def _continues(before, step):
    """Does a step take both streams of the piece before it, alone?"""
    if not isinstance(step, Piece) or _writes(step) or not _is_start(before):
        return False
    inside = {*before.nodes, *step.nodes}
    return all(value in step.inputs and all(user in inside for user in value.users) for value in before.outputs)


def _writes(piece):
    """Does a second run do more than the first?"""
    return any(n.op == "call_module" or has_effect(n) and not (isinstance(n.target, torch._ops.OpOverload) and not n.target._schema.is_mutable) for n in piece.nodes)


def _chain(run):
    every = run[0].outputs[1].meta[REVERSIBLE]
    inner = [None, *(inverse(piece, *before.outputs) if every is True or i % every else None for i, (before, piece) in enumerate(zip(run, run[1:-1]), 1)), None]
    handed = {value for piece in run[:-1] for value in piece.outputs}
    inputs = list(dict.fromkeys(value for piece in run for value in piece.inputs if value not in handed))
    for before, piece in zip(run, run[1:]):
        piece.inputs = [*before.outputs, *(value for value in piece.inputs if value not in before.outputs)]
    return Chain(run[0].path, 0, [n for piece in run for n in piece.nodes], inputs, run[-1].outputs, pieces=tuple(run), inverses=tuple(inner))


def inverse(piece, x, c):
    """The inverse of a block as a Piece of its own, from its two outputs to the streams `x` and `c` that entered it; None where it has none."""
    y, d = piece.outputs
    inside = set(piece.nodes)
    first, second = _term(y, c), _term(d, x)
    if first is None or second is None or REVERSIBLE not in d.meta:
        return None
    (a, f), (b, g) = first, second
    f_nodes, f_ends = _sources(f, inside, {x})
    g_nodes, g_ends = _sources(g, inside, {y})
    if {c, y} & f_ends or {x, c} & g_ends or any(has_effect(n) and n.target is not aten.scaled_dot_product_attention.default for n in g_nodes):
        return None
    graph, env = fx.Graph(), {}

    def value(node):
        if node not in env:  # a size, or a tensor of the block
            env[node] = graph.create_node(node.op, node.target, (), {}, node.name)
            env[node].meta = dict(node.meta)
        return env[node]

    def copied(nodes):
        for node in sorted(nodes):
            env[node] = graph.node_copy(node, value)
            env[node].meta = dict(node.meta)

    def back(total, part, factor, like):
        left = graph.call_function(aten.sub.Tensor, (total, part))
        result = graph.call_function(aten.div.Tensor, (left, factor))
        left.meta, result.meta = ({"val": like.meta["val"], "path": d.meta.get("path", ""), "made": d.meta.get("made")} for _ in range(2))
        return result

    rest = [n for n in piece.inputs if n not in (x, c)]
    for node in (y, d, *rest):
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    inputs = [env[node] for node in (y, d, *rest)]
    copied(g_nodes)
    env[x] = back(env[d], value(g), b, x)
    copied(f_nodes)
    env[c] = back(env[y], value(f), a, c)
    graph.output((env[x], env[c]))
    streams = {x: y, c: d}  # as long as what leaves in their place
    sizes = {env[n]: (env[streams.get(source, source)], dim) for n, (source, dim) in piece.sizes.items() if n in env}
    given = {*inputs, *sizes}
    nodes = [n for n in graph.nodes if n.op not in ("get_attr", "output") and n not in given]
    return Piece(piece.path, piece.call, nodes, inputs, [env[x], env[c]], sizes)


def _term(total, stream):
    """(factor, the rest) where a value is `factor * stream + rest`; None for another."""
    if total.target is not aten.add.Tensor or total.kwargs:
        return None
    for at in (0, 1):
        term, rest = total.args[at], total.args[1 - at]
        if not (isinstance(term, fx.Node) and isinstance(rest, fx.Node)):
            continue
        if term is stream:
            return 1.0, rest
        if term.target is aten.mul.Tensor and term.args[0] is stream and isinstance(term.args[1], float) and term.args[1]:
            return term.args[1], rest
    return None


def _sources(node, inside, ends):
    """The nodes of a block that a value is computed from, back to `ends`, and what they read beside themselves."""
    found, outer, todo = set(), set(), [node]
    while todo:
        node = todo.pop()
        if node in ends or node not in inside:
            outer.add(node)
        elif node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found, outer
