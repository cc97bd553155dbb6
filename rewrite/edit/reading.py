"""What a pass sees of a site while it works: live handles, prototypes and facts by name, and why a site is declined."""

import math

import torch
from torch import fx

from .. import graph as g
from ..contract import FACTS, OUTER, has_default, wants
from ..errors import Refused
from ..roles.attention import key_heads
from . import derive
from .derive import evaluated
from .lengthen import not_made_of
from .operation import Operation
from .region import Region, body_of
from .tensors import FAILURES

_LACKING = {"x": "x of its own", "w": "weight", "y": "y of its own"}
_ADDS = (torch.ops.aten.add.Tensor,)
_NORMS = (torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default)


class Reading:
    """The reading half of an `Edit` (its attributes are said there): the values at a site after the passes so far."""

    def live(self, node):
        """The value that stands for a node after the passes so far."""
        while isinstance(node, fx.Node) and "live" in node.meta:
            node = self.by_name[node.meta["live"]]
        return node

    def handle(self, site, name):
        """The live node of a handle of a site, or None."""
        if name == "positions":
            return self.live(self.sites.positions)
        if name in OUTER:
            return self.outer(site, name)
        operation = self.operation(site)
        if operation is None or name not in ("x", "w", "b", "y"):
            replaced = self.by_name.get(site.node.meta.get("handles", {}).get((site.role, name)))
            return self.live(replaced if replaced is not None else site.handles.get(name))
        if name == "y":
            return self.live(operation.node)
        if name == "w":
            return operation.source
        at = operation.x if name == "x" else operation.b
        return operation.node.args[at] if at is not None and len(operation.node.args) > at else None

    def outer(self, site, name):
        """A value from further out, or None: `block_x` and `sublayer_x` of what is around the site, `embeds` of the last embedding before it."""
        if name == "embeds":
            before = [other for other in self.sites if other.role == "embed" and other.node < site.node]
            return self.handle(before[-1], "y") if before else None
        kinds = ("block",) if name == "block_x" else ("attention.block", "mlp", "mixer")
        around = [other for other in self.sites if other.role in kinds and not other.node < site.node]
        nearest = min(around, key=lambda other: other.node, default=None)
        if nearest is None or (name == "block_x" and nearest.path != site.block):
            return None
        x = self.handle(nearest, "x")
        return x if x is not None and x < site.node else None

    def operation(self, site):
        """How the site's operation reads its weight, or None for a site without one."""
        node = site.operation
        if node is None:
            return None
        args, known = self.operations.get(node, (None, None))
        if args is not node.args:  # what it reads has been replaced, or there are nodes on the way that may be
            known = Operation.of(node)
            if known is not None and known.source.op == "get_attr" and not known.chain:
                self.operations[node] = node.args, known
        return known

    def given(self, site, method):
        """What a method of the pass (`refuse`, `params`, `trains`) asks to see of a site, by name.

        A weight or bias is the tensor itself in standard orientation; an activation is an empty prototype with its rank, dtype and device,
        sizes that vary being 1. `kind` is "linear", "conv", "embedding", "experts" or None, `fan_in` how many inputs make one output.
        """
        names, known = wants(method), (*dict.fromkeys((*site.handles, "x", "w", "b", "y")), *FACTS, *OUTER, "norm", "positions", *(("choices",) if self.choices else ()))
        for name in names:
            if name not in known:
                raise Refused(f"{self.kind} at {site.path}: {method.__name__}() asks for {name!r}; it may ask for {', '.join(known)}.")
        return {name: self.value(site, name) for name in names}

    def value(self, site, name):
        """One of the things of `given`."""
        operation = self.operation(site)
        if name == "norm":
            return self.norm_after(site)
        if name in ("index", "role"):
            return getattr(site, name)
        if name == "key_heads":
            return key_heads(site.handles["k"]) if site.handles.get("k") is not None else None
        if name == "tied":
            return operation is not None and len(names_of(self.graph.root, g.attribute(self.graph.root, operation.weight))) > 1
        if name == "kind":
            return operation.kind if operation is not None else None
        if name == "fan_in":
            if operation is None:
                return None
            return 1 if operation.kind == "embedding" else math.prod(self.value(site, "w").shape[1 if operation.kind == "conv" else -1 :])
        if operation is not None and name in ("w", "b"):
            path = operation.weight if name == "w" else operation.bias
            if path is None:
                return None
            value = self._base(operation, path) if name == "w" else g.attribute(self.graph.root, path).detach()
            value = operation.standard(value) if name == "w" else value
            return self._part(site, value, self._dim(operation, name))
        if name == "choices":
            target, nodes = next((target, nodes) for (other, target), nodes in self.choices.items() if other is site)
            return tuple(self._prototype(site, target, node) for node in nodes)
        node = self.sites.positions if name == "positions" else self.outer(site, name) if name in OUTER else site.handles.get(name)
        return self._prototype(site, name, node) if node is not None else None

    def _prototype(self, site, name, node):
        """An empty tensor like the value of a node as a handle of a site (of a fused projection, its rows); a constant itself."""
        if node.op == "get_attr":
            return g.attribute(self.graph.root, node.target).detach()
        fake = node.meta["val"]
        size = [s if isinstance(s, int) else 1 for s in g.shape(node)]
        dtype = self.real_dtype(fake.dtype)
        device = {new: old for old, new in self.devices.items()}.get(fake.device, fake.device)
        value = torch.empty(size, dtype=dtype, device=device)
        operation, rows = self.operation(site), site.layout.rows
        if name == "y" and operation is not None and rows is not None and rows.listed is None:
            return rows.take(value, operation.channel)
        return value.transpose(-1, -2) if name in site.layout.turned else value

    def real_dtype(self, dtype):
        """The dtype that one in the graph stands for."""
        return {new: old for old, new in self.dtypes.items()}.get(dtype, dtype)

    def _base(self, operation, path):
        """A site's weight as it is stored; where passes have put another value in its place that is made of constants alone, that value."""
        source = operation.source
        if self._evaluated[0] is not source:
            self._evaluated = source, evaluated(self, source) if source.op != "get_attr" else None
        value = self._evaluated[1] if self._evaluated[1] is not None else g.attribute(self.graph.root, path)
        if value is None:
            raise Refused(f"{self.kind} at {path}: its numbers are gone (they are stored in codes), and what stands in their place depends on more than constants.")
        return value.detach()

    def norm_after(self, site):
        """The residual add and the norm that follow a sub-layer's output, as a region that can be run again; None where there are none."""
        start = self.handle(site, "y")
        add = next((n for n in start.users if n.target in _ADDS and "made" not in n.meta), None) if start is not None else None
        norm = next((n for n in add.users if n.target in _NORMS), None) if add is not None and len(add.users) == 1 else None
        return Region((add, norm), start) if norm is not None else None

    def body(self, site, weights=False):
        """What the site does between its x and its y, passes so far included, as a region that can be run again (`body_of`); None where there is none."""
        return body_of(self.handle(site, "x"), self.handle(site, "y"), weights)

    def reason(self, site, sites):
        """Why the pass declines a site, or None."""
        options = self.step.options
        operation, rows = self.operation(site), site.layout.rows
        asked = {name for noun in options.bodies() for name in wants(getattr(options, noun))}
        if options.whole_sequence and self.caches:
            return "the pass looks at all tokens of a sequence at once, and this model also decodes token by token behind a cache"
        if {"op", "mix"} & asked:
            if operation is None:
                return "it has no operation on a weight that can be run again on another one"
            if operation.is_grouped:
                return "its convolution has groups: the rows of another weight would not see all of x"
        if {"f", "copy"} & asked:
            body = self.body(site)
            if body is None:
                return "there is nothing between its x and its y that could be run again"
            if (why := body.reason(self.caches)) is not None:
                return why
        for name in asked & {"key_of", "value_of"}:
            if (why := not_made_of(self, site, name)) is not None:
                return why
        if rows is not None and rows.listed is not None:
            return f"its {len(rows)} rows of the fused projection follow no regular pattern"
        if rows is not None and self._trained(site) and self._covered(site, sites) < rows.total:
            return "its bias is one tensor for the whole fused projection: name all of its parts, for example attention.{q,k,v}"
        if operation is not None and "w" in options.writes(**self.given(site, options.writes)) and self._is_read_elsewhere(site, sites):
            return "its weight is tied: another operation would see what is written into it"
        if (declined := derive.reason(self, site)) is not None:
            return declined
        lacking = next((n for n in wants(options.params) if n in _LACKING and not has_default(options.params, n) and self.value(site, n) is None), None)
        if lacking is not None:
            return f"it has no {_LACKING[lacking]}"
        try:
            return options.refuse(**self.given(site, options.refuse))
        except FAILURES as error:
            raise Refused(f"{self.kind} at {site.path}: refuse() fails here: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error

    def _is_read_elsewhere(self, site, sites):
        """Is the site's weight also that of an operation which is none of the chosen sites?"""
        names = names_of(self.graph.root, g.attribute(self.graph.root, self.operation(site).weight))
        chosen = {other.operation for other in sites}
        return any(found.weight in names and found.node not in chosen for node in self.graph.nodes if (found := Operation.of(node)) is not None)

    def _trained(self, site):
        return self.step.options.trains(**self.given(site, self.step.options.trains))

    def _covered(self, site, sites):
        """How many rows of the site's fused weight the chosen sites cover together."""
        return sum(len(rows) for other in sites if (other.weight, other.call) == (site.weight, site.call) and (rows := other.layout.rows or other.layout.stored) is not None)

    @staticmethod
    def _part(site, value, dim):
        return value if site.layout.rows is None else site.layout.rows.take(value, dim)

    @staticmethod
    def _dim(operation, name):
        if name == "y":
            return operation.channel if operation is not None else -1
        return -2 if operation is not None and operation.kind == "experts" and name == "w" else 0


def names_of(root, parameter):
    """Every name under which a (tied) parameter stands on the tree."""
    return [name for name, other in root.named_parameters(remove_duplicate=False) if other is parameter]
