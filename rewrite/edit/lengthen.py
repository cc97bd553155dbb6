"""Keys and values with more places in front, and what grows with them.

    y = attention(q, k, v, mask)   -->   y = attention(q, [p_k; k], [p_v; v], [1; mask])

Every query sees the places in front: a mask of truth gets True there, one that is added gets 0 (so does a bias of relative positions), a causal
attention gets its mask written out. The places stand behind the model's own cache, which keeps the keys of tokens alone. In a batch of several
adapters the rows of others have places there too, and see none of them.
"""

import torch

from .. import graph as g
from ..errors import Refused
from ..roles.dataflow import PRODUCTS, op_name
from .body import Body, signature
from .region import body_of

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
# what acts on scores place by place: op → what another operand of theirs has at the places in front
_NEUTRAL = {"add": 0, "add_": 0, "sub": 0, "mul": 1, "mul_": 1, "div": 1, "div_": 1}
_ALONE = frozenset("""
    softmax _softmax _safe_softmax dropout native_dropout to _to_copy type_as float contiguous clone detach neg nan_to_num clamp clamp_min clamp_max tanh
""".split())  # fmt: skip
_MANY = 1009  # tokens to try with: no size of a model
_TELLING = frozenset({"masked_fill", "masked_fill_", "where"})  # whose other operands tell which places count


def in_front(prefix, of):
    """`prefix` (places, heads, dim), or one for each row, in front of keys or values `of` (batch, heads, length, dim): a head as often as `of` repeats it."""
    at = prefix.dim() - 3
    heads = prefix.transpose(at, at + 1).unsqueeze(at + 1).expand(*[-1] * (at + 1), of.shape[1] // prefix.shape[-2], -1, -1).flatten(at, at + 1)
    return torch.cat([heads.to(of.dtype).expand(of.shape[0], -1, -1, -1), of], -2)


class MadeOf:
    """The keys or values that a site would make of other tokens, standing where its block's input does, as a function that a body may call."""

    def __init__(self, region, is_turned):
        self.region, self.is_turned = region, is_turned
        self.reads, self.flagged = region.reads, region.flagged

    @property
    def static(self):
        return (*self.region.static, self.is_turned)

    def run(self, tokens, known, training=False):
        made = self.region.run(tokens, known, training)
        made = made.transpose(-1, -2) if self.is_turned else made
        if made.dim() != 4 or (made.shape[0], made.shape[-2]) != tokens.shape[:2]:
            raise ValueError(f"{tuple(tokens.shape)} tokens become {tuple(made.shape)}")
        return made


def made_of(edit, site, name):
    """The MadeOf of `key_of` or `value_of`, or None where no block's input makes them."""
    region = body_of(edit.outer(site, "block_x"), edit.handle(site, "k" if name == "key_of" else "v"))
    return region and MadeOf(region, name == "key_of" and "k" in site.layout.turned)


def not_made_of(edit, site, name):
    """Why a site's keys or values cannot be made of other tokens, or None."""
    made = made_of(edit, site, name)
    if made is None:
        return "there is no block around it whose input makes its keys and values"
    if set(made.reads) & set(edit.caches):
        return "its keys and values come out of a cache too, which holds those of tokens alone"
    if (why := made.region.reason()) is not None:
        return why
    x = made.region.start.meta["val"]
    with edit.fake_mode, torch.no_grad():
        tokens = torch.empty(1, _MANY, x.shape[-1], dtype=x.dtype, device=x.device)
        try:
            made.run(tokens, {n: n.meta["val"] for n in made.reads})
        except (RuntimeError, ValueError, TypeError, IndexError):
            return "its keys and values are made of where tokens stand too (turned by their positions), and a prompt stands nowhere"


def growth(site, target, current, new):
    """By how many places a new value of keys or values is longer than the current one; 0 where it is not, or is something else besides."""
    values = current.meta["val"], new.meta["val"]
    if target not in ("k", "v") or not all(isinstance(v, torch.Tensor) for v in values) or values[0].dtype != values[1].dtype:
        return 0
    before, after = g.shape(current), g.shape(new)
    axis = len(before) - (1 if target in site.layout.turned else 2)
    if len(before) != len(after) or axis < 0 or any(a != b for i, (a, b) in enumerate(zip(before, after)) if i != axis):
        return 0
    places = after[axis] - before[axis]
    return int(places) if getattr(places, "is_number", True) and places > 0 else 0


def lengthen(edit, site, longer):
    """Let all that meets a site's scores have as many more places in front as its keys and values; `longer`: noun → number of places."""
    place = f"{edit.kind} at {site.path}"
    places, others = longer.get("key", 0), longer.get("value", 0)
    if places != others:
        raise Refused(f"{place}: the keys become {places} places longer and the values {others}; it must be as many.")
    if site.node.target is _SDPA:
        _kernel(edit, site, places, place)
    else:
        _written_out(edit, site, places, place)


def _kernel(edit, site, places, place):
    node, defaults = site.node, (None, 0.0, False)
    args, kwargs = [*node.args, *defaults[len(node.args) - 3 :]], dict(node.kwargs)
    for at, name in ((3, "attn_mask"), (4, "dropout_p"), (5, "is_causal")):
        args[at] = kwargs.pop(name, args[at])
    if not isinstance(args[5], bool):
        raise Refused(f"{place}: whether it is causal is known only in the call, so its mask cannot be made longer.")
    if args[5]:
        args[3:6] = paste(edit, node.prev, ("causal", places), lambda q, k: _visible(q, k, places), args[:2], (site.owner, site.path), place), args[4], False
    elif args[3] is not None:
        fill = args[3].meta["val"].dtype is torch.bool
        args[3] = _longer(edit, site, args[3], g.shape(args[1])[-2] - places, places, fill, place)
    if edit.seeing is not None:
        args[3] = _hidden(edit, site, args[3], args[1], places, place)
    while len(args) > 3 and args[-1] == defaults[len(args) - 4]:
        args.pop()
    node.args, node.kwargs = tuple(args), kwargs
    if len(args) > 3 and args[3] is not None:
        site.node.meta["handles"] = {**site.node.meta.get("handles", {}), (site.role, "mask"): args[3].name}


def _visible(q, k, places):
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(places)


def _hidden(edit, site, mask, keys, places, place):
    """A mask that hides the places in front from the rows that are not to see them; `mask` None: they see all else."""
    if mask is None:
        return paste(edit, site.node.prev, ("hidden", places), lambda k, rows: _seen(rows, k.shape[-2], places), [keys, edit.seeing], (site.owner, site.path), place)
    inputs = [mask, edit.seeing] if g.shape(mask)[-1] != 1 else [mask, edit.seeing, keys]

    def run(mask, rows, keys=None):
        seen = _seen(rows, mask.shape[-1] if keys is None else keys.shape[-2], places)
        return mask & seen if mask.dtype is torch.bool else torch.where(seen, mask, float("-inf"))

    after = mask if len(inputs) == 2 else site.node.prev
    return paste(edit, after, ("hidden", places), run, inputs, (g.path_of(mask), site.path), place)


def _seen(rows, length, places):
    """Which of `length` places each row of a batch sees, as a mask: `rows` says whether the first `places` are among them."""
    return (rows.unsqueeze(1) | (torch.arange(length, device=rows.device) >= places)).unsqueeze(1).unsqueeze(1)


def _written_out(edit, site, places, place):
    """From the products with the keys to the one with the values: each op as it is, its other operands longer."""
    keys, end = edit.handle(site, "k"), edit.handle(site, "y")
    length = g.shape(keys)[-1] - places

    def longer(value, fill):
        if value in wide or not isinstance(value, torch.fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            return value
        return _longer(edit, site, value, length, places, fill, place)

    wide, hides = {}, edit.seeing is None  # wide: in the order of the graph
    for node in list(edit.graph.nodes):
        touched = [n for n in node.all_input_nodes if n in wide or n is keys]
        if not touched or node is end or node.op != "call_function":
            continue
        name = op_name(node)
        if not isinstance(node.meta.get("val"), torch.Tensor):
            if name == "sym_size" and node.args[1] % len(g.shape(node.args[0])) == len(g.shape(node.args[0])) - 1:
                raise Refused(f"{place}: the model counts how many places its scores have, which the new ones would be among.")
            continue
        if keys in touched:
            if name not in PRODUCTS - {"einsum"} or keys is not node.args[2 if "add" in name else 1]:
                raise Refused(f"{place}: its keys are read by {name}, of which it is not known how it grows with them.")
            if "add" in name:
                node.args = (longer(node.args[0], 0), *node.args[1:])
        elif name in _NEUTRAL:
            node.args = (*(longer(a, _NEUTRAL[name]) for a in node.args[:2]), *node.args[2:])
        elif name in _TELLING:
            kept = name == "where" and node.args[1] in wide
            node.args = (*(longer(a, kept and a is node.args[0]) for a in node.args),)
        elif name not in _ALONE or ("softmax" in name and node.args[1] % len(g.shape(node)) != len(g.shape(node)) - 1):
            raise Refused(f"{place}: between its scores and its values stands {name}, of which it is not known how it grows with the keys.")
        elif "softmax" in name and edit.seeing is not None:
            scores, hides = node.args[0], True
            if len(g.shape(scores)) != 4 or edit.rows(scores) != "rows":
                raise Refused(f"{place}: its scores are {g.shape(scores)}, whose rows are not those of the batch.")
            run = lambda scores, rows, keys: scores.masked_fill(~_seen(rows, keys.shape[-1], places), float("-inf"))  # noqa: E731
            node.args = (paste(edit, scores, ("hidden", places), run, [scores, edit.seeing, keys], (site.owner, site.path), place), *node.args[1:])
        wide[node] = None
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        with edit.fake_mode, torch.no_grad():
            node.meta["val"] = node.target(*args, **kwargs)
    if not hides:
        raise Refused(f"{place}: no softmax stands between its scores and its values, before which rows could be kept from seeing what is in front.")


def _longer(edit, site, value, length, places, fill, place):
    """A mask or bias with places of `fill` in front of its last axis; as it is where all `length` keys share one entry."""
    sizes = g.shape(value)
    if not sizes or (sizes[-1] == 1 and length != 1):
        return value
    run = lambda mask: torch.cat([mask.new_full((*mask.shape[:-1], places), fill), mask], -1)  # noqa: E731
    return paste(edit, value, ("longer", fill, places), run, [value], (g.path_of(value), site.path), place)


def paste(edit, after, what, function, inputs, paths, place):
    """The node of `function(*inputs)`, made right after a node, once for all that ask for it; `paths`: of its module, of its site."""
    made = (what, *inputs)
    if made not in edit.grown:
        values = [n.meta["val"] for n in inputs]
        key = (what, edit.fake_mode, *map(signature, values))
        if key not in edit.memo:
            with edit.fake_mode:
                fresh = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in values]
            edit.memo[key] = Body(lambda *v, training: function(*v), fresh, edit.fake_mode, training=False, marker=edit.marker, place=place)
        before = edit.top if after.op in ("placeholder", "get_attr") else after.next
        with edit.graph.fx.inserting_before(before):
            new, own = edit.memo[key].paste(edit.graph.fx, inputs, None, {"path": paths[0], "made": edit.kind, "role": f"made.{edit.kind}", "site": paths[1]})
        edit.by_name.update((n.name, n) for n in own)
        edit.grown[made] = new
    return edit.grown[made]
