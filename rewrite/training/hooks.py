"""What a pass does while training: which steps have hooks, what each remembers, and its sites as the hooks see them.

    report.hooked   place of a step  -->  Hooked: the step, and per site the paths of its tensors
    view.up         -->  the tensor of that name on the live model, as it is now
    view.w          -->  the base weight, out × in

Hooks write in place, so what they choose is a buffer that the printed source reads: a compiled model is not compiled again for it.
"""

from dataclasses import dataclass, field

from .. import graph as g
from ..roles.site import Rows

#: how many optimizer steps the model has seen: a buffer, so that it is saved and resumed with the tensors
COUNTER = "steps_done"


@dataclass(frozen=True)
class Base:
    """A site's part of a stored base tensor: `axes` turn the stored one to out × in, `rows` are the site's own along `dim`."""

    path: str
    axes: tuple[int, ...]
    rows: Rows | None
    dim: int

    def read(self, stored):
        """The site's part of a stored tensor (the weight, its gradient) in standard orientation, detached."""
        whole = stored.detach().permute(self.axes)
        return whole if self.rows is None else self.rows.take(whole, self.dim)

    def write(self, stored, value):
        """Put a new value for the site's part in a stored tensor, in place."""
        whole = stored.detach().permute(self.axes)
        whole.copy_(value if self.rows is None else self.rows.put(whole, value, self.dim))


@dataclass(frozen=True)
class Held:
    """The tensors of one site: name → path, new ones and what hooks remember; `base` is its weight, None where it has none.

    `row`: which of the stacked tensors of a batch of adapters are meant, None where they are not stacked.
    """

    path: str
    role: str
    tensors: dict[str, str]
    base: Base | None
    row: int | None = None


@dataclass
class Hooked:
    """A step with hooks: its sites by the place of their tensors, and the paths of what they share (`row` as for Held)."""

    step: object
    seed: int
    sites: dict[str, Held] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    row: int | None = None

    def views(self, root):
        """The sites as hooks see them on the live model `root`."""
        return tuple(View(root, held) for held in self.sites.values())

    def common(self, root, name):
        """A tensor that the sites share."""
        return _at(root, self.shared[name], self.row)


class View:
    """A site of a live model: `.path`, `.role`, `.w` (the base weight, out × in), `.w_grad`, and each of its new tensors by name.

    Assigning to `w` or `w_grad` writes the site's part of the stored tensor in place.
    """

    def __init__(self, root, held):
        self._root, self._held, self.path, self.role = root, held, held.path, held.role

    def __getattr__(self, name):
        held = self.__dict__.get("_held")
        if held is None or name not in held.tensors:
            raise AttributeError(f"{name!r} is no tensor of this site; it has {', '.join(held.tensors) if held else 'none'}")
        return _at(self._root, held.tensors[name], held.row)

    @property
    def names(self):
        """The names of the site's tensors."""
        return tuple(self._held.tensors)

    @property
    def w(self):
        return self._held.base.read(self._stored)

    @w.setter
    def w(self, value):
        self._held.base.write(self._stored, value)

    @property
    def w_grad(self):
        return self._held.base.read(self._stored.grad)

    @w_grad.setter
    def w_grad(self, value):
        self._held.base.write(self._stored.grad, value)

    @property
    def _stored(self):
        return g.attribute(self._root, self._held.base.path)


def _at(root, path, row):
    value = g.attribute(root, path)
    return value if row is None else value[row]


def forget(report, root):
    """Let go of the hooks of sites whose tensors a merge has folded, and of what they remembered."""
    for place, hooked in list(report.hooked.items()):
        kept = {base: held for base, held in hooked.sites.items() if all(path in report.made or path in report.memory for path in held.tensors.values())}
        gone = [path for base, held in hooked.sites.items() if base not in kept for path in held.tensors.values()]
        if not kept and hooked.sites:
            gone += hooked.shared.values()
            del report.hooked[place]
        hooked.sites = kept
        discard(report, root, gone)
    if not report.hooked:
        discard(report, root, [COUNTER])


def discard(report, root, paths):
    """Take what hooks remember under `paths` off the model."""
    for path in report.memory.intersection(paths):
        g.remove(root, path)
        report.memory.discard(path)
