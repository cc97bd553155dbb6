"""Cut a flat graph by block: which nodes run in which block, what each block takes and gives, and in which order the top calls them.

    flat graph, block paths  -->  Outline(steps = [node, Piece, node, …], result)

A block must be convex: nothing outside may depend on it and feed it. One that is not stays in the top, with a note.
"""

import heapq
import operator
from dataclasses import dataclass, field

import networkx as nx
import torch

from ..capture import tidy
from ..graph import expression


@dataclass(eq=False)
class Piece:
    """One call of a block: its nodes in order, the outer values it takes (hidden state first) and its values used outside (same)."""

    path: str
    call: int
    nodes: list
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    sizes: dict = field(default_factory=dict)


@dataclass(eq=False)
class Outline:
    """The top of a graph: nodes and pieces in the order they run; `sizes` maps a size node to (tensor input, dim)."""

    steps: list
    inputs: list
    result: tuple
    sizes: dict
    notes: list


def is_size(node):
    """True for an int, or an arithmetic value of sizes: it lives on the host."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)) and node.op == "call_function"


def has_effect(node):
    """True where order matters beyond dataflow: random numbers, writes, opaque modules, what is asked of a size."""
    return tidy.has_effect(node) or node.target is torch.ops.aten.scaled_dot_product_attention.default


def outline(graph):
    """The Outline of one graph (a variant counts as one)."""
    return _Cut(graph).run()


class _Cut:
    def __init__(self, graph):
        self.graph = graph
        self.nodes = [n for n in graph.nodes if n.op in ("call_function", "call_module")]
        self.result = next(n for n in graph.nodes if n.op == "output")
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.notes = []
        self.expressions = {}

    def run(self):
        self.top_sizes = self.aliases(self.nodes, self.graph.placeholders)
        home = self.homes()
        while True:
            order, stuck = self.schedule(home)
            if not stuck:
                break
            self.dissolve(home, stuck)
        return self.build(home, order)

    # ---- sizes

    def size(self, node):
        """A size node's expression, cached: asking a SymInt is slow."""
        if node not in self.expressions:
            value = node.meta.get("val")
            self.expressions[node] = expression(value) if isinstance(value, (int, torch.SymInt)) else None
        return self.expressions[node]

    def shape(self, node):
        key = (node, "shape")
        if key not in self.expressions:
            value = node.meta.get("val")
            self.expressions[key] = tuple(map(expression, value.shape)) if isinstance(value, torch.Tensor) else ()
        return self.expressions[key]

    def aliases(self, nodes, inputs):
        """size node -> (input, dim) where an input has a dimension of the same expression, earliest input first."""
        wanted = [n for n in nodes if is_size(n) and isinstance(n.meta["val"], torch.SymInt)]
        if not wanted:
            return {}
        known = {}
        for node in inputs:
            for dim, size in enumerate(self.shape(node)):
                if not isinstance(size, int):
                    known.setdefault(size, (node, dim))
        return {n: known[self.size(n)] for n in wanted if self.size(n) in known}

    # ---- which node belongs to which block call

    def homes(self):
        """node -> (block path, call), or None for the top."""
        blocks, memo = frozenset(self.graph.blocks), {}

        def block_of(path):
            if path not in memo:
                parts = path.split(".")
                memo[path] = next((p for i in range(1, len(parts) + 1) if (p := ".".join(parts[:i])) in blocks), None)
            return memo[path]

        home, calls = {}, {}
        for node in self.nodes:
            path = node.target if node.op == "call_module" else node.meta.get("path", "")
            block = block_of(path) if path else None
            if block is None or node in self.top_sizes or (node.op == "call_module" and path == block):  # an opaque block is called as it stands
                home[node] = None
                continue
            home[node] = block
            times = calls.setdefault(block, {})
            times[path] = max(times.get(path, 0), node.meta.get("call", 0) + 1)
        for node, block in home.items():
            if block is not None:
                path = node.target if node.op == "call_module" else node.meta.get("path", "")
                per_call = calls[block][path] // min(calls[block].values())  # a module inside may be called several times per call of the block
                home[node] = (block, node.meta.get("call", 0) // per_call)
        for node in self.nodes:  # an element stays with its list
            if node.target is operator.getitem and node.args[0] in home:
                home[node] = home[node.args[0]]
        for node in reversed(self.nodes):
            users = {home.get(u) for u in node.users}
            if home[node] is None and node not in self.top_sizes and len(users) == 1 and None not in users:
                if any(home.get(a) for a in node.all_input_nodes):  # between two nodes of one block
                    home[node] = users.pop()
            elif home[node] is not None and is_size(node) and users != {home[node]}:
                if all(home.get(a) != home[node] or is_size(a) for a in node.all_input_nodes):  # a size that leaves its block
                    home[node] = None
        return home

    # ---- the order of top nodes and pieces

    def schedule(self, home):
        """(units in order, []) or (None, the units on cycles). A unit is a node of the top or a (path, call)."""
        unit = {n: home[n] or n for n in self.nodes}
        first, after, waits, last_effect = {}, {}, {}, None
        for node in self.nodes:
            own = unit[node]
            first.setdefault(own, self.order[node])
            sources = [unit[a] for a in node.all_input_nodes if a in unit and a not in self.top_sizes]
            if has_effect(node):
                if last_effect is not None:
                    sources.append(last_effect)
                last_effect = own
            for source in sources:
                if source != own and own not in after.setdefault(source, set()):
                    after[source].add(own)
                    waits[own] = waits.get(own, 0) + 1
        ready = [(first[u], i, u) for i, u in enumerate(first) if not waits.get(u)]
        heapq.heapify(ready)
        done, serial = [], len(first)
        while ready:
            *_, own = heapq.heappop(ready)
            done.append(own)
            for user in after.get(own, ()):
                waits[user] -= 1
                if not waits[user]:
                    serial += 1
                    heapq.heappush(ready, (first[user], serial, user))
        if len(done) == len(first):
            return done, []
        left = set(first) - set(done)
        tangle = nx.DiGraph((a, b) for a in left for b in after.get(a, ()) if b in left)
        return None, [c for c in nx.strongly_connected_components(tangle) if len(c) > 1]

    def dissolve(self, home, cycles):
        """Calls of one block that wait for each other become one; any other block on a cycle goes into the top."""
        for cycle in cycles:
            pieces = [u for u in cycle if isinstance(u, tuple)]
            paths = {path for path, _ in pieces}
            merge = len(paths) == 1 and len(pieces) > 1
            if not merge:
                self.notes += [f"{path} is printed into the top: something outside depends on it and feeds it" for path in sorted(paths)]
            target = min(pieces) if merge else None
            members = set(pieces)
            for node, own in home.items():
                if own in members:
                    home[node] = target

    # ---- pieces with their inputs and outputs

    def build(self, home, order):
        pieces = {}
        for node in self.nodes:
            if home[node]:
                pieces.setdefault(home[node], Piece(*home[node], [])).nodes.append(node)
        hidden = {}  # what blocks of one list hand on: the path of the list -> values
        for own in order:
            if own in pieces:
                self.border(pieces[own], home, hidden)
        steps = [pieces.get(own, own) for own in order]
        live = self.live_top(steps)
        steps = [s for s in steps if isinstance(s, Piece) or s in live]
        return Outline(steps, list(self.graph.placeholders), self.result.args[0], self.top_sizes, self.notes)

    def live_top(self, steps):
        live = set(self.result.all_input_nodes)
        for step in reversed(steps):
            if isinstance(step, Piece):
                live.update(step.inputs)
            elif step in live or has_effect(step):
                live.add(step)
                live.update(step.all_input_nodes)
        return live

    def border(self, piece, home, hidden):
        """Fill a piece's inputs and outputs, drop what nobody needs, and write sizes as dimensions of its tensor inputs."""
        own, inside, prefix = home[piece.nodes[0]], set(piece.nodes), piece.path + "."
        outputs = [n for n in piece.nodes if n not in self.top_sizes and any(home.get(u) != own for u in n.users)]
        main = next((n for n in reversed(outputs) if "carried" not in n.meta), None)  # the hidden state, not what a pass hands on beside it
        piece.outputs = [n for n in outputs if n is main] + [n for n in outputs if n is not main]
        outer, sizes = {}, {}
        for node in piece.nodes:
            for a in node.all_input_nodes:
                if a not in inside and not (a.op == "get_attr" and a.target.startswith(prefix)):
                    (sizes if is_size(a) else outer)[a] = None
        tensors = [a for a in outer if a.op != "get_attr"]
        handed = hidden.setdefault(piece.path.rpartition(".")[0], set())
        state = next((a for a in tensors if a in handed), None)
        if state is None and piece.outputs:
            expected = self.shape(piece.outputs[0])
            state = next((a for a in tensors if self.shape(a) == expected and a.meta["val"].is_floating_point()), None)
        tensors.sort(key=lambda a: a is not state)  # stable: the others by first use
        handed.update(piece.outputs[:1])
        piece.sizes = self.aliases([*sizes, *piece.nodes], tensors)
        live = set(piece.outputs)
        for node in reversed(piece.nodes):
            if (node in live or has_effect(node)) and node not in piece.sizes:
                live.add(node)
                live.update(node.all_input_nodes)
        piece.nodes = [n for n in piece.nodes if n in live and n not in piece.sizes]
        used = {a for n in piece.nodes for a in n.all_input_nodes}
        used.update(source for size, (source, _) in piece.sizes.items() if size in used)
        constants = [a for a in outer if a.op == "get_attr"]
        piece.inputs = [a for a in [*tensors, *constants, *sizes] if a in used and a not in piece.sizes]
