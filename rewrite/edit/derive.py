"""What follows from the base: the tensors of a pass's `derive`, made weight by weight, not saved, made anew on load.

    {"w": w - up @ down}     a base tensor's new value, on this live model alone
    {"codes": …}             a new frozen tensor; the float weight that nothing reads any more leaves memory
"""

import dataclasses

import torch
from torch import fx

from .. import graph as g
from ..contract import Pass
from ..errors import Refused
from ..store.fingerprint import facts

#: handles that `derive` may give a new value -> the field of an Operation that holds their path
BASE = {"w": "weight", "b": "bias"}


def whole(sites):
    """The sites, with the parts of a fused projection that are all there as one: a weight is stored in one format."""
    found, done = [], set()
    for site in sites:
        rows = site.layout.rows
        parts = [s for s in sites if s.operation is site.operation and s.layout.rows is not None] if rows is not None else []
        if rows is None or rows.listed is not None or sum(len(s.layout.rows) for s in parts) < rows.total:
            found.append(site)
        elif site.operation not in done:
            done.add(site.operation)
            found.append(dataclasses.replace(site, layout=dataclasses.replace(site.layout, rows=None), label=""))
    return found


def reason(edit, site):
    """Why a site's base tensors can have no new values, or None."""
    operation, options = edit.operation(site), edit.step.options
    if type(options).derive is Pass.derive:
        return None
    if operation is None:
        return "it has no weight of its own"
    if "coded" in operation.source.meta:
        return "its weight came in codes, as the model given stores it, and cannot be made anew"
    if operation.source.op != "get_attr":
        return f"{operation.source.meta.get('made', 'a pass')} stands in the place of its weight, which would be lost. Put {edit.kind} before it, or merge first"
    if options.whole and site.layout.rows is not None:
        return "its weight is one tensor for the whole fused projection: name all of its parts, for example attention.{q,k,v}"


def evaluated(edit, node):
    """The value of a node that passes, or codes that the model came with, made of constants alone (a dequantised weight); None where it reads anything else."""
    env, todo = {}, [node]
    while todo:
        part = todo[-1]
        if part.op == "get_attr":
            env[part] = g.attribute(edit.graph.root, part.target)
        elif part.target is g.dtype_of:
            env[part] = edit.real_dtype(part.args[0].meta["val"].dtype)
        elif part.op != "call_function" or not {"made", "coded"} & part.meta.keys():
            return None
        elif missing := [a for a in part.all_input_nodes if a not in env]:
            todo += missing
            continue
        else:
            args, kwargs = fx.node.map_arg((part.args, part.kwargs), lambda n: env[n])
            with torch.no_grad():
                env[part] = part.target(*args, **kwargs)
        todo.pop()
    return env[node]


def readers_elsewhere(edit, path):
    """Nodes of any variant that read a base tensor and are no part of a site of this step, and modules that stay one call around it."""
    chosen = edit.memo["chosen", edit.step.place]
    found = [user for part in edit.graphs for n in part.nodes if n.op == "get_attr" and n.target == path for user in n.users if user not in chosen and "made" not in user.meta]
    return found + [module for part in edit.graphs for module in part.opaque if path.startswith(f"{module}.")]


def set_base(edit, site, name, value):
    """Give a base tensor its new value, in the site's rows, on this live model alone. Raises Refused where something else reads it as well."""
    operation, root = edit.operation(site), edit.graph.root
    path, place = getattr(operation, BASE[name]), f"{edit.kind} at {site.path}"
    others = readers_elsewhere(edit, path)
    if others:
        raise Refused(f"{place}: derive() gives {name} a new value, and {getattr(others[0], 'name', others[0])} reads @{path} as well. Narrow \"where\" to sites whose weights are theirs alone.")
    parameter, dim = g.attribute(root, path), edit._dim(operation, name)
    old = operation.standard(parameter.detach()) if name == "w" else parameter.detach()
    part = edit._part(site, old, dim)
    if value.shape != part.shape or value.dtype != part.dtype:
        raise Refused(f"{place}: derive() gives {name} as {tuple(value.shape)} {value.dtype}, where the model has {tuple(part.shape)} {part.dtype}.")
    new = value if site.layout.rows is None else site.layout.rows.put(old, value, dim)
    parameter.data = (operation.stored(new) if name == "w" else new).clone(memory_format=torch.contiguous_format)
    edit.report.derived.update(dict.fromkeys(edit.names_of(parameter)))


def let_go(edit, site):
    """Take the site's float weight off the tree, once a noun that does not read it stands in its place everywhere."""
    operation = edit.operation(site)
    node = edit.attributes.get(operation.weight) if operation is not None else None
    if node is None or node.users or readers_elsewhere(edit, operation.weight):
        return
    edit.graph.fx.erase_node(edit.attributes.pop(operation.weight))
    del edit.by_name[node.name]
    parameter = g.attribute(edit.graph.root, operation.weight)
    if parameter is None:
        return  # another variant came first
    for path in edit.names_of(parameter):
        module, _, name = path.rpartition(".")
        g.attribute(edit.graph.root, module)._parameters[name] = None
        edit.report.released[path] = parameter.dtype
        if edit.memo["donated"] is not None:
            g.attribute(edit.memo["donated"], path).data = parameter.new_empty(0)


def settle(report, root):
    """Hash what was derived: what is still the same when the model is saved need not be stored."""
    made = {path: g.attribute(root, path) for path, fact in report.derived.items() if fact is None}
    report.derived.update(facts({path: tensor for path, tensor in made.items() if not tensor.is_meta}))
