"""The canonical graph: flat FX over ATen ops, and the module tree that owns its tensors.

    placeholder   one per tensor leaf of the inputs
    get_attr      a tensor by its original dotted path, or a module's `….training`
    call_function an ATen overload, one of our ops, or size arithmetic (`HOST`)
    call_module   a module, or a method of one, that could not be captured (opaque), or that does something in training alone
    output        one flat tuple

Nothing else. Every node carries `meta["path"]` (the module it came from) and `meta["val"]` (its fake value).
"""

import copy as _copy
import math
import operator
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field, replace

import sympy
import torch
from torch import fx, nn


def select(training, train, eval):
    """`train` in training mode, `eval` otherwise: the two captures differ in this argument."""
    return train if training else eval


def dtype_of(value):
    """The dtype of a value at hand, where the original code read `x.dtype`."""
    return value.dtype


def device_of(value):
    """The device of a value at hand, where the original code read `x.device`."""
    return value.device


def least(dtype):
    """The most negative finite number of a dtype at hand, where the original code asked `torch.finfo`."""
    return torch.finfo(dtype).min


def count(training, counter):
    """Add one to a counter (BatchNorm's `num_batches_tracked`) in training mode."""
    if training:
        counter.add_(1)


def drops(training, probability):
    """Whether a layer is left out of this call (LayerDrop): one draw in training mode, never in eval mode."""
    return bool(training and torch.rand([]) < probability)


def unless(value, dropped, before):
    """A layer's value, or what it was given where the layer is left out; printed so that it does not run then."""
    return before if dropped else value


HOST = frozenset({
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.pow, operator.neg,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_, operator.not_,
    math.ceil, math.floor, math.trunc, math.sqrt, max, min,
    torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_int, torch.sym_float, torch.sym_ite, torch.sym_sum, torch.sym_sqrt,
    select, dtype_of, device_of, least, count, drops, unless,
})  # fmt: skip


@dataclass(frozen=True)
class Check:
    """A condition that tracing met on the sizes of the inputs: a sympy relation over their symbols, and where it was asked."""

    condition: sympy.Basic
    where: str


@dataclass
class Graph:
    """A captured model, or one variant of it (another set of inputs over the same tensors).

    `fx` holds the nodes, `root` the tensors: a tree of shallow clones of the model's modules whose Parameters are new objects over
    the model's storage. `inputs` and `outputs` name the leaves, in order (`past_key_values.0.key`). `blocks` are the paths of the
    repeated modules. `checks` must hold for the inputs of each call. `opaque` maps the path of a module that stays one call to the
    reason; `training_only` are those that hold no tensor and hand their input on in eval mode (stochastic depth, masks of SpecAugment): these hide
    nothing. `notes` are fall-backs for the report. `variants` are the other graphs over the same root; one that `is_inner` is a leaf module inside
    an opaque one, captured on its own: a part of the model that no other graph shows; `around` are the model's blocks then, `part` is what the leaf
    is to a mixer ("in", "inner", "out"; "" where that is not known). `captured` is the graph before the passes, where one of
    them may be done again. `front`: how many tokens passes have put before the model's own. `loss`: the op that
    makes the loss of what the head reads, where one is to. `known`: what has been worked out of this
    capture, which all copies share: the code of passes as it was traced, what ops give for which shapes.
    """

    fx: fx.Graph
    root: nn.Module
    name: str = "forward"
    owner: str = ""
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    opaque: dict[str, str] = field(default_factory=dict)
    training_only: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)
    variants: dict[str, "Graph"] = field(default_factory=dict)
    signature: object = None
    is_inner: bool = False
    around: tuple[str, ...] = ()
    part: str = ""
    captured: "Graph | None" = None
    bare: "Graph | None" = None
    front: int = 0
    loss: object = None
    known: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def nodes(self):
        return self.fx.nodes

    @property
    def placeholders(self):
        return [n for n in self.fx.nodes if n.op == "placeholder"]

    @property
    def fake_mode(self):
        """The FakeTensorMode that all `meta["val"]` of this graph share."""
        for node in self.fx.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch._subclasses.FakeTensor):
                return value.fake_mode
        raise LookupError("no node of this graph carries a fake value")

    def all(self):
        """This graph and its variants."""
        return [self, *self.variants.values()]

    def twin(self, root, **changes):
        """These nodes anew over a tree, without variants; `changes` are fields that differ."""
        nodes, env = fx.Graph(), {}
        for node in self.nodes:
            env[node] = copied = add_node(nodes, node.op, node.target, *fx.node.map_arg((node.args, node.kwargs), env.__getitem__), node.name)
            copied.meta = dict(node.meta)
        return replace(self, fx=nodes, root=root, opaque=dict(self.opaque), notes=list(self.notes), variants={}, **changes)

    def copy(self):
        """The same graphs over a tree of their own: frozen tensors share storage, trainable ones are copies."""
        root = clone_tree(self.root)
        for parameter in root.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.clone()
        return self.over(root)

    def over(self, root):
        """The same graphs anew over a tree."""
        main, *rest = (part.twin(root) for part in self.all())
        main.variants.update((part.name, part) for part in rest)
        return main


def add_node(nodes, op, target, args=(), kwargs=None, name=None):
    """A node at the insertion point of an `fx.Graph`. It gets its arguments afterwards: `create_node` searches those it is given for SymInts, which costs more than the rest."""
    node = nodes.create_node(op, target, name=name)
    if args:
        node.args = args
    if kwargs:
        node.kwargs = kwargs
    return node


def attribute(root, path):
    """The attribute of a module tree at a dotted path (a tensor, a module, a flag). Raises AttributeError with the path."""
    value = root
    for name in path.split(".") if path else ():
        children = getattr(value, "_modules", None)
        if children and name in children:  # what nn.Module itself finds only after a failure
            value = children[name]
            continue
        try:
            value = getattr(value, name)
        except AttributeError:
            raise AttributeError(f"{path}: no {name!r} on {type(value).__name__}") from None
    return value


def parameters_of(root, path):
    """{path: parameter} of what a `call_module` runs: all that a module holds, or what a method's own module does."""
    called = attribute(root, path)
    if isinstance(called, nn.Module):
        return {f"{path}.{name}": parameter for name, parameter in called.named_parameters()}
    owner = path.rpartition(".")[0]
    return {f"{owner}.{name}" if owner else name: parameter for name, parameter in attribute(root, owner).named_parameters(recurse=False)}


def has_attribute(root, path):
    try:
        attribute(root, path)
    except AttributeError:
        return False
    return True


def install(root, path, tensor, *, persistent=True):
    """Put a Parameter or a buffer at a dotted path; containers on the way that do not exist are made."""
    *parents, name = path.split(".")
    module = root
    for parent in parents:
        child = module._modules.get(parent)
        if child is None:
            child = nn.Module()
            module.add_module(parent, child)
        module = child
    if isinstance(tensor, nn.Parameter):
        module._buffers.pop(name, None)
        module.register_parameter(name, tensor)
    else:
        module._parameters.pop(name, None)
        module.register_buffer(name, tensor, persistent=persistent)


def remove(root, path):
    """Take a tensor away, and the containers that it leaves empty."""
    *parents, name = path.split(".")
    chain = [root]
    for parent in parents:
        chain.append(chain[-1]._modules[parent])
    chain[-1]._parameters.pop(name, None)
    chain[-1]._buffers.pop(name, None)
    for module, parent, child in zip(reversed(chain[:-1]), reversed(parents), reversed(chain[1:])):
        if type(child) is not nn.Module or child._parameters or child._buffers or child._modules:
            break
        del module._modules[parent]


_OF_EACH = frozenset(vars(nn.Module()))


def shallow(module):
    twin = module.__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    twin.__dict__.pop("forward", None)  # an instance attribute left by a tracer would run the original code
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set") or ("_hooks" in name and isinstance(value, dict)):
            twin.__dict__[name] = value.copy()  # dicts and a set
    return twin


def clone_tree(model):
    """A tree of shallow clones: Parameters are new objects over the same storage (tied ones stay tied), buffers are copies.

    Nothing that is done to the clone (training, casting, sharding, hooks) reaches the model.
    """
    modules, tensors = {}, {}

    def tensor(value):
        if value is None:
            return None
        if id(value) not in tensors:
            tensors[id(value)] = nn.Parameter(value.detach(), value.requires_grad) if isinstance(value, nn.Parameter) else value.detach().clone()
        return tensors[id(value)]

    def visit(module):
        if id(module) in modules:
            return modules[id(module)]
        twin = modules[id(module)] = shallow(module)
        for name, value in module._parameters.items():
            twin._parameters[name] = tensor(value)
        for name, value in module._buffers.items():
            twin._buffers[name] = tensor(value)
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else visit(child)
        return twin

    return own_state(visit(model))


def own_state(tree):
    """Give a tree of clones configs and plain containers of its own: a call, `generate` and trainers write into them."""
    copies, held = {}, {}
    for module in tree.modules():
        for name, value in module.__dict__.items():
            if name in ("config", "generation_config"):
                if hasattr(value, "to_dict"):
                    module.__dict__[name] = _copy.deepcopy(value, copies)
            elif type(value) in (dict, list, set, OrderedDict, defaultdict) and name not in _OF_EACH:
                module.__dict__[name] = held.setdefault(id(value), _copy.copy(value))
    return tree


def expression(size):
    """The int or sympy expression of a dimension or SymInt."""
    if isinstance(size, torch.SymInt):
        value = size.node.expr
        return int(value) if value.is_number else value
    return size


def shape(node):
    """The shape of a node's value as a tuple of ints and sympy expressions."""
    return tuple(expression(size) for size in node.meta["val"].shape)


def reached(node, onward):
    """A node and all that `onward` (node → the next ones) leads to from it, as the keys of a dict, in the order found: the same one each time."""
    found, todo = {}, [node]
    while todo:
        node = todo.pop()
        if node not in found:
            found[node] = None
            todo += reversed(tuple(onward(node)))
    return found


def path_of(node):
    """The dotted path of the module that a node came from ("" is the model itself)."""
    return node.meta.get("path", "")
