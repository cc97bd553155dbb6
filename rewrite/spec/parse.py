"""The spec: JSON in, a checked value out, and every mistake with its place.

    {"seed": 0, "passes": [{"pass": "lora", "where": "attention.{q,v}", "rank": 8}]}
    -->
    Spec(seed=0, passes=(Step("lora", LoRA(rank=8), where="attention.{q,v}", name="default", …),))

A pass is found by its name, not in a registry: `"lora"` is the module `rewrite.passes.lora` and the one `Pass` in it. What may stand in a
step is read off that dataclass, so the checks, the messages and the JSON Schema cannot say three different things.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import json
import keyword
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pydantic
from torch import nn

from ..contract import Pass
from ..edit.batch import Batch, parse_batch, place_of, refuse_second
from ..errors import SpecError
from ..roles.where import parse as parse_where
from .forms import Form, form_of, parse_form, refuse_mixing
from .options import COMMON, closest, common, options_model, parse_options, said
from .schema import SEED_LIMIT, schema


@dataclass(frozen=True)
class Step:
    """One pass of a spec: `method` as the spec spells it, `options` an instance of the pass, `place` such as "passes[1]".

    `members`: the adapters of a batch that it serves, None where it serves all rows.
    """

    method: str
    options: Pass
    where: object = None
    name: str = "default"
    allow_refusals: bool = False
    place: str = field(default="", compare=False)
    members: object = field(default=None, compare=False)

    def to_dict(self, *, full=False):
        """The step as plain JSON values; defaults are left out unless `full`."""
        model = options_model(type(self.options))
        given = model(**{f.name: getattr(self.options, f.name) for f in dataclasses.fields(self.options)})
        step = {"pass": self.method, "where": self.where, **given.model_dump(mode="json", by_alias=True, exclude_defaults=not full)}
        step |= {"name": self.name, "allow_refusals": self.allow_refusals}
        usual = {"where": self.options.role, "name": "default", "allow_refusals": False}
        keys = common(type(self.options))
        return {key: value for key, value in step.items() if key not in usual or (key in keys and (full or value != usual[key]))}


@dataclass(frozen=True)
class Spec:
    """A checked spec. `source` is the file that it came from, for messages; two specs are equal when they ask for the same."""

    seed: int = 0
    passes: tuple[Step | Form, ...] = ()
    source: str | None = field(default=None, compare=False)

    @staticmethod
    def parse(value, passes=(), *, imports=True):
        """A Spec from a dict, a path to a JSON file, or a Spec (handed back as it is).

        `passes` are `Pass` classes, or modules with one, that the spec may name beside the built-in ones. With `imports=False` nothing
        else is looked up: a spec from somewhere cannot make us import what it names. Raises SpecError with every mistake found, one a line.
        """
        if isinstance(value, Spec):
            return value
        source = None
        if isinstance(value, str | Path):
            source, value = str(value), read_json(value)
        prefix = f"{source}: " if source else ""
        faults = []
        spec = _parse(value, _Finder(passes, imports), source, faults)
        if faults:
            raise SpecError("\n".join(prefix + fault for fault in faults))
        return spec

    def to_dict(self, *, full=False):
        """The spec as plain JSON values; defaults are left out unless `full`."""
        return {**({"seed": self.seed} if self.seed or full else {}), "passes": [step.to_dict(full=full) for step in self.passes]}

    def to_json(self):
        """The spec as JSON text, defaults left out, one pass a line; parsing it gives an equal Spec."""
        lines = [json.dumps(step.to_dict(), ensure_ascii=False) for step in self.passes]
        seed = f'"seed": {self.seed}, ' if self.seed else ""
        listed = "\n    " + ",\n    ".join(lines) + "\n  " if lines else ""
        return f'{{ {seed}"passes": [{listed}] }}\n'

    @staticmethod
    def schema(passes=()):
        """The JSON Schema (draft 2020-12) of a spec that names the built-in passes and `passes`."""
        finder = _Finder(passes)
        found = {name: finder.find(name) for name in sorted({*builtin_names(), *(_names_of(p)[0] for p in passes)})}
        return schema(found)


# -- finding a pass ------------------------------------------------------------------------------------------------------------------


def builtin_names():
    """The names of the built-in passes: the files of `rewrite.passes`, sorted."""
    folder = importlib.import_module("rewrite.passes")  # by name: the engine knows no pass
    return sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_"))


def _entry_points():
    return {point.name: point for point in importlib.metadata.entry_points(group="rewrite.passes")}


def pass_of(module):
    """The one Pass that a module defines."""
    found = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Pass) and v.__module__ == module.__name__]
    found = [v for v in found if not v.__name__.startswith("_")]
    if len(found) == 1:
        return found[0]
    count = f"{len(found)} passes ({', '.join(v.__name__ for v in found)})" if found else "no pass"
    raise SpecError(f'"{module.__name__}" defines {count}. A pass file holds one subclass of rewrite.Pass.')


def _class_of(given):
    if isinstance(given, ModuleType):
        return pass_of(given)
    if isinstance(given, type) and issubclass(given, Pass):
        return given
    raise SpecError(f"passes: expected Pass classes or modules with one, got {given!r}")


def _names_of(given):
    """The names under which a spec may name a pass that was handed over: its stem, and its module's dotted name."""
    cls = _class_of(given)
    return cls.__name__.lower(), cls.__module__


class _Finder:
    """Finds the Pass class that a name stands for."""

    def __init__(self, passes=(), imports=True):
        self.handed = {name: _class_of(given) for given in passes for name in _names_of(given)}
        self.imports = imports

    def find(self, name):
        """The Pass class called `name`. Raises SpecError with the closest names."""
        cls = self._locate(name)
        if "__dataclass_fields__" not in vars(cls):
            raise SpecError(f'"{name}": {cls.__name__} is not a frozen dataclass. Write @dataclass(frozen=True) above the class.')
        taken = [f.name for f in dataclasses.fields(cls) if f.name in COMMON]
        if taken:
            raise SpecError(f'"{name}": {cls.__name__} has an option called "{taken[0]}", which every step has already. Call it something else.')
        wrong = _misspelt(cls)
        if wrong:
            raise SpecError(f'"{name}": {wrong}')
        try:
            options_model(cls)
        except (pydantic.PydanticUserError, NameError) as error:
            raise SpecError(f'"{name}": an option of {cls.__name__} has a type that JSON cannot hold: {str(error).splitlines()[0]}') from error
        return cls

    def _locate(self, name):
        if name in builtin_names():
            return pass_of(importlib.import_module(f"rewrite.passes.{name}"))
        if name in self.handed:
            return self.handed[name]
        if not self.imports:
            near = closest(name, [*builtin_names(), *self.handed])
            raise SpecError(
                f'"{name}" is not a built-in pass, and a folder may not have code imported.{near} '
                "If you trust it, import the pass yourself and hand it over: passes=[…]."
            )
        points = _entry_points()
        if name in points:
            return _class_of(self._import(name, points[name].load))
        if "." in name and all(part.isidentifier() for part in name.split(".")):
            return pass_of(self._import(name, lambda: importlib.import_module(name)))
        known = sorted([*builtin_names(), *(n for n in self.handed if "." not in n), *points])
        own = 'A pass of your own is named by its module: "mylab.rosa".'
        raise SpecError(f'"{name}" is not a pass.{closest(name, known)} Passes: {", ".join(known)}. {own}')

    @staticmethod
    def _import(name, load):
        try:
            return load()
        except (ImportError, AttributeError, SyntaxError) as error:
            raise SpecError(f'"{name}" cannot be imported: {type(error).__name__}: {error}. Is it on the Python path?') from error


@functools.cache
def _misspelt(cls):
    """What is wrong with the names that a pass defines: a fact, noun or hook that nearly has the name of one is never read. None where all is well."""
    known, options = cls.words(), {f.name for f in dataclasses.fields(cls)}
    own = [word for one in cls.__mro__ if one is not Pass and issubclass(one, Pass) for word in vars(one) if not word.startswith("_")]
    near = ((word, closest(word, known, cutoff=0.8)) for word in own if word not in known and word not in options)
    return next((f'{cls.__name__} defines "{word}", which nothing reads.{meant} What a pass has for itself begins with _.' for word, meant in near if meant), None)


# -- reading -------------------------------------------------------------------------------------------------------------------------


def read_json(path):
    """The value of a JSON file. Raises SpecError with line and column; a key that stands twice in one object is an error too."""

    def pairs(items):
        made = {}
        for key, value in items:
            if key in made:
                raise SpecError(f'{path}: the key "{key}" stands twice in one object. Keep one.')
            made[key] = value
        return made

    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text (byte {error.start}). A spec is a JSON file.") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SpecError(f"{path}: cannot be read: {reason}. Give a dict or the path of a JSON file.") from error
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise SpecError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise SpecError(f"{path}: nested too deeply to be a spec") from error
    except ValueError as error:  # an integer of thousands of digits
        raise SpecError(f"{path}: not JSON that can be read: {error}") from error


def _plain(value, place):
    """`value` rebuilt from JSON types alone (tuples become lists). Raises SpecError at the first thing that JSON does not have."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v, f"{place}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str:
                raise SpecError(f"{place or 'spec'}: a key must be a string, got {key!r}")
        return {k: _plain(v, f"{place}.{k}" if place else k) for k, v in value.items()}
    raise SpecError(f"{place or 'spec'}: expected a JSON value, got {type(value).__module__}.{type(value).__qualname__}")


def _parse(value, finder, source, faults):
    try:
        value = _plain(value, "")
    except SpecError as error:
        faults.append(str(error))
        return None
    except RecursionError:
        faults.append("nested too deeply to be a spec")
        return None
    if not isinstance(value, dict):
        faults.append(f'expected an object such as {{"passes": […]}}, got {said(value)}')
        return None
    for key in value:
        if key not in ("seed", "passes", "$schema"):
            faults.append(f'"{key}" is not a key of a spec.{closest(key, ("seed", "passes"))} Keys: seed, passes.')
    seed = value.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < SEED_LIMIT:
        faults.append(f"seed: expected int from 0 to 2⁶³-1, got {said(seed)}")
    if "passes" not in value:
        faults.append('"passes" is missing: the list of passes, in the order in which they run')
        return None
    if not isinstance(value["passes"], list):
        faults.append(f"passes: expected list, got {said(value['passes'])}")
        return None
    steps = [_parse_step(step, finder, f"passes[{i}]", faults) for i, step in enumerate(value["passes"])]
    for step in steps:
        refuse_mixing(step, faults)
    if faults:
        return None
    refuse_second(steps, faults)
    _check_collisions(steps, faults)
    return Spec(seed, tuple(steps), source)


def _parse_step(step, finder, place, faults):
    """One Step or Form, or None with what is wrong added to `faults`."""
    before = len(faults)
    if not isinstance(step, dict):
        faults.append(f'{place}: expected an object such as {{"pass": "lora", …}}, got {said(step)}')
        return None
    kind = form_of(step)
    if kind is not None:
        return parse_form(kind, step, place, faults, lambda inner, place: _parse_step(inner, finder, place, faults))
    if "batch" in step and "pass" not in step:
        return parse_batch(step, place, faults, _name_fault, lambda inner, place: _parse_step(inner, finder, place, faults))
    if "pass" not in step:
        faults.append(f'{place}: "pass" is missing: the name of the pass.{closest(next(iter(step), ""), COMMON)}')
        return None
    method = step["pass"]
    if not isinstance(method, str):
        faults.append(f"{place}.pass: expected string, got {said(method)}")
        return None
    try:
        cls = finder.find(method)
    except SpecError as error:
        faults.append(f"{place}: {error}")
        return None
    name = step.get("name", "default")
    reason = _name_fault(name)
    if reason:
        faults.append(f"{place}.name: {reason}")
    allow = step.get("allow_refusals", False)
    if type(allow) is not bool:
        faults.append(f"{place}.allow_refusals: expected true or false, got {said(allow)}")
    where = step.get("where", cls.role)
    for key in COMMON:
        if key in step and key not in common(cls):
            what = "works where the steps of its choose do" if cls.mixes() else "works on the whole graph" if cls.role is None else "makes no tensors"
            faults.append(f'{place}: {method} {what} and takes no "{key}". Leave it out.')
    if where is None and "where" in common(cls) and "where" not in step:
        faults.append(f'{place}: {method} needs "where": the role on which it works')
    if "where" in step and "where" in common(cls):
        try:
            parse_where(where, f"{place}.where")
        except SpecError as error:
            faults.append(str(error))
    options = parse_options(cls, method, {k: v for k, v in step.items() if k not in COMMON}, place, faults)
    if len(faults) > before:
        return None
    return Step(method, options, where, name, allow, place)


def _name_fault(name):
    if not isinstance(name, str):
        return f"expected string, got {said(name)}"
    if not name.isascii() or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("__"):
        return f"{said(name)} cannot be part of a parameter's name. Use letters, digits and _."
    if hasattr(nn.Module, name) or name in vars(nn.Module()):
        return f"{said(name)} is a name that every torch module has already. Choose another."
    return None


def _check_collisions(steps, faults):
    """Two steps that would make tensors of the same names at the same sites, with no whole-graph pass (a merge) in between."""
    seen = {}
    for step in steps:
        if isinstance(step, Batch):
            for _, own in step.adapters:
                _check_collisions(own, faults)
            continue
        if isinstance(step, Step) and hasattr(step.options, "apply"):
            seen.clear()
            continue
        for leaf, where in _placed(step):
            key = place_of(dataclasses.replace(leaf, where=where))
            if key in seen:
                there = f'stands at {said(where)} already ({seen[key]}) under the name "{leaf.name}"'
                faults.append(f'{leaf.place}: "{leaf.method}" {there}. Give one of them another "name".')
            seen.setdefault(key, leaf.place)


def _placed(step):
    """(step, where it works) of each single step of a step or a form: a mixing pass works where the steps of its own choose do."""
    if isinstance(step, tuple):
        return [each for one in step for each in _placed(one)]
    if not isinstance(step, Form):
        return [(step, step.where)]
    inner = _placed(step.steps)
    if step.by is None:
        return inner
    wheres = list({json.dumps(where, sort_keys=True): where for _, where in inner}.values())
    return [*inner, (step.by, wheres[0] if len(wheres) == 1 else wheres)]
