"""The JSON Schema (draft 2020-12) of a spec, for editors: made from the passes' own fields, docstrings and examples."""

import importlib
import inspect

from ..roles.where import ROLES
from .options import COMMON, common, options_schema

SEED_LIMIT = 2**63
_SHARED = {
    "where": {
        "description": f"Where the pass works. Braces stand for either, * for the rest of a name. Roles: {', '.join(ROLES)}.",
        "anyOf": [
            {"type": "string", "minLength": 1, "examples": ["linear", "attention.{q,v}", "mlp.*"]},
            {
                "type": "object",
                "properties": {
                    "role": {"$ref": "#/$defs/texts", "description": "A role as above."},
                    "path": {"$ref": "#/$defs/texts", "description": "Paths of modules: * is one component, ** any number: layers.{0..3}.**"},
                    "depth": {"type": "string", "pattern": r"^\d+([./]\d+)?\.\.\d+([./]\d+)?$", "description": "A part of the stack of blocks, from 0 to 1: 0..1/4 is its first quarter."},
                    "not": {"$ref": "#/$defs/where", "description": "Sites to leave out."},
                    "expect": {"type": "integer", "minimum": 1, "description": "The number of sites there must be."},
                },
                "anyOf": [{"required": ["role"]}, {"required": ["path"]}, {"required": ["depth"]}],
                "additionalProperties": False,
            },
            {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/where"}, "description": "Either of these."},
        ],
    },
    "texts": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}}]},
    "name": {
        "type": "string",
        "pattern": "^[A-Za-z_][A-Za-z0-9_]*$",
        "default": "default",
        "description": "Tells adapters of one kind apart; part of the names of their tensors.",
    },
    "allow_refusals": {"type": "boolean", "default": False, "description": "Leave out the sites that this pass declines, instead of stopping."},
}


def schema(found):
    """The schema of a spec that may name the passes of `found` (name → Pass class), and passes of the reader's own by their module."""
    own = {
        "title": "a pass of your own, named by its module",
        "type": "object",
        "properties": {"pass": {"type": "string", "pattern": r"^[^.]+(\.[^.]+)+$"}, **{key: {"$ref": f"#/$defs/{key}"} for key in COMMON[1:]}},
        "required": ["pass"],
    }
    steps, definitions = {}, {}
    for name, cls in found.items():
        options = options_schema(cls)
        definitions |= options.get("$defs", {})
        steps[f"pass.{name}"] = _step_schema(name, cls, options)
    steps["pass.other"] = own
    mixing = [f"pass.{name}" for name, cls in found.items() if cls.mixes()]
    plain = [key for key in steps if key not in mixing]
    whole = [f"pass.{name}" for name, cls in found.items() if hasattr(cls, "apply")]
    forms = _forms([key for key in plain if key not in whole], [*mixing, "pass.other"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rewrite spec",
        "description": "Passes over a captured model, run in the order written.",
        "type": "object",
        "properties": {
            "$schema": {"type": "string", "description": "The path of this file, for editors."},
            "seed": {
                "type": "integer",
                "minimum": 0,
                "maximum": SEED_LIMIT - 1,
                "default": 0,
                "description": "Seeds the new tensors, with the path of their site.",
            },
            "passes": {"type": "array", "items": _any_of([*plain, "parallel", "choose", "batch"])},
        },
        "required": ["passes"],
        "additionalProperties": False,
        "$defs": {**steps, **forms, **_SHARED, **definitions},
    }


def _any_of(keys):
    return {"anyOf": [{"$ref": f"#/$defs/{key}"} for key in keys]}


def _forms(inner, mixing):
    """The forms of a spec: steps side by side. `inner` and `mixing` are the definitions that may stand in them, and in `by`."""

    def form(description, **properties):
        return {"description": description, "type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}

    steps = {"anyOf": [*_any_of([*inner, "parallel", "choose"])["anyOf"], {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/inner"}, "description": "These, one after the other."}]}
    adapters = {"type": "object", "minProperties": 1, "propertyNames": _SHARED["name"], "additionalProperties": {"type": "array", "minItems": 1, "items": _any_of(inner)}}
    return {
        "batch": form("Adapters by name: each row of a batch runs the steps of the one that the input adapter_ids says (its number here; -1: none).", batch=adapters),
        "inner": steps,
        "parallel": form("Each step sees the model as it is before all of them; the differences that they make to a value are added up.", parallel={"type": "array", "minItems": 2, "items": {"$ref": "#/$defs/inner"}}),
        "choose": form("Each step sees the model as it is before all of them; a mixing pass makes one value of theirs.", choose={"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/inner"}}, by=_any_of(mixing)),
    }


def _step_schema(name, cls, options):
    shared = {key: {"$ref": f"#/$defs/{key}"} for key in common(cls) if key != "pass"}
    if "where" in shared and cls.role:
        shared["where"]["default"] = cls.role
    return {
        "title": name,
        "description": inspect.getdoc(importlib.import_module(cls.__module__)) or inspect.getdoc(cls),
        "type": "object",
        "properties": {"pass": {"const": name}, **shared, **options.get("properties", {})},
        "required": ["pass", *options.get("required", [])],
        "additionalProperties": False,
        "examples": [{"pass": name, **cls.example}],
    }
