"""The passes of a spec, run in the order written, verified in between; all or nothing.

    rewrite(model, spec)  =  capture → (apply → verify) per pass → live model
"""

import copy
import dataclasses
import time

from .capture.fakes import uncollected
from .capture.model import capture
from .contract import Pass
from .edit.batch import Batch
from .edit.compose import beside
from .edit.derive import settle, whole
from .edit.edit import Edit
from .edit.prompts import follow, split
from .edit.rows import RowsEdit
from .emit.live import make_live
from .errors import Refused
from .graph import attribute
from .report import Applied, Report, Size
from .roles.find import Roles, roles
from .roles.where import select
from .spec.forms import Form, leaves, placed
from .spec.parse import Spec, Step
from .store.fingerprint import fingerprint
from .text import Picture
from .training.backward import cut_off, lost_gradient
from .verify import Record, verify


def rewrite(model, spec, example=None, *, donate=False):
    """A live model: `model` captured, the passes of `spec` applied, printed as source.

    model: a transformers model or any `nn.Module`; it is not changed in any way, nor by training, casting or sharding the live one, and
    frozen weights share its storage. spec: a dict, a path to JSON, or a `Spec`. example: inputs of a model that is not of transformers (a
    dict of keyword arguments or a tuple). donate: the model given is not needed any more, so base tensors that the spec lets train are not
    copied first, and training the live model changes them there too; a weight that is stored in codes leaves it at once, so that no more than
    the model and one weight are in memory.

    The live model is an instance of the model's class, with `.report`, `.graph` and `.spec`. What no pass makes or names is frozen.
    Raises SpecError before the model is looked at, Refused for what this model cannot have, Broken where an invariant does not hold.
    """
    return rewrite_again(model, Spec.parse(spec), {}, example, donate)


def rewrite_again(model, spec, stored, example=None, donate=False):
    """As `rewrite`, with frozen tensors of an earlier run (path → tensor), so that what is derived from them is the same."""
    base = fingerprint(model)
    return rewritten(capture(model, example), spec, base, donated=model if donate else None, stored=stored)


def rewritten(graph, spec, base, *, donated=None, stored=()):
    """The live model of a captured graph, which is used up; `base` is the fingerprint of the model that it was captured from.

    donated: the model given, if it is not needed any more. stored: as for `rewrite_again`.
    """
    if donated is None:
        graph.bare = graph.over(None)
    if donated is not None:
        base.settle()  # hashed now: the tensors it would be made from later are about to change
    report = apply(graph, spec, donated=donated, stored=stored)
    return live_of(graph, spec, report, base)


@uncollected()
def live_of(graph, spec, report, base):
    """The live model of a graph to which the steps of a spec have been applied; `base` is the fingerprint of the model given."""
    live = make_live(graph)
    live.__dict__.update(graph=graph, spec=spec, report=report, _base=base)
    return live


def merge(live, *, partial=False, dequantize=False):
    """A live model in which everything that the passes added is folded into the base weights; `live` stays as it is.

    partial: leave in place what cannot be folded (an adapter with an activation, a gate) instead of refusing. dequantize: a weight in codes that
    something was added to becomes numbers again. Raises Refused with the reasons.
    """
    if live.graph is None:
        raise Refused("merge: this live model has left its graph behind (it was unpickled). Use save(live, folder) and load(model, folder) instead of pickle.")
    graph, report = live.graph.copy(), copy.deepcopy(live.report)
    (step,) = Spec.parse({"passes": [{"pass": "merge", "partial": partial, "dequantize": dequantize}]}).passes
    step = dataclasses.replace(step, place="merge(live)")
    _apply_steps(graph, (step,), live.spec.seed, report)
    return live_of(graph, dataclasses.replace(live.spec, passes=(*live.spec.passes, step)), report, live._base)


@uncollected()
def apply(graph, spec, *, donated=None, stored=()):
    """Apply a spec to a captured graph, its variants and its module tree, in place. Returns the Report.

    donated: the model given, if it is not needed any more. stored: as for `rewrite_again`.
    """
    report = Report(opaque=dict(graph.opaque), notes=list(graph.notes))
    for parameter in graph.root.parameters():
        parameter.requires_grad_(False)
    if donated is None and any(hasattr(getattr(step, "options", None), "compacted") for step in spec.passes):
        graph.captured = graph.copy()
    _apply_steps(graph, spec.passes, spec.seed, report, donated, stored)
    settle(report, graph.root)
    return report


def run_again(graph, steps, seed, report, kept):
    """Apply steps to the captured graph of a live model over its own tree, where the tensors `kept` (paths) are there already."""
    for parameter in graph.root.parameters():
        parameter.requires_grad_(False)
    _apply_steps(graph, steps, seed, report, kept=kept)
    settle(report, graph.root)


def _apply_steps(graph, steps, seed, report, donated=None, stored=(), kept=()):
    if any(step.options.lengthens for step in leaves(tuple(steps))):
        split(graph)
    work = Work(graph, seed, report, donated, dict(stored))
    work.memo["kept"] = frozenset(kept)
    for number, step in enumerate(steps):
        step = placed(step, f"passes[{number}]")
        texts = [Picture(part) for part in work.graphs]  # for a Broken
        work.apply(step)
        name = step.method if isinstance(step, Step) else str(step)
        for part, record, text in zip(work.graphs, work.records, texts):
            verify(part, record, name, text)
            _refuse_lost_gradients(part, f"{step.place}: {name}")
        for number in work.inner:
            _refuse_cut_off(work.graphs[number], f"{step.place}: {name}")


class Work:
    """All graphs of a model under the steps of a spec.

    `inner` are the numbers of the graphs that together are the model, the others are other calls of it. One entry a graph: `found` its sites,
    `aside` the nodes that steps beside the present one have made, `replaced` what has been put in place, in order.
    """

    def __init__(self, graph, seed, report, donated, stored):
        self.graphs, self.seed, self.report, self.memo = graph.all(), seed, report, {"donated": donated, "stored": stored}
        self.records = [Record.of(part, report, self.graphs) for part in self.graphs]
        self.found = [roles(part) for part in self.graphs]
        self.inner = [number for number, part in enumerate(self.graphs) if number == 0 or part.is_inner]
        self.aside, self.replaced = [frozenset() for _ in self.graphs], [[] for _ in self.graphs]

    def apply(self, step):
        """One step, a form, or several steps in order (a tuple, a batch)."""
        if isinstance(step, Form | Batch):
            _refuse_derived(step)
        if isinstance(step, tuple | Batch):
            for each in step.grouped() if isinstance(step, Batch) else step:
                self.apply(each)
        elif isinstance(step, Form):
            beside(self, step)
        else:
            _refuse_fused(step, self.graphs)
            self.step(step, _picked(step, self.found, self.inner))

    def step(self, step, picked, choices=None):
        """One step at the sites `picked`, one list a graph; `choices` are those of a mixing pass, one dict a graph."""
        start, before = time.perf_counter(), Size.of(self.graphs[0].root)
        reason = step.options.requires(self.graphs[0])
        if reason:
            raise Refused(f"{step.place}: {step.method}: {reason}")
        kind = Edit if step.members is None else RowsEdit
        edits = [kind(part, sites, self.graphs, step, self.seed, self.report, self.memo, aside) for part, sites, aside in zip(self.graphs, self.found, self.aside)]
        if hasattr(step.options, "apply") and step.options.hooks():
            edits[0].new.hooked(step)
        for edit, given in zip(edits, choices or ()):
            edit.choices = given
        sites, refused = _run(edits, picked, self.inner)
        if step.options.lengthens:
            follow(edits)
        for number, edit in enumerate(edits):  # when all are done: the tree must have let go of what they have folded
            self.replaced[number] += edit.replaced
            if edit.restructured:
                self.found[number] = roles(edit.graph)
        self.report.applied.append(Applied(step.method, step.name, step.place, sites, refused, before, Size.of(self.graphs[0].root), time.perf_counter() - start))


def _refuse_fused(step, graphs):
    """Where operations are fused their sites are no longer there for a step to find. The whole model still is."""
    fused = next((node for graph in graphs for node in graph.nodes if "fused" in node.meta), None)
    if fused is not None and not step.options.unfuses and not (step.where == "model" and hasattr(step.options, "apply")):
        op = fused.target._schema.name.partition("::")[2]
        raise Refused(f"{step.place}: {step.method}: {op} stands where it would look for linears. Fuse last: leave fuse out before it, or put it behind.")
    if graphs[0].loss is not None and not step.options.unfuses:
        raise Refused(f"{step.place}: {step.method}: the head and its loss are one op, which it may change. Fuse last: leave fuse out before it, or put it behind.")


def _refuse_derived(form):
    """What gives the base new values, or puts it into codes, does so for all steps beside it."""
    for step in leaves(form):
        if type(step.options).derive is not Pass.derive:
            raise Refused(f"{step.place}: {step.method} changes the base itself, which the steps beside it read too. Write it before them, as a step of its own.")


def _trains(graph):
    return lambda path: getattr(attribute(graph.root, path), "requires_grad", False)


def _refuse_cut_off(graph, place):
    lost = cut_off(graph, _trains(graph))
    if lost is not None:
        path, node = lost
        raise Refused(
            f"{place}: @{path} is to train, and {node.meta['made']} lets no gradient through to it (at %{node.name}): it would never change.  "
            'Freeze it (`frozen(…)` where a pass makes it), narrow "where", or change the option that cuts gradients off.'
        )


def _refuse_lost_gradients(graph, place):
    lost = lost_gradient(graph, _trains(graph))
    if lost is not None:
        path, node = lost
        raise Refused(
            f"{place}: @{path} is to train, and what it makes is read (by %{node.name}) in a part that runs without gradients: "
            "it would never change.  Freeze it, narrow \"where\", or leave out the pass that keeps backward out of that part."
        )


def _picked(step, found, inner):
    """The sites of a step, one list a graph. `inner`: the graphs that together are the model; the others are other calls of it."""
    if step.where is None:
        return [[] for _ in found]
    default = step.options.role or "linear"
    try:
        select(Roles(site for number in inner for site in found[number]), step.where, default=default)
    except Refused as error:
        raise Refused(f"{step.place}: {step.method} {error}") from None
    sites = [select(part, step.where, default=default, strict=False) for part in found]
    return [whole(part) for part in sites] if step.options.whole else sites


def _run(edits, picked, inner):
    """One step on all graphs. Returns ((path, role) per site, (path, reason) per refusal), those of the `inner` graphs."""
    step, options = edits[0].step, edits[0].step.options
    if hasattr(options, "apply"):
        done = [tuple(options.apply(edit, sites)) for edit, sites in zip(edits, picked)]
        return tuple(site for number in inner for site in done[number]), tuple(reason for number in inner for reason in edits[number].declined)
    reasons = [[(site, edit.reason(site, sites)) for site in sites] for edit, sites in zip(edits, picked)]
    whole = {(site.name, site.role): reason for part in reasons for site, reason in part if reason}  # a site that one call cannot have, no call has
    reasons = [[(site, whole.get((site.name, site.role))) for site, _ in part] for part in reasons]
    refused = [(site, reason) for number in inner for site, reason in reasons[number] if reason]
    total = sum(len(picked[number]) for number in inner)
    if refused and (not step.allow_refusals or len(refused) == total):
        raise Refused(_refusals(step, refused, total))
    accepted = [[site for site, reason in part if not reason] for part in reasons]
    operations = [edit.operation(site) for edit, sites in zip(edits, accepted) for site in sites]
    edits[0].memo["chosen", step.place] = {node for operation in operations if operation is not None for node in (operation.node, *operation.chain)}
    seen = [(edit, site) for number in inner for edit, site in zip([edits[number]] * len(accepted[number]), accepted[number])]
    shared = edits[0].new.shared(seen)
    for edit, sites in zip(edits, accepted):
        for site in sites:
            edit.apply(site, shared, last=site is sites[-1])
    return tuple((site.name, site.role) for _, site in seen), tuple((site.name, reason) for site, reason in refused)


def _refusals(step, refused, total):
    shown = [f"{step.method} at {site.name}{_shape(site)}: {reason}" for site, reason in refused[:5]]
    more = f"\n… and {len(refused) - 5} more" if len(refused) > 5 else ""
    advice = 'narrow "where" or change the options' if len(refused) == total or step.options.mixes() else 'narrow "where", change the options, or say "allow_refusals": true in this pass'
    return "\n".join(shown) + f"{more}\n{len(refused)} of {total} sites refused ({step.place}); {advice}."


def _shape(site):
    w = site.handles.get("w")
    return f" ({'×'.join(map(str, w.meta['val'].shape))})" if w is not None else ""
