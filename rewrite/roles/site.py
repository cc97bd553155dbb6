"""What a pass is told about a place in the graph: a site with its handles.

    Site    one place: its role, its handles (`x w b y`, `q k v mask y`, …), the weight's path, how the weight is stored
    Layout  how the stored weight stands to the standard out × in, and which of its OUT rows the site covers
    Rows    a regular set of OUT rows: a third of a fused projection, one head's share of each period of an interleaved one
    Roles   all sites of a graph, in graph order
"""

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import fx


@dataclass(frozen=True)
class Rows:
    """The rows r of `total` with start ≤ r mod period < stop. A plain slice has period = total.

    `y.unflatten(-1, (total // period, period)).narrow(-1, start, stop - start).flatten(-2)` reads them from an output y;
    `listed` holds the rows one by one where they follow no such rule.
    """

    start: int
    stop: int
    period: int
    total: int
    listed: tuple[int, ...] | None = None

    def __len__(self):
        return len(self.listed) if self.listed is not None else (self.stop - self.start) * (self.total // self.period)

    @property
    def is_slice(self):
        return self.listed is None and self.period == self.total

    def index(self):
        """The rows as an int64 tensor, ascending."""
        if self.listed is not None:
            return torch.tensor(self.listed)
        return torch.arange(self.total).view(-1, self.period)[:, self.start : self.stop].reshape(-1)

    def take(self, value, dim):
        """These rows of dimension `dim` of a tensor."""
        if self.is_slice:
            return value.narrow(dim, self.start, self.stop - self.start)
        at = dim % value.dim()
        return value.unflatten(at, (self.total // self.period, self.period)).narrow(at + 1, self.start, self.stop - self.start).flatten(at, at + 1)

    def put(self, value, part, dim):
        """`value` with these rows of dimension `dim` replaced by `part`."""
        at = dim % value.dim()
        if not self.is_slice:
            value = value.unflatten(at, (self.total // self.period, self.period))
            part = part.unflatten(at, (self.total // self.period, self.stop - self.start))
        inner = at if self.is_slice else at + 1
        pieces = (value.narrow(inner, 0, self.start), part, value.narrow(inner, self.stop, self.period - self.stop))
        whole = torch.cat([piece for piece in pieces if piece.shape[inner] != 0], inner)
        return whole if self.is_slice else whole.flatten(at, inner)

    def __str__(self):
        if self.listed is not None:
            return f"rows {len(self.listed)} of {self.total}"
        return f"rows {self.start}:{self.stop}" + ("" if self.is_slice else f" of every {self.period}")

    @staticmethod
    def of(index, total):
        """The Rows of a sorted tensor of distinct row numbers; None when it holds all of them."""
        if len(index) == total:
            return None
        breaks = (torch.diff(index) != 1).nonzero().flatten()
        start = int(index[0])
        length = int(breaks[0]) + 1 if len(breaks) else len(index)
        period = int(index[length]) - start if len(breaks) else total
        if start + length <= period and total % period == 0:
            rows = Rows(start, start + length, period, total)
            if torch.equal(rows.index(), index):
                return rows
        return Rows(start, int(index[-1]) + 1, total, total, tuple(index.tolist()))


@dataclass(frozen=True)
class Layout:
    """How a site's weight is stored, and where the operation takes its arguments.

    `kind`: "linear" (out × in), "conv" (out × in/groups × window), "experts" (expert × out × in), "embedding" (ids × features),
    "einsum" (any order of axes), or "" for sites without a weight. `transposed`: the stored weight has in before out (GPT-2's Conv1D,
    a transposed convolution, experts as E × in × out). `axis`: the features' axis of x and y. `rows`: the OUT rows that the site covers,
    None for all. `stored`: the rows of the stored weight that the operation reads, None for all.
    `arguments`: name of a handle → position in `operation.args`. `turned`: the handles whose last two axes stand the other way round
    (keys as a product of attention written out takes them, dim × length).
    """

    kind: str = ""
    transposed: bool = False
    axis: int = -1
    rows: Rows | None = None
    stored: Rows | None = None
    arguments: dict[str, int] = field(default_factory=dict)
    turned: tuple[str, ...] = ()

    def __str__(self):
        return " ".join(filter(None, (self.kind, self.transposed and "in×out", self.rows and str(self.rows))))


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a pass applies.

    `node`: the node whose value is `y` (for a part of a fused projection: the whole output, `layout.rows` says which part).
    `role`: the narrowest name; `roles`: every name under which the site is found. `path`: the module of the weight, or the parameter's own
    path where it is not of a leaf module. `owner`: the module on which new tensors are installed, `label` tells several sites on
    one owner apart. `handles`: name → node, or None where the site has none (no bias, no mask). `operation`: the node of the affine op.
    `block`, `index`: path and number of the block around it; `depth`: where its middle lies in the stack of blocks, 0 to 1. `call`: 0, or the number of the call when a module is called again.
    """

    node: fx.Node
    role: str
    roles: tuple[str, ...]
    path: str
    owner: str
    handles: dict[str, fx.Node | None]
    label: str = ""
    layout: Layout = Layout()
    operation: fx.Node | None = None
    index: int | None = None
    block: str | None = None
    call: int = 0
    depth: Fraction | None = None

    @property
    def name(self):
        """The path, with the label and the call that tell it from its neighbours."""
        is_own = self.path.endswith(f".{self.label}") and not self.label.isdigit()  # the parameter's name, which the path has already
        label = "" if is_own else self.label.rpartition(".")[2]
        return self.path + (f"[{label}]" if label else "") + (f"#{self.call}" if self.call else "")

    @property
    def weight(self):
        """Dotted path of the stored weight, or None."""
        w = self.handles.get("w")
        return w.target if w is not None and w.op == "get_attr" else None

    def __str__(self):
        return f"{self.role} at {self.name}"


class Roles:
    """The sites of a graph, in graph order; `positions` is the one value by which its tokens are counted, or None."""

    def __init__(self, sites, positions=None):
        self.sites, self.positions = tuple(sites), positions

    def __iter__(self):
        return iter(self.sites)

    def __len__(self):
        return len(self.sites)

    def __getitem__(self, role):
        """The sites found under a role's name."""
        return [site for site in self.sites if role in site.roles]

    @property
    def names(self):
        """Every name under which a site is found, sorted."""
        return sorted({name for site in self.sites for name in site.roles})

    def summary(self):
        """One line: `attention.{q,k,v,o} ×2, mlp.{gate,up,down} ×2, norm ×5, head`."""
        counts = Counter(site.role for site in self.sites)
        groups = {}
        for role in sorted(counts, key=_order):
            stem, dot, part = role.rpartition(".")
            groups.setdefault((stem, counts[role], role in _WHOLE) if dot else role, []).append(part)
        lines = []
        for key, parts in groups.items():
            stem, count = key[:2] if isinstance(key, tuple) else ("", counts[key])
            name = key if not stem else f"{stem}.{parts[0]}" if len(parts) == 1 else f"{stem}.{{{','.join(parts)}}}"
            lines.append(name + (f" ×{count}" if count > 1 else ""))
        return ", ".join(lines)

    def folded(self):
        """`(name, sites)`: sites that differ by the number of their block alone stand together, as `layers.{0..3}.mlp.up_proj`."""
        groups = {}
        for site in self.sites:
            stem, _, number = (site.block or "").rpartition(".")
            inside = number.isdigit() and site.name.startswith(f"{site.block}")
            pattern = (f"{stem}.", site.name.removeprefix(site.block)) if inside else (site.name, "")
            w = site.handles.get("w")
            groups.setdefault((site.roles, pattern, w is not None and tuple(w.meta["val"].shape), str(site.layout)), []).append((int(number) if inside else None, site))
        return [(_spread(*pattern, [number for number, _ in group]), [site for _, site in group]) for (_, pattern, *_), group in groups.items()]

    def table(self):
        """A rich table: role, sites, what else they are found by, shape of the weight, layout."""
        from rich.table import Table

        table = Table("role", "site", "also", "weight", "layout", title=self.summary(), title_justify="left")
        for name, (site, *_) in self.folded():
            w = site.handles.get("w")
            table.add_row(site.role, name, " ".join(site.roles[1:]), "×".join(map(str, w.meta["val"].shape)) if w is not None else "", str(site.layout))
        return table

    def __str__(self):
        rows = [(site.role, name, str(site.layout), " ".join(role for role in site.roles[1:] if role not in ("linear", "conv"))) for name, (site, *_) in self.folded()]
        rows = [(role, name, layout, also and f"also {also}") for role, name, layout, also in rows]
        wide = [max(map(len, column), default=0) for column in zip(*rows)]
        return "\n".join(" ".join(cell.ljust(w) for cell, w in zip(row, wide)).rstrip() for row in rows)


def _spread(stem, rest, numbers):
    """`layers.{0..2,4}.mlp`: the numbers of blocks between the two parts of a path."""
    if numbers[0] is None:
        return stem
    runs = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
    return f"{stem}{{{text}}}{rest}" if len(numbers) > 1 else f"{stem}{text}{rest}"


_KINDS = ("attention", "mlp", "router", "expert", "mixer", "linear", "conv", "embed", "norm", "head")
_PARTS = ("q", "kv", "k", "v", "o", "gate", "up", "down", "rope", "in", "conv", "inner", "out", "shared")
_WHOLE = ("attention", "attention.cross", "attention.block", "mlp", "mixer", "residual", "block", "opaque", "logits", "model")


def _order(role):
    """Projections first, in the order of the data, whole regions last."""
    if role in _WHOLE:
        return 1, _WHOLE.index(role), [], role
    kind, *parts = role.split(".")
    place = lambda name, names: names.index(name) if name in names else len(names)  # noqa: E731
    return 0, place(kind, _KINDS), [place(part, _PARTS) for part in parts], role
