"""Attention: `scaled_dot_product_attention`, or written out as softmax(q kᵀ [scale, mask, bias]) v, with its q, k, v and o projections.

From the op that cannot be mistaken back to the affine ops that made q, k and v, and forward to the one that reads the result.
"""

from dataclasses import dataclass, field

from torch import fx

from ..graph import shape
from .affine import rows_in
from .dataflow import ATTENTIONS, PRODUCTS, op_name, value

# what may happen to probabilities before they meet the values
_KEEPING = frozenset({"mul", "mul_", "add", "div", "masked_fill", "masked_fill_", "where", "nan_to_num"})
# between keys as they are cached and keys that a product reads
_CARRIES = frozenset({"expand", "repeat_interleave", "reshape", "view", "_unsafe_view", "clone", "contiguous", "transpose", "permute", "to", "mul"})


@dataclass(eq=False)
class Attention:
    """`parts`: "q" "k" "v" → list of (affine op, rows); `o`: the affine ops that read y.

    `downs`: op → ("q" or "kv", rows) for what projects down to a latent, `ups`: op → "q" or "kv" for what projects up from it, `ropes`: the
    ops of keys that no latent stands behind while others have one. `convs`: convolutions before a projection. `gates`: what scales y on its
    way to o, `beside`: ops of other heads, put beside y there. `scores`: the product q kᵀ where attention is written out, `logits` what its
    softmax reads.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    y: fx.Node
    parts: dict = field(default_factory=dict)
    o: list = field(default_factory=list)
    gates: list = field(default_factory=list)
    beside: list = field(default_factory=list)
    convs: list = field(default_factory=list)
    others: list = field(default_factory=list)
    positions: list = field(default_factory=list)
    downs: dict = field(default_factory=dict)
    ups: dict = field(default_factory=dict)
    ropes: set = field(default_factory=set)
    scores: fx.Node | None = None
    logits: fx.Node | None = None
    is_cross: bool = False


def find_attention(flow):
    """All attentions of a graph, in order."""
    found = []
    for node in flow.nodes:
        name = flow.name[node]
        if name in ATTENTIONS:
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            y = node if value(node) is not None else next((user for user in node.users if user.args[1:] == (0,)), node)
            found.append(Attention(*node.args[:3], mask if isinstance(mask, fx.Node) else None, y))
        elif flow.is_softmax(node):
            written = _written_out(flow, node)
            if written is not None:
                found.append(written)
    return found


def _written_out(flow, softmax):
    v_product = _reads_probabilities(flow, softmax)
    if v_product is None:
        return None
    product, v = v_product
    scores, others = _scores(flow, softmax.args[0])
    if scores is None:
        return None
    left, right = _operands(flow, scores)
    found = Attention(left, right, v, _mask(flow, softmax.args[0], scores), product)
    found.others, found.scores, found.logits = others, scores, softmax.args[0]
    return found


def _operands(flow, product):
    if flow.name[product] == "einsum":
        return product.args[1]
    return product.args[1:3] if flow.name[product] in ("baddbmm", "addbmm") else product.args[:2]


def _is_product(flow, node):
    """A product of two activations."""
    if flow.name[node] not in PRODUCTS or node in flow.affine:
        return False
    operands = _operands(flow, node)
    return len(operands) == 2 and all(operand in flow.content for operand in operands)


def _reads_probabilities(flow, softmax):
    """`(product, v)`: the product in which the probabilities, after dropout, casts, masks and slices, meet the values."""
    queue, seen = [(softmax, user) for user in softmax.users], {softmax}
    for parent, node in queue:
        if node in seen:
            continue
        seen.add(node)
        if _is_product(flow, node):
            a, b = _operands(flow, node)
            return node, (b if a is parent else a)
        if flow.is_view(node) or flow.name[node] in _KEEPING:
            queue += [(node, user) for user in node.users]
        if len(queue) > 64:
            return None
    return None


def _scores(flow, node):
    """`(q kᵀ, other products)` behind a softmax.

    q kᵀ is the nearest product of two values that depend on the inputs, else the nearest one; the others bring positions in.
    """
    queue, seen, products = [node], {node}, []
    for current in queue:
        if current in flow.affine or current in flow.stream or current.op != "call_function":
            continue
        parents = flow.parents(current)
        if _is_product(flow, current):
            products.append(current)
            parents = [n for n in parents if n not in _operands(flow, current)]
        queue += [n for n in parents if n not in seen]
        seen.update(parents)
    if not products:
        return None, []
    scores = next((p for p in products if all(operand in flow.live for operand in _operands(flow, p))), products[0])
    return scores, [p for p in products if p is not scores]


def _mask(flow, node, scores):
    """The operand that is added to the scores or decides where they are filled, nearest to the softmax."""
    for _ in range(16):
        if node is scores or not isinstance(node, fx.Node):
            return None
        name = flow.name[node]
        if name in ("add", "add_", "sub"):
            a, b = node.args[:2]
            if not isinstance(b, fx.Node):
                node = a
                continue
            for kept, other in ((a, b), (b, a)):
                if isinstance(other, fx.Node) and scores not in flow.cone(other, stop=(scores,))[1]:
                    return other
            return None
        if name in ("masked_fill", "masked_fill_"):
            return node.args[1]
        if name == "where":
            return node.args[0]
        parents = [n for n in node.all_input_nodes if n in flow.content]
        if len(parents) != 1:
            return None
        node = parents[0]
    return None


def key_heads(k):
    """How many heads of keys (a handle) differ: fewer than it has where each is repeated for several heads of queries."""
    heads, node = shape(k)[1], k
    while node.op == "call_function" and op_name(node) in _CARRIES:
        before, after = shape(node.args[0]), shape(node)
        if op_name(node) == "expand" and len(before) == len(after) == 5 and before[2] == 1 and isinstance(after[2], int):
            return heads // after[2]
        if op_name(node) == "repeat_interleave" and len(before) == 4 and before[1] != after[1] and isinstance(before[1], int):
            return before[1]
        node = node.args[0]
    return heads


def find_projections(flow, attentions):
    """Fill what an Attention says of its projections."""
    results, readers = {a.y for a in attentions}, {}
    for attention in attentions:
        for part in "qkv":
            inside, ops = flow.sources(getattr(attention, part), results)
            attention.parts[part] = [(op, rows_in(flow, op, inside)) for op in ops]
        direct = {op for claims in attention.parts.values() for op, _ in claims}
        attention.o = [op for op in flow.onward(attention.y, stop=results) if op not in direct]
        for o in attention.o:
            _find_gates(flow, attention, o, results)
        for product in attention.others:
            ops = {op for side in _operands(flow, product) for op in flow.sources(side, results)[1]}
            attention.positions += sorted(ops - direct, key=flow.place.__getitem__)
        _find_latents(flow, attention, results, readers)
        attention.is_cross = _is_cross(flow, attention)
    for attention in attentions:  # what several attentions read, or all of q, k and v, is no latent of one of them
        attention.downs = {op: names.popitem() for op, names in attention.downs.items() if len(names) == 1 and readers[op] == {attention}}
        attention.ups = {op: name for op, (name, ends) in attention.ups.items() if any(end in attention.downs for end in ends)}
        keys = {op for op, _ in attention.parts["k"]}
        attention.ropes = keys - attention.ups.keys() if keys & attention.ups.keys() else set()


def _find_latents(flow, attention, results, readers):
    """The affine ops behind those that make q, k and v, with the names under which they are read; `readers`: op → the attentions that do."""
    for part, name in (("q", "q"), ("k", "kv"), ("v", "kv")):
        for op, _ in attention.parts[part]:
            inside, ends = flow.sources(flow.affine[op].x, results)
            for end in ends:
                readers.setdefault(end, set()).add(attention)
                if flow.has_window(end):
                    attention.convs.append(end)
                else:
                    attention.downs.setdefault(end, {})[name] = rows_in(flow, end, inside)
            attention.ups[op] = name, ends


def _find_gates(flow, attention, o, results):
    """What joins y on its way to o: factors of it are gates, anything else belongs to heads beside it."""
    inside, ends = flow.sources(flow.affine[o].x, results)
    way, gates = {attention.y}, []
    for node in sorted(inside, key=flow.place.__getitem__):
        sides = [side for side in flow.parents(node) if side not in way]
        if len(sides) == len(flow.parents(node)):
            continue
        way.add(node)
        for side in sides if flow.name[node] in ("mul", "mul_") else ():
            between, ops = flow.sources(side, results)
            gates += [(op, rows_in(flow, op, between)) for op in ops]
    attention.gates += gates
    attention.beside += [end for end in ends if end not in {op for op, _ in gates}]


def find_biases(flow, attentions):
    """The lookups whose values are added to the scores of an attention: tables of relative positions."""
    scores = {attention.scores for attention in attentions}
    queue = [node for attention in attentions if (node := attention.logits or attention.mask) is not None]
    seen, found = set(queue), set()
    for node in queue:
        if node in flow.embeddings:
            found.add(node)
        if node in flow.embeddings or node in scores or node in flow.affine or node in flow.stream:
            continue
        fresh = [n for n in flow.reads[node] if n not in seen]
        seen.update(fresh)
        queue += fresh
    return found


def _is_cross(flow, attention):
    """Whether k and v come from another stream than q (or from a filled cache)."""
    if not attention.parts["k"] and not attention.parts["v"]:
        return bool(attention.parts["q"])
    q, k = (_origins(flow, [flow.affine[op].x for op, _ in attention.parts[p]]) for p in ("q", "k"))
    return bool(k) and not q & k


def _origins(flow, values):
    """The stream values (or inputs, embeddings) that some values are made of, affine ops crossed."""
    queue, seen, found = list(values), set(values), set()
    for current in queue:
        if current in flow.stream or current.op in ("placeholder", "get_attr") or current in flow.embeddings:
            found.add(current)
            continue
        for parent in flow.parents(current):
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)
    return found
