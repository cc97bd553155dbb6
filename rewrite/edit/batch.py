"""Many adapters in one batch: a form of the spec in which each row of a batch runs the steps of one adapter.

    {"batch": {"fr": [step, …], "de": [step, …]}}          adapter_ids: (batch,), the adapter of each row in that order; -1: none
    -->
    one step for those of several adapters that are alike: their tensors stacked, each row taking its adapter's

Steps are grouped by likeness, in an order that keeps that of each adapter. Rows do not see each other, so what a row gets is what the model with
its adapter alone gives.
"""

import dataclasses
import json
from dataclasses import dataclass, field

from ..errors import SpecError
from ..spec.options import said

IDS = "adapter_ids"
_LONGEST = 40  # characters of a name put together of adapters' names


@dataclass(frozen=True)
class Members:
    """The adapters that one step serves: `names` of all in the batch, `numbers` (ascending) of those served, `steps` their own steps."""

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    steps: tuple

    @property
    def adapters(self):
        return tuple(self.names[number] for number in self.numbers)

    def parted(self, step):
        """A step of these members as one for those of each set of options."""
        groups = {}
        for number, own in zip(self.numbers, self.steps):
            groups.setdefault(repr(own.options), []).append((number, own))
        for group in groups.values():
            members = Members(self.names, tuple(number for number, _ in group), tuple(own for _, own in group))
            yield dataclasses.replace(group[0][1], name=_joined(group[0][1].name, members.adapters), members=members, place=step.place)


@dataclass(frozen=True)
class Batch:
    """The form: (name, its steps) of each adapter, in the order of their numbers."""

    adapters: tuple[tuple[str, tuple], ...]
    place: str = field(default="", compare=False)

    @property
    def names(self):
        return tuple(name for name, _ in self.adapters)

    def to_dict(self, *, full=False):
        """The form as plain JSON values."""
        return {"batch": {name: [step.to_dict(full=full) for step in steps] for name, steps in self.adapters}}

    def __str__(self):
        return f"batch ({', '.join(self.names)})"

    def grouped(self):
        """The steps to run, each with its Members."""
        waiting = [list(steps) for _, steps in self.adapters]
        found = []
        while any(waiting):
            heads = [steps[0] for steps in waiting if steps]
            first = next((step for step in heads if not step.options.lengthens), heads[0])  # all that put tokens in front do so at once
            numbers = tuple(i for i, steps in enumerate(waiting) if steps and _are_alike(steps[0], first))
            members = Members(self.names, numbers, tuple(waiting[i].pop(0) for i in numbers))
            found.append(dataclasses.replace(first, name=_joined(first.name, members.adapters), members=members))
        return found


def _are_alike(one, other):
    """Can one step serve both? Tokens in front may be as many as each adapter likes: the rows of the others are padded."""
    return type(one.options) is type(other.options) and (one == other or (one.options.lengthens and dataclasses.replace(one, options=other.options) == other))


def _joined(name, adapters):
    """What stands for several adapters in the names of their stacked tensors."""
    joined = "_".join(adapters) if len("_".join(adapters)) <= _LONGEST else f"{adapters[0]}_and_{len(adapters) - 1}_more"
    return joined if name == "default" else f"{name}_{joined}"


def parse_batch(value, place, faults, name_fault, parse):
    """A Batch, or None with what is wrong added to `faults`; `parse(step, place)` reads one step, `name_fault(name)` says why it is no name."""
    before = len(faults)
    for key in value:
        if key != "batch":
            faults.append(f'{place}: "{key}" is not a key of "batch". It has none but its adapters.')
    given = value["batch"]
    if not isinstance(given, dict) or not given:
        faults.append(f'{place}.batch: expected an object of adapters such as {{"fr": [{{"pass": "lora", …}}]}}, got {said(given)}')
        return None
    adapters = []
    for name, steps in given.items():
        reason = name_fault(name)
        if reason:
            faults.append(f"{place}.batch: {reason}")
        if not isinstance(steps, list) or not steps:
            faults.append(f"{place}.batch.{name}: expected list of at least 1 step, got {said(steps)}")
            continue
        parsed = tuple(parse(step, f"{place}.batch.{name}[{i}]") for i, step in enumerate(steps))
        for step in parsed:
            reason = step is not None and _misplaced(step)
            if reason:
                faults.append(f"{step.place}: {reason}")
        adapters.append((name, parsed))
    return Batch(tuple(adapters), place) if len(faults) == before else None


def _misplaced(step):
    """Why a step cannot stand in a batch, or None."""
    if not hasattr(step, "options"):
        return "a form cannot stand in a batch; write its steps one after the other."
    if hasattr(step.options, "apply"):
        return f"{step.method} changes the model for all rows alike. Write it before or after the batch."
    if step.options.mixes():
        return f"{step.method} mixes what other passes make, which rows with an adapter each have none of."
    if step.options.unstacked():
        return f"{step.method} does something to its tensors while training ({', '.join(step.options.unstacked())}), which it cannot do to stacked ones. Train it alone."
    return None


def refuse_second(steps, faults):
    """Add to `faults` that two batches would read their adapters from one input."""
    batches = [step for step in steps if isinstance(step, Batch)]
    if len(batches) > 1:
        faults.append(f'{batches[1].place}: there is a batch at {batches[0].place} already, and {IDS} says one adapter for each row. Write one batch.')


def alone(spec, name):
    """The spec of one adapter of a batch as if it were the only one. Raises SpecError for a name that is none of them."""
    batch = next((step for step in spec.passes if isinstance(step, Batch)), None)
    if batch is None or name not in batch.names:
        raise SpecError(f'"{name}" is no adapter of a batch here. {"It has: " + ", ".join(batch.names) if batch else "The spec has no batch"}.')
    steps = dict(batch.adapters)[name]
    passes = [own for step in spec.passes for own in (steps if step is batch else (step,))]
    return dataclasses.replace(spec, passes=tuple(dataclasses.replace(step, place=f"passes[{i}]") for i, step in enumerate(passes)), source=None)


def place_of(step):
    """A key that two steps share which would make tensors of the same names."""
    return step.method, step.name, json.dumps(step.where, sort_keys=True)
