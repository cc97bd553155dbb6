"""The three errors: what is wrong with a spec, what a pass declines, and what we broke ourselves.

Each message carries its place, its reason and the next step, and is meant to be read as it stands.
"""


class RewriteError(Exception):
    """Parent of the three, for callers that want to catch them together."""


class SpecError(RewriteError):
    """The spec (or a file that was to be read) is wrong; raised before the model is looked at."""


class Refused(RewriteError):
    """A request that this model, graph, file or input cannot meet; nothing was changed."""


class Broken(RewriteError):
    """An invariant does not hold after a pass: our fault, with the difference that shows it."""
