"""Tokens in front of the model's own, and what follows them.

    y = embedding(w, ids)   -->   y = [prompt; embedding(w, ids)]

Every input that is as long as the ids is lengthened at the top of the graph, so that the model's own code sees a longer text: a mask by ones,
positions by those in front, token types by zeros, labels by what a loss ignores. What comes out is cut again. A graph behind a cache or behind
an encoder finds the tokens there already: only its masks and positions are lengthened. A decoder's first call, with an empty cache, is a graph
of its own ("first").

In a batch of several adapters each row has its own number of tokens in front, none at all where its adapter has no prompt. All rows get as many
places, and what is too many is padding that the mask hides: on the left where the model is told its positions, as decoders are; else on the
right, behind the row's own tokens, so that a model that counts for itself, or looks at its first token, finds what it would find alone.
"""

import sympy
import torch

from .. import graph as g
from ..errors import Refused
from .lengthen import paste

CACHE = "past_key_values"
_SLICE, _END = torch.ops.aten.slice.Tensor, 9223372036854775807
IGNORED = -100


def split(graph):
    """Give a decoder's first call, behind an empty cache, a graph of its own."""
    past = graph.variants.get("past")
    if past is None or "first" in graph.variants:
        return
    graph.variants["first"] = past.twin(graph.root, name="first")
    signature = graph.signature.parted("past", "first")
    for part in graph.all():
        if part.owner == graph.owner:
            part.signature = signature


def insert(edit, site, paths):
    """The output of an embedding with the tokens of a pass in front, and every input of the graph as much longer."""
    graph, place = edit.graph, f"{edit.kind} at {site.path}"
    if graph.name == "past" and "first" in edit.graphs[0].variants:
        return  # `follow` sees to it
    if graph.front:
        raise Refused(f'{place}: tokens stand in front of the model\'s own already. One prompt is put in front of one embedding; narrow "where" to it, or give one prompt the length of both.')
    current, new, own = edit.make(site, "output", paths)
    symbol, places = _growth(current, new, place)
    if any(n.op != "get_attr" and n not in own and n is not current and n not in edit.choosing for node in own for n in node.all_input_nodes):
        raise Refused(f"{place}: what stands in front may be made of new tensors and the embeddings alone.")
    tokens, first = current.meta["val"], set(graph.nodes)
    edit.memo["behind", edit.step.place] = behind = _pads_behind(edit, place)
    plain = _turned(edit, current, places, -1, site.path, place) if behind else current
    turns, before = set(graph.nodes) - first, list(graph.nodes)
    _lengthen(edit, site, symbol, places, place)
    with graph.fx.inserting_after(plain):
        kept = graph.fx.call_function(_SLICE, (plain, 1, places, _END))
    kept.meta = {**new.meta, "val": tokens, "front": places}
    edit.by_name[kept.name] = kept
    for node in own:
        node.replace_input_with(current, kept)
    new = _turned(edit, new, places, 1, site.path, place) if behind else new
    edit._replace(site, "y", current, new, own | turns | {kept})
    for node in before:
        if node not in own and node.op not in ("placeholder", "get_attr"):
            node.meta["val"] = _resized(node.meta.get("val"), {symbol: symbol + places}, edit.fake_mode)
    if not graph.owner and not getattr(graph.signature, "encoder", None):  # what an encoder gives is for its decoder, which reads the prompt too
        _cut(edit, site, symbol, places, place)
    graph.checks = tuple(g.Check(check.condition.xreplace({symbol: symbol + places}), check.where) for check in graph.checks)
    graph.front, edit.front = places, kept


def stands_in_front(edit, site):
    """Does a site read the tokens that its step has put in front, in this graph? Behind a cache, which holds them, it does not. Refused where it never does."""
    x = edit.handle(site, "x")
    if edit.front is not None and x is not None and g.shape(x)[1:2] == (g.shape(edit.front)[1] + edit.graph.front,):
        return True
    if edit.main or edit.graph.is_inner:
        raise Refused(
            f"{edit.step.place}: {edit.kind} at {site.name}: no tokens of the pass stand in front of what it reads. "
            'Let "where" name the embedding that they come through too, and the sites behind it alone, for example {"role": ["embed", "block"], "path": "encoder.**"}.'
        )
    return False


def _pads_behind(edit, place):
    """Does padding for rows with fewer tokens in front stand behind their own? Refused where it can stand nowhere."""
    if edit.lengths is None:
        return False
    graph = edit.graph
    told = {_kinds(graph).get(name) for name, node in zip(graph.inputs, graph.placeholders) if node.users}
    caches = any(part.name == "past" for part in edit.graphs) and not graph.owner and not getattr(graph.signature, "encoder", None)
    if "ones" not in told or (caches and "positions" not in told):
        lacks = "an attention mask" if "ones" not in told else "positions"
        raise Refused(
            f"{place}: in a batch rows with fewer tokens in front are padded, which a model must be told by {lacks}, and this one takes none.\n"
            "Write the prompt before the batch, for all rows, or give the adapters another method (prefix_tuning)."
        )
    return "positions" not in told


def _turn(value, lengths, places, step):
    """Each row turned so that what is in front of its first token comes behind its last (`step` 1), or back (-1)."""
    length = value.shape[1]
    at = (torch.arange(length, device=value.device) + step * (places - lengths.unsqueeze(1))).remainder(length)
    return value.gather(1, at.view(*at.shape, *[1] * (value.dim() - 2)).expand_as(value))


def _turned(edit, node, places, step, path, place):
    """The node of a value with its rows turned."""
    return paste(edit, max(node, edit.lengths), ("turned", places, step), lambda value, lengths: _turn(value, lengths, places, step), [node, edit.lengths], ("", path), place)


def _growth(current, new, place):
    """(the symbol of the tokens' length, how many are put in front)."""
    before, after = g.shape(current), g.shape(new)
    if len(before) != 3 or not getattr(before[1], "is_Symbol", False):
        raise Refused(f"{place}: its output is {before}; tokens are put in front of (batch, length, features) of any length.")
    places = after[1] - before[1] if len(after) == 3 else 0
    if (after[0], after[2]) != (before[0], before[2]) or not getattr(places, "is_Integer", False) or places <= 0:
        raise Refused(f"{place}: output() gives {after} for {before}; it must put tokens in front.")
    return before[1], int(places)


def _lengthen(edit, site, symbol, places, place):
    graph, kinds = edit.graph, _kinds(edit.graph)
    ids = _root(site.handles["ids"], place)
    for name, node in zip(graph.inputs, graph.placeholders):
        axes = [axis for axis, size in enumerate(g.shape(node)) if not isinstance(size, int) and symbol in size.free_symbols]
        users = list(node.users)
        if not axes or not users:
            continue
        kind = "ids" if node is ids else kinds.get(name)
        if axes != [1] or node.meta["val"].dim() != 2 or kind is None:
            raise Refused(f"{place}: the input {name!r} is as long as the tokens, and it is not known what it says of tokens put in front.")
        fill = {"ones": 1, "label": IGNORED, "ids": _plain_id(graph)}.get(kind, 0)
        beyond = {"ones": 0, "ids": getattr(getattr(graph.root, "config", None), "pad_token_id", None)}.get(kind)
        _use(edit, site.path, node, users, _positions(places) if kind == "positions" else _filled(places, fill, beyond), (kind, places, fill), place)


def _root(ids, place):
    while ids.op != "placeholder":
        if not ids.all_input_nodes:
            raise Refused(f"{place}: its ids come from no input.")
        ids = ids.all_input_nodes[0]
    return ids


def _filled(places, fill, beyond=None):
    """Places in front, of `fill`; in a batch, of `beyond` (None: the same) where a row has no tokens there."""

    def run(value, lengths=None):
        front = value.new_full((value.shape[0], places), fill)
        if lengths is not None and beyond is not None:
            front = torch.where(_counted(lengths, places) >= 0, front, beyond)
        return torch.cat([front, value], 1)

    return run


def _positions(places):
    def run(value, lengths=None):
        if lengths is None:
            return torch.cat([torch.arange(places, device=value.device).to(value.dtype).expand(value.shape[0], -1), value + places], 1)
        return torch.cat([_counted(lengths, places).clamp(min=0).to(value.dtype), value + lengths.unsqueeze(1).to(value.dtype)], 1)

    return run


def _behind_rows(function, places):
    return lambda value, lengths: _turn(function(value, lengths), lengths, places, 1)


def _counted(lengths, places):
    """The places in front of each row, counted from its own first one: those before it are below zero."""
    return torch.arange(places, device=lengths.device) + lengths.unsqueeze(1) - places


def _use(edit, path, node, users, function, what, place):
    """Let the users of an input read what a function makes of it, and of how many tokens stand in front of each row."""
    inputs, behind = [node] if edit.lengths is None else [node, edit.lengths], edit.memo.get(("behind", edit.step.place))
    if behind:
        function = _behind_rows(function, what[1])
    new = paste(edit, inputs[-1], ("input", node.name, what), function, inputs, ("", path), place)
    node.meta["live"] = new.name
    for user in users:
        user.replace_input_with(node, new)


def _plain_id(graph):
    """An id that says nothing of its own: neither padding, nor begin, nor end."""
    config = getattr(graph.root, "config", None)
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls", "mask")]
    special = {i for entry in special for i in (entry if isinstance(entry, (list, tuple)) else [entry])}
    return next(number for number in range(len(special) + 1) if number not in special)


def _kinds(graph):
    """Name of an input → what leaving it out means, as the signature has it."""
    entry = getattr(graph.signature, "entries", {}).get(graph.name)
    return {slot.name: slot.default for slot in entry.slots if not slot.path} if entry is not None else {}


def _cut(edit, site, symbol, places, place):
    """What comes out as long as the tokens, without those in front; a cache keeps them."""
    graph, output = edit.graph, edit.graph.fx.output_node()
    [returned], found = output.args, []
    for name, out in zip(graph.outputs, returned):
        value = out.meta.get("val") if isinstance(out, torch.fx.Node) else None
        axes = [axis for axis, size in enumerate(g.shape(out)) if not isinstance(size, int) and symbol in size.free_symbols] if isinstance(value, torch.Tensor) else []
        if axes and not name.startswith(CACHE):
            if axes != [1] or g.shape(out)[1] != symbol + places:
                raise Refused(f"{place}: the output {name!r} is {g.shape(out)}, and it is not known where in it the tokens put in front are.")
            if edit.memo["behind", edit.step.place]:
                out = _turned(edit, out, places, -1, site.path, place)
            with graph.fx.inserting_before(output):
                cut = graph.fx.call_function(_SLICE, (out, 1, places, _END))
            cut.meta = {"path": "", "made": edit.kind, "role": f"made.{edit.kind}", "site": site.path, "cut": places}
            cut.meta["val"] = _resized(value, {symbol: symbol - places}, edit.fake_mode)
            edit.by_name[cut.name] = cut
            out = cut
        found.append(out)
    output.args = (tuple(found),)


def follow(edits):
    """The other calls of a model whose tokens have become longer: those behind its cache or its encoder. Then every call's signature."""
    main, places = edits[0].graph, max(edit.graph.front for edit in edits)
    for edit in edits:
        graph = edit.graph
        if graph.front or graph.is_inner:
            continue
        state = f"{CACHE}." if graph.name == "past" else "encoder_outputs."
        axis = 2 if graph.name == "past" else 1
        node = next((node for name, node in zip(graph.inputs, graph.placeholders) if name.startswith(state)), None)
        if node is not None:
            _behind(edit, g.shape(node)[axis], places)
            graph.front = places
    graphs = {graph.name: graph for graph in main.all()}
    for owner in {graph.owner for graph in main.all()}:
        parts = [graph for graph in main.all() if graph.owner == owner]
        if hasattr(parts[0].signature, "lengthened"):
            signature = parts[0].signature.lengthened(graphs, _cut_names(parts[0]))
            for part in parts:
                part.signature = signature


def _cut_names(graph):
    [returned] = graph.fx.output_node().args
    return tuple(name for name, out in zip(graph.outputs, returned) if isinstance(out, torch.fx.Node) and "cut" in out.meta)


def _behind(edit, length, places):
    """A graph whose cache or encoder's outputs, `length` long, hold the tokens in front: the caller's masks and positions do not."""
    graph, place = edit.graph, f"{edit.kind}: the graph {edit.graph.name!r}"
    values = _hints(edit.fake_mode)
    values[length] = values[length] + places  # the size at which torch tries things out: a cache that holds the tokens in front is longer than they are
    for name, node in zip(graph.inputs, graph.placeholders):
        kind, users = _kinds(graph).get(name), list(node.users)
        if name.startswith((f"{CACHE}.", "encoder_outputs.")) or kind not in ("ones", "positions") or not users:
            continue
        if kind == "positions" and graph.name == "past":
            _use(edit, "", node, users, lambda value, lengths=None: value + (places if lengths is None else lengths.unsqueeze(1).to(value.dtype)), ("behind", places), place)
        elif kind == "ones" and any(not isinstance(size, int) and length in size.free_symbols for size in g.shape(node)):
            before = set(graph.nodes) - {node}
            _use(edit, "", node, users, _filled(places, 1, 0), ("ones", places), place)
            for made in graph.nodes:
                if made not in before:
                    made.meta["val"] = _resized(made.meta.get("val"), {length: length - places}, edit.fake_mode)
    graph.checks = (*graph.checks, g.Check(sympy.Ge(length, places), ""))


def whole(graph):
    """A copy of a graph that gives what the tokens in front give too, for a loss that is made of it; None where nothing was cut."""
    [returned] = graph.fx.output_node().args
    if not _cut_names(graph) or getattr(graph.signature, "loss", None) is None:
        return None
    twin = graph.twin(graph.root, name="whole")
    output = twin.fx.output_node()
    [returned] = output.args
    output.args = (tuple(out.args[0] if isinstance(out, torch.fx.Node) and "cut" in out.meta else out for out in returned),)
    for node in returned:
        if isinstance(node, torch.fx.Node) and "cut" in node.meta and not node.users:
            twin.fx.erase_node(node)
    return twin


def _resized(value, changes, mode):
    """A fake value at other sizes: each symbol replaced."""
    if isinstance(value, (list, tuple)):
        return type(value)(_resized(v, changes, mode) for v in value)
    if isinstance(value, torch.SymInt):
        return _size(value.node.expr.xreplace(changes), mode)
    if not isinstance(value, torch.Tensor):
        return value
    shape = [g.expression(size) for size in value.shape]
    strides = [g.expression(size) for size in value.stride()]
    if not any(isinstance(size, sympy.Basic) and size.free_symbols & changes.keys() for size in (*shape, *strides)):
        return value
    change = lambda size: _size(size.xreplace(changes), mode) if isinstance(size, sympy.Basic) else size  # noqa: E731
    with mode:
        return torch.empty_strided([change(size) for size in shape], [change(size) for size in strides], dtype=value.dtype, device=value.device)


def _size(expr, mode):
    return mode.shape_env.create_symintnode(expr, hint=int(expr.xreplace(_hints(mode))))


def _hints(mode):
    """Symbol → the size at which it was traced."""
    values = getattr(mode.shape_env, "backed_var_to_val", None)
    return mode.shape_env.var_to_val if values is None else values
