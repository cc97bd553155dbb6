"""The live model: the graph's own module tree, each block and the top running printed source.

    root (LlamaForCausalLM)                   live (LlamaForCausalLM, a subclass of it by the same name)
      layers.0 (LlamaDecoderLayer)     -->      layers.0 (LlamaDecoderLayer whose forward is the printed source)

The live model is still an instance of its class, its blocks are real submodules under their paths, and its tensors keep their names.
"""

import hashlib
import inspect
import linecache
from functools import lru_cache

from ..graph import attribute
from .outline import Piece, outline
from .source import block_source, top_source


def make_live(graph):
    """The live model of a graph and its variants: `graph.root`, re-classed in place."""
    root = graph.root
    bodies = {}
    tops = {}
    for variant in graph.all():
        cut = outline(variant)
        variant.notes += [n for n in cut.notes if n not in variant.notes]
        for step in cut.steps:
            if isinstance(step, Piece):
                bodies.setdefault(step.path, {})[variant.name] = block_source(step, attribute(root, step.path))
        tops[variant.name] = top_source(cut, attribute(root, variant.owner), variant.name, variant.owner)
    for path, sources in bodies.items():
        module = attribute(root, path)
        module.__class__ = live_class(type(module), tuple(sources.items()))
    root.__class__ = live_class(type(root), tuple(tops.items()), True)
    root.__dict__["graph"] = graph
    root.__dict__["_inputs"] = graph.inputs
    return root


@lru_cache(maxsize=4096)
def compiled(source):
    """The function `forward` of a source text; equal texts give one function, so that equal blocks share one code object."""
    name = f"<rewrite {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space = {"__name__": "rewrite.emit.printed"}
    exec(compile(source, name, "exec"), space)
    return space["forward"]


@lru_cache(maxsize=4096)
def live_class(base, sources, is_top=False):
    """A subclass of `base`, under its name, whose forward runs the printed sources."""
    functions = {name: compiled(text) for name, text in sources}
    run = functions["forward"]
    space = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "_sources": dict(sources)}
    if not is_top:
        return type(base.__name__, (base,), {**space, "forward": run})

    def forward(self, *args, **kwargs):
        kwargs.update(zip(self._inputs, args))
        flat = run(self, *(kwargs[name] for name in self._inputs))
        return flat[0] if len(flat) == 1 else flat

    forward.__signature__ = inspect.signature(base.forward)
    return type(base.__name__, (base,), {**space, "forward": forward})


def source(live, path=""):
    """The printed source of the top ("") or of the block at a path."""
    return "\n\n".join(type(attribute(live, path))._sources.values())
