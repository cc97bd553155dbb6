"""Interim: one plain export to the canonical graph. To be replaced by the real capture."""

import torch
from torch import fx

from .graph import Graph, attribute, clone_tree, install


def capture(model, example=None, dims=None):
    model = model.eval()
    root = clone_tree(model)
    D = torch.export.Dim.DYNAMIC
    if dims is None:
        dims = {k: ({0: D, 1: D} if isinstance(v, torch.Tensor) and v.dim() == 2 and v.dtype == torch.long else {0: D}) for k, v in example.items()}
    from transformers.exporters.exporter_dynamo import apply_patches, patch_forward_signature, register_cache_pytrees_for_model, reset_model_state

    import contextlib

    hf = hasattr(model, "config")
    if hf:
        register_cache_pytrees_for_model(model)
        model.config.use_cache = False
    with torch.no_grad(), apply_patches("dynamo"), reset_model_state(model) if hf else contextlib.nullcontext(), patch_forward_signature(model, example):
        ep = torch.export.export(model, (), kwargs=example, dynamic_shapes=dims, strict=False, prefer_deferred_runtime_asserts_over_guards=True)
    model.__dict__.pop("forward", None)
    sig = ep.graph_signature
    where = {**sig.inputs_to_parameters, **sig.inputs_to_buffers, **sig.inputs_to_lifted_tensor_constants}
    for name, c in ep.constants.items():
        try:
            attribute(root, name)
        except AttributeError:
            install(root, name, c, persistent=False)
    g, env = fx.Graph(), {}
    for n in ep.graph.nodes:
        if n.op == "placeholder" and n.name in where:
            m = g.create_node("get_attr", where[n.name])
        elif n.op == "call_function" and not n.users and n.target in (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default, torch.ops.aten.sym_constrain_range_for_size.default):
            continue
        else:
            m = g.node_copy(n, lambda a: env[a])
        stack = n.meta.get("nn_module_stack") or {}
        m.meta = {"val": n.meta.get("val"), "path": list(stack.values())[-1][0].split("@")[0] if stack else "", "source": n.meta.get("stack_trace")}
        env[n] = m
    for n in reversed(list(g.nodes)):
        if n.op in ("call_function", "get_attr") and not n.users and not (isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable):
            g.erase_node(n)
    ph = [n.name for n in g.nodes if n.op == "placeholder"]
    blocks = ()
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.ModuleList) and len(m) > 0 and not any(name.startswith(b + ".") for b in blocks):
            blocks += tuple(f"{name}.{i}" for i in range(len(m)))
    out = Graph(g, root, inputs=tuple(ph), outputs=tuple(f"out{i}" for i in range(len(sig.user_outputs))), blocks=blocks)
    return out
