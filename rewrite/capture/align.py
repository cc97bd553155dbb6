"""Two runs of one model that differ in everything that is not part of the computation, made one graph.

    eval,  own dtype,    example sizes, one seed       dropout(x, 0.1, False)    to(x, float32)    full(-3.4e38)
    train, other dtype,  least sizes,   another seed   dropout(x, 0.1, True)     to(x, bfloat16)   full(-3.39e38)
    -->
    dropout(x, 0.1, @….training)    to(x, dtype_of(y))    full(least(dtype_of(y)))

The runs agree node by node; where an argument differs, the difference says what the model's code had read there: its own training
flag, a dtype, the least number of a dtype. A constant stays only where both runs made it.
"""

import math
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from ..graph import drops, expression
from .tidy import is_size, named_arguments

aten = torch.ops.aten
_LAYOUT = aten.contiguous.default  # not even asked of a value that is contiguous already, as everything of size one is


class Misaligned(Exception):
    """The runs differ in more than arguments, first in the module at `path`, in its code of the name `function` where that is known."""

    def __init__(self, path, words, function=None):
        self.path, self.words, self.function = path, words, function
        super().__init__(f"{path or 'the model'}: {words}")

def _path(node):
    return node.meta.get("path", "")


def _laid_out(node):
    while node.target is _LAYOUT:
        node = node.args[0]
    return node


def _arguments(node):
    """The arguments of a node by name, where a slice begins as the number that leaving it out means."""
    found = named_arguments(node)
    if node.target is aten.slice.Tensor and found["start"] is None:
        found["start"] = 0
    return found


def _expression(value):
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else sympy.sympify(value)


@dataclass(frozen=True)
class Difference:
    """One argument in which the runs differ: `where` is the way to it inside the node's argument `name`."""

    node: fx.Node
    name: object
    where: tuple
    ours: object
    theirs: object


@dataclass(eq=False)
class Cast:
    """What their run alone made of our node `source`, before our node `before`: a cast, as ours had that dtype already, or the dropout of training."""

    theirs: fx.Node
    source: object
    before: fx.Node


class Alignment:
    """The pairing of two tidied graphs, theirs → ours, and what it found.

    `pairs`: their node → our node or a Cast. `differences`; `reads`: Differences whose `theirs` is a Cast to be read instead.
    `counters`: (our node, path of the counter that theirs adds one to before it). `drops`: (our node, their draw before it).
    """

    def __init__(self, ours, theirs, replacements, hints):
        self.ours, self.theirs, self.replacements, self.hints = ours, theirs, replacements, hints
        self.pairs, self.differences, self.reads, self.counters, self.drops = {}, [], [], [], []
        self.own_casts = {}  # our casts, and slices that are whole at their sizes, that their run did not make -> what they read
        self._pair()

    def _pair(self):
        first, second = (
            [n for n in graph.nodes if n.op != "get_attr" and (n.target is drops or not is_size(n)) and n.target is not _LAYOUT] for graph in (self.ours, self.theirs)
        )
        tensors = {n.target: n for n in self.ours.nodes if n.op == "get_attr"}
        for node in self.theirs.nodes:
            if node.op == "get_attr" and node.target in tensors:
                self.pairs[node] = tensors[node.target]
        waiting, place = [], 0
        for node in second:
            other = first[place] if place < len(first) else None
            if node.target is drops and other is not None:
                self.drops.append((other, node))
                continue
            if self._is_counter(node) and not (other is not None and other.target is node.target):
                waiting.append(node)
                continue
            while other is not None and self._ours_alone(other, node):
                self.own_casts[other] = other.args[0]
                if self._is_cast(other):
                    self.differences.append(Difference(other, "dtype", (), other.meta["val"].dtype, None))
                place += 1
                other = first[place] if place < len(first) else None
            if other is not None and (self._is_cast(node) or self._is_dropout(node)) and not self._same_cast(other, node):
                self.pairs[node] = Cast(node, self.pairs[_laid_out(node.args[0])], other)
                continue
            if other is None or node.op != other.op or (node.op not in ("placeholder", "output") and node.target != other.target):
                odd = self._odd_one(other, node, first[place:])
                words = f"the two runs differ: {other.format_node() if other is not None else 'nothing'} / {node.format_node()}"
                raise Misaligned(_path(odd), words, (odd.meta.get("source") or "").rpartition(", in ")[2])
            self.counters += [(other, counter.args[0].target) for counter in waiting]
            waiting = []
            self.pairs[node] = other
            place += 1
            self._compare(other, node)
        if place != len(first):
            raise Misaligned(_path(first[place]), f"the two runs differ: {first[place].format_node()} / nothing")

    @staticmethod
    def _odd_one(ours, theirs, rest):
        """Of two nodes that do not match, the one to blame: theirs, if nothing like it follows in our run."""
        like = {(node.target, node.meta.get("path")) for node in rest}
        return theirs if ours is None or (theirs.op != "output" and (theirs.target, theirs.meta.get("path")) not in like) else ours

    def _ours_alone(self, ours, theirs):
        """Whether our node is one that their run passed over: a cast to the dtype at hand, a slice that is whole at their sizes."""
        if self._is_cast(ours):
            return theirs.target is not ours.target
        if ours.target is not aten.slice.Tensor or (theirs.target is ours.target and self._means(theirs.args[0], ours.args[0])):
            return False
        before, after = ([sympy.sympify(expression(size)).subs(self.hints) for size in node.meta["val"].shape] for node in (ours.args[0], ours))
        return before == after

    @staticmethod
    def _is_cast(node):
        return node.target is aten.to.dtype and node.args[0].meta["val"].dtype != node.meta["val"].dtype

    @staticmethod
    def _is_dropout(node):
        """Whether a dropout is at work, as where the code asks for it in training alone: in eval mode it would hand its input on."""
        return node.target is aten.dropout.default and node.args[2] is True

    def _same_cast(self, ours, theirs):
        return ours.target is theirs.target and self._means(theirs.args[0], ours.args[0])

    def _means(self, theirs, ours):
        """Whether their node stands for our value, casts aside that only one run made."""
        ours, other = _laid_out(ours), self.pairs.get(_laid_out(theirs))
        while ours in self.own_casts and other is not ours:
            ours = _laid_out(self.own_casts[ours])
        while isinstance(other, Cast):
            other = other.source
        return other is ours

    @staticmethod
    def _is_counter(node):
        if node.target is not aten.add_.Tensor or node.users or node.args[0].op != "get_attr" or node.args[1] != 1:
            return False
        return not node.args[0].meta["val"].dtype.is_floating_point

    def _compare(self, ours, theirs):
        if ours.op == "call_module":
            first, second = {"args": ours.args, "kwargs": ours.kwargs}, {"args": theirs.args, "kwargs": theirs.kwargs}
        else:
            first, second = _arguments(ours), _arguments(theirs)
        for name in first.keys() | second.keys():
            self._compare_value(ours, name, (), first.get(name), second.get(name))

    def _compare_value(self, node, name, where, ours, theirs):
        if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
            for i, (a, b) in enumerate(zip(ours, theirs)):
                self._compare_value(node, name, (*where, i), a, b)
            return
        if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
            for key in ours:
                self._compare_value(node, name, (*where, key), ours[key], theirs[key])
            return
        tensors = [isinstance(value, fx.Node) and not is_size(value) for value in (ours, theirs)]
        if all(tensors):
            if not self._means(theirs, ours):
                raise Misaligned(_path(node), f"{node.format_node()} reads {ours.name} in one run and {theirs.name} in the other")
            if isinstance(self.pairs[_laid_out(theirs)], Cast):
                self.reads.append(Difference(node, name, where, ours, self.pairs[_laid_out(theirs)]))
            return
        if any(tensors):
            raise Misaligned(_path(node), f"argument {name} of {node.format_node()} is a tensor in one run alone")
        if any(isinstance(value, fx.Node) for value in (ours, theirs)):
            if not self._same_size(ours, theirs):
                sizes = f"{_expression(ours)} in one run and {_expression(theirs)} in the other"
                raise Misaligned(_path(node), f"argument {name} of {node.format_node()} is {sizes}")
            return
        if ours != theirs and not (isinstance(ours, float) and isinstance(theirs, float) and math.isnan(ours) and math.isnan(theirs)):
            self.differences.append(Difference(node, name, where, ours, theirs))

    def _same_size(self, ours, theirs):
        a, b = (_expression(value).xreplace(self.replacements) for value in (ours, theirs))
        return a == b or sympy.expand(a - b) == 0 if not isinstance(a, sympy.logic.boolalg.Boolean) else a == b
