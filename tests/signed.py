"""A signed model without a capture: its graphs are only placeholders, and what runs is the original on what `bind` made of the call.

So whatever goes wrong between the caller and the graph, and back, shows as a difference from the original.
"""

import copy
import functools

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from rewrite.calls.leaves import leaves, rebuild
from rewrite.calls.signature import sign, variants
from rewrite.graph import Check, Graph

HINTS = {"batch": 3, "length": 11, "past": 5, "target": 7, "source": 13}


def placeholders(variant):
    """A Graph of placeholders alone, its sizes symbols as `variant.dims` says. Returns (graph, {word: sympy symbol})."""
    names, tensors, _ = leaves(variant.kwargs)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    symbols = {}

    def size(word):
        if word not in symbols:
            context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            symbols[word] = mode.from_tensor(torch.empty(HINTS.get(word, 17 + len(symbols))), symbolic_context=context).shape[0]
        return symbols[word]

    graph = fx.Graph()
    nodes = []
    for name, tensor in zip(names, tensors):
        shape = list(tensor.shape)
        for dim, word in variant.dims.get(name, {}).items():
            shape[dim] = sum(size(part) for part in word.split("+")) if "+" in word else size(word)
        node = graph.placeholder(name.replace(".", "_"))
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=tensor.dtype)
        nodes.append(node)
    graph.output(tuple(nodes))
    return Graph(graph, None, name=variant.name, owner=variant.owner, inputs=names), {word: s.node.expr for word, s in symbols.items()}


def signed(model, example=None, checks=None):
    """A copy of the model whose forward (and whose encoder's) goes through `bind` and `pack`.

    checks: function from {word: symbol} to a sympy relation, put on the main graph.
    """
    live = copy.deepcopy(model)
    found = variants(model, example)
    graphs, trees = {}, {}
    for variant in found:
        graph, symbols = placeholders(variant)
        names, tensors, tree = leaves(variant.kwargs)
        try:
            with torch.no_grad():
                output = copy.deepcopy(model).eval().get_submodule(variant.owner)(**rebuild(tree, tensors))
        except RuntimeError:
            if variant is found[0]:
                raise
            continue  # a variant that could not be captured
        graph.outputs, _, trees[variant.name] = leaves(output, {id(t): n for n, t in zip(names, tensors)})
        if checks is not None and variant is found[0]:
            graph.checks = (Check(checks(symbols), "model.py:7"),)
        graphs[variant.name] = graph
    main = graphs.pop(found[0].name)
    main.variants = graphs
    sign(model, main, found, trees)
    inner = {v.name: leaves(v.kwargs)[2] for v in found}
    inner["unlabelled"] = leaves({name: value for name, value in found[0].kwargs.items() if name not in found[0].labels})[2]
    calls = []
    for graph in main.all():
        module = live.get_submodule(graph.owner)
        if "_signature" in module.__dict__:
            continue
        original = copy.deepcopy(model).get_submodule(graph.owner)
        through = functools.wraps(type(module).forward)(lambda self, *args, **kwargs: _through(self, args, kwargs))
        module.__class__ = type(type(module).__name__, (type(module),), {"forward": through})
        module.__dict__.update(_signature=graph.signature, _inner=inner, _original=(original,), _calls=calls)
    return live


def _through(self, args, kwargs):
    original = self._original[0].train(self.training)
    call = self._signature.bind(self, args, kwargs)
    self._calls.append(call.name)
    entry = self._signature.entries[call.name]
    output = original(**rebuild(self._inner[call.name], call.values))
    _, flat, found = leaves(output, {id(value): name for value, name in zip(call.values, entry.inputs)})
    if call.name != "unlabelled" and found != entry.tree:
        raise AssertionError(f"{call.name} returned {found}, signed for {entry.tree}")
    return self._signature.pack(self, call, flat)
