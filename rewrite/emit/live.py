"""The live model: the graph's own module tree, in which each block and the top run printed source.

    root (LlamaForCausalLM)                   live (LlamaForCausalLM: a subclass of it, by the same name)
      layers.0 (LlamaDecoderLayer)     -->      layers.0 (LlamaDecoderLayer whose forward is the printed source)

The live model is still an instance of its class, its blocks are real submodules under their paths, and its tensors keep their names; so
Trainer, checkpointing, sharding, hooks and compilation find what they look for.
"""

import copy
import hashlib
import inspect
import linecache
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from ..edit.loss import with_loss
from ..edit.prompts import whole
from ..errors import Refused
from ..graph import attribute
from .coupled import chains
from .form import block_form
from .outline import Piece, outline
from .source import block_source, top_source
from .unlabelled import unlabelled

_ENCODED = {"mm_encoder_outputs"}  # where forward takes it, generate runs the encoder of images by itself, from outside; the graph has it inside


@dataclass(frozen=True)
class Printed:
    """What a live class runs: body name → source text, and the role of its module ("top", "block" or "passage").

    `entries` are the blocks at which a top enters each list of blocks, `inputs` the names of those beside the module's own.
    """

    base: type
    role: str
    sources: tuple[tuple[str, str], ...] = ()
    entries: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


def make_live(graph):
    """The live model of a graph and its variants: `graph.root`, re-classed in place. Raises Refused for a model with device-map hooks."""
    root = graph.root
    refuse_hooks(root)
    _undress(root)  # the tree of a live model that is rewritten further
    printed = graph.all()
    if (plain := unlabelled(graph)) is not None:
        printed.append(plain)
    if (full := whole(graph)) is not None:
        printed.append(full)
    if (lossy := with_loss(graph)) is not None:
        printed.append(lossy)
    cuts = {variant.name: outline(variant) for variant in printed}
    coupled = {name: chains(cut) for name, cut in cuts.items()}
    written = {}  # form of a block -> its source: most blocks of a model are alike

    def text(piece):
        form = block_form(piece, module := attribute(root, piece.path))
        if form not in written:
            written[form] = block_source(piece, module)
        return written[form]

    bodies, names = {}, {}  # block path -> {text: body name}; piece -> its body name, or None for the block's first
    for name, cut in cuts.items():
        for piece in cut.steps:
            if isinstance(piece, Piece):
                texts = bodies.setdefault(piece.path, {})
                body = texts.setdefault(text(piece), f"{name}.{piece.call}" if piece.call else name)
                names[piece] = None if body == next(iter(texts.values())) else body
        for chain in coupled[name][0]:
            for piece in filter(None, chain.inverses):
                names[piece] = bodies[piece.path].setdefault(text(piece), f"{name}.inverse{piece.call or ''}")
    tops = {}  # owner path -> [(variant name, text)]
    for variant in printed:
        cut = cuts[variant.name]
        chained, notes = coupled[variant.name]
        variant.notes += [note for note in (*cut.notes, *notes) if note not in variant.notes]
        tops.setdefault(variant.owner, []).append((variant.name, top_source(cut, root, variant.name, variant.owner, names, chained)))
    for path in _passages(graph, bodies):
        module = attribute(root, path)
        module.__class__ = live_class(Printed(type(module), "passage", (("path", path),)))
    for path, texts in bodies.items():
        module = attribute(root, path)
        module.__class__ = live_class(Printed(type(module), "block", tuple((body, text) for text, body in texts.items())))
    for owner, sources in tops.items():
        module = attribute(root, owner)
        first = next(v for v in graph.all() if v.owner == owner)
        added = getattr(first.signature, "added", ())
        module.__class__ = live_class(Printed(type(module), "top", tuple(sources), _entries(cuts[sources[0][0]], owner), added))
        module.__dict__["_signature"] = first.signature or Plain(first.name, first.inputs)
        if owner:
            module.__dict__["_whole"] = (root,)  # a tuple, so that the whole is no submodule of its part
    for inner in (v for v in graph.all() if v.is_inner):
        names = inner.owner.split(".")
        for path in (".".join(names[:depth]) for depth in range(1, len(names))):
            module = attribute(root, path)
            if any(f"{path}.".startswith(f"{opaque}.") for opaque in graph.opaque) and _reach not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_reach, with_kwargs=True)
    root.__dict__["graph"] = graph
    return root


def _reach(module, args, kwargs):
    """A backward of a module's own (reversible layers) runs only where what it is given needs a gradient: where something inside trains, it does."""
    given = dict(enumerate(args)) | kwargs
    floats = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    if not trains or not floats or any(value.requires_grad for value in floats.values()):
        return None
    first = next(iter(floats))
    given[first] = floats[first].detach().requires_grad_()
    return tuple(given[place] for place in range(len(args))), {name: given[name] for name in kwargs}


def _undress(root):
    for module in root.modules():
        if "_printed" in vars(type(module)):
            module.__class__ = type(module)._printed.base


@dataclass(frozen=True)
class Worn:
    """The classes and signatures that make a tree of modules live, to be put on again."""

    modules: tuple

    @staticmethod
    def of(live):
        return Worn(tuple((module, type(module), vars(module).get("_signature")) for module in live.modules() if "_printed" in vars(type(module))))

    def put(self, live):
        """Let the modules of a live model be what they were."""
        _undress(live)
        for module, cls, signature in self.modules:
            module.__class__ = cls
            if signature is not None:
                module.__dict__["_signature"] = signature


def source(live, path=""):
    """The printed source of the top ("") or of the block at a dotted path, one text per body. Raises Refused where there is none."""
    printed = getattr(type(attribute(live, path)), "_printed", None)
    if printed is None or printed.role == "passage":
        raise Refused(f"{path or 'this model'} runs no printed source.  Ask for the live model itself, or for one of its blocks.")
    return "\n\n".join(text for _, text in printed.sources)


def refuse_hooks(model):
    """Raise Refused for a model that accelerate has spread over devices: its hooks move weights while the original code runs."""
    hooked = [name or "the model" for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked:
        raise Refused(
            f"{hooked[0]} (and {len(hooked) - 1} more modules) carry accelerate's device-map hooks, "
            "which move weights while the original code runs.\n"
            "Load the model without device_map, or take the hooks away with accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )


@dataclass(frozen=True)
class PlainCall:
    name: str
    values: list
    watched: None = None


@dataclass(frozen=True)
class Plain:
    """How a graph without a signature of its own is called: its inputs by name or in order; one output comes back bare."""

    name: str
    inputs: tuple[str, ...]

    def bind(self, live, args, kwargs):
        given = dict(zip(self.inputs, args)) | kwargs
        missing = [name for name in self.inputs if name not in given]
        if missing or len(given) != len(self.inputs):
            raise Refused(f"this graph takes {', '.join(self.inputs)}; {'missing: ' + ', '.join(missing) if missing else 'got ' + ', '.join(given)}.")
        return PlainCall(self.name, [given[name] for name in self.inputs])

    def pack(self, live, call, flat):
        return flat[0] if len(flat) == 1 else flat


def _entries(cut, owner):
    """The first block of each list of blocks, as its owner names it."""
    first = {}
    for piece in cut.steps:
        if isinstance(piece, Piece):
            first.setdefault(piece.path.rpartition(".")[0], piece.path.removeprefix(owner + "." if owner else ""))
    return tuple(first.values())


def _passages(graph, bodies):
    """The modules between the whole and its blocks: their own code would call the blocks as they no longer are."""
    owners = {v.owner for v in graph.all()}
    paths = {}
    for path in bodies:
        parts = path.split(".")
        paths.update(dict.fromkeys(".".join(parts[:i]) for i in range(1, len(parts))))
    return [p for p in paths if p not in owners and p not in bodies and not isinstance(attribute(graph.root, p), (nn.ModuleList, nn.ModuleDict))]


@lru_cache(maxsize=4096)
def compiled(text):
    """The function `forward` of a source text; equal texts give one function, so that equal blocks share one code object."""
    name = f"<rewrite {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    space = {}  # no __name__: torch.compile would import a module by it
    exec(compile(text, name, "exec"), space)
    return space["forward"]


@lru_cache(maxsize=4096)
def live_class(printed):
    """The subclass of a module's class, under the same name, that runs what is printed."""
    base = printed.base
    space = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "_printed": printed, "__reduce_ex__": _reduce}
    if printed.role == "passage":
        return type(base.__name__, (base,), {**space, "forward": _passage_forward(printed)})
    bodies = {name: compiled(text) for name, text in printed.sources}
    if printed.role == "block":
        return type(base.__name__, (base,), {**space, "forward": _block_forward(bodies)})
    space |= {"forward": _top_forward(base, bodies, printed.inputs), "__deepcopy__": _deepcopy, "graph": None}
    if hasattr(base, "enable_input_require_grads"):
        space["enable_input_require_grads"] = _enable_input_require_grads
    return type(base.__name__, (base,), space)


def _block_forward(bodies):
    if len(bodies) == 1:
        return next(iter(bodies.values()))
    first = next(iter(bodies))

    def forward(self, *values, body=first):
        return bodies[body](self, *values)

    return forward


def _top_forward(base, bodies, inputs):
    def forward(self, *args, **kwargs):
        signature = self._signature
        call = signature.bind(self, args, kwargs)
        if call.watched is None:
            return signature.pack(self, call, bodies[call.name](self, *call.values))
        with signature.watching(self, call):
            flat = bodies[call.name](self, *call.values)
        return signature.pack(self, call, flat)

    given = inspect.signature(base.forward)
    given = given.replace(parameters=[p for name, p in given.parameters.items() if name not in _ENCODED])
    forward.__signature__ = _with_inputs(given, inputs)
    forward.__doc__ = base.forward.__doc__
    return forward


def _with_inputs(signature, names):
    """A signature that also takes `names`, by name: `generate` and trainers ask it what a model takes."""
    given = list(signature.parameters.values())
    rest = [given.pop()] if given and given[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    return signature.replace(parameters=[*given, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names), *rest])


def _passage_forward(printed):
    path = dict(printed.sources)["path"]

    def forward(self, *args, **kwargs):
        raise Refused(f"{path} was not captured as a call of its own: its blocks run rewritten code.  Call the live model itself.")

    forward.__signature__ = inspect.signature(printed.base.forward)
    return forward


def _enable_input_require_grads(self):
    """As the original's, where the stream enters the blocks: the embedding is an op of the graph, so hooks on its module do not run."""

    def require_grad(module, args):
        args[0].requires_grad_()

    self._require_grads_hooks = [attribute(self, path).register_forward_pre_hook(require_grad) for path in type(self)._printed.entries]


def _rebuild(printed):
    cls = live_class(printed)
    return cls.__new__(cls)


def _reduce(self, protocol):
    """Pickle as (base class, source texts, state): the class is made anew where it is read. The graph stays behind (fake values do not travel)."""
    printed = type(self)._printed
    if "_printed" not in type(self).__dict__:  # something (FSDP) put a class of its own on top
        return object.__reduce_ex__(self, protocol)
    return _rebuild, (printed,), {k: v for k, v in self.__dict__.items() if k != "graph"}


def _deepcopy(self, memo):
    """A copy with tensors of its own; graphs are values and are shared, over the copy's tree."""
    twin = memo[id(self)] = self.__new__(type(self))
    twin.__setstate__(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "graph"}, memo))
    if self.graph is not None:
        variants = {name: replace(variant, root=twin) for name, variant in self.graph.variants.items()}
        twin.__dict__["graph"] = replace(self.graph, root=twin, variants=variants)
    return twin
