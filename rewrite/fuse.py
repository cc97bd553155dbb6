"""Fusing: each occurrence of an op's reference becomes one node, whose target carries the reference.

A node made here remembers in `meta["fused"]` the names of the captured nodes that it stands for, and in `meta["apart"]` how to take it apart again.
"""

import operator
from dataclasses import replace

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import graph as g
from .errors import Refused
from .occurrence import occurrences, patterns
from .training.backward import REGION

#: what nodes ask of a value at hand, and an op asks itself
ASKED = (g.dtype_of, torch.ops.aten.sym_size.int)


def fuse(edit, ops, together=None, in_turn=None, beside=None):
    """Fuse a graph; `ops` are pairs of an op and a small tensor for each of its tensor arguments. Returns the sites, [(path, op)].

    together(ops): the one op that does the work of several that read the same first argument, which gives a tuple; None where there is none.

    in_turn(ops): the one op that does the work of several of which each adds to what the one before it gives, and reads the same second argument; or None.

    beside(): fuses what is no occurrence in the graph, and gives its sites.

    What passes have made and no op covers goes to `edit.declined` with the reason. Raises Refused where there is nothing to fuse at all.
    """
    graph = edit.graph
    known = edit.memo.setdefault(("patterns", edit.step.place), {})
    for op, values in ops:
        if op not in known:
            with torch.random.fork_rng(devices=()):  # a reference may draw; the user's generator stands still
                known[op] = patterns(op, values)
    found, reasons = [], {}
    for sign in dict.fromkeys(getattr(op, "sign", None) for op, _ in ops):  # each by itself, so that a reason is that of the op asked for
        these = [p for op, _ in ops if getattr(op, "sign", None) is sign for p in known[op]]
        more, reasons[sign] = occurrences(graph.fx, these, _declines, [n for o in found for n in (o.root, *o.inner)])
        found += more
    sites, fused = [], {}
    for occurrence in sorted(found, key=lambda o: o.root):
        occurrence = replace(occurrence, args=tuple(fused.get(arg, arg) if isinstance(arg, fx.Node) else arg for arg in occurrence.args))
        root = occurrence.root
        near = next((n for n in (root, *occurrence.inner) if "site" in n.meta), root)
        captured = tuple(n.name for n in (*occurrence.inner, root) if "made" not in n.meta)
        own, args = {**near.meta, "made": edit.kind, "role": f"made.{edit.kind}"}, list(occurrence.args)
        with graph.fx.inserting_before(root):
            for i in occurrence.turned:
                args[i] = graph.fx.call_function(torch.ops.aten.permute.default, (source := args[i], [1, 0]))
                args[i].meta = {**own, "fused": (), "val": source.meta["val"].permute(1, 0)}
            node = graph.fx.call_function(occurrence.op.overload, tuple(args))
        node.meta = {**own, "fused": captured, "val": root.meta["val"], "apart": _apart(occurrence), "turned": occurrence.turned}
        root.replace_all_uses_with(node)
        fused[root] = node
        gone = (root, *sorted(occurrence.inner, reverse=True))
        asked = dict.fromkeys(a for old in gone for a in old.all_input_nodes if a.target in ASKED)
        for old in gone:
            graph.fx.erase_node(old)
        for old in asked:
            if not old.users and old not in gone:
                graph.fx.erase_node(old)
        sites.append((near.meta.get("site", near.meta.get("path", "")), node))
    joined = {} if together is None else _together(graph, together)
    if in_turn is not None:
        _in_turn(graph, in_turn)
    edit.by_name = {node.name: node for node in graph.nodes}
    edit.restructured = True
    edit.declined += _left(graph, reasons.pop(None, {}), reasons)
    others = [] if beside is None else beside()
    if not sites and not others and (edit.main or graph.is_inner):
        shown = "\n".join(f"{path}: {reason}" for path, reason in edit.declined[:5])
        raise Refused(f"{edit.step.place}: {edit.kind}: nothing to fuse.\n{shown}\nLeave the pass out.")
    return [*((path, joined.get(node, node.target.made_by.name)) for path, node in sites), *others]


def _declines(occurrence):
    """Why an op does not stand for an occurrence of its reference, or None."""
    op = occurrence.op
    if not getattr(op, "everywhere", False) and not any("made" in n.meta for n in (occurrence.root, *occurrence.inner, *occurrence.args) if isinstance(n, fx.Node)):
        return "it is the model's own"
    return op.unfit(occurrence) if hasattr(op, "unfit") else None


def _apart(occurrence):
    """The nodes of an occurrence in order, as (name, target, args, kwargs, meta), where "%i" is the i-th argument of the op and a name a node before.

    None where they read anything else: then they cannot be put back.
    """
    outer = {arg: f"%{i}" for i, arg in reversed(list(enumerate(occurrence.args))) if isinstance(arg, fx.Node)}
    inner = (*sorted(occurrence.inner), occurrence.root)
    read = dict.fromkeys(n for node in inner for n in node.all_input_nodes if n not in inner and n not in outer)
    if any(n.target not in ASKED or (n.target is not g.dtype_of and n.args[0] not in outer) for n in read):
        return None
    named = lambda value: fx.node.map_arg(value, lambda n: _Named(outer.get(n, n.name)))  # noqa: E731
    first = next(iter(reversed(outer.values())))
    dtypes = tuple((n.name, n.target, (_Named(outer.get(n.args[0], first)), *n.args[1:]), {}, n.meta) for n in read)
    return (*dtypes, *((n.name, n.target, named(n.args), named(n.kwargs), n.meta) for n in inner))


class _Named(str):
    """The name of a node in arguments of which others are plain text."""


def unfuse(edit):
    """Take the fused nodes of a graph apart into what they stand for."""
    graph = edit.graph
    for node in [node for node in graph.nodes if "together" in node.meta]:
        _asunder(graph, node)
    for node in [node for node in graph.nodes if "in turn" in node.meta]:
        _one_by_one(graph, node)
    fused = [node for node in graph.nodes if node.meta.get("apart")]
    for node in fused:
        views = [node.args[i] for i in node.meta["turned"]]
        env = {f"%{i}": arg.args[0] if i in node.meta["turned"] else arg for i, arg in enumerate(node.args)}
        read = lambda value: pytree.tree_map(lambda leaf: env[leaf] if isinstance(leaf, _Named) else leaf, value)  # noqa: B023, E731
        with graph.fx.inserting_before(node):
            for name, target, args, kwargs, meta in node.meta["apart"]:
                made = env[name] = graph.fx.create_node("call_function", target, tuple(read(args)), dict(read(kwargs)), name)
                made.meta = dict(meta)
                if made.all_input_nodes and all(a.op != "get_attr" for a in made.all_input_nodes):
                    max(made.all_input_nodes).append(made)  # an activation stands where its value is, not where the product of it is
        node.replace_all_uses_with(made)
        graph.fx.erase_node(node)
        for turned in views:
            graph.fx.erase_node(turned)
    if fused:
        edit.by_name = {node.name: node for node in graph.nodes}
        edit.restructured = True


def _together(graph, together):
    """Ops of one module that read one value become one op, where the first of them stands: what the others read must be there by then. {node: the op that has it now}."""
    alike, joined = {}, {}
    for node in graph.nodes:
        if "fused" in node.meta and hasattr(node.target, "made_by") and together([node.target.made_by]) is not None:
            path = node.meta.get("site", node.meta.get("path", "")).rpartition(".")[0]
            alike.setdefault((node.args[: _shared(node.target)], path, node.meta.get(REGION)), []).append(node)
    for (given, *_), nodes in alike.items():
        first = nodes[0]
        nodes = [n for n in nodes if all(a.op == "get_attr" or a < first for a in n.all_input_nodes)]
        op = together([n.target.made_by for n in nodes]) if len(nodes) > 1 else None
        if op is None:
            continue
        for read in dict.fromkeys(a for n in nodes[1:] for a in n.all_input_nodes if not a < first):
            first.prepend(read)  # a tensor of the model may be read anywhere
        with graph.fx.inserting_before(first):
            made = graph.fx.call_function(op.overload, (*given, *(a for n in nodes for a in n.args[len(given) :])))
            made.meta = {**first.meta, "fused": tuple(name for n in nodes for name in n.meta["fused"]), "val": tuple(n.meta["val"] for n in nodes), "apart": None}
            made.meta["together"] = tuple((n.target, len(n.args) - len(given), n.meta) for n in nodes)
            for i, node in enumerate(nodes):
                part = graph.fx.call_function(operator.getitem, (made, i))
                part.meta = {**node.meta, "fused": (), "apart": None}
                node.replace_all_uses_with(part)
        joined |= dict.fromkeys(nodes, op.name)
        for node in nodes:
            graph.fx.erase_node(node)
    return joined


def _shared(target):
    """How many arguments, from the first on, ops have in common that become one."""
    return getattr(target.made_by, "shared", 1)


def _asunder(graph, node):
    """What `_together` has put together, each by itself again."""
    common = _shared(node.meta["together"][0][0])
    given, rest = node.args[:common], node.args[common:]
    parts = {part.args[1]: part for part in node.users}
    for i, (target, width, meta) in enumerate(node.meta["together"]):
        own, rest = rest[:width], rest[width:]
        if i in parts:
            with graph.fx.inserting_before(min(parts[i].users, default=parts[i])):  # where it is read, as before
                alone = graph.fx.call_function(target, (*given, *own))
            alone.meta = dict(meta)
            parts[i].replace_all_uses_with(alone)
            graph.fx.erase_node(parts[i])
    graph.fx.erase_node(node)


def _in_turn(graph, in_turn):
    """Ops that add to one value, one after the other, become one op, where the last of them stands."""
    made_by = lambda chain: in_turn([node.target.made_by for node in chain])  # noqa: E731
    for node in [node for node in graph.nodes if "fused" in node.meta and hasattr(node.target, "made_by")]:
        chain, following = [node], node
        while len(following.users) == 1 and made_by(chain) is not None:
            following = next(iter(following.users))
            adds = "fused" in following.meta and hasattr(following.target, "made_by") and following.args[:2] == (chain[-1], node.args[1])
            if not adds or made_by([*chain, following]) is None:
                break
            chain.append(following)
        op = made_by(chain) if len(chain) > 1 else None
        if op is None:
            continue
        last = chain[-1]
        with graph.fx.inserting_before(last):
            made = graph.fx.call_function(op.overload, (*node.args[:2], *(a for n in chain for a in n.args[2:])))
        made.meta = {**last.meta, "fused": tuple(name for n in chain for name in n.meta["fused"]), "apart": None, "in turn": tuple((n.target, len(n.args) - 2, n.meta) for n in chain)}
        last.replace_all_uses_with(made)
        for old in reversed(chain):
            graph.fx.erase_node(old)


def _one_by_one(graph, node):
    """What `_in_turn` has put together, one after the other again."""
    value, read, *rest = node.args
    with graph.fx.inserting_before(node):
        for target, width, meta in node.meta["in turn"]:
            value = graph.fx.call_function(target, (value, read, *rest[:width]))
            value.meta, rest = dict(meta), rest[width:]
    node.replace_all_uses_with(value)
    graph.fx.erase_node(node)


def _left(graph, reasons, signs):
    """(site, reason) for each addition of a pass that stays as it is, and for each node that says that an op of `signs` might stand there: target → reasons."""
    left = {}
    for node in graph.nodes:
        if "site" in node.meta and "fused" not in node.meta:
            key = f"{node.meta['site']} + {node.meta['made']}"
            if node in reasons or key not in left:
                left[key] = reasons.get(node, "no op stands for what was added there")
        elif node.target in signs and "made" not in node.meta:
            left.setdefault(f"{node.meta.get('path', '')}: {node.target.overloadpacket.__name__}", _why(node, signs[node.target]))
    return list(left.items())


def _why(sign, reasons):
    """The reason at the node that ends what begins with a sign: the first one behind it that has any."""
    seen, ahead = {sign}, [sign]
    for node in ahead:
        if node in reasons:
            return reasons[node]
        fresh = [user for user in node.users if user not in seen and user.meta.get("path", "").startswith(sign.meta.get("path", "").rpartition(".")[0])]
        seen.update(fresh)
        ahead += fresh
    return "no op stands for what is done there"
