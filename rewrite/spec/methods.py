"""The passes as a page for people, made from their own docstrings, fields, facts and examples.

    passes/lora.py   -->   ## lora: the sentence, the equation, where it acts, its options, a step of a spec, the source
"""

import importlib
import inspect
import json
import re

from .options import common, options_schema, words_of
from .parse import builtin_names, pass_of

INTRO = """\
# Methods

The built-in passes, made from their files by `rewrite methods`. An equation shows a site before and after; `w` is out × in. Whether something merges
is not declared: `merge(live)` finds it out, and says why where it does not. Parameters and bytes of a model are told by its report, and beforehand by
`rewrite plan`.

| pass | what it does | acts on |
|---|---|---|
"""
_SOURCE = re.compile(r"arXiv:|et al\.|\b(19|20)\d\d\b")


def page(names=None):
    """The page as Markdown; `names` are those of passes, all built-in ones if None."""
    found = {name: pass_of(importlib.import_module(f"rewrite.passes.{name}")) for name in names or builtin_names()}
    rows = "".join(f"| [`{name}`](#{name}) | {_parts(cls)[0].rstrip('.:')} | {_acts(cls)} |\n" for name, cls in found.items())
    return INTRO + rows + "".join(f"\n{section(name, cls)}" for name, cls in found.items())


def section(name, cls):
    """One pass."""
    sentence, picture, prose, source = _parts(cls)
    lines = [f"## {name}", "", sentence, ""]
    if picture:
        lines += ["```", picture, "```", ""]
    if prose:
        lines += [prose, ""]
    lines += [f"Acts on {_acts(cls)}. {_start(cls)}", ""]
    options = options_schema(cls)
    if options.get("properties"):
        lines += ["| option | is | default | |", "|---|---|---|---|"]
        lines += [_option(option, part, options) for option, part in options["properties"].items()]
        lines += [""]
    steps = cls.shown(name)
    lines += ["```json", *(json.dumps(step, ensure_ascii=False) for step in steps), "```", ""]
    return "\n".join(lines) + (f"\n{source}\n" if source else "")


def _parts(cls):
    """(first sentence, picture, prose, source) of the docstring of a pass's file."""
    text = inspect.getdoc(importlib.import_module(cls.__module__)) or inspect.getdoc(cls) or ""
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    first, rest = " ".join(blocks[0].split()), blocks[1:]
    picture = "\n\n".join(_dedent(block) for block in rest if block.startswith("    "))
    lines = [line for block in rest if not block.startswith("    ") for line in [*block.splitlines(), ""]]
    while lines and not lines[-1]:
        lines.pop()
    at = len(lines)
    while at and lines[at - 1] and _SOURCE.search(lines[at - 1]):
        at -= 1
    prose = "\n\n".join(" ".join(part.split()) for part in "\n".join(lines[:at]).split("\n\n") if part.strip())
    return first, picture, prose, " ".join(lines[at:])


def _dedent(block):
    return "\n".join(line.removeprefix("    ") for line in block.splitlines())


def _acts(cls):
    if "where" not in common(cls):
        return "what the steps of its `choose` act on" if cls.mixes() else "the whole graph"
    role = cls.role if cls.role is not None else cls.example.get("where")
    return ", ".join(f"`{one}`" if isinstance(one, str) else f"`{json.dumps(one)}`" for one in (role if isinstance(role, list) else [role]))


def _start(cls):
    """What happens to the output before the first step of training."""
    if hasattr(cls, "apply") or cls.mixes():
        return "" if cls.drift == 0.0 else f"The output stays within {cls.drift:g} of its size." if cls.drift is not None else ""
    if cls.drift is None:
        return "The output changes from the start: that is its nature."
    return "Nothing changes until the first step." if cls.drift == 0.0 else f"At the start the output stays within {cls.drift:g} of its size."


def _option(name, part, options):
    default = f"`{json.dumps(part['default'])}`" if "default" in part else "needed" if name in options.get("required", ()) else ""
    said = part.get("description", "").rstrip(".").replace("|", "\\|")
    return f"| `{name}` | {words_of(part, options).replace('|', chr(92) + '|')} | {default} | {said} |"
