"""Parameter-efficient fine-tuning as a compiler: `rewrite(model, spec)` gives a live model whose graph the passes of the spec have rewritten."""

from .capture import capture
from .contract import Pass
from .emit.live import source
from .emit.onnx import export_onnx
from .emit.program import export_program
from .errors import Broken, Refused, RewriteError, SpecError
from .pipeline import merge, rewrite
from .roles import roles
from .spec import Spec
from .store import load, save
from .text import diff, show, to_networkx

__all__ = [
    "Broken", "Pass", "Refused", "RewriteError", "Spec", "SpecError", "capture", "diff", "export_onnx", "export_program", "load", "merge",
    "rewrite", "roles", "save", "show", "source", "to_networkx",
]  # fmt: skip
