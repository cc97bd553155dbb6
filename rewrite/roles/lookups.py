"""What an embedding is a table of: tokens, positions, relative positions, or something that is added to the tokens' vectors."""

from ..graph import attribute
from .dataflow import tensors, value


def find_lookups(flow, defaults, relative):
    """Lookup → role. `defaults`: placeholder → what leaving that input out means; `relative`: the lookups that are added to scores."""
    roles = {op: _role(flow, defaults, affine.x) for op, affine in flow.embeddings.items() if op not in relative}
    _keep_one_per_sum(flow, roles)
    return roles | dict.fromkeys(relative, "embed.relative")


def _keep_one_per_sum(flow, roles):
    """Of several tables that are looked up by inputs and added up, the largest is the tokens'."""
    sums = {}
    for op, role in roles.items():
        if role == "embed":
            sums.setdefault(_sum(flow, op), []).append(op)
    for ops in sums.values():
        tokens = max(ops, key=lambda op: value(flow.embeddings[op].w).shape[0])
        roles.update({op: "embed.added" for op in ops if op is not tokens})


def _sum(flow, node):
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not (flow.is_view(user) or flow.name[user] in ("add", "add_", "mul", "div")):
            break
        node = user
    return node


def _role(flow, defaults, ids):
    """Ids of an input are tokens, ids that are counted are positions, constant ones belong to a table added to the tokens'."""
    if _is_constant(flow, ids):
        return "embed.added"
    default = defaults.get(flow.strip(ids))
    if default is not None:
        return {"positions": "embed.position", "zeros": "embed.added"}.get(default, "embed")
    if ids not in flow.content:
        return "embed.position"
    queue, seen = [ids], {ids}
    for node in queue:
        if flow.name[node] in ("cumsum", "sub", "arange") or defaults.get(node) == "positions":
            return "embed.position"
        fresh = [n for n in tensors(node) if n not in seen]
        seen.update(fresh)
        queue += fresh
    return "embed"


def _is_constant(flow, ids):
    while ids.op != "get_attr":
        if flow.name[ids] in ("zeros", "zeros_like", "ones", "full", "new_zeros"):
            return True
        parents = tensors(ids)
        if not parents or not (flow.is_view(ids) or flow.name[ids] in ("gather", "index")):
            return False
        ids = parents[0]  # whatever is picked from a constant table is that constant
    tensor = attribute(flow.graph.root, ids.target)
    return tensor.device.type != "meta" and tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())
