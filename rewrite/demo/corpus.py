"""A corpus that every machine with Python already has: docstrings of the standard library, labelled by their package.

    a definition's docstring -> prose without examples -> passages of a few words -> one of three splits

The source files are parsed, not imported. A definition belongs to one split with all of its passages, by the hash of its qualified name, so that another
Python version moves little but what it changed. Passages that nearly repeat an earlier one are dropped, and the names of the packages are masked
everywhere, so that no label can be read off its text.
"""

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..errors import Refused

PACKAGES = {
    "asyncio": "asyncio",
    "decimal": "_pydecimal.py",
    "difflib": "difflib.py",
    "doctest": "doctest.py",
    "email": "email",
    "http": "http",
    "importlib": "importlib",
    "logging": "logging",
    "turtle": "turtle.py",
    "typing": "typing.py",
    "unittest": "unittest",
    "xml": "xml",
}
"""Label → where its source lies in the standard library. Each has prose enough in Python 3.11 and 3.12, whoever packaged it."""

LENGTH = 16
"""Words of a passage: about 24 tokens of a WordPiece tokenizer."""

SHORTEST = 8
SIZES = {"test": 60, "validation": 25, "train": 200}
"""Passages per package, in the order in which the splits are filled. Where a package has less, `train` gets what is left."""

LEAST = 90

MASK = "_"


@dataclass(frozen=True)
class Passage:
    """A few words of a docstring: the text, the index of its label, and the qualified name that it stands under."""

    text: str
    label: int
    source: str


@dataclass(frozen=True)
class Corpus:
    """Three disjoint splits, and the labels' names in the order of their indices."""

    labels: tuple[str, ...]
    train: tuple[Passage, ...]
    validation: tuple[Passage, ...]
    test: tuple[Passage, ...]


def read(library=None):
    """The corpus of a standard library (default: the running Python's). The same files give the same corpus, in the same order.

    Raises Refused with the package's name when its source files are not there, or hold too little.
    """
    library = Path(library or sysconfig.get_paths()["stdlib"])
    found = [passage for label, name in enumerate(PACKAGES) for passage in _package(library, label, name)]
    found.sort(key=lambda passage: (_digest(passage.source), _digest(passage.text)))
    rooms = {label: [] for label in range(len(PACKAGES))}
    for passage in _distinct(found):
        rooms[passage.label].append(passage)
    splits = {split: [] for split in SIZES}
    for label, room in rooms.items():
        for split, size in SIZES.items():
            chosen, room = _take(room, size)
            if len(chosen) < (LEAST if split == "train" else size):
                raise Refused(f"the demo needs more passages of {list(PACKAGES)[label]!r}, and {library} holds too few. Use a Python with its whole standard library.")
            splits[split] += chosen
    return Corpus(tuple(PACKAGES), **{split: tuple(sorted(chosen, key=lambda p: _digest(p.text))) for split, chosen in splits.items()})


def docstrings(library=None, packages=tuple(PACKAGES)):
    """(qualified name, prose) of every documented definition of some packages, in the order of the files."""
    library = Path(library or sysconfig.get_paths()["stdlib"])
    for name in packages:
        place = library / PACKAGES[name]
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        if not files or not all(file.is_file() for file in files):
            raise Refused(f"the demo reads docstrings of {name!r}, and {place} is not there. Use a Python with its whole standard library.")
        for file in files:
            parts = file.relative_to(place if place.is_dir() else place.parent).with_suffix("").parts
            if "test" in parts or "tests" in parts:
                continue
            module = ".".join((name, *parts) if place.is_dir() else (name,)).removesuffix(".__init__")
            for qualified, text in _definitions(ast.parse(file.read_bytes()), module):
                prose = _prose(text)
                if prose:
                    yield qualified, prose


def _package(library, label, name):
    for qualified, prose in docstrings(library, (name,)):
        words = _masked(prose).split()
        for start in range(0, len(words), LENGTH):
            piece = words[start : start + LENGTH]
            if len(piece) >= SHORTEST and sum(any(c.isalpha() for c in word) for word in piece) >= SHORTEST:
                yield Passage(" ".join(piece), label, qualified)


def _definitions(tree, name):
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    text = ast.get_docstring(tree) if isinstance(tree, (ast.Module, *kinds)) else None
    if text:
        yield name, text
    for node in ast.iter_child_nodes(tree):
        yield from _definitions(node, f"{name}.{node.name}" if isinstance(node, kinds) else name)


def _prose(text):
    """A docstring without its doctests, indented code and rules."""
    paragraphs = (p for p in re.split(r"\n\s*\n", text) if ">>>" not in p)
    lines = (line.strip() for p in paragraphs for line in p.splitlines())
    return " ".join(line for line in lines if re.search(r"[A-Za-z]{2}", line))


def _masked(prose):
    names = "|".join(PACKAGES)
    return re.sub(rf"\w*(?:{names})\w*", MASK, prose, flags=re.IGNORECASE)


def _digest(text):
    return hashlib.sha256(text.encode()).digest()


def _take(room, size):
    """The first passages of a room, and the room without them and without what else their definitions say."""
    chosen, sources = room[:size], {passage.source for passage in room[:size]}
    return chosen, [passage for passage in room[size:] if passage.source not in sources]


def _distinct(passages, most=0.3):
    """The passages, without those that share more than a part of their three-word runs, or of the other's, with one passage before."""
    holders, sizes = {}, {}
    for index, passage in enumerate(passages):
        words = re.findall(r"[a-z]+", passage.text.lower())
        runs = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        shared = Counter(other for run in runs for other in holders.get(run, ()))
        if not runs or any(count > most * min(len(runs), sizes[other]) for other, count in shared.items()):
            continue
        sizes[index] = len(runs)
        for run in runs:
            holders.setdefault(run, []).append(index)
        yield passage
