"""Print a cut graph as Python source that a person can read: one statement per node, ops bound natively.

    %linear = aten.linear.default(%x, @layers.0.mlp.up_proj.weight)  -->  linear_1 = linear(x, mlp.up_proj.weight)

Native bindings (`torch._C._nn.linear`, `x.view(…)`, `x.shape[1]`) reach the same overload as `torch.ops.aten`, in a quarter of the time.
"""

import keyword
import math
import operator
import re
from collections import Counter

import torch
from torch import fx, nn

from ..graph import HOST, attribute, count, device_of, drops, dtype_of, least, select, unless
from ..training.backward import REGION
from .coupled import Chain
from .native import SPECIAL, native, with_keywords, with_reduction
from .outline import Piece, is_size

HOST_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//", operator.truediv: "/", operator.mod: "%", operator.pow: "**",
    operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
    operator.and_: "&", operator.or_: "|",
}  # fmt: skip
_LITERALS = (bool, int, float, complex, str, torch.dtype, torch.layout, torch.memory_format)


def top_source(outline, root, name, owner="", bodies=None, chains=(), regions=True):
    """The source of a top: `forward(self, <inputs>)` of the module at path `owner`, giving one flat tuple.

    `bodies`: piece → the name of the body that its block runs, None for the block's first. `chains`: the calls that run as one reversible step.
    `regions`: print what backward leaves out.
    """
    starts, inner = {chain.pieces[0]: chain for chain in chains}, {piece for chain in chains for piece in chain.pieces[1:]}
    steps = [starts.get(step, step) for step in outline.steps if step not in inner]
    module = attribute(root, owner)
    writer = _Writer(outline.inputs, steps, outline.sizes, module, owner)
    writer.bodies, writer.tied, writer.whole, writer.regions = bodies or {}, _tied(root, owner), root, regions
    return writer.source(f"{type(module).__name__}, {name}", outline.result, is_top=True)


def block_source(piece, root):
    """The source of a block: `forward(self, hidden state, …)`; `root` is the block's module. Equal blocks give equal text."""
    result = tuple(piece.outputs) if len(piece.outputs) != 1 else piece.outputs[0]
    return _Writer(piece.inputs, piece.nodes, piece.sizes, root, piece.path).source(type(root).__name__, result)


class _Writer:
    """One function: names for its values, bindings for its ops, local names for modules that are read more than once."""

    def __init__(self, inputs, steps, sizes, root, prefix):
        self.inputs, self.sizes, self.root = inputs, sizes, root
        self.prefix = prefix + "." if prefix else ""
        self.steps = [s for s in steps if isinstance(s, Piece) or s not in sizes]
        self.bodies, self.tied, self.whole, self.regions = {}, {}, None, True
        self.bindings, self.used, self.names, self.modules, self.lines = {}, set(), {}, {}, []
        self.counters, self.taken = {}, {"self", "torch", "math", "inf", "nan"}

    def source(self, title, result, is_top=False):
        self.result = result
        for step in self.steps:
            if isinstance(step, fx.Node) and step.op == "call_function":
                self.bind(step)
        self.taken.update(self.bindings)
        for i, node in enumerate(self.inputs):
            stem = "x" if i == 0 and not is_top else re.sub(r"_?\d+", "", node.name) if not is_top else node.name
            self.names[node] = self.fresh(stem)
        parameters = [self.names[n] for n in self.inputs]
        self.plan()
        self.count_reads()
        self.droppable = {}  # the call of a block that may be left out -> the node that says so
        for piece, step in zip(self.steps, self.steps[1:]):
            if isinstance(piece, Piece) and isinstance(step, fx.Node) and step.target is unless and piece.outputs == [step.args[0]] and len(step.args[0].users) == 1:
                self.droppable[piece] = step
        with_block = set(self.droppable.values())
        place, region = None, None
        for i, step in enumerate(self.steps):
            if (inside := self.region(step, region)) != region:
                region, place = inside, None
                self.lines += ["with torch.no_grad():"] if region else []
            start = len(self.lines)
            if step in with_block:
                self.release(i)
                continue
            if (here := self.place(step)) != place:
                place = here
                self.lines.append(f"# {place}" if place else "#")
            self.statement(step)
            self.release(i)
            self.lines[start:] = [f"    {line}" if region else line for line in self.lines[start:]]
        returned = self.value(result)
        head = [f'"""{title}."""', "import torch"] + [f"{name} = {target}" for name, target in sorted(self.bindings.items()) if name in self.used]
        body = "\n    ".join(self.lines + [f"return {returned}"])
        return "\n".join(head) + f"\n\n\ndef forward({', '.join(['self', *parameters])}):\n    {body}\n"

    # ---- names

    def fresh(self, stem):
        stem = re.sub(r"\W", "_", stem).strip("_") or "value"
        if keyword.iskeyword(stem) or stem[0].isdigit():
            stem = f"_{stem}"
        name, i = stem, 1
        while name in self.taken:
            i += 1
            name = f"{stem}_{i}"
        self.taken.add(name)
        return name

    def numbered(self, stem):
        """`linear_1`, `linear_2`, …: counted per function, so that equal blocks read the same."""
        while True:
            self.counters[stem] = self.counters.get(stem, 0) + 1
            name = f"{stem}_{self.counters[stem]}"
            if name not in self.taken:
                self.taken.add(name)
                return name

    def bind(self, node):
        """Note the global name that a node's target needs."""
        target = node.target
        if hasattr(target, "launch"):  # an op of ours: a registered one costs more on the way in than it saves
            name, text = target._schema.name.partition("::")[2], f"__import__({target.launch.__module__!r}, fromlist=['*']).{target.launch.__qualname__}"
            self.bindings[name] = text
            return name
        if isinstance(target, torch._ops.OpOverload):
            kind, text = self.call_form(node)
            if kind != "function":
                return None
        elif target in HOST:
            if target in HOST_INFIX or target.__module__ not in ("torch", "math"):
                return None
            text = f"torch.{target.__name__}" if target.__module__ == "torch" else f"__import__('math').{target.__name__}"
        else:
            text = f"__import__({target.__module__!r}, fromlist=['*']).{target.__qualname__}"
        name = re.sub(r"\W", "_", text.rsplit(".ops.aten.")[-1] if ".ops." in text else text.rsplit(".", 1)[-1])
        if name.endswith("_default"):
            name = name[: -len("_default")]
        while self.bindings.get(name, text) != text:
            name += "_"
        self.bindings[name] = text
        return name

    def bound(self, node):
        name = self.bind(node)
        self.used.add(name)
        return name

    def call_form(self, node):
        kind, text = native(node.target)
        first = node.args[0] if node.args else None
        is_tensor = isinstance(first, fx.Node) and isinstance(first.meta.get("val"), torch.Tensor)
        if (kind == "infix" and (len(node.args) != 2 or node.kwargs or not is_tensor)) or (kind == "method" and not is_tensor):
            name, overload = node.target._schema.name.split("::")[1], node.target._overloadname or "default"
            return "function", f"torch.ops.aten.{name}.{overload}"
        return kind, text

    # ---- modules and tensors by path

    def count_reads(self):
        """How often each module on the way to a tensor or a called module is read, and by how many different names."""
        self.visits = {}
        targets = []
        for i, step in enumerate(self.steps):
            if isinstance(step, Chain):
                targets += [(piece.path, True) for piece in step.pieces]
            elif isinstance(step, Piece) or step.op == "call_module":
                targets.append((step.path if isinstance(step, Piece) else step.target, True))
            targets += [(a.target, False) for a in self.reads[i] if a.op == "get_attr" and a not in self.names]
        for target, is_module in targets:
            parts = self.relative(target).split(".")
            for i in range(1, len(parts) + is_module):
                self.visits.setdefault(tuple(parts[:i]), []).append(tuple(parts[: i + 1]))

    def relative(self, path):
        """A path as seen from this function's module; a tensor outside of it by a tied name, else through the whole model."""
        if path.startswith(self.prefix):
            return path[len(self.prefix) :]
        return self.tied.get(path) or f"_whole.0.{path}"

    def read(self, path):
        """An expression for what stands at a dotted path; modules read more than once get a local name."""
        parts = tuple(self.relative(path).split("."))
        module, text = self.root, "self"
        for i, part in enumerate(parts):
            text = self.step_into(module, text, part)
            module = getattr(module, "_modules", {}).get(part)
            key = parts[: i + 1]
            if key == ("_whole", "0"):
                module, text = self.whole, "self._whole[0]"
            if module is None:
                continue
            if key in self.modules:
                text = self.modules[key]
            elif len(set(self.visits.get(key, ()))) > 1 or (len(self.visits.get(key, ())) > 1 and i == len(parts) - 2):
                is_added = type(module) is nn.Module and i > 0  # a container made by a pass: `lora_default`
                self.modules[key] = self.fresh(f"{parts[i - 1] if i else 'module'}_{part}" if is_added or not part.isidentifier() else part)
                self.lines.append(f"{self.modules[key]} = {text}")
                text = self.modules[key]
        return text

    @staticmethod
    def step_into(module, text, part):
        if part.isidentifier() and not keyword.iskeyword(part):
            return f"{text}.{part}"
        if part.isdigit() and isinstance(module, (nn.ModuleList, nn.Sequential, nn.ParameterList)):
            return f"{text}[{part}]"
        return f"getattr({text}, {part!r})"

    # ---- values

    def value(self, arg):
        """The text of an argument. Reads of tensors are written where they are used; sizes as `x.shape[1]`."""
        if isinstance(arg, fx.Node):
            return self.of_node(arg)
        if isinstance(arg, (tuple, list)):
            inner = ", ".join(map(self.value, arg))
            return f"[{inner}]" if isinstance(arg, list) else f"({inner}{',' if len(arg) == 1 else ''})"
        if isinstance(arg, dict):
            return "{" + ", ".join(f"{k!r}: {self.value(v)}" for k, v in arg.items()) + "}"
        if isinstance(arg, slice):
            return f"slice({self.value(arg.start)}, {self.value(arg.stop)}, {self.value(arg.step)})"
        if isinstance(arg, torch.device):
            return f"torch.device({str(arg)!r})"
        if isinstance(arg, float) and not math.isfinite(arg):
            return f"float({str(arg)!r})"
        if arg is None or arg is Ellipsis or isinstance(arg, _LITERALS):
            return repr(arg)
        raise TypeError(f"an argument of type {type(arg).__name__} cannot be printed: {arg!r}")

    def of_node(self, node):
        if node in self.names:
            return self.names[node]
        if node in self.inline:
            return self.call(node)
        if node in self.sizes:
            source, dim = self.sizes[node]
            shared = f"{self.names[source]}.shape[{dim}]"
            key = (source, dim)
            if self.uses[key] < 2:
                return shared
            name = self.names.get(key)
            if name is None:
                name = self.names[key] = self.numbered("n")
                self.lines.append(f"{name} = {shared}")
            return name
        if node.op == "get_attr":
            text = self.read(node.target)
            if self.uses[node] < 2:
                return text
            name = self.names[node] = self.fresh(node.target.rsplit(".", 1)[-1])
            self.lines.append(f"{name} = {text}")
            return name
        raise LookupError(f"%{node.name} is used before it is made")

    def plan(self):
        """What each step reads, how often each value is read and where last; host values read once are written where they are used."""
        raw = [*(s.inputs if isinstance(s, Piece) else s.all_input_nodes for s in self.steps), _nodes_in(self.result)]
        times = Counter(a for sources in raw for a in sources)
        self.inline = {s for s in self.steps if isinstance(s, fx.Node) and _is_host(s) and times[s] == 1 and s not in raw[-1]}

        def expand(node):
            if node not in self.inline:
                return [node]
            return [a for source in node.all_input_nodes for a in expand(source)]

        kept = [i for i, s in enumerate(self.steps) if s not in self.inline]
        self.steps = [self.steps[i] for i in kept]
        self.reads = [[a for source in sources for a in expand(source)] for sources in [*(raw[i] for i in kept), raw[-1]]]
        self.uses, self.last = Counter(), {}
        for i, sources in enumerate(self.reads):
            for a in sources:
                self.uses[a] += 1
                self.last[a] = i
                if a in self.sizes:
                    self.uses[self.sizes[a]] += 1
                    self.last[self.sizes[a][0]] = i

    def release(self, i):
        """Let go of tensors after their last use: a step holds no more memory than the original's inner scopes."""
        sources = [self.sizes[a][0] if a in self.sizes else a for a in self.reads[i]]
        ended = [a for a in dict.fromkeys(sources) if self.last[a] == i and a in self.names and a.op != "get_attr"]
        dead = [a for a in ended if isinstance(a.meta.get("val"), (torch.Tensor, tuple, list))]
        if dead:
            self.lines[-1] += f"; del {', '.join(self.names[a] for a in dead)}"

    def region(self, step, before):
        """The region of a step that the source says ("no_grad" or None); what touches no tensor stays in that of the step before."""
        if not self.regions or isinstance(step, Piece):
            return None
        return before if _is_host(step) else step.meta.get(REGION)

    def place(self, step):
        """Where a step comes from, for the comment above it: a module's path, and the pass that made it."""
        path, made = (step.path, None) if isinstance(step, Piece) else (step.meta.get("path", ""), step.meta.get("made"))
        path = path[len(self.prefix) :] if path.startswith(self.prefix) else ""
        return f"{path} + {made}".strip() if made else path

    # ---- statements

    def statement(self, step):
        if isinstance(step, Chain):
            return self.call_chain(step)
        if isinstance(step, Piece):
            return self.call_block(step)
        text = self.call(step)
        if step.target is count:
            self.lines.append(text)
        elif not step.users:
            self.lines.append(text)
        else:
            name = self.names[step] = self.numbered(_stem(step))
            self.lines.append(f"{name} = {text}")

    def call_chain(self, chain):
        """Blocks that backward runs again: each with what it takes beside the two streams, its body and that of its inverse."""
        rows, before = [], ()
        for piece, back in zip(chain.pieces, chain.inverses):
            given = tuple(a for a in piece.inputs if a not in before)
            rows.append(f"    ({self.read(piece.path)}, {self.value(given)}, {self.bodies.get(piece)!r}, {self.bodies.get(back)!r}),")
            before = piece.outputs
        self.bindings["reversible"] = "__import__('rewrite.training.reversible', fromlist=['*']).reversible"
        self.used.add("reversible")
        self.name_outputs(piece)
        self.lines += [f"{', '.join(self.names[n] for n in piece.outputs)} = reversible(", *rows, ")"]

    def call_block(self, piece):
        arguments = [self.value(a) for a in piece.inputs]
        if body := self.bodies.get(piece):
            arguments.append(f"body={body!r}")
        text = f"{self.read(piece.path)}({', '.join(arguments)})"
        if drop := self.droppable.get(piece):
            self.names[drop] = self.numbered(self.stem(piece))
            self.lines.append(f"{self.names[drop]} = {self.value(drop.args[2])} if {self.value(drop.args[1])} else {text}")
            return
        self.name_outputs(piece)
        self.lines.append(f"{', '.join(self.names[n] for n in piece.outputs)} = {text}" if piece.outputs else text)

    @staticmethod
    def stem(piece):
        parents = piece.path.rpartition(".")[0].rpartition(".")[2]
        return parents if parents.isidentifier() else "block"

    def name_outputs(self, piece):
        for node in piece.outputs:
            self.names[node] = self.numbered(self.stem(piece) if node is piece.outputs[0] else _stem(node))

    def call(self, node):
        """The text of one node's operation."""
        if node.op == "call_module":
            return f"{self.read(node.target)}({self.arguments(node.args, node.kwargs)})"
        if not isinstance(node.target, torch._ops.OpOverload):
            return self.call_host(node)
        special = SPECIAL.get(node.target)
        if special and (text := special(self, node)):
            return text
        kind, text = self.call_form(node)
        silent = {"pin_memory": False, "layout": torch.strided}  # what every factory takes anyway
        args, kwargs = node.args, {k: v for k, v in node.kwargs.items() if v is not None and (k not in silent or v != silent[k])}
        if kind == "infix":
            return f"{self.operand(args[0])} {text} {self.operand(args[1])}"
        if kind == "method":
            args, kwargs = with_keywords(node.target, args, kwargs)
            if len(args) == 2 and isinstance(args[1], (list, tuple)) and not kwargs and text in ("view", "reshape", "expand", "permute", "repeat"):
                args = (args[0], *args[1])
            return f"{self.value(args[0])}.{text}({self.arguments(args[1:], kwargs)})"
        return f"{self.bound(node)}({self.arguments(*with_reduction(node.target, args, kwargs))})"

    def arguments(self, args, kwargs):
        return ", ".join([*map(self.value, args), *(f"{k}={self.value(v)}" for k, v in kwargs.items())])

    def operand(self, arg):
        text = self.value(arg)
        return f"({text})" if " " in text and isinstance(arg, fx.Node) else text

    def call_host(self, node):
        target, args = node.target, node.args
        if target is operator.getitem:
            return f"{self.value(args[0])}[{self.value(args[1])}]"
        if target is select:
            return f"{self.operand(args[1])} if {self.operand(args[0])} else {self.operand(args[2])}"
        if target is drops:
            return f"bool({self.value(args[0])} and torch.rand([]) < {self.value(args[1])})"
        if target is unless:
            return f"{self.operand(args[2])} if {self.operand(args[1])} else {self.operand(args[0])}"
        if target is dtype_of or target is device_of:
            return f"{self.value(args[0])}.{'dtype' if target is dtype_of else 'device'}"
        if target is least:
            return f"torch.finfo({self.value(args[0])}).min"
        if target is count:
            return f"{self.value(args[1])}.add_(1) if {self.value(args[0])} else None"
        if target in HOST_INFIX:
            return f"{self.operand(args[0])} {HOST_INFIX[target]} {self.operand(args[1])}"
        if target is operator.neg:
            return f"-{self.operand(args[0])}"
        if target is operator.not_:
            return f"not {self.operand(args[0])}"
        if target in (max, min):
            return f"{target.__name__}({self.arguments(args, node.kwargs)})"
        return f"{self.bound(node)}({self.arguments(args, node.kwargs)})"


def _tied(root, owner):
    """path outside of `owner` -> the name inside of it under which the same tensor is found."""
    if not owner:
        return {}
    prefix, inside, tied = owner + ".", {}, {}
    pairs = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    for path, tensor in pairs:
        if path.startswith(prefix):
            inside.setdefault(id(tensor), path[len(prefix) :])
    for path, tensor in pairs:
        if not path.startswith(prefix) and id(tensor) in inside:
            tied[path] = inside[id(tensor)]
    return tied


def _nodes_in(value):
    found = []
    fx.node.map_arg(value, found.append)
    return found


def _is_host(node):
    """True for what is read or reckoned without touching a tensor's values."""
    return node.target in (select, dtype_of, device_of, least) or (node.target in HOST and node.target is not drops and is_size(node))


def _stem(node):
    target = node.target
    if node.op == "call_module":
        name = target.rsplit(".", 1)[-1]
        return name if name.isidentifier() else "module"
    name = target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", "value")
    short = {"scaled_dot_product_attention": "attention", "getitem": "part", "dtype_of": "dtype", "device_of": "device", "sym_size": "n"}
    return short.get(name, name.strip("_"))
