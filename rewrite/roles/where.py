"""Where a pass works: the text of `where` in a spec, and the sites that it picks.

    "attention.{q,v}"                      by role; `{a,b}` stands for either, `*` for any rest of the name of a role that has a weight
    {"role": "linear", "path": "layers.{0..3}.**", "not": "mlp.*", "expect": 4}
    {"role": "mlp", "depth": "0..1/4"}     in the first quarter of the stack of blocks, however many there are
    ["attention.{q,v}", "mlp.down"]        either of these

In a path `*` is one component and `**` any number of them; a pattern matches at any component, so `layers.0.**` finds
`model.layers.0.self_attn.q_proj`. A block belongs to the part of the depth in which its middle lies, so that parts which meet
(0..1/6, 1/6..1/2, 1/2..5/6, 5/6..1) share out all blocks, each to one. `not` is a where of its own, or a path where it has the form {"path": …}.
"""

import difflib
import itertools
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from ..errors import Refused, SpecError
from .site import Roles, Site

WEIGHTS = tuple("""
    linear attention.q attention.q.down attention.q.up attention.kv.down attention.k attention.k.rope attention.v attention.o attention.gate
    attention.conv attention.position mlp.gate mlp.up mlp.down expert.gate expert.up expert.down expert.shared.gate expert.shared.up
    expert.shared.down router router.shared mixer.in mixer.conv mixer.inner mixer.out head head.hidden
    conv embed embed.position embed.relative embed.patch embed.added norm
""".split())  # fmt: skip
# several of the above in one weight, found by these names alone: who asks for q, k and v does not want the whole once more
FUSED = ("attention.qkv", "attention.kv", "attention.kv.up", "attention.fused", "mlp.gate_up", "mlp.fused", "expert.gate_up", "expert.fused", "mixer.fused")
REGIONS = ("attention", "attention.cross", "attention.block", "mlp", "mixer", "residual", "block", "opaque", "logits", "model")
ROLES = WEIGHTS + FUSED + REGIONS
_KEYS = ("role", "path", "depth", "not", "expect")


@dataclass(frozen=True)
class Where:
    """A parsed `where`: any of `roles` (None for every role) at any of `paths` and in the part `depth` of the stack (None for everywhere),
    without the sites of `excluded`.

    A list is a Where of `either` alone. `text` is how it stood in the spec.
    """

    text: str
    roles: frozenset[str] | None = None
    paths: re.Pattern | None = None
    depth: tuple[Fraction, Fraction] | None = None
    excluded: "Where | None" = None
    expect: int | None = None
    either: tuple["Where", ...] = ()

    def hits(self, site: Site, default: "Where | None" = None):
        """Whether this picks a site; where no role is given, those of `default` are meant (any role without one)."""
        if self.either:
            return any(each.hits(site, default) for each in self.either)
        if self.roles is None:
            if default is not None and not default.hits(site):
                return False
        elif self.roles.isdisjoint(site.roles):
            return False
        if self.paths is not None and not self.paths.search(site.path):
            return False
        if self.depth is not None and (site.depth is None or not self.depth[0] <= site.depth < self.depth[1]):
            return False
        return self.excluded is None or not self.excluded.hits(site)


def parse(where, place="where") -> Where:
    """The value of a `where`; SpecError, beginning with `place`, where it is malformed or names an unknown role."""
    if isinstance(where, Where):
        return where
    if isinstance(where, str):
        return Where(where, roles=_roles(where, place))
    if isinstance(where, (list, tuple)):
        if not where:
            raise SpecError(f"{place}: an empty list finds nothing. Name a role, for example \"linear\".")
        return Where(_text(where), either=tuple(parse(each, f"{place}[{i}]") for i, each in enumerate(where)))
    if not isinstance(where, dict):
        raise SpecError(f'{place}: expected a role, an object or a list of these, got {_text(where)}. For example "attention.{{q,v}}".')
    for key in where:
        if key not in _KEYS:
            raise SpecError(f"{place}.{key}: no such key.{_closest(key, _KEYS)} The keys are {', '.join(_KEYS)}.")
    if not {"role", "path", "depth"} & where.keys():
        raise SpecError(f'{place}: none of "role", "path" and "depth" is given. For example {{"role": "linear", "path": "layers.{{0..3}}.**"}}.')
    expect = where.get("expect")
    if expect is not None and (not isinstance(expect, int) or isinstance(expect, bool) or expect < 1):
        raise SpecError(f"{place}.expect: expected a whole number above 0, got {_text(expect)}.")
    return Where(
        _text(where),
        roles=_any(where["role"], f"{place}.role", _roles) if "role" in where else None,
        paths=_paths(where["path"], f"{place}.path") if "path" in where else None,
        depth=_depth(where["depth"], f"{place}.depth") if "depth" in where else None,
        excluded=parse(where["not"], f"{place}.not") if "not" in where else None,
        expect=expect,
    )


def select(roles: Roles, where, default="linear", strict=True) -> list[Site]:
    """The sites that a where picks, in graph order, each once. Refused when there is none, or not as many as `expect` says.

    A where of a path alone picks among the sites of the role `default`. Not `strict` (a variant runs a part of the model): whatever is found.
    """
    where, default = parse(where), parse(default)
    found = [site for site in roles if where.hits(site, default)]
    for each in (where.either or (where,)) if strict else ():
        count = sum(each.hits(site, default) for site in found)
        if not count or each.expect not in (None, count):
            number = "no site" if not count else "1 site" if count == 1 else f"{count} sites"
            wanted = f", expected {each.expect}" if count else ""
            raise Refused(f"found {number} for {_quoted(each.text)}{wanted}.  This model has: {roles.summary()}.")
    return found


@cache
def _roles(text, place):
    """The role names that a pattern stands for."""
    if not text.strip():
        raise SpecError(f"{place}: an empty role. Name one, for example \"linear\".")
    found = set()
    for name in _braces(text, place):
        pattern = re.compile(re.escape(name).replace(r"\*\*", ".*").replace(r"\*", ".*"))
        hits = [role for role in (WEIGHTS if "*" in name else ROLES) if pattern.fullmatch(role)]
        if not hits:
            raise SpecError(f"{place}: {_quoted(name)} is not a role.{_closest(name, ROLES)} Roles are {', '.join(ROLES)}.")
        found.update(hits)
    return frozenset(found)


def _any(value, place, read):
    values = value if isinstance(value, (list, tuple)) else [value]
    for each in values:
        if not isinstance(each, str):
            raise SpecError(f"{place}: expected text, got {_text(each)}.")
    if not values:
        raise SpecError(f"{place}: an empty list finds nothing.")
    return frozenset().union(*(read(each, place) for each in values))


def _paths(value, place):
    patterns = _any(value, place, lambda text, place: frozenset(_braces(text, place)))
    if "" in patterns:
        raise SpecError(f"{place}: an empty path.")
    return re.compile("|".join(sorted(map(_glob, patterns))))


def _depth(text, place):
    """`1/4..1/2` as its two ends."""
    ends = re.fullmatch(r"(\d+(?:[./]\d+)?)\.\.(\d+(?:[./]\d+)?)", text) if isinstance(text, str) else None
    try:
        start, stop = map(Fraction, ends.groups()) if ends else (Fraction(0), Fraction(0))
    except ZeroDivisionError:
        start = stop = Fraction(0)
    if not 0 <= start < stop <= 1:
        raise SpecError(f'{place}: expected a part of the stack of blocks from 0 to 1, such as "0..1/4" or "1/4..1", got {_text(text)}.')
    return start, stop


def _glob(pattern):
    """A regular expression that finds a path glob at the boundaries of components; `a.**` also finds `a` itself."""
    pieces = []
    for piece in pattern.split("."):
        pieces.append(r"(?:[^.]+(?:\.[^.]+)*)?" if piece == "**" else re.escape(piece).replace(r"\*", "[^.]*"))
    text = r"\.".join(pieces).replace(r"\.(?:[^.]+(?:\.[^.]+)*)?", r"(?:\.[^.]+)*").replace(r"(?:[^.]+(?:\.[^.]+)*)?\.", r"(?:[^.]+\.)*")
    return rf"(?:^|(?<=\.)){text}$"


def _braces(text, place):
    """`a.{b,c}.{0..2}` written out: every name that it stands for."""
    if not isinstance(text, str):
        raise SpecError(f"{place}: expected text, got {_text(text)}.")
    parts = re.split(r"\{([^{}]*)\}", text)
    if any("{" in part or "}" in part for part in parts):
        raise SpecError(f"{place}: {_quoted(text)} has a brace without its partner.")
    choices = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            choices.append([part])
            continue
        options = []
        for option in part.split(","):
            span = re.fullmatch(r"\s*(\d+)\.\.(\d+)\s*", option)
            if span and int(span[1]) > int(span[2]):
                raise SpecError(f"{place}: {{{option.strip()}}} in {_quoted(text)} runs backwards. Write {{{span[2]}..{span[1]}}}.")
            options += map(str, range(int(span[1]), int(span[2]) + 1)) if span else [option.strip()]
        if "" in options:
            raise SpecError(f"{place}: an empty choice in the braces of {_quoted(text)}.")
        choices.append(options)
    return ["".join(each) for each in itertools.product(*choices)]


def _closest(name, names):
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(_quoted, close))}?" if close else ""


def _quoted(text):
    return f'"{text}"' if not text.startswith(("{\"", "[")) else text


def _text(value):
    import json

    try:
        return json.dumps(value)
    except TypeError:
        return repr(value)
