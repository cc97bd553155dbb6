"""Conditions that tracing met: which of them the inputs must meet, and those on values, which each call asks."""

import operator

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .align import Misaligned
from .tidy import provenance


def is_equality(condition):
    return any(isinstance(part, sympy.Eq) for part in sympy.preorder_traversal(condition))


def only_fails_at(condition, least):
    """Whether a condition on a sum of symbols is false where all have their least value, and there alone."""
    symbols = condition.free_symbols
    if not symbols or not isinstance(condition, sympy.core.relational.Relational) or not symbols <= least.keys():
        return False
    difference = condition.lhs - condition.rhs
    if isinstance(condition, sympy.Gt | sympy.Ne) and condition.rhs == 0 and difference.is_Mul and symbols == set(difference.args) - {difference.as_coeff_Mul()[0]}:
        return any(least[symbol] == 0 for symbol in symbols)  # a product of sizes (whether a tensor holds anything): none of them is zero
    if not difference.is_polynomial(*symbols) or sympy.Poly(difference, *symbols).total_degree() > 1:
        return False
    # as every symbol grows the difference moves one way, so it is enough to look at the corner and at one step from it
    if len({sympy.sign(difference.coeff(symbol)) for symbol in symbols}) != 1:
        return False
    at = {symbol: least[symbol] for symbol in symbols}
    steps = [{**at, symbol: at[symbol] + step} for symbol in symbols for step in (1, 10**9)]
    return condition.xreplace(_numbers(at)) == sympy.false and all(condition.xreplace(_numbers(step)) == sympy.true for step in steps)


def _numbers(sizes):
    return {symbol: sympy.Integer(size) for symbol, size in sizes.items()}


def require_filled(ours):
    """Sizes that depend on values and were taken not to be zero are asked at every call."""
    waiting = dict(ours.filled)
    for node in list(ours.graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr in waiting:
            words = f"{waiting.pop(value.node.expr)}: nothing is left of this input; it was captured with something left"
            _ask(ours.graph, node, operator.gt, 0, words)
    if waiting:
        raise Misaligned("", f"{', '.join(waiting.values())}: what the code does here depends on the values of the inputs.")


def _ask(graph, node, compare, number, words):
    with graph.inserting_after(node):
        holds = graph.call_function(compare, (node, number))
    with graph.inserting_after(holds):
        asked = graph.call_function(torch.ops.aten._assert_scalar.default, (holds, words))
    holds.meta, asked.meta = (provenance(node) | {"val": compare(node.meta["val"], number)}, provenance(node) | {"val": None, "asked": True})


_COMPARED = {sympy.Eq: operator.eq, sympy.Ne: operator.ne, sympy.Ge: operator.ge, sympy.Gt: operator.gt, sympy.Le: operator.le, sympy.Lt: operator.lt}


def keep_checks(run):
    """What the model's code checks of a size that depends on values (`all rows have one end of sequence`) is asked at every call.

    Nothing can branch on such a size while it is traced, so these are checks that raise; those on more than a size and a number are left
    to the ops behind them.
    """
    waiting = {}
    for guard in run.guards:
        condition = guard.condition
        if not guard.torch_asked and type(condition) in _COMPARED and condition.rhs.is_Integer and condition.lhs.is_Symbol and free_unbacked_symbols(condition):
            waiting.setdefault(condition.lhs, {})[_COMPARED[type(condition)], int(condition.rhs)] = guard.place
    for node in list(run.graph.nodes) if waiting else ():
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) and node.op == "call_function" else ()):
            symbol = size.node._expr if isinstance(size, torch.SymInt) else None  # as it was before a check said that it is 1
            asked = waiting.pop(symbol, {})
            if not asked:
                continue
            with run.graph.inserting_after(node):
                read = run.graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
            read.meta = dict(node.meta) | {"val": size}
            for (compare, number), place in asked.items():
                _ask(run.graph, read, compare, number, f"{place}: the check here does not hold")
