"""What a rewrite did, as a value: per pass its sites and refusals, parameters and bytes before and after."""

import re
from collections import Counter
from dataclasses import dataclass, field

import torch

from .training.hooks import Hooked

#: so many sites of a step are printed with their figures
LISTED = 16


@dataclass(frozen=True)
class Size:
    """Parameters of a model, tied ones counted once. `stored_bytes` are those of all parameters and persistent buffers."""

    trainable: int
    frozen: int
    stored_bytes: int

    @staticmethod
    def of(root):
        parameters = {id(p): p for p in root.parameters()}.values()
        tensors = {id(t): t for t in root.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}.values()
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        return Size(trainable, sum(p.numel() for p in parameters) - trainable, sum(t.numel() * t.element_size() for t in tensors))

    def training(self, trainable):
        """The same tensors, of which another number trains."""
        return Size(trainable, self.trainable + self.frozen - trainable, self.stored_bytes)

    @property
    def share(self):
        """Trainable share of all parameters, 0 to 1."""
        return self.trainable / max(1, self.trainable + self.frozen)


@dataclass(frozen=True)
class Applied:
    """One step of the pipeline. `sites` are paths with their roles, `refused` paths with reasons; sizes are those of the whole model."""

    method: str
    name: str
    place: str
    sites: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]
    before: Size
    after: Size
    seconds: float

    @property
    def label(self):
        """The pass, its name where it has one, before it the form that it stands in."""
        form = re.findall(r"\.(parallel|choose|by)\b", self.place)
        return (f"{form[-1]}: " if form else "") + self.method + (f" {self.name}" if self.name != "default" else "")


@dataclass
class Report:
    """The report of one rewrite.

    `made` maps each new tensor's path to the pass that made it; `trains` are the base tensors that the spec lets train, `written` those that are
    copies of the live model's own, `trainers` the places of the steps that asked for them; `folded` those whose values a merge changed, `biases` the bias that a merge had to make for a weight; `opaque`
    the modules that stayed one call, with the reason; `notes` fall-backs. `hooked` are the steps that do something while training, by place;
    `memory` the buffers that they remember things in. `inputs` those beside the model's own (name → `Input`); `stacked` maps a tensor with an
    entry for each of several adapters to adapter → the path of its own tensor alone. `derived` maps what follows from
    the base (codes, a base tensor's new value) to its Fact, `feeds` are new tensors that it was made from; `released` base tensors that left
    memory, with their dtype; `figures` what passes measured: place of the step → site → name → number.
    """

    applied: list[Applied] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)
    trains: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    trainers: dict[str, set[str]] = field(default_factory=dict)
    folded: set[str] = field(default_factory=set)
    biases: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, object] = field(default_factory=dict)
    stacked: dict[str, dict[str, str]] = field(default_factory=dict)
    derived: dict[str, object] = field(default_factory=dict)
    feeds: set[str] = field(default_factory=set)
    released: dict[str, torch.dtype] = field(default_factory=dict)
    figures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hooked: dict[str, Hooked] = field(default_factory=dict)
    memory: set[str] = field(default_factory=set)

    def table(self):
        """A rich table: a row per pass."""
        from rich.table import Table

        table = Table(title="rewrite", title_justify="left")
        for head, justify in (("pass", "left"), ("sites", "left"), ("refused", "right"), ("trainable", "right"), ("share", "right"), ("stored", "right"), ("seconds", "right")):
            table.add_column(head, justify=justify)
        for step in self.applied:
            roles = ", ".join(f"{role} ×{n}" for role, n in Counter(role for _, role in step.sites).items())
            size = step.after
            table.add_row(step.label, roles or "whole graph", str(len(step.refused)), f"{size.trainable:,}", f"{size.share:.2%}", f"{size.stored_bytes / 1e6:,.1f} MB", f"{step.seconds:.2f}")
        return table

    def _measured(self):
        """A line for each figure of each step: its median and its worst site; under it site by site, the worst ones where there are many."""
        for step in self.applied:
            sites = self.figures.get(step.place, {})
            for name in next(iter(sites.values()), {}):
                order = sorted(((figures[name], site) for site, figures in sites.items()), reverse=True)
                yield f"measured {step.method}: {name} {order[(len(order) - 1) // 2][0]:.3g} in the middle, {order[0][0]:.3g} at {order[0][1]}"
                yield from (f"         {value:.3g} {site}" for value, site in order[:LISTED])
                if len(order) > LISTED:
                    yield f"         … and {len(order) - LISTED} more, in report.figures"

    def __str__(self):
        from rich.console import Console

        console = Console(width=120, record=False, force_terminal=False, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
            for step in self.applied:
                for path, reason in step.refused:
                    console.print(f"refused  {step.method} at {path}: {reason}", highlight=False)
            for hooked in self.hooked.values():
                console.print(f"training {hooked.step.method} ({hooked.step.name}): {', '.join(hooked.step.options.hooks())}", highlight=False)
            for line in self._measured():
                console.print(line, highlight=False)
            for path, reason in self.opaque.items():
                console.print(f"opaque   {path}: {reason}", highlight=False)
            for note in self.notes:
                console.print(f"note     {note}", highlight=False)
        return capture.get()
