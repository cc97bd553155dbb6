"""Parts of a graph between two values: what lies on the ways, and a part as a function that can be run again."""

from torch import fx


class Region:
    """Some nodes of the graph in order, as a function of one value (`start`) that can be run again on another."""

    def __init__(self, nodes, start):
        self.nodes, self.start = nodes, start
        self.reads = tuple(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes and n is not start))

    @property
    def static(self):
        """What a traced body holds of it as constants, hashable."""
        at = {n: f"%{i}" for i, n in enumerate((self.start, *self.reads, *self.nodes))}
        return tuple((n.target, repr(fx.node.map_arg((n.args, n.kwargs), lambda a: at[a]))) for n in self.nodes)

    def run(self, value, known):
        """The last node's value at `value`; `known` gives each node of `reads`."""
        env = {**known, self.start: value}
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = node.target(*args, **kwargs)
        return env[self.nodes[-1]]


def between(starts, end):
    """The nodes on the ways from `starts` to `end`, and what else `end` needs that comes after the first of them."""
    found, todo, first = set(), [end], min(starts, default=end)
    while todo:
        node = todo.pop()
        if node in starts or node in found or node < first:
            continue
        found.add(node)
        todo += node.all_input_nodes
    return found
