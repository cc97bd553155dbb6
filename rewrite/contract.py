"""What a pass file says: options, facts, `refuse`, `params`, nouns."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Pass:
    """A named, optioned graph → graph step. Subclasses are frozen dataclasses whose fields are the options of the spec.

    `role` is the default `where`; `drift` the allowed relative change of the output at initialisation (0.0 = bit-equal);
    `example` a step of a spec that shows the pass. A pass that is not site-shaped defines `apply(self, graph, sites)` instead of nouns.
    """

    role: ClassVar[str | None] = None
    drift: ClassVar[float] = 0.0
    example: ClassVar[dict] = {}
