"""What a run of a model leaves behind in its graph, taken out.

    asserts · dead nodes · whole slices, aliases, casts of integers to themselves · sizes asked twice · no_grad regions
"""

import functools
import re

import sympy
import torch
from torch import fx

from ..graph import add_node, count, drops

aten = torch.ops.aten
ASSERTS = {
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.default, aten._assert_async.msg,
    aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
}  # fmt: skip
_NUMBER = re.compile(r"_\d+$")
_END = torch.iinfo(torch.int64).max


def is_size(node):
    """Whether a node's value is a number or a condition on numbers, not a tensor."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def has_effect(node):
    """Whether a node does something besides giving its value."""
    if node.op == "call_module" or node.target in (count, drops, aten._assert_scalar.default):
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags  # whoever draws moves those that draw after it


def written(node):
    """The node whose value an in-place op changes; None for all others."""
    names = _changed(node.target) if isinstance(node.target, torch._ops.OpOverload) else ()
    if not names:
        return None
    arguments = named_arguments(node)
    return next((arguments[name] for name in names if isinstance(arguments.get(name), fx.Node)), None)


@functools.cache
def _changed(op):
    """Names of the arguments that an op changes in place."""
    return tuple(a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def named_arguments(node):
    """An op's arguments by name, defaults filled in; positions for what has no schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**dict(enumerate(node.args)), **node.kwargs}
    given, args, kwargs = {}, node.args, node.kwargs
    for place, (name, has_default, default) in enumerate(_declared(node.target)):
        if place < len(args):
            given[name] = args[place]
        elif name in kwargs:
            given[name] = kwargs[name]
        elif has_default:
            given[name] = default
    return given


@functools.cache
def _declared(op):
    """(name, whether it may be left out, what that means) of an op's arguments, taken out of its schema once."""
    return tuple((a.name, a.has_default_value(), a.default_value) for a in op._schema.arguments)


def set_argument(node, name, value):
    """Set an op's argument by its name in the schema (or its position where there is no schema)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        if isinstance(name, int):
            node.update_arg(name, value)
        else:
            node.update_kwarg(name, value)
        return
    arguments = node.target._schema.arguments
    place = [a.name for a in arguments].index(name)
    if arguments[place].kwarg_only or name in node.kwargs:
        node.update_kwarg(name, value)
        return
    values = named_arguments(node)
    node.args = tuple(value if a.name == name else values[a.name] for a in arguments[: max(place + 1, len(node.args))])


def _is_noop(node):
    """Ops that hand their input through: aliases, whole slices, casts between equal integer dtypes."""
    if node.target is aten.alias.default:
        return True
    if node.target is aten.slice.Tensor:
        value = named_arguments(node)
        return value["start"] in (0, None) and value["end"] in (_END, None) and value["step"] == 1
    if node.target in (aten.to.dtype, aten.to.dtype_layout, aten.type_as.default):
        source = node.args[0].meta["val"]
        return source.dtype == node.meta["val"].dtype and not source.dtype.is_floating_point and source.device == node.meta["val"].device
    return False


def tidy(graph):
    """Take out what a run leaves behind, in place: asserts, dead nodes, size questions, whole slices, no-op integer casts."""
    writes = {id(node): written(node) for node in graph.nodes if node.op == "call_function"}
    for node in list(graph.nodes):
        if node.target in ASSERTS and "asked" not in node.meta:
            graph.erase_node(node)
        elif node.target is aten.detach_.default and node.args[0].target is aten.lift_fresh_copy.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.op == "call_function" and _is_noop(node) and not any(target is node for target in writes.values()):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    written_to = {id(target) for target in writes.values() if target is not None}
    for node in list(graph.nodes):
        if node.target is aten.lift_fresh_copy.default and id(node) not in written_to:
            node.args[0].meta["val"] = node.meta["val"]
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _regions(graph)
    drop_dead(graph)
    _sizes_once(graph)


def drop_dead(graph):
    """Erase what nobody reads and what has no effect of its own."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not has_effect(node):
            graph.erase_node(node)


def _sizes_once(graph):
    """One node per size of one value: equal size reads and equal arithmetic become one."""
    seen = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_size(node) or node.target is drops:
            continue
        if _number(node) is not None:
            _inline(node, _number(node))
            graph.erase_node(node)
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def _number(node):
    """The number that a size has whatever the inputs are; None for others."""
    value = node.meta["val"]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        value = value.node.expr
        if not value.is_number and value not in (sympy.true, sympy.false):
            return None
        return bool(value) if value in (sympy.true, sympy.false) else int(value) if value.is_Integer else float(value)
    return value


def _inline(node, value):
    """Write a number in place of the node that computes it."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)


def _regions(graph):
    """`with torch.no_grad()` inside the model: what such a region computed from something trainable is detached where it leaves."""
    enabled, trainable, outside = [True], set(), {}
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            enabled[0] = node.args[0]
            graph.erase_node(node)
            continue
        value = node.meta.get("val")
        floating = not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype.is_complex
        if node.op == "placeholder" or (node.op == "get_attr" and isinstance(value, torch.nn.Parameter)) or node.op == "call_module":
            if floating:
                trainable.add(node)
        elif node.op == "call_function" and floating and not is_size(node):
            sources = [source for source in node.all_input_nodes if source in trainable]
            if sources and not enabled[0]:
                outside[node] = None
            elif sources:
                trainable.add(node)
    for node in outside:
        if isinstance(node.meta.get("val"), torch.Tensor) and any(user not in outside and not is_size(user) for user in node.users):
            with graph.inserting_after(node):
                cut = graph.call_function(aten.detach.default, (node,))
            cut.meta = dict(node.meta)
            node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut and user not in outside)


def in_order(graph):
    """A plain fx.Graph with readable names: one get_attr per path (right before its first use), placeholders named after their leaves."""
    made, env, read = fx.Graph(), {}, {}
    uses = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            uses.setdefault(source, node)

    def get(source):
        if source.op == "get_attr" and source not in env:
            if source.target not in read:
                read[source.target] = made.create_node("get_attr", source.target)
                read[source.target].meta.update(provenance(source))
            env[source] = read[source.target]
        return env[source]

    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "placeholder":
            env[node] = made.placeholder(node.meta["leaf"].replace(".", "_"))
            env[node].meta = provenance(node) | {"leaf": node.meta["leaf"], "path": ""}
            continue
        given = fx.map_arg(node.args, get), fx.map_arg(node.kwargs, get) if node.kwargs else {}
        name = _NUMBER.sub("", node.name) if node.op == "call_function" else None  # counted anew, without what was taken out
        env[node] = add_node(made, node.op, node.target, *given, name)
        env[node].meta.update(provenance(node))
    return made


def provenance(node):
    """What a node says of its value and where it comes from."""
    return {key: node.meta[key] for key in ("val", "path", "call", "source") if key in node.meta}
