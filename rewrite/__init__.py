"""Parameter-efficient fine-tuning as a compiler: `rewrite(model, spec)` gives a live model whose graph the passes of the spec have rewritten.

A public name is imported when it is first asked for, so that `rewrite --help` does not wait for torch.
"""

import importlib
import sys
from types import ModuleType

_HOMES = {
    "Broken": "errors", "compact": "training.compact", "Pass": "contract", "Refused": "errors", "RewriteError": "errors", "Spec": "spec.parse", "SpecError": "errors",
    "adapters": "adapters", "capture": "capture.model", "diff": "text", "export_onnx": "emit.onnx", "export_program": "emit.program", "kept": "training.backward", "load": "store.folder", "merge": "pipeline",
    "rewrite": "pipeline", "roles": "roles.find", "save": "store.folder", "show": "text", "source": "emit.live", "to_networkx": "text", "training": "training.loop",
}  # fmt: skip
__all__ = list(_HOMES)


class _Package(ModuleType):
    """This package, its public names properties: python binds a submodule of the same name (`rewrite.capture`) to the package, and may not."""


def _public(name, home):
    return property(lambda self: getattr(importlib.import_module(f"{__name__}.{home}"), name), lambda self, submodule: None)


for _name, _home in _HOMES.items():
    setattr(_Package, _name, _public(_name, _home))
sys.modules[__name__].__class__ = _Package
