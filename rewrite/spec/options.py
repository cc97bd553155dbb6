"""The options of a pass: what its dataclass fields accept, checked strictly, and each mistake in words with its place.

    rank: Annotated[int, Field(ge=1)]
    -->
    passes[1].rank: expected int ≥ 1, got 0

The types are read off the pass by pydantic; the words are read off the JSON Schema that pydantic makes of them.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import typing

import pydantic

COMMON = ("pass", "where", "name", "allow_refusals")  # the keys of a step that are not options of its pass

LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "a multiple of {}",
    "minItems": "with at least {} items",
    "maxItems": "with at most {} items",
    "minLength": "of at least {} characters",
    "maxLength": "of at most {} characters",
    "pattern": "like {}",
}


def common(cls):
    """The keys of COMMON that a step of this pass may have: a pass that makes no tensors has no name, one without sites of its own no `where`."""
    if cls.mixes():
        return ("pass", "name")
    if not hasattr(cls, "apply"):
        return COMMON
    return ("pass",) if cls.role is None else ("pass", "where")


def said(value):
    """A JSON value as a message shows it, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def closest(name, known, cutoff=0.6):
    """' Did you mean "lora"?' or '', for messages."""
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=cutoff)
    ratios = [difflib.SequenceMatcher(None, other, name.lower()).ratio() for other in near]
    near = [other for other, ratio in zip(near, ratios) if ratio > ratios[0] - 0.08]  # what is as good as the best
    return " Did you mean " + " or ".join(f'"{lowered[k]}"' for k in near) + "?" if near else ""


@functools.cache
def options_model(cls):
    """The pydantic model of a pass's options. Field names are aliases, so that an option may be called `copy` or `json`."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {}
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            default = {"default": f.default}
        elif f.default_factory is not dataclasses.MISSING:
            default = {"default_factory": f.default_factory}
        else:
            default = {}
        fields[f"option_{f.name}"] = (hints[f.name], pydantic.Field(alias=f.name, **default))
    config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=False)
    return pydantic.create_model(cls.__name__, __config__=config, **fields)


def options_schema(cls):
    """The JSON Schema of a pass's options, each described as the class's docstring has it ("rank: of the update. alpha: …")."""
    schema = options_model(cls).model_json_schema(by_alias=True)
    names = "|".join(map(re.escape, schema.get("properties", {})))
    said_of = dict(re.findall(rf"\b({names}):\s+(.*?)(?=\s+(?:{names}):\s|\Z)", " ".join((cls.__doc__ or "").split()))) if names else {}
    for name, part in schema.get("properties", {}).items():
        part.pop("title", None)
        if name in said_of:
            part.setdefault("description", said_of[name])
    return schema


def parse_options(cls, method, given, place, faults):
    """An instance of the pass, or None with what is wrong added to `faults`."""
    model = options_model(cls)
    try:
        # through JSON text: there pydantic's strict mode takes a list for a tuple, and a string for an enum, as a JSON file needs
        checked = model.model_validate_json(json.dumps(given))
    except pydantic.ValidationError as error:
        schema = options_schema(cls)
        for fault in dict.fromkeys(_in_words(e, given, schema, method, place) for e in error.errors()):
            faults.append(fault)
        return None
    names = {f"option_{f.name}": f.name for f in dataclasses.fields(cls)}
    try:
        return cls(**{names[key]: getattr(checked, key) for key in checked.model_fields_set})
    except (ValueError, TypeError) as error:  # what the pass itself checks in __post_init__
        faults.append(f"{place}: {method}: {error}")
        return None


def _in_words(error, given, schema, method, place):
    """One of pydantic's errors in our words."""
    options = list(schema.get("properties", {}))
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        name = error["loc"][0]
        has = f"Options: {', '.join(options)}." if options else "It has no options."
        return f'{place}: "{name}" is not an option of {method}.{closest(name, [*options, *COMMON])} {has}'
    if error["type"] == "missing" and len(error["loc"]) == 1:
        return f'{place}: {method} needs "{error["loc"][0]}" ({words_of(schema["properties"][error["loc"][0]], schema)})'
    if error["type"] == "json_invalid":  # half of a surrogate pair: the only JSON that Python reads and pydantic does not
        return f"{place}: a string holds a character that is not Unicode"
    part, value = schema, given
    for key in error["loc"]:
        part = _resolved(part, schema)
        if isinstance(key, int) and "items" in part and isinstance(value, list):
            part, value, place = part["items"], value[key], f"{place}[{key}]"
        elif isinstance(key, int) and "prefixItems" in part and isinstance(value, list) and key < len(value):
            part, value, place = part["prefixItems"][key], value[key], f"{place}[{key}]"
        elif key in part.get("properties", {}) and isinstance(value, dict) and key in value:
            part, value, place = part["properties"][key], value[key], f"{place}.{key}"
        else:
            break  # the branch of a union: the whole union is described
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place}: expected a finite number, got {said(value)}"
    bounds = error["type"].startswith(("greater_than", "less_than", "multiple_of", "too_", "string_too", "string_pattern"))
    return f"{place}: expected {words_of(part, schema, bounds)}, got {said(value)}"


def _resolved(part, schema):
    while "$ref" in part:
        part = schema["$defs"][part["$ref"].rsplit("/", 1)[-1]]
    return part


def words_of(part, schema, bounds=True):
    """A JSON Schema in a few words: `int ≥ 1`, `one of "a", "b"`, `list of string`, `int or null`."""
    part = _resolved(part, schema)
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(words_of(p, schema, bounds) for p in part["anyOf"]))
    if "const" in part:
        return said(part["const"])
    if "enum" in part:
        return "one of " + ", ".join(said(v) for v in part["enum"])
    kind = part.get("type", "another value")
    kind = {"integer": "int", "boolean": "true or false", "array": "list"}.get(kind, kind)
    if part.get("type") == "array" and "items" in part:
        kind = f"list of {words_of(part['items'], schema, bounds)}"
    if part.get("type") == "array" and "prefixItems" in part:
        kind = f"list of {len(part['prefixItems'])} items: {', '.join(words_of(p, schema, bounds) for p in part['prefixItems'])}"
    limits = [text.format(part[key]) for key, text in LIMITS.items() if key in part and "prefixItems" not in part]
    return f"{kind} {' and '.join(limits)}" if bounds and limits else kind


