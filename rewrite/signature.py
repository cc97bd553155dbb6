"""How a model is called: each later call finds its graph, its inputs and what it returns (`Signature`)."""

from .leaves import Tree, leaves, rebuild  # noqa: F401  (the way in and out of a trace)
from .variants import Variant, variants  # noqa: F401
