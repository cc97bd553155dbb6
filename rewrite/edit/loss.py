"""The loss of a language model, made of what its head reads: a call with labels makes no logits while the model trains.

    x -- linear(w, b) --> logits        loss = loss_function(logits, labels)
    -->
    x, w, b, labels -- an op --> loss

The loss is made outside of the graph, of the logits that it gives. So the graph stays as it is for all other calls, and one that gives the loss in the
place of the logits is printed beside it. Its two inputs behind all others are the labels, shifted, and the number that the sum of losses is divided by.
"""

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from .. import graph as g

NAME, LOGITS = "loss", "logits"
LINEAR = torch.ops.aten.linear.default


def fuse_loss(edit, op):
    """Let a graph's head and its loss be `op`(x, w, b, labels, items). Returns the sites, [(path, op)]; the reason why there is none goes to `edit.declined`."""
    graph = edit.graph
    if not edit.main:
        return []
    head = _head(graph)
    path = LOGITS if head is None else g.path_of(head) or LOGITS
    reason = _reason(graph, head, edit.report)
    if reason is not None:
        edit.declined.append((path, f"the loss stays as it is: {reason}"))
        return []
    signature = graph.signature.with_loss(LOGITS)
    for part in graph.all():
        if part.owner == graph.owner:
            part.signature = signature
    graph.loss = op.overload
    edit.report.notes.append(f"{path}: in training mode a call with labels gives the loss and no logits")
    return [(path, op.name)]


def _head(graph):
    """The node whose value the logits are, those of tokens in front included; None where the graph gives none."""
    if LOGITS not in graph.outputs:
        return None
    [returned] = graph.fx.output_node().args
    node = returned[graph.outputs.index(LOGITS)]
    return node.args[0] if "cut" in node.meta else node


def _reason(graph, head, report):
    """Why the loss cannot be made of what the head reads, or None."""
    loss = getattr(graph.signature, "loss", None)
    if loss is None:
        return "there is none, or the model makes it inside of its own code"
    if graph.root.loss_function is not ForCausalLMLoss:
        return f"it is {getattr(graph.root.loss_function, '__name__', 'one of its own')}, not that of causal language models"
    read = dict(zip(("logits", "labels", "vocab_size"), loss.args)) | dict(loss.kwargs)
    if head is None or read != {"logits": ("output", LOGITS), "labels": ("label", "labels"), "vocab_size": ("value", g.shape(head)[-1])}:
        return "it reads something else than logits, labels and the size of the vocabulary"
    if head.target is not LINEAR:
        made = head.target.made_by.name if hasattr(head.target, "made_by") else head.meta.get("made", head.target)
        return f"its logits are not a plain linear of what the head reads, but what {made} gives"
    [returned] = graph.fx.output_node().args
    others = [node for node in head.users if node.op != "output" and "cut" not in node.meta]
    if others or sum(out is head or out in head.users for out in returned) > 1:
        return "its logits are read elsewhere too"
    own = next((hooked.step.method for hooked in report.hooked.values() if "loss" in hooked.step.options.hooks()), None)
    return own and f"{own} adds a loss of its own, which may ask for logits"


def with_loss(graph):
    """A copy of a graph that gives the loss in the place of the logits; None where the loss is not fused."""
    if graph.loss is None:
        return None
    twin = graph.twin(graph.root, name=NAME)
    output, head, last, inputs = twin.fx.output_node(), _head(twin), twin.placeholders[-1], []
    x, w, b = (*head.args, None)[:3]
    value = x.meta["val"]
    with graph.fake_mode:
        values = {"labels": value.new_empty(value.shape[:-1], dtype=torch.int64), "items": value.new_empty((), dtype=torch.int64)}
        loss = value.new_empty((), dtype=torch.promote_types(value.dtype, torch.float32))
    for name, fake in values.items():
        with twin.fx.inserting_after(last):
            last = twin.fx.placeholder(name)
        last.meta = {"path": "", "val": fake}
        inputs.append(last)
    with twin.fx.inserting_before(head):
        made = twin.fx.call_function(graph.loss, (x, w, b, *inputs))
    made.meta = {**head.meta, "val": loss}
    [returned] = output.args
    output.args = (tuple(made if name == LOGITS else out for name, out in zip(twin.outputs, returned)),)
    for node in (*head.users, head):  # a cut, if there is one
        twin.fx.erase_node(node)
    twin.outputs = tuple(NAME if name == LOGITS else name for name in twin.outputs)
    return twin
