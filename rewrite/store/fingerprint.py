"""Which model a live model was made from: the class, and per tensor its dtype, its shape and a hash of its bytes.

SHA-256, because it sees every byte, needs no further library and hashes 2 GB a second a core where the CPU has its instructions (22 M
float32 parameters: 0.04 s on one core of a Xeon). Derived buffers (`persistent=False`) are left out: another device computes other last bits.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..capture.coded import read_modules
from ..errors import Refused


@dataclass(frozen=True)
class Fact:
    """What identifies a tensor: dtype such as "float32", shape, and 32 hex digits of the SHA-256 of its bytes in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @staticmethod
    def of(tensor, name):
        """The fact of a tensor. Raises Refused, naming it, where it has no bytes at hand (meta, sharded, sparse)."""
        return Fact(dtype_name(tensor), tuple(tensor.shape), hashlib.sha256(_bytes(tensor, name)).hexdigest()[:32])

    def to_list(self):
        return [self.dtype, list(self.shape), self.digest]

    @staticmethod
    def from_list(value):
        """Raises TypeError or ValueError where `value` is not what `to_list` gives."""
        dtype, shape, digest = value
        if not (isinstance(dtype, str) and isinstance(digest, str) and all(type(n) is int for n in shape)):
            raise TypeError(f"not a fact: {value!r}")
        return Fact(dtype, tuple(shape), digest)

    def difference(self, other):
        """In words how `other` differs from this, or None."""
        if self.shape != other.shape:
            return f"was {self.shape}, is {other.shape}"
        if self.dtype != other.dtype:
            return f"was {self.dtype}, is {other.dtype}"
        return None if self.digest == other.digest else "has other values"


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor, name):
    if hasattr(tensor, "full_tensor"):
        raise Refused(f"{name} is sharded over several processes. Gather the model on one first (torch.distributed.checkpoint.state_dict).")
    if tensor.is_meta:
        raise Refused(f"{name} has no values (meta device). Load the weights first.")
    if tensor.layout != torch.strided:
        raise Refused(f"{name} is stored as {tensor.layout}; only dense tensors can be saved.")
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def stored_tensors(model):
    """Parameters and persistent buffers by name, as `state_dict` names them; tied ones under each of their names."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}


def facts(tensors):
    """name → Fact. Hashing lets go of the interpreter lock, so a few threads share the work; tied tensors are hashed once."""
    first, todo = {}, {}
    for name, tensor in tensors.items():
        key = _place(tensor)
        todo.setdefault(key, (tensor, name))
        first[name] = key
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        made = dict(zip(todo, pool.map(lambda item: Fact.of(*item), todo.values())))
    return {name: made[key] for name, key in first.items()}


def _place(tensor):
    """Equal for two tensors only where they are the same bytes in memory."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel() or hasattr(tensor, "full_tensor"):
        return id(tensor)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


class Fingerprint:
    """The tensors of a base model, hashed when asked for.

    It holds aliases of the base's tensors (no copies), or, once settled, their facts. Pickling settles; a deep copy of a live model has the
    same base, and shares this.
    """

    def __init__(self, kind, tensors=(), known=()):
        self.kind = kind
        self.aliases = {name: tensor.detach() for name, tensor in dict(tensors).items()}
        self.known = dict(known)

    @property
    def names(self):
        return self.aliases.keys() | self.known.keys()

    def facts(self):
        """name → Fact of every tensor of the base, in the order of names."""
        made = {**self.known, **facts(self.aliases)}
        return {name: made[name] for name in sorted(made)}

    def settle(self):
        """Hash the base now and let go of its tensors."""
        self.known = self.facts()
        self.aliases = {}

    def changed(self, tensors, known, dtype=None):
        """The names among `tensors` (all of them names of the base) whose values are not the base's, whose facts are `known`.

        With `dtype`, a floating tensor of the base counts as if it had been cast to it.
        """
        held = {name: alias for name, alias in self.aliases.items() if name in tensors}
        cast = {name: alias.to(dtype) for name, alias in held.items() if dtype and alias.is_floating_point() and alias.dtype != dtype}
        known = {**known, **facts(cast)}
        same = {name for name, alias in held.items() if name not in cast and _place(alias) == _place(tensors[name])}
        return {name for name, fact in facts({n: t for n, t in tensors.items() if n not in same}).items() if fact != known[name]}

    def differences(self, other):
        """In words, per tensor, how another fingerprint differs from this one; nothing when they are of the same base."""
        mine, theirs = self.facts(), other.facts()
        words = [f"the class was {self.kind}, is {other.kind}"] if self.kind != other.kind else []
        words += [f"{name} is missing" for name in mine if name not in theirs]
        words += [f"{name} is new" for name in theirs if name not in mine]
        both = ((name, mine[name].difference(theirs[name])) for name in mine if name in theirs)
        return words + [f"{name} {reason}" for name, reason in both if reason]

    def to_dict(self):
        """Plain JSON values, which `from_dict` reads."""
        return {"class": self.kind, "tensors": {name: fact.to_list() for name, fact in self.facts().items()}}

    @staticmethod
    def from_dict(value):
        return Fingerprint(value["class"], known={name: Fact.from_list(fact) for name, fact in value["tensors"].items()})

    def __deepcopy__(self, memo):
        return self

    def __getstate__(self):
        return {"kind": self.kind, "aliases": {}, "known": self.facts()}


def fingerprint(model):
    """The Fingerprint of a model as it is now: made at once, hashed when it is first needed."""
    return Fingerprint(type(model).__name__, stored_tensors(read_modules(model)))
