"""Forms of a spec: several steps that stand at one place of the list, because they work on the same values.

    {"parallel": [step, …]}                         the differences that they make are added up
    {"choose": [step, …], "by": {"pass": …}}        a mixing pass makes one value of the value before and theirs

Each of the inner steps is a step, a form, or a list of these that run one after the other.
"""

import dataclasses
from dataclasses import dataclass, field

from ..edit.batch import Batch
from .options import closest, said


@dataclass(frozen=True)
class Form:
    """Steps side by side. `kind` is "parallel" or "choose", `by` the step of the mixing pass; in `steps` a tuple is a list of steps in order."""

    kind: str
    steps: tuple
    by: object = None
    place: str = field(default="", compare=False)

    def to_dict(self, *, full=False):
        """The form as plain JSON values; defaults of its steps are left out unless `full`."""
        return {self.kind: plain(self.steps, full=full), **({"by": plain(self.by, full=full)} if self.by is not None else {})}

    def __str__(self):
        return f"{self.kind} ({', '.join(step.method for step in leaves(self.steps))})"


def plain(step, *, full=False):
    """A step, a form or a tuple of these as plain JSON values."""
    if isinstance(step, tuple):
        return [plain(each, full=full) for each in step]
    return step.to_dict(full=full)


def leaves(step):
    """The single steps of a step, a form or a tuple of these, in the order in which they run."""
    if isinstance(step, tuple):
        return [leaf for each in step for leaf in leaves(each)]
    if isinstance(step, Batch):
        return [leaf for _, steps in step.adapters for leaf in leaves(steps)]
    if not isinstance(step, Form):
        return [step]
    return [*leaves(step.steps), *([step.by] if step.by is not None else [])]


def placed(step, place):
    """A step that was not read from a spec, with a place of its own: what is remembered of steps is remembered under it."""
    if isinstance(step, tuple):
        return tuple(placed(each, f"{place}[{i}]") for i, each in enumerate(step))
    if step.place:
        return step
    if not isinstance(step, Form):
        return dataclasses.replace(step, place=place)
    by = placed(step.by, f"{place}.by") if step.by is not None else None
    return dataclasses.replace(step, steps=placed(step.steps, f"{place}.{step.kind}"), by=by, place=place)


KINDS = {"parallel": ("parallel",), "choose": ("choose", "by")}


def form_of(step):
    """The kind of form that an object of a spec is, or None: a pass may have an option of such a name."""
    return next((kind for kind in KINDS if kind in step), None) if "pass" not in step else None


def parse_form(kind, value, place, faults, parse):
    """A Form, or None with what is wrong added to `faults`; `parse(step, place)` reads one inner step likewise."""
    before = len(faults)
    for key in value:
        if key not in KINDS[kind]:
            faults.append(f'{place}: "{key}" is not a key of "{kind}".{closest(key, KINDS[kind])} Keys: {", ".join(KINDS[kind])}.')
    fewest = 2 if kind == "parallel" else 1
    if not isinstance(value[kind], list) or len(value[kind]) < fewest:
        faults.append(f"{place}.{kind}: expected list of at least {fewest} step{'s' if fewest > 1 else ''}, got {said(value[kind])}")
        return None
    steps = tuple(_parse_inner(step, f"{place}.{kind}[{i}]", faults, parse) for i, step in enumerate(value[kind]))
    by = _parse_by(value, place, faults, parse) if kind == "choose" else None
    return Form(kind, steps, by, place) if len(faults) == before else None


def _parse_inner(step, place, faults, parse):
    """One step, form, or list of these, that stands in a form."""
    if isinstance(step, list):
        if not step:
            faults.append(f"{place}: an empty list of steps. Leave it out.")
        return tuple(_parse_inner(each, f"{place}[{i}]", faults, parse) for i, each in enumerate(step))
    found = parse(step, place)
    if isinstance(found, Batch):
        faults.append(f"{place}: a batch cannot stand beside other steps. Write it before or after.")
        return None
    if found is None or isinstance(found, Form):
        return found
    if hasattr(found.options, "apply"):
        faults.append(f"{place}: {found.method} replaces no value that another pass could work beside. Write it before or after.")
    if found.options.lengthens:
        faults.append(f"{place}: {found.method} puts tokens in front of the model's own, which is not the work of one place. Write it before or after.")
    refuse_mixing(found, faults)
    return found


def refuse_mixing(step, faults):
    """Add to `faults` that a mixing pass stands where no choices are."""
    if step is not None and not isinstance(step, Form | Batch) and step.options.mixes():
        faults.append(f'{step.place}: {step.method} mixes what other passes make. Write {{"choose": [step, …], "by": {{"pass": "{step.method}"}}}}.')


def _parse_by(value, place, faults, parse):
    """The step of the mixing pass of a choose."""
    if "by" not in value:
        faults.append(f'{place}: "by" is missing: the pass that makes one value of those of the steps, for example {{"pass": "adapter_fusion"}}')
        return None
    by = parse(value["by"], f"{place}.by")
    if by is not None and (isinstance(by, Form | Batch) or not by.options.mixes()):
        what = "a form" if isinstance(by, Form | Batch) else by.method
        faults.append(f"{place}.by: {what} mixes nothing: a mixing pass has a noun that asks for `choices`")
    return by
