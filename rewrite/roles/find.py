"""What each part of a graph is for, by dataflow alone: no names of modules, no knowledge of models.

Affine ops on weights, norms and attention cannot be mistaken; residual adds are found by reachability; everything else follows
from what lies between them (attention.py, branches.py). What is not recognised is still a "linear".
"""

from dataclasses import replace
from fractions import Fraction

from torch import nn

from ..graph import Graph, attribute, path_of, shape
from .affine import find_affine, union
from .attention import find_attention, find_biases, find_projections
from .branches import Mlp, branches, find_residuals, find_routed, find_routers, is_shared, mixer_part, read_branch, region
from .dataflow import Flow, is_float, value
from .lookups import find_lookups
from .norms import find_norms
from .site import Layout, Roles, Rows, Site

__all__ = ["Layout", "Roles", "Rows", "Site", "everywhere", "roles"]

_FUSED = {"qkv": {"q", "k", "v"}, "kv": {"k", "v"}, "gate_up": {"gate", "up"}}


def roles(model_or_graph, example=None):
    """The sites of a graph, or of a model (which is captured first, `example` as for capture)."""
    if isinstance(model_or_graph, Graph):
        graph = model_or_graph
    else:
        from ..capture.model import capture

        graph = capture(model_or_graph, example)
    survey = _Survey(graph)
    sites = survey.sites()
    return Roles(_inner(sites, graph.part) if graph.is_inner else sites, survey.positions(sites))


def everywhere(graph):
    """The sites of a graph, and those of the leaf modules inside its opaque ones."""
    main = roles(graph)
    return Roles((*main, *(site for part in graph.variants.values() if part.is_inner for site in roles(part))), main.positions)


def _inner(sites, part):
    """The sites of a leaf module that was captured on its own: what it gives is not what the model gives, but it may be a mixer's."""
    kept = []
    for site in sites:
        if site.role in ("logits", "model"):
            continue
        if site.layout.kind in ("linear", "conv"):
            roles = ("conv",) if site.layout.kind == "conv" else ("linear",)
            is_window = site.layout.kind == "conv" and any(size != 1 for size in shape(site.handles["w"])[2:])
            roles = (f"mixer.{'conv' if is_window else part}", *roles) if part else roles
            site = replace(site, role=roles[0], roles=roles)
        kept.append(site)
    return kept


class _Survey:
    """One reading of a graph: the parts are found in the order in which each needs the ones before."""

    def __init__(self, graph):
        self.graph, self.flow = graph, Flow(graph)
        flow = self.flow
        find_affine(flow)
        self.norms = find_norms(flow)
        self.residuals = find_residuals(flow)
        self.attentions = find_attention(flow)
        find_projections(flow, self.attentions)
        self.biases = find_biases(flow, self.attentions)
        self.routers = find_routers(flow)
        self.routed = find_routed(flow, self.routers)
        self.defaults = _defaults(graph)
        siblings = {}
        for block in graph.blocks or graph.around:
            siblings.setdefault(block.rpartition(".")[0], []).append(block)
        self._blocks = {block: number for blocks in siblings.values() for number, block in enumerate(blocks)}
        self._depths = {block: Fraction(2 * number + 1, 2 * len(blocks)) for blocks in siblings.values() for number, block in enumerate(blocks)}
        self._inside = {}
        self.claims = {}  # affine op → {role: rows}
        self.ups = {op for attention in self.attentions for op, name in attention.ups.items() if name == "kv"}
        self.regions = []  # (role, x, y, affine ops)
        self._claim_attention()
        self._claim_branches()
        self.heads = self._heads()

    def _claim(self, op, role, rows=None):
        """One more role of an op, on some of its rows; the rows of one role are put together."""
        claims = self.claims.setdefault(op, {})
        claims[role] = union([claims[role], rows], value(op).shape[self.flow.affine[op].axis]) if role in claims else rows

    def _claim_attention(self):
        for attention in self.attentions:
            for part in "qkv":
                for op, rows in attention.parts[part]:
                    for role in _projection(attention, part, op):
                        self._claim(op, role, rows)
            for op in attention.positions:
                self._claim(op, "attention.position")
        for attention in self.attentions:
            for op in attention.o:
                if op not in self.claims:
                    self._claim(op, "attention.o")
            for op, (name, rows) in attention.downs.items():
                self._claim(op, f"attention.{name}.down", rows)
            for op in attention.convs:
                self._claim(op, "attention.conv")
            for op, rows in attention.gates:
                self._claim(op, "attention.gate", rows)
            for op in region(self.flow, attention.beside, (), {a.y for a in self.attentions})[0]:
                if op not in self.claims:
                    self._claim(op, f"mixer.{mixer_part(self.flow, op)}")

    def _claim_branches(self):
        flow = self.flow
        results = {a.y for a in self.attentions}
        taken = {op: a for a in self.attentions for op in (*a.o, *(op for claims in a.parts.values() for op, _ in claims))}
        attention_of = {op: a for a in self.attentions for op in a.o}
        for op in self.routers:
            self.claims[op] = {"router": None}
        for residual in self.residuals:
            for y in branches(flow, residual, attention_of):
                attention = self._attention_behind(y, attention_of)
                if attention is not None:
                    ops = [op for claims in attention.parts.values() for op, _ in claims] + attention.o
                    x = next((flow.affine[op].x for part in "qkv" for op, _ in attention.parts[part]), residual.origin)
                    self.regions.append(("attention.block", flow.strip(x, drops=False, scales=False), y, ops))
                    continue
                found = read_branch(flow, y, self.routers, taken, results)
                if found is None:
                    continue
                is_mlp, ends = isinstance(found, Mlp), set(flow.cone(y, floats=True)[1])
                parts = [op for claims in found.parts.values() for op, _ in claims]
                routers = [op for op in self.routers if op in ends]
                has_experts = is_mlp and (routers or not self.routed.isdisjoint(parts))
                for part, claims in found.parts.items():
                    for op, rows in claims:
                        for stem in self._stems(op) if has_experts else ("mlp",) if is_mlp else ("mixer",):
                            self._claim(op, f"{stem}.{part}", rows)
                for op in found.weights if is_mlp else ():
                    self._claim(op, "router.shared")
                self.regions.append(("mlp" if is_mlp else "mixer", found.x, y, routers + parts))

    def _stems(self, op):
        """The names before the part for an op of an MLP that has experts."""
        return ("expert.shared", "mlp") if is_shared(self.flow, op, self.routed) else ("expert",)

    def _attention_behind(self, y, attention_of):
        _, ends = self.flow.cone(y, stop={a.y for a in self.attentions}, floats=True)
        for end in ends:
            if end in attention_of:
                return attention_of[end]
            for attention in self.attentions:
                if end is attention.y:
                    return attention
        return None

    def _heads(self):
        """Affine ops after which only the output follows: op → the output's value that they make."""
        flow, feeds, heads = self.flow, set(), {}
        for node in reversed(flow.nodes):
            if any(user in flow.affine or user in feeds for user in node.users):
                feeds.add(node)
        for op in flow.affine:
            if op in self.claims or op in feeds:
                continue
            value_out = self._to_output(op)
            if value_out is not None:
                heads[op] = value_out
                self.claims[op] = {"head": None}
        if not self.residuals:
            return heads
        for op in reversed(list(flow.affine)):  # dense layers between the last stream value and the head
            if op in self.claims or flow.affine[op].kind != "linear":
                continue
            onward = flow.onward(op)
            if onward and all(self.claims.get(o, {}).keys() & {"head", "head.hidden"} for o in onward):
                self.claims[op] = {"head.hidden": None}
        return heads

    def _to_output(self, op):
        queue, seen, found = [op], {op}, []
        for node in queue:
            for user in node.users:
                if user.op == "output":
                    found.append(node)
                elif user not in seen and user not in self.flow.stream and not self._bends(user):
                    seen.add(user)
                    queue.append(user)
        return next((node for node in found if value(node) is not None and value(node).dim() > 1), found[0] if found else None)

    def _bends(self, node):
        """An activation ends the way to a head, unless it caps logits (c · tanh(y / c))."""
        if not self.flow.is_nonlinear(node) or self.flow.name[node] == "pow":
            return False
        return not (self.flow.name[node] == "tanh" and self.flow.name[node.args[0]] in ("mul", "div"))

    # Sites

    def sites(self):
        sites = []
        for op, affine in self.flow.affine.items():
            sites += self._affine_sites(op, affine)
        lookups = find_lookups(self.flow, self.defaults, self.biases)
        sites += [self._embed_site(op, affine, lookups[op]) for op, affine in self.flow.embeddings.items()]
        sites += [self._norm_site(norm) for norm in self.norms.values()]
        sites += [self._attention_site(attention) for attention in self.attentions]
        for r in self.residuals:
            sites.append(self._plain("residual", ("residual",), r.y, path_of(r.y), {"stream": r.stream, "branch": r.branch, "y": r.y}))
        for role, x, y, ops in self.regions:
            call = ops[-1].meta.get("call", 0) if ops else None
            sites.append(self._plain(role, (role,), y, self._common(ops, y), {"x": x, "y": y}, call))
        for node in self.flow.nodes:
            if self.flow.is_opaque(node):
                x = next((n for n in self.flow.parents(node) if is_float(n)), None)
                sites.append(self._plain("opaque", ("opaque",), node, node.target, {"x": x, "y": node}))
        sites += self._block_sites()
        ends = {y: op for op, y in reversed(self.heads.items())}
        sites += [self._plain("logits", ("logits",), y, path_of(y), {"x": self.flow.affine[ends[y]].x, "y": y}) for y in dict.fromkeys(self.heads.values())]
        output = self.flow.nodes[-1]
        inputs = dict(zip(self.graph.inputs, self.graph.placeholders))
        logits = next(iter(self.heads.values()), None)
        sites.append(self._plain("model", ("model",), output, "", {**inputs, "logits": logits}))
        place = self.flow.place
        sites = self._told_apart(sites)
        return sorted(sites, key=lambda site: (place[site.node], len(site.layout.rows or ()) != 0, site.layout.rows.start if site.layout.rows else 0))

    def positions(self, sites):
        """The value by which tokens are counted: the input that says so, else the ids of the one table of positions; None where there are several."""
        counted = [node for node, default in self.defaults.items() if default == "positions" and node.users]
        counted = counted or list(dict.fromkeys(site.handles["ids"] for site in sites if site.role == "embed.position"))
        return counted[0] if len(counted) == 1 and counted[0].op != "get_attr" else None

    def _told_apart(self, sites):
        """Sites that one module owns several of (the two residual adds of a block) get labels: their sub-layer's name, else their number."""
        sublayers = {y: role.partition(".")[0] for role, _, y, _ in self.regions}
        groups = {}
        for site in sites:
            if not site.label and site.weight is None:
                kind = "sublayer" if site.role in ("attention.block", "mlp", "mixer") else site.role
                groups.setdefault((site.owner, site.call, kind), []).append(site)
        labels = {}
        for group in groups.values():
            group.sort(key=lambda site: self.flow.place[site.node])
            names = [sublayers.get(site.handles["branch"] if site.role == "residual" else site.node) for site in group]
            if len(group) > 1 and (None in names or len(set(names)) < len(group)):
                names = [str(number) for number in range(len(group))]
            if len(group) > 1:
                labels.update(zip(group, names))
        return [replace(site, label=labels[site]) if site in labels else site for site in sites]

    def _plain(self, role, roles, node, path, handles, call=None, **more):
        block, index = self._block_of(path, node)
        call = node.meta.get("call", 0) if call is None else call
        return Site(node, role, roles, path, path, handles, block=block, index=index, call=call, depth=self._depths.get(block), **more)

    def _block_of(self, *places):
        """`(path, number among its siblings)` of the block around a path or node; the first place that lies in one counts."""
        for place in places:
            path = place if isinstance(place, str) else path_of(place)
            if path not in self._inside:
                at = path
                while at and at not in self._blocks:
                    at = at.rpartition(".")[0]
                self._inside[path] = (at, self._blocks[at]) if at else (None, None)
            if self._inside[path][0] is not None:
                return self._inside[path]
        return None, None

    def _place(self, node, w):
        """`(path, owner, label)` of the weight of an op."""
        if w.op != "get_attr":
            return path_of(node), path_of(node), ""
        owner, _, name = w.target.rpartition(".")
        module = attribute(self.graph.root, owner)
        called = path_of(node)
        if called != owner:
            tensor = attribute(self.graph.root, w.target)
            try:
                here = attribute(self.graph.root, called)
            except AttributeError:
                here = None
            for own, parameter in getattr(here, "_parameters", {}).items():
                if parameter is tensor:  # a tied weight, called here
                    owner, name, module = called, own, here
        matrices = [p for p in module._parameters.values() if p is not None and p.dim() >= 2]
        if len(matrices) == 1 and all(type(child) is nn.Module for child in module._modules.values()):  # what passes have put on it is in plain ones
            return owner, owner, ""
        return f"{owner}.{name}" if owner else name, owner, name

    def _affine_sites(self, op, affine):
        claims = self.claims.get(op) or {_unclaimed(self.flow, op, affine): None}
        family = "conv" if affine.kind == "conv" else "linear"
        parts = {}
        for role, rows in claims.items():
            parts.setdefault(rows, []).append(role)
        over = ["attention.kv.up"] if op in self.ups else []
        if any(rows is not None and not len(rows) for rows in parts):  # which rows are whose cannot be told
            return [self._affine_site(op, affine, [_joined(claims), *over], None, "", family)]
        if len(parts) == 1 or None in parts:
            names = parts.get(None) or next(iter(parts.values()))
            names = list(dict.fromkeys(names + [r for rows, more in parts.items() if rows is not None for r in more]))
            return [self._affine_site(op, affine, [*names, *over], None, "", family)]
        sites = [self._affine_site(op, affine, [*over, _joined(claims)], None, "", None)]
        for rows, roles in parts.items():
            sites.append(self._affine_site(op, affine, roles, rows, roles[-1].rpartition(".")[2], family))
        return sites

    def _affine_site(self, op, affine, names, rows, label, family):
        path, owner, parameter = self._place(op, affine.w)
        if family and names[0] not in ("head", "router", "router.shared"):
            names = [*names, family]
        if affine.stored is not None and not label:
            label = names[0].rpartition(".")[2]  # several operations on parts of one stored weight
        layout = Layout(affine.kind, affine.transposed, affine.axis, rows, affine.stored, affine.arguments)
        block, index = self._block_of(path, op)
        label = ".".join(filter(None, (parameter, label)))
        handles = {"x": affine.x, "w": affine.w, "b": affine.b, "y": op}
        return Site(op, names[0], tuple(dict.fromkeys(names)), path, owner, handles, label, layout, op, index, block, op.meta.get("call", 0), self._depths.get(block))

    def _embed_site(self, op, affine, role):
        path, owner, label = self._place(op, affine.w)
        block, index = self._block_of(path, op)
        layout = Layout("embedding", arguments=affine.arguments)
        handles = {"ids": affine.x, "w": affine.w, "y": op}
        return Site(op, role, (role,), path, owner, handles, label, layout, op, index, block, op.meta.get("call", 0), self._depths.get(block))

    def _norm_site(self, norm):
        if norm.w is not None:
            path = norm.w.target.rpartition(".")[0]
        else:
            path = path_of(norm.y)
        return self._plain("norm", ("norm",), norm.y, path, {"x": norm.x, "w": norm.w, "b": norm.b, "y": norm.y}, operation=norm.y)

    def _attention_site(self, a):
        roles = ("attention.cross", "attention") if a.is_cross else ("attention",)
        layout = Layout(turned=("k",)) if a.scores is not None and self.flow.name[a.scores] != "einsum" else Layout()
        return self._plain(roles[0], roles, a.y, path_of(a.y), {"q": a.q, "k": a.k, "v": a.v, "mask": a.mask, "y": a.y}, operation=a.y, layout=layout)

    def _common(self, ops, y):
        paths = [self._place(op, self.flow.affine[op].w)[0].split(".") for op in ops] or [path_of(y).split(".")]
        common = []
        for names in zip(*paths):
            if len(set(names)) > 1:
                break
            common.append(names[0])
        return ".".join(common)

    def _block_sites(self):
        inside = {block: [] for block in self.graph.blocks}
        for node in self.flow.nodes:
            if node.op in ("call_function", "call_module") and (block := self._block_of(node)[0]) in inside:
                inside[block].append(node)
        sites = []
        for block, nodes in inside.items():
            calls = sorted({node.meta.get("call", 0) for node in nodes if path_of(node) == block})
            for call in calls if len(calls) > 1 else (None,):  # a block that is used several times
                sites += self._block_site(block, [node for node in nodes if call in (None, node.meta.get("call", 0))])
        return sites

    def _block_site(self, block, nodes):
        members = set(nodes)
        left = [node for node in nodes if is_float(node) and any(user not in members for user in node.users)]
        residual = next((r for r in self.residuals if r.y in members), None)
        x = residual.origin if residual is not None and residual.origin not in members else None
        if x is None:
            x = next((p for node in nodes for p in self.flow.parents(node) if p not in members and is_float(p)), None)
        if not left or x is None:
            return []
        return [self._plain("block", ("block",), left[-1], block, {"x": x, "y": left[-1]})]


def _projection(attention, part, op):
    """The roles of an op that makes q, k or v, the narrowest first."""
    if part == "k" and op in attention.ropes:
        return "attention.k.rope", "attention.k"
    return ("attention.q.up", "attention.q") if attention.ups.get(op) == "q" else (f"attention.{part}",)


def _joined(claims):
    """The name of a weight that holds several parts: "attention.qkv", or "attention.fused" where the parts are no usual ones."""
    plain = [role for role in claims if role.count(".") == 1] or list(claims)
    parts = {role.partition(".")[2] for role in plain}
    return f"{min(plain).partition('.')[0]}.{next((name for name, usual in _FUSED.items() if parts == usual), 'fused')}"


def _defaults(graph):
    """Placeholder → what leaving that input out means ("positions", "zeros", …), where the captured signature knows it."""
    entry = getattr(graph.signature, "entries", {}).get(graph.name)
    known = {slot.name: slot.default for slot in entry.slots if slot.default is not None and not slot.path} if entry is not None else {}
    return {node: known[name] for name, node in zip(graph.inputs, graph.placeholders) if name in known}


def _unclaimed(flow, op, affine):
    if affine.kind != "conv":
        return "linear"
    window = tuple(value(affine.w).shape[2:])
    stride = tuple(op.args[3]) if len(op.args) > 3 else ()
    is_patch = flow.strip(affine.x).op == "placeholder" and stride == window and max(window) > 1
    return "embed.patch" if is_patch else "conv"
