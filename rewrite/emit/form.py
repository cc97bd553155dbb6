"""What the source of a block is made from: blocks of equal form have equal source, which is printed once."""

import re

import torch
from torch import fx

from ..training.backward import REGION


def block_form(piece, root):
    """All that the source of a block is made from, the block's own path aside: blocks of equal form have equal source."""
    prefix, number, outer = piece.path + "." if piece.path else "", {}, []

    def within(path):
        """A path as the block has it, and the kinds of the modules on the way."""
        if not path.startswith(prefix):
            return "whole", path
        module, kinds = root, []
        for part in path[len(prefix) :].split("."):
            module = getattr(module, "_modules", {}).get(part)
            kinds.append(type(module))
        return path[len(prefix) :], tuple(kinds)

    def described(arg):
        if isinstance(arg, fx.Node):
            if arg not in number:
                number[arg] = len(number)
                outer.append((number[arg], within(arg.target) if arg.op == "get_attr" else arg.op, kind(arg)))
            return "%", number[arg]
        if isinstance(arg, (list, tuple)):
            return isinstance(arg, list), *map(described, arg)
        if isinstance(arg, dict):
            return "dict", *((key, described(entry)) for key, entry in arg.items())
        if isinstance(arg, slice):
            return "slice", described(arg.start), described(arg.stop), described(arg.step)
        return type(arg), repr(arg)

    def kind(node):
        value = node.meta.get("val")
        return value.dim() > 0 if isinstance(value, torch.Tensor) else type(value)

    number.update((node, i) for i, node in enumerate(piece.inputs))
    inputs = tuple((re.sub(r"_?\d+", "", node.name) if i else "x", kind(node), node.op == "get_attr") for i, node in enumerate(piece.inputs))
    nodes = []
    for node in piece.nodes:
        path, meta = node.meta.get("path", ""), node.meta
        target = within(node.target) if node.op == "call_module" else node.target
        given = described(node.args), described(node.kwargs)
        number.setdefault(node, len(number))
        here = path[len(prefix) :] if path.startswith(prefix) else ""
        nodes.append((number[node], node.op, target, given, kind(node), bool(node.users), here, meta.get("made"), meta.get(REGION)))
    sizes = tuple((described(size), described(source), dim) for size, (source, dim) in piece.sizes.items())
    return type(root), inputs, tuple(nodes), described(tuple(piece.outputs)), sizes, tuple(outer)
