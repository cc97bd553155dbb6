"""Linears whose weights are codes already when the model comes: a checkpoint was quantised, or its modules are bitsandbytes' own.

    y = linear(x, dequant(codes, scales)[:, order]) + b

`Coded` holds the codes and says so in plain torch and one op, so that a trace of it has the very nodes that the pass `quantize` makes. `weight`
stays a name on it, of a parameter that is None: what stands for it is found by that (`mark`).
"""

import functools
import importlib

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import Refused
from ..graph import attribute, clone_tree, dtype_of, path_of

#: format → the tensors of its op beside the codes, in order
PARTS = {"nf4": ("scales", "nested"), "fp4": ("scales", "nested"), "int4": ("scales", "zeros")}
#: entries that share a scale of bitsandbytes', scales that share a nested one
BLOCK, NESTED = 64, 256


class Coded(nn.Module):
    """A linear with a weight in codes. `order`: for each input, the column of the codes that is its own, where they stand in another order."""

    def __init__(self, in_features, out_features, bias=None):
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, None
        self.register_parameter("weight", None)
        self.register_parameter("bias", bias)

    def fill(self, format, codes, order=None, **parts):
        """Give it its codes and the tensors of its format's op; those that a format can do without may be None."""
        self.format = format
        for name, tensor in {"codes": codes, **{name: parts.get(name) for name in PARTS[format]}, "order": order}.items():
            # a parameter, for these a live model shares with the model given, where it copies buffers
            self.register_parameter(name, tensor if tensor is None else nn.Parameter(tensor, requires_grad=False))
        return self

    def forward(self, x):
        parts = (getattr(self, name) for name in PARTS[self.format])
        w = _op(self.format)(self.codes, *parts, [self.out_features, self.in_features], x.dtype)
        return F.linear(x, w if self.order is None else w.index_select(1, self.order), self.bias)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, format={self.format}"


@functools.cache
def _op(format):
    return getattr(importlib.import_module(f"rewrite.kernels.dequant_{format}"), f"dequant_{format}")


def mark(graph, root):
    """Note on what a Coded makes of its codes which weight it stands for, and on each node on the way that it is made of codes."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.linear.default and isinstance(attribute(root, path_of(node)), Coded):
            node.args[1].meta["stands_for"] = f"{path_of(node)}.weight"
            todo = [node.args[1]]
            for part in todo:
                part.meta["coded"] = True
                todo += [a for a in part.all_input_nodes if a.op == "call_function" and a.target is not dtype_of]


def read_modules(model):
    """The model with a Coded in the place of each Linear4bit of bitsandbytes, over the same codes; the model itself where it has none."""
    found = {path: module for path, module in model.named_modules() if _is_linear_4bit(module)}
    if not found:
        return model
    twin = clone_tree(model)
    for path, module in found.items():
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            raise Refused(f"{path}: its weight is not in codes yet. bitsandbytes makes them when the model is moved to a device: model.to(\"cpu\"), or \"cuda\".")
        if getattr(state, "packing_format_for_cpu", False):
            raise Refused(f"{path}: bitsandbytes has packed its codes anew for this CPU, as it does when a model is called in eval mode. Give the model before its first call.")
        nested = (state.state2.absmax, state.state2.blocksize, state.state2.code, state.offset) if state.nested else None
        bias = None if module.bias is None else nn.Parameter(module.bias.detach(), requires_grad=False)
        made = table_codes(path, state.quant_type, module.weight.data, state.absmax, state.blocksize, state.code, nested)
        twin.set_submodule(path, Coded(state.shape[1], state.shape[0], bias).fill(state.quant_type, **made).train(module.training))
    return twin


def _is_linear_4bit(module):
    return any(cls.__name__ == "Linear4bit" and cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__)


def table_codes(path, kind, codes, absmax, block, table, nested):
    """The tensors of nf4 and fp4 from bitsandbytes': `nested` is (absmax, block, table, offset) of the scales' own scales, or None."""
    if kind not in ("nf4", "fp4"):
        raise Refused(f"{path}: its codes are of {kind}; nf4 and fp4 are read.")
    known = importlib.import_module(f"rewrite.kernels.dequant_{kind}")
    if block != BLOCK or (nested is not None and nested[1] != NESTED):
        raise Refused(f"{path}: its blocks are of {block} entries; those of {BLOCK} (their scales in blocks of {NESTED}) are read. Quantise it anew with blocksize={BLOCK}.")
    if not _is_table(table, getattr(known, kind.upper())) or (nested is not None and not _is_table(nested[2], importlib.import_module("rewrite.kernels.tables").dynamic())):
        raise Refused(f"{path}: its codes stand for other numbers than those of {kind}.")
    codes = codes.contiguous().view(torch.uint8).reshape(-1)
    if nested is None:
        return {"codes": codes, "scales": absmax.float().contiguous().view(torch.int32), "nested": None}
    offset = torch.as_tensor(nested[3], dtype=torch.float32, device=absmax.device).reshape(1)
    return {"codes": codes, "scales": absmax.contiguous(), "nested": torch.cat([nested[0].float(), offset]).view(torch.int32)}


def _is_table(found, known):
    known = torch.tensor(known, device=found.device)
    return found.shape == known.shape and bool((found.float() - known).abs().max() < 1e-6)
