"""A site's own operation, read in one orientation whatever the model stores: `y = op(x, w) + b` with `w` out × in.

    linear      w is out × in as it stands            conv        out × in × kernel
    addmm, mm   (Conv1D) stored in × out              embedding   stored vocab × out, x are ids
    grouped_mm, bmm   experts × in × out, rows of x sorted or gathered by expert

The shape ops and gathers between the stored tensor and the op are part of it, so that another weight can take the same way.
"""

from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional as F

aten = torch.ops.aten

#: target -> (position of x, of w, of b or None, target without bias)
_POSITIONS = {
    aten.linear.default: (0, 1, 2, aten.linear.default),
    aten.addmm.default: (1, 2, 0, aten.mm.default),
    aten.mm.default: (0, 1, None, aten.mm.default),
    aten.matmul.default: (0, 1, None, aten.matmul.default),
    aten.bmm.default: (0, 1, None, aten.bmm.default),
    aten.baddbmm.default: (1, 2, 0, aten.bmm.default),
    aten.embedding.default: (1, 0, None, aten.embedding.default),
}
_CONVOLUTIONS = {getattr(getattr(aten, f"conv{n}d"), overload) for n in (1, 2, 3) for overload in ("default", "padding")}
_POSITIONS |= {target: (0, 1, 2, target) for target in _CONVOLUTIONS}
#: ops on the way from the stored weight that only turn its axes; that keep it as it is; that pick experts by token
_TURNS = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}
_SAME = {aten.alias.default, aten.detach.default, aten.contiguous.default, aten.to.dtype, aten.to.device, aten.clone.default}
_GATHERS = {aten.index.Tensor, aten.index_select.default}
_WAY = _TURNS | _SAME | _GATHERS


def _positions(target):
    found = _POSITIONS.get(target)
    if found is None and isinstance(target, torch._ops.OpOverload) and "grouped_mm" in target._schema.name:
        found = (0, 1, None, target)
    return found


def _stored_path(node):
    """The path of the stored tensor that a node is, or stands for after a pass replaced it; None for anything else."""
    if not isinstance(node, fx.Node):
        return None
    return node.target if node.op == "get_attr" else node.meta.get("stands_for")


def _permutation(node, ndim):
    """The axes of an op of `_TURNS` as a permutation."""
    axes = list(range(ndim))
    if node.target is aten.permute.default:
        return [d % ndim for d in node.args[1]]
    if node.target is aten.transpose.int:
        i, j = (d % ndim for d in node.args[1:3])
        axes[i], axes[j] = j, i
        return axes
    return axes[::-1]


@dataclass(frozen=True, eq=False)
class Operation:
    """How one affine node reads.

    `x`, `w`, `b` are positions in `node.args`, `bare` the target without bias. `weight` and `bias` are the paths of the stored tensors (bias
    None if there is none), also where a pass has put another value in their place; `chain` the nodes between the weight and the op,
    `axes` the permutation from stored to standard orientation.
    """

    node: fx.Node
    x: int
    w: int
    b: int | None
    bare: object
    weight: str
    bias: str | None
    chain: tuple[fx.Node, ...]
    axes: tuple[int, ...]

    @staticmethod
    def of(node):
        """The reading of a node, or None if it is not an affine op on a stored weight."""
        found = _positions(node.target) if node.op == "call_function" else None
        if found is None:
            return None
        x, w, b, bare = found
        chain, source = [], node.args[w]
        while isinstance(source, fx.Node) and source.op == "call_function" and "stands_for" not in source.meta and source.target in _WAY:
            chain.append(source)
            source = source.args[0]
        weight = _stored_path(source)
        if weight is None or not isinstance(node.args[x], fx.Node):
            return None
        chain.reverse()
        axes = list(range(source.meta["val"].dim()))
        if len(axes) < 2:
            return None
        for step in chain:
            if step.target in _TURNS:
                axes = [axes[d] for d in _permutation(step, len(axes))]
        if node.target is not aten.linear.default and node.target not in _CONVOLUTIONS:
            axes[-2], axes[-1] = axes[-1], axes[-2]
        bias = _stored_path(node.args[b]) if b is not None and len(node.args) > b else None
        return Operation(node, x, w, b, bare, weight, bias, tuple(chain), tuple(axes))

    @property
    def kind(self):
        """ "linear", "conv", "embedding" or "experts"."""
        if self.node.target is aten.embedding.default:
            return "embedding"
        if self.node.target in _CONVOLUTIONS:
            return "conv"
        return "experts" if len(self.axes) == 3 else "linear"

    @property
    def channel(self):
        """The dimension of `y` that the weight's rows make."""
        return 1 if self.kind == "conv" else -1

    @property
    def is_grouped(self):
        """True for a convolution with groups: its rows do not see all of x's channels."""
        return self.kind == "conv" and (self.node.args[6] if len(self.node.args) > 6 else self.node.kwargs.get("groups", 1)) != 1

    @property
    def source(self):
        """The node that gives the weight as it is stored: a get_attr, or what passes have put in its place."""
        return self.chain[0].args[0] if self.chain else self.node.args[self.w]

    @property
    def extras(self):
        """Nodes other than x, w, b that the op or the way to its weight reads (expert offsets, gather ids)."""
        own = {a for i, a in enumerate(self.node.args) if i in (self.x, self.w, self.b) and isinstance(a, fx.Node)} | {*self.chain, self.source}
        return tuple(dict.fromkeys(a for n in (*self.chain, self.node) for a in n.all_input_nodes if a not in own))

    @property
    def static(self):
        """What of the op a traced body holds as constants, hashable."""
        plain = lambda a: repr(fx.node.map_arg(a, lambda n: None))  # noqa: E731
        return (self.node.target, self.axes, plain(self.node.args), plain(self.node.kwargs), tuple((c.target, plain(c.args), plain(c.kwargs)) for c in self.chain))

    @property
    def _is_standard(self):
        return self.axes == tuple(range(len(self.axes)))

    def standard(self, stored):
        """A stored tensor in standard orientation (a view)."""
        return stored if self._is_standard else stored.permute(self.axes)

    def stored(self, standard):
        """The inverse of `standard`."""
        if self._is_standard:
            return standard
        back = [0] * len(self.axes)
        for here, there in enumerate(self.axes):
            back[there] = here
        return standard.permute(back)

    def again(self, x, w, values):
        """The operation on `x` with another weight in standard orientation, without bias; `values` gives each node of `extras`."""
        read = lambda a: fx.node.map_arg(a, lambda n: values[n])  # noqa: E731
        rows = w.shape[-2] if self.node.target is aten._grouped_mm.default else None
        if rows is not None:
            x, w = _aligned(x, w)
        weight = self.stored(w)
        for step in self.chain:
            if step.target in _TURNS | _GATHERS:
                weight = step.target(weight, *read(step.args[1:]), **read(step.kwargs))
        if self.bare is not self.node.target:
            return self.bare(x, weight)
        args = [weight if i == self.w else x if i == self.x else None if i == self.b else read(a) for i, a in enumerate(self.node.args)]
        y = self.bare(*args, **read(self.node.kwargs))
        return y if rows is None or rows == y.shape[-1] else y.narrow(-1, 0, rows)

    def mix(self, h, m, values):
        """`m` (out × rank) over the channels of `h`; per expert where the site has experts."""
        if self.kind == "experts":
            return self.again(h, m, values)
        if self.kind == "conv":
            conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.axes) - 3]
            return conv(h, m.reshape(*m.shape, *[1] * (len(self.axes) - 2)))
        return F.linear(h, m)


def _aligned(x, w):
    """x and w with zeros behind, where a rank is no multiple of eight: the grouped product, and its backward, want rows of whole 16 bytes."""
    inner, outer = -x.shape[-1] % 8, -w.shape[-2] % 8
    return F.pad(x, (0, inner)) if inner else x, F.pad(w, (0, inner, 0, outer)) if inner or outer else w


@dataclass(frozen=True)
class Again:
    """`op` or `mix` of an Operation as a function that a body may call: what it reads of the graph, what a traced body holds of it as constants."""

    operation: Operation
    name: str
    flagged = False  # does it read whether the model trains?

    @property
    def reads(self):
        return self.operation.extras

    @property
    def static(self):
        return self.operation.static

    def run(self, x, w, known):
        """`op(x, w)` or `mix(h, m)`; `known` gives each node of `reads`."""
        return (self.operation.again if self.name == "op" else self.operation.mix)(x, w, known)
