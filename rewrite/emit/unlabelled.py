"""A graph as it runs without labels: the loss, and what only the loss needs, taken out."""

from dataclasses import replace

from torch import fx

from ..capture.tidy import has_effect

NAME = "unlabelled"


def unlabelled(graph):
    """A copy of the graph under the name "unlabelled", without its labels and what follows from them; None if it takes none."""
    labels = set(graph.signature.labels) & set(graph.inputs) if graph.signature is not None else set()
    if not labels:
        return None
    follow = {node for name, node in zip(graph.inputs, graph.placeholders) if name in labels}
    for node in graph.nodes:
        if any(before in follow for before in node.all_input_nodes) and node.op != "output":
            follow.add(node)
    [returned] = graph.fx.output_node().args
    kept = [(name, out) for name, out in zip(graph.outputs, returned) if out not in follow]
    copy, env = fx.Graph(), {}
    for node in graph.nodes:
        if node not in follow and node.op != "output":
            env[node] = copy.node_copy(node, env.__getitem__)
    copy.output(tuple(env[out] for _, out in kept))
    for node in reversed(list(copy.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not has_effect(node):
            copy.erase_node(node)
    inputs = tuple(name for name in graph.inputs if name not in labels)
    return replace(graph, fx=copy, name=NAME, inputs=inputs, outputs=tuple(name for name, _ in kept), variants={}, notes=[])
