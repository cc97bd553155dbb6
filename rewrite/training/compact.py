"""A smaller model from one whose passes have found out what they do not need: the same function, a smaller spec, smaller tensors.

    {"pass": "sora", "where": "linear", "rank": 16}       three sites, of whose gates 5, 5 and 0 are left
    -->
    {"pass": "sora", "where": […two paths…], "rank": 5}

A pass that can be made smaller says so in `compacted(site)`: the options and the tensors that are left of a site, None where nothing is.
"""

import dataclasses

import torch

from ..errors import Refused
from ..store.folder import stored_tensors, unwrapped
from .hooks import View


def compact(live):
    """A live model without what its passes no longer need, of equal output; `live` stays as it is.

    Each step that can be made smaller becomes one step for each set of options that is left. Frozen tensors are shared with `live`, what trains
    is copied. Raises Refused where no pass can be made smaller, and for a model whose base a merge has changed.
    """
    from ..pipeline import apply, live_of  # the pipeline keeps what this begins from

    live = unwrapped(live, "compact")
    found = {place: hooked for place, hooked in live.report.hooked.items() if hasattr(hooked.step.options, "compacted")}
    if not found:
        raise Refused(f"compact: no pass of this model leaves anything out. Its passes: {', '.join(step.method for step in live.report.applied) or 'none'}.")
    if live.graph is None or live.graph.captured is None:
        raise Refused("compact: this live model has left its captured graph behind (pickled, or rewritten with donate=True). Save it, and load it on its base.")
    if live.report.folded:
        raise Refused("compact: a merge has changed the base weights. Compact before you merge.")
    steps, smaller = [], {}
    for step in live.spec.passes:
        if getattr(step, "place", None) not in found:
            steps.append(step)
            continue
        for options, sites in _left(live, found.pop(step.place)).items():
            where = [{"role": held.role, "path": held.path} for held, _ in sites]
            steps.append(dataclasses.replace(step, options=dataclasses.replace(step.options, **dict(options)), where=where))
            smaller |= {held.tensors[name]: tensor for held, tensors in sites for name, tensor in tensors.items()}
    if found:
        raise Refused(f"compact: {', '.join(found)} stands inside a group of steps. Only a step of its own can be made smaller.")
    spec = dataclasses.replace(live.spec, passes=tuple(dataclasses.replace(step, place=f"passes[{i}]") for i, step in enumerate(steps)))
    graph = live.graph.captured.copy()
    report = apply(graph, spec)
    result = live_of(graph, spec, report, live._base)
    _move(live, result, smaller)
    return result.train(live.training)


def _left(live, hooked):
    """options that are left → [(site, its tensors)], without the sites of which nothing is left."""
    groups = {}
    for held in hooked.sites.values():
        with torch.no_grad():
            left = hooked.step.options.compacted(View(live, held))
        if left is not None:
            options, tensors = left
            groups.setdefault(tuple(sorted(options.items())), []).append((held, tensors))
    return groups


def _move(live, result, smaller):
    """Put the tensors of `live`, and those that have become smaller, in the place of those of `result`."""
    old, seen = stored_tensors(live), set()
    for name, tensor in stored_tensors(result).items():
        value = smaller.get(name, old.get(name))
        if value is None or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if value.shape != tensor.shape:
            raise Refused(f"compact: {name} is {tuple(value.shape)}, and the smaller spec makes {tuple(tensor.shape)}.")
        value = value.detach().clone() if tensor.requires_grad or name in smaller else value.detach()
        if isinstance(tensor, torch.nn.Parameter):
            tensor.data = value
        else:
            parent, _, leaf = name.rpartition(".")
            result.get_submodule(parent)._buffers[leaf] = value.clone()
