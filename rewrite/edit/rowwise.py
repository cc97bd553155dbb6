"""A noun's body run for each row of a batch on its own tensors: beneath vmap, with what vmap cannot follow written out.

    new = vmap(f)(x, y, down[slot])      value = where(mask, new, y)
"""

import functools

import torch
from torch._C import _functorch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import graph as g
from ..contract import FACTS, FUNCTIONS
from ..errors import Refused

aten = torch.ops.aten
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}


def _by_row(value, batch):
    """A value of batch × something rows, as batch and something."""
    return value.view(batch, value.shape[0] // batch, *value.shape[1:])  # unflatten would ask for numbers


class _BeneathVmap(TorchFunctionMode):
    """Writes what vmap cannot follow at sizes that are symbols: a linear with its bias, dropout, whose flag then is a number in an argument, a cat, a
    table for each row, a norm."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            return self._linear(*args, **(kwargs or {}))
        if function is F.dropout:
            return self._dropout(*args, **(kwargs or {}))
        if function is torch.cat:
            return self._cat(*args, **(kwargs or {}))
        if function is aten.embedding.default:
            return self._embedding(*args)
        if function in _NORMS:
            return self._norm(function, *args)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _linear(input, weight, bias=None):
        product = torch.matmul(input, weight.mT)
        return product if bias is None else product + bias

    @staticmethod
    def _dropout(input, p=0.5, training=True, inplace=False):
        p = p * training
        return input * (torch.rand_like(input) >= p) / (1.0 - p)

    @staticmethod
    def _norm(function, value, *rest):
        level = _functorch.maybe_current_level()
        raw, axis = _functorch._unwrap_batched(value, level)
        if axis is None:
            return function(value, *rest)
        return _functorch._add_batch_dim(function(raw.movedim(axis, 0), *rest), 0, level)  # over the last axes

    @staticmethod
    def _embedding(weight, ids, *rest):
        level = _functorch.maybe_current_level()
        (table, axis), (ids, dim) = _functorch._unwrap_batched(weight, level), _functorch._unwrap_batched(ids, level)
        if axis is None or dim is None:
            return aten.embedding.default(weight, ids, *rest)
        table, ids = table.movedim(axis, 0), ids.movedim(dim, 0)
        found = table.gather(1, ids.flatten(1).unsqueeze(-1).expand(-1, -1, table.shape[-1]))
        return _functorch._add_batch_dim(found.view(*ids.shape, table.shape[-1]), 0, level)

    @staticmethod
    def _cat(tensors, dim=0):
        level = _functorch.maybe_current_level()
        raw = [_functorch._unwrap_batched(tensor, level) for tensor in tensors]
        batch = next((value.shape[axis] for value, axis in raw if axis is not None), None)
        if batch is None:
            return torch.cat(tensors, dim)
        rows = [value.movedim(axis, 0) if axis is not None else value.expand(batch, *value.shape) for value, axis in raw]
        return _functorch._add_batch_dim(torch.cat(rows, dim if dim < 0 else dim + 1), 0, level)


class Rows:
    """A noun's body over rows: `run(*values of nodes, *of extras, slot, mask, training=…)`. `kinds`: how each value stands to the batch."""

    def __init__(self, edit, site, target, function, asked, names, extras, kinds, facts, functions, place):
        self.edit, self.site, self.target, self.function, self.asked, self.names = edit, site, target, function, asked, names
        self.extras, self.kinds, self.facts, self.functions, self.place = extras, kinds, facts, functions, place
        self.operation = edit.operation(site)

    def run(self, *tensors, training):
        *values, slot, mask = tensors
        keys = (*self.names, *self.extras)
        whole = dict(zip(keys, values))
        batched, fixed = {}, {}
        for key, kind in zip(keys, self.kinds):
            if kind is None:
                fixed[key] = whole[key]
            elif kind == "stack":
                batched[key] = whole[key].index_select(0, slot)
            else:
                batched[key] = whole[key].unsqueeze(1) if kind == "rows" else _by_row(whole[key], slot.shape[0])
        self.is_same = False
        new = self.over_rows(lambda row: self.new({**fixed, **row}, training), batched) if batched else self.new(fixed, training)
        name = " current" if " current" in whole else self.target
        if self.is_same:
            return whole[name]
        if self.kinds[self.names.index(name)] is None:
            raise Refused(f"{self.place}: one value of {name} serves all rows here, and in a batch each needs its own.")
        own_value = lambda new: self.over_rows(lambda row: self.own_value({**fixed, **row}, row[" new"]), {**batched, " new": new})  # noqa: E731
        new = own_value(new) if self.target == "w" else new
        new = self.put(whole, batched, name, new)
        new = own_value(new) if self.target == "b" else new
        current = self.as_long(batched[name], new)
        if new.shape != current.shape:
            raise Refused(f"{self.place}: in a batch a value keeps its shape, and a row of it becomes {tuple(new.shape[1:])} where the model has {tuple(current.shape[1:])}.")
        chosen = torch.where(mask.view(-1, *[1] * (new.dim() - 1)), new, current)
        return chosen.view(whole[name].shape) if self.kinds[self.names.index(name)] == "flat" else chosen.squeeze(1)

    def as_long(self, current, new):
        """Keys, values or embeddings with zeros where others have places in front, which their rows do not see."""
        axis = -1 if self.target in self.site.layout.turned else -2
        if (self.target not in ("k", "v") and not self.edit.step.options.lengthens) or new.dim() != current.dim():
            return current
        places = g.expression(new.shape[axis]) - g.expression(current.shape[axis])
        if not getattr(places, "is_number", True) or places <= 0:
            return current
        shape = list(current.shape)
        shape[axis] = int(places)
        return torch.cat([current.new_zeros(shape), current], axis)

    @staticmethod
    def over_rows(function, batched):
        with _BeneathVmap():
            return torch.vmap(function, randomness="different")(batched)

    def new(self, raw, training):
        """What the body gives for one row, whose tensors have a batch of one."""
        if self.function is None:
            return self.operation.standard(raw["copy"]) if self.target == "w" and self.operation is not None else raw["copy"]
        known = {node: raw[node] for node in self.extras}
        given = {name: self.read(name, raw[name]) if name in raw else None for name in self.asked if name not in ("training", *FUNCTIONS, *FACTS)} | self.facts
        given |= {name: functools.partial(f.run, known=known) for name, f in self.functions.items() if name in self.asked}
        given |= {name: training if name == "training" else None for name in self.asked if name not in given}
        new = self.function(**{name: given[name] for name in self.asked})
        self.is_same = new is given.get(self.target) and new is not None  # as the noun of a pass that leaves this site alone gives it back
        return new.transpose(-1, -2) if self.target in self.site.layout.turned else new

    def own_value(self, raw, new):
        """What the site's operation gives for one row with that weight or bias."""
        if self.target == "b":
            return raw[" current"] + self.along(new - raw["b"], raw[" current"])
        y = self.functions["op"].run(raw["x"], new, known={node: raw[node] for node in self.extras})
        return y if raw.get("b") is None else y + self.along(self.read("b", raw["b"]) if self.function is not None else raw["b"], y)

    def read(self, name, value):
        if name in self.site.layout.turned:
            return value.transpose(-1, -2)
        if self.operation is None or name not in ("w", "b", "y"):
            return value
        value = self.operation.standard(value) if name == "w" else value
        return self.edit._part(self.site, value, self.edit._dim(self.operation, name))

    def put(self, whole, batched, name, new):
        """The whole value of each row with the site's part of it replaced; not beneath vmap, which cannot join at free sizes."""
        if self.operation is None or self.site.layout.rows is None or self.target not in ("w", "b", "y") or self.function is None:
            return new
        if self.target == "b":
            return self.site.layout.rows.put(whole["b"].expand(new.shape[0], -1), new, 1)
        dim = self.edit._dim(self.operation, "y")
        return self.site.layout.rows.put(batched[name], new, dim if dim < 0 else dim + 1)

    def along(self, bias, y):
        """A bias as it is added to y: along the last axis, on a convolution along that of the channels."""
        behind = y.dim() - 2 if self.operation is not None and self.operation.kind == "conv" else 0
        return bias.reshape(-1, *[1] * behind)
