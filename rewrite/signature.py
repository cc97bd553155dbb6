"""How a model is called: which calls are captured (`variants`), and how each later call finds its graph (`Signature`)."""

from dataclasses import dataclass, field

import torch

from .leaves import Tree, leaves, rebuild  # noqa: F401  (the way in and out of a trace)


@dataclass(frozen=True)
class Variant:
    """One call of the model that is to be captured.

    name: "forward" (the main one), "past", "encoder", "first" or "next".
    owner: the path of the module that is called ("" is the model).
    kwargs: the example call, name → tensor, cache or constant; `leaves(kwargs)` gives the names of the placeholders.
    dims: leaf name → {dimension: symbol}; what is not named is static. A symbol is a name ("batch", "length", "past", "target") or a
    sum of two ("past+length").
    mode: "both" (captured in training and in eval mode, then aligned) or "eval" (flags by analogy with the main graph).
    """

    name: str
    owner: str = ""
    kwargs: dict[str, object] = field(default_factory=dict)
    dims: dict[str, dict[int, str]] = field(default_factory=dict)
    mode: str = "both"
