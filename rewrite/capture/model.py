"""A model, captured: its main call and the calls it generates by, each one flat graph over one tree of tensors.

    capture(model)  ->  Graph("forward", variants={"past": …}, checks=(length <= 64, …), opaque={path: reason})

Each call is run twice on fake tensors, differently in everything that must not be baked in (mode, dtype, sizes, seeds), and aligned.
"""

import inspect
from collections import Counter
from dataclasses import replace

import sympy
import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..calls.inputs import MEDIA
from ..calls.signature import sign
from ..calls.variants import Variant, variants
from ..errors import Refused
from ..graph import HOST, Check, Graph, attribute, clone_tree, has_attribute, install, select
from .align import Alignment, Misaligned
from .checks import is_equality, keep_checks, only_fails_at, require_filled
from .coded import mark, read_modules
from .fakes import uncollected
from .maps import whole_maps
from .reads import Merge, read_devices
from .tidy import in_order, named_arguments, set_argument, tidy
from .trace import CannotTrace, is_method, trace

_ATTEMPTS = 24


@uncollected()
def capture(model, example=None, *, generation=True, stamp=True):
    """Capture a model → its main Graph ("forward"), the others under `.variants`.

    model: a transformers model, or any nn.Module with `example` (a dict of arguments, or a tuple of them in order). It is not changed:
    not its mode, its config, its tensors, nor the random state of the process. Linears of bitsandbytes in four bits are read as codes. generation: also capture the calls that `generate` makes
    (with a cache; the encoder alone); False spares their time where nothing will be generated.
    stamp: write blocks that are alike down from the first of them instead of running each, so that time hardly grows with depth; a kind of
    block that does something besides is run each time, and a note says what it does. False runs every block.
    Raises Refused where the outermost module cannot be captured, with the line that stood in the way.
    """
    hooked = next((name for name, module in model.named_modules() if hasattr(module, "_hf_hook")), None)
    if hooked is not None:
        raise Refused(
            f"{type(model).__name__}: {hooked or 'the model'} runs through accelerate's hooks, which move tensors between devices. "
            "Load the model without a device map, or take them off first: accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )
    model = read_modules(model)
    calls = variants(model, example)
    try:
        return _captured(model, calls[: None if generation else 1], stamp)
    except Refused as reason:
        if example is not None or "input_ids" not in calls[0].kwargs or not MEDIA.keys() & calls[0].kwargs.keys():
            raise
        calls = variants(model, refused=str(reason))  # the text alone, and a note why
    return _captured(model, calls[: None if generation else 1], stamp)


def _captured(model, calls, stamp):
    root = clone_tree(model)
    graphs, opaque, trees, captured, inner = [], {}, {}, [], {}
    for variant in calls:
        main = graphs[0] if graphs else None
        try:
            work = _Capture(model, root, variant, opaque, main, stamp)
            graph = work.graph()
            if variant.owner in graph.opaque:  # it would be a graph that calls the module whose call it is
                captured.append(work.variant)
                raise Refused(f"{variant.owner} stays one call: {graph.opaque[variant.owner]}")
            graphs.append(graph)
            trees[variant.name] = work.tree
            inner |= work.inner
            captured.append(work.variant)
        except Refused as reason:
            if main is None:
                raise
            main.notes.append(f"no variant {variant.name!r}: {reason}")
    main = graphs[0]
    main.variants = {graph.name: graph for graph in graphs[1:]}
    sign(model, main, captured, trees)
    main.variants |= {graph.name: graph for graph in _inside(model, root, main, inner)}
    return main


def _inside(model, root, main, inner):
    """Graphs of the leaf modules inside those that stay one call, which call them: each a graph of its own, so that passes reach them."""
    graphs = []
    for path, (shape, dtype, larger, part) in inner.items():
        device = next(iter(attribute(model, path).parameters())).device
        name = next(iter(inspect.signature(attribute(model, path).forward).parameters))
        dims = {dim: f"size_{dim}" for dim, (size, other) in enumerate(zip(shape, larger)) if size != other}
        value = torch.zeros(shape, dtype=dtype, device=device)
        try:
            graph = _Capture(model, root, Variant(path, path, {name: value}, {name: dims}), {}, main).graph()
            graphs.append(replace(graph, is_inner=True, blocks=(), around=main.blocks, part=part if _is_within(main, path) else ""))
        except Refused as reason:
            main.notes.append(f"{path}, inside an opaque module, is out of reach for passes: {reason}")
    return graphs


def _is_within(main, path):
    """Whether the opaque module around a leaf is a part of a block, and no whole one."""
    at = max((opaque for opaque in main.opaque if path.startswith(f"{opaque}.")), key=len, default="")
    return any(at.startswith(f"{block}.") for block in main.blocks)


class _Capture:
    """One variant on its way to a Graph. `opaque` (path → reason) is shared by the variants of a model."""

    def __init__(self, model, root, variant, opaque, main, stamp=True):
        self.stamp = stamp
        self.model, self.root, self.variant, self.opaque, self.main = model, root, variant, opaque, main
        self.notes, self.blamed = list(variant.notes), []
        self.modules = dict(model.named_modules())
        self.dtype = _main_dtype(model)

    def graph(self):
        ours, theirs = self._pair()
        self.tree, self.inner = ours.tree, ours.inner
        self.notes += ours.notes
        if self.variant.mode == "eval" and self.main is not None:
            _flags_by_analogy(ours.graph, self.main)
        self._install(ours)
        read_devices(ours.graph)
        graph = in_order(ours.graph)
        mark(graph, self.root)
        called = {node.target for node in graph.nodes if node.op == "call_module"}
        return Graph(
            fx=graph,
            root=self.root,
            name=self.variant.name,
            owner=self.variant.owner,
            inputs=ours.inputs,
            outputs=ours.outputs,
            blocks=_blocks(self.model, ours.called),
            checks=self._checks(ours, theirs),
            opaque={path: reason for path, reason in self.opaque.items() if path in called - ours.training_only},
            training_only=ours.training_only & called,
            notes=self.notes,
        )

    # -- the two runs, and what is done about a module that does not go along

    def _pair(self):
        """→ (our trace, merged with theirs; their trace), modules that cannot be traced or merged made opaque on the way."""
        for _ in range(_ATTEMPTS):
            method = None
            try:
                ours = self._trace(training=False, seed=1)
                failed = self._specialised(ours)
                if failed is None:
                    alignment, theirs, notes = self._aligned(ours)
                    Merge(alignment, self.variant.mode == "both", self.other_dtype, notes, ours.called).apply()
                    self._compare_constants(ours, theirs)
                    require_filled(ours)
                    self.notes += notes
                    return ours, theirs
            except CannotTrace as error:
                failed, method = (error.stack, error.reason), error.method
            except Misaligned as error:
                failed = self._around(error.path), error.words
                method = error.function if error.function and is_method(self.modules[failed[0][-1]], error.function) else None
            self._give_up(*failed, method=method)
        raise Refused(f"{type(self.model).__name__}: after {_ATTEMPTS} attempts there was still something that could not be captured: {failed[1]}")

    def _twins(self):
        """(dtype, least sizes) in which the second run may differ, boldest first; other floats go other ways where code asks for a dtype."""
        others = [dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if dtype != self.dtype][:2]
        return [(others[0], True), (others[1], True), (self.dtype, True), (others[0], False), (self.dtype, False)]

    def _aligned(self, ours):
        """The boldest second run that goes along with our trace → (the alignment, theirs, notes). Raises what the last one raised."""
        training, reasons, notes = self.variant.mode == "both", [], []
        for dtype, least in self._twins():
            try:
                theirs = self._trace(training=training, seed=2, dtype=dtype, least=least)
                alignment = Alignment(ours.graph, theirs.graph, {**ours.replacements, **theirs.replacements}, theirs.hints)
            except (CannotTrace, Misaligned) as error:
                reasons.append(error)
                continue
            if dtype == self.dtype:
                notes.append(f"{self.variant.name}: dtypes stay as captured, no run in another one went along: {reasons[0]}")
            elif dtype != self._twins()[0][0]:
                notes.append(f"{self.variant.name}: in {self._twins()[0][0]} the model runs other ops than these: {reasons[0]}")
            self.least, self.other_dtype = least, dtype
            return alignment, theirs, notes
        raise reasons[-1]

    def _trace(self, training, seed, dtype=None, least=False):
        cast = (lambda given: dtype if given == self.dtype else given) if dtype else (lambda given: given)
        opaque = self.opaque.keys()
        with whole_maps():
            result = trace(self.model, self.variant, training=training, cast=cast, seed=seed, least=least, opaque=opaque, stamp=self.stamp)
        keep_checks(result)
        tidy(result.graph)
        _write_extremes(result)
        for node in result.graph.nodes:
            if node.op == "call_function" and node.target not in HOST and not isinstance(node.target, torch._ops.OpOverload):
                raise Misaligned(node.meta.get("path", ""), f"{node.target} is no op of a graph")
        return result

    def _around(self, path):
        """The modules that a path lies in, outermost first, as far as they are modules that run."""
        names = path.split(".") if path else []
        stack = [".".join(names[:depth]) for depth in range(len(names) + 1)]
        return [place for place in stack if place in self.modules and not isinstance(self.modules[place], (nn.ModuleList, nn.ModuleDict))]

    def _specialised(self, ours):
        """A symbol that became a number: (modules at work, words, its name, whether torch itself asked); None if all stayed symbols."""
        for name, symbol in ours.symbols.items():
            value = ours.replacements.get(symbol)
            if isinstance(value, sympy.Integer):
                asked = [guard for guard in ours.guards if symbol in guard.condition.free_symbols]
                guard = next((guard for guard in asked if is_equality(guard.condition)), asked[-1])
                why = "as it must fit" if guard.torch_asked else "by the code here"
                return guard.stack, f"{guard.place}: {name} would be fixed at {value} {why}", name, guard.torch_asked
        return None

    def _give_up(self, stack, reason, symbol=None, must_fit=False, method=None):
        """Make the innermost method or module at work opaque, with all of its class; what is opaque already sends it outwards."""
        if method is not None and f"{stack[-1]}.{method}".lstrip(".") not in self.opaque:
            kind = type(self.modules[stack[-1]])
            self.opaque.update({f"{path}.{method}".lstrip("."): reason for path, module in self.modules.items() if type(module) is kind})
            return
        for path in () if must_fit else reversed(stack):
            if not path or path == self.variant.owner:
                break
            if path in self.opaque:
                continue
            kind = type(self.modules[path])
            alike = kind.__module__.startswith("torch.nn.")  # what fails in one of torch's own says nothing of the others
            made = [other for other, module in self.modules.items() if (other == path or (type(module) is kind and not alike)) and other not in self.opaque]
            self.opaque.update(dict.fromkeys(made, reason))
            if symbol is not None:
                self.blamed.append((symbol, reason, made))
            return
        if symbol is None and self.blamed:  # what could not keep a size open cannot be one call either
            symbol, reason, made = self.blamed.pop()
            for other in made:
                self.opaque.pop(other, None)
        if symbol is not None:
            dims = {leaf: {dim: name for dim, name in named.items() if symbol not in name.split("+")} for leaf, named in self.variant.dims.items()}
            self.variant = replace(self.variant, dims=dims)
            self.notes.append(f"{self.variant.name}: {reason}; other values of {symbol} are refused")
            return
        raise Refused(f"{type(self.model).__name__}, call {self.variant.name!r}: {reason}")

    # -- what must be the same in both runs, and what must hold for the inputs

    def _compare_constants(self, ours, theirs):
        """Tensors made while tracing may stay where both runs made the same; single numbers become numbers."""
        for node in list(ours.graph.nodes):
            if node.op != "get_attr" or node.target not in ours.constants:
                continue
            value, other = ours.constants[node.target], theirs.constants.get(node.target)
            if other is None or not _same(value, other):
                place = node.meta.get("source") or node.target
                words = f"{place}: a tensor is made from random numbers outside of torch while the model runs; each call would get the same."
                raise Misaligned(node.meta.get("path", ""), words)
            if value.dim() == 0 and value.device.type == "cpu" and value.dtype == other.dtype:
                _write_number(ours.graph, node, value)

    def _install(self, ours):
        """The tensors made while tracing that stay become buffers of their module."""
        for node in ours.graph.nodes:
            if node.op == "get_attr" and node.target in ours.constants:
                value = ours.constants[node.target]
                node.target = self._free(node.target, value)
                install(self.root, node.target, value.detach().clone(), persistent=False)

    def _free(self, path, value):
        """`path`, or the next one like it that holds nothing or this very value (another variant's constant may stand there)."""
        stem, _, number = path.rpartition("_")
        while has_attribute(self.root, path):
            held = attribute(self.root, path)
            if isinstance(held, torch.Tensor) and held.dtype == value.dtype and held.shape == value.shape and torch.equal(held, value):
                return path
            number = int(number) + 1
            path = f"{stem}_{number}"
        return path

    def _checks(self, ours, theirs):
        """Conditions that the calls must meet: those of the model's code that no second run showed to be indifferent."""
        found = {}
        for guard in ours.guards:
            condition = guard.condition.xreplace(ours.replacements)
            if condition in (True, sympy.true) or condition in found or free_unbacked_symbols(condition):
                continue
            if guard.torch_asked and not is_equality(condition):
                continue  # a question about strides and sizes of one: the op is in the graph either way, and checks its own inputs
            if self.least and only_fails_at(condition, theirs.hints):
                continue  # the second run was there, and gave the same graph
            found[condition] = Check(condition, guard.place)
        return tuple(found.values())


def _main_dtype(model):
    counts = Counter(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    return counts.most_common(1)[0][0] if counts else torch.get_default_dtype()


def _write_number(graph, node, value):
    """Write a single number in place of the constant tensor that holds it."""
    with graph.inserting_before(node):
        number = graph.call_function(torch.ops.aten.scalar_tensor.default, (value.item(),), {"dtype": value.dtype, "device": value.device})
    number.meta = dict(node.meta)
    node.replace_all_uses_with(number)
    graph.erase_node(node)


def _write_extremes(run):
    """The least or greatest number of a dtype is a number before the runs are compared: in another dtype it is another one, and nothing was drawn."""
    for node in list(run.graph.nodes):
        value = run.constants.get(node.target) if node.op == "get_attr" else None
        if value is not None and value.dim() == 0 and value.device.type == "cpu" and value.is_floating_point() and abs(value.item()) == torch.finfo(value.dtype).max:
            _write_number(run.graph, node, value)


def _same(value, other):
    """Whether two runs made the same tensor; in another dtype it may be rounded."""
    return value.shape == other.shape and torch.equal(value.to(other.dtype), other)


def _flags_by_analogy(graph, main):
    """Training flags of a call that was run in eval mode alone, from the main graph's nodes of the same module, op and place."""
    def keyed(nodes):
        counter = Counter()
        for node in nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                key = node.meta.get("path", ""), node.target
                yield (*key, counter[key]), node
                counter[key] += 1

    known = dict(keyed(main.fx.nodes))
    for key, node in list(keyed(graph.nodes)):
        twin = known.get(key)
        if twin is None or not any(n.target is select or (n.op == "get_attr" and n.target.endswith("training")) for n in twin.all_input_nodes):
            continue
        for name, value in named_arguments(twin).items():
            is_flag = isinstance(value, fx.Node) and value.op == "get_attr" and value.target.endswith("training")
            chosen = isinstance(value, fx.Node) and value.target is select
            if not is_flag and not chosen:
                continue
            flag = value if is_flag else value.args[0]
            with graph.inserting_before(node):
                read = graph.create_node("get_attr", flag.target)
                read.meta = {**{k: node.meta[k] for k in ("path", "call", "source") if k in node.meta}, "val": False}
                if chosen:
                    read = graph.call_function(select, (read, value.args[1], value.args[2]))
                    read.meta = {**{k: node.meta[k] for k in ("path", "call", "source") if k in node.meta}, "val": value.args[2]}
            set_argument(node, name, read)


def _blocks(model, called):
    """The repeated modules: members of a ModuleList or Sequential that share a class, hold parameters and ran as modules; outermost only."""
    blocks = []
    for name, parent in model.named_modules():
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)) or any(name == block or name.startswith(block + ".") for block in blocks):
            continue
        kinds = Counter(type(child) for child in parent.children())
        for key, child in parent.named_children():
            path = f"{name}.{key}" if name else key
            if kinds[type(child)] > 1 and path in called and next(child.parameters(), None) is not None:
                blocks.append(path)
    return tuple(blocks)
