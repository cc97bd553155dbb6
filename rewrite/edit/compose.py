"""Steps side by side: each works on the graph as it was, and what several do to one value is put together.

    v --a--> v_a        v --b--> v_b        each taken back, its new nodes left where they are
    -->
    parallel    v_a + (v_b - v)
    choose      mixed(v, (v_a, v_b))

What a step did is read off the graph, edge by edge: which node now reads another value, or is called otherwise. So it does not matter how a
step does it, and forms can stand in forms.
"""

from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .. import graph as g
from ..contract import REPLACES
from ..errors import Refused
from ..spec.forms import leaves
from .body import signature

_ADD, _SUB = torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor



def beside(work, form):
    """Apply a form to all graphs of a `Work`."""
    crossings = [Crossing(graph, form.place) for graph in work.graphs]
    aside, made, trains, done = work.aside, set(work.report.made), set(work.report.trains), len(work.report.applied)
    branches = []  # one a step: what it replaced, a list a graph
    for step in form.steps:
        before = [len(replaced) for replaced in work.replaced]
        work.apply(step)
        branches.append([replaced[start:] for replaced, start in zip(work.replaced, before)])
        work.aside = [mine | crossing.take_back() for mine, crossing in zip(aside, crossings)]
    settled = [()] * len(crossings)
    if form.by is not None:
        if form.by.options.freezes_choices:
            _freeze(work.report, work.graphs[0].root, made, trains, done)
        settled = _choose(work, form, crossings, branches)
    for crossing, edges in zip(crossings, settled):
        crossing.rejoin(edges)
    work.aside = aside
    _refuse_unread(work, form, made)


def _freeze(report, root, made, trains, done):
    """Keep from training what has been made, or let train, since; the report's rows behind the first `done` say so too."""
    for path in [p for p in (*report.made, *report.trains) if p not in made and p not in trains]:
        tensor = g.attribute(root, path)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(False)
    report.trains.intersection_update(trains)
    before = report.applied[done].before.trainable
    report.applied[done:] = [replace(row, before=row.before.training(before), after=row.after.training(before)) for row in report.applied[done:]]


def _refuse_unread(work, form, made):
    read = {node.target for graph in work.graphs for node in graph.nodes if node.op == "get_attr" and node.users}
    lost = next((path for path in work.report.made if path not in made and path not in read), None)
    if lost is not None:
        who = form.by or form
        raise Refused(f"{who.place}: {who.method if form.by else form.kind} reads nothing of @{lost}, which {work.report.made[lost]} has made. A mixing pass must read all of its choices.")


def _choose(work, form, crossings, branches):
    """Let the mixing pass make one value of each that the steps replace. Returns the edges (user, value) that it has settled, a set a graph."""
    by, picked, choices, settled = form.by, [], [], []
    for number, (graph, crossing) in enumerate(zip(work.graphs, crossings)):
        values = _values(form, crossing, [branch[number] for branch in branches])
        picked.append(list(dict.fromkeys(value.site for value in values)))
        choices.append({(value.site, value.target): tuple(crossing.final(at, value.users[0], value.root) for at in value.branches) for value in values})
        settled.append({(user, value.root) for value in values for user in value.users})
    for at, step in enumerate(form.steps):
        if not any(branches[at][number] for number in work.inner):
            raise Refused(f"{form.place}.choose[{at}]: {', '.join(leaf.method for leaf in leaves(step))} replaces no value, so there is nothing to choose.")
    work.step(by, picked, choices)
    return settled


def _values(form, crossing, branches):
    """The values that the branches replace: those at the same place, with the numbers of the branches that give one there."""
    found, nouns = {}, {REPLACES[noun] for noun in form.by.options.nouns()}
    for number, replaced in enumerate(branches):
        roots = {}
        for site, target, current, new, users in replaced:
            root = roots[new] = roots.get(current, current)
            users = tuple(user for user in users if user in crossing.calls)
            if root not in crossing.calls or not users:
                continue
            if target not in nouns:
                mixed = " and ".join(noun for noun in REPLACES if REPLACES[noun] in nouns)
                raise Refused(f"{form.by.place}: {form.by.method} mixes {mixed}, and a step of the choose replaces {target} at {site}.")
            value = found.setdefault((root, target, site.layout.rows, users), Value(site, target, root, users, []))
            if number not in value.branches:
                value.branches.append(number)
    values = list(found.values())
    for i, value in enumerate(values):
        for other in values[:i]:
            rows = (value.site.layout.rows, other.site.layout.rows)
            if value.root is other.root and set(value.users) & set(other.users) and (None in rows or rows[0] == rows[1]):
                raise Refused(f"{form.place}: {value.site} and {other.site} are parts of one value, and it is chosen for a whole value. Let the steps name the same sites.")
    return values


@dataclass(frozen=True, eq=False)
class Value:
    """A value that steps of a choose replace: `root` at the crossing, as `users` read it; `branches` are the numbers of the steps."""

    site: object
    target: str
    root: fx.Node
    users: tuple
    branches: list


class Crossing:
    """One graph at the place where several steps part: `take_back()` after each of them, then `rejoin()`."""

    def __init__(self, graph, place):
        self.graph, self.place = graph, place
        self.calls = {node: (node.args, node.kwargs) for node in graph.nodes}
        self.marks = {node: _marks(node) for node in self.calls}
        self.values = {node: node.meta.get("val") for node in self.calls}
        self.branches, self.joined = [], {}

    def take_back(self):
        """Undo what has happened since the crossing (or the last branch), but for the nodes that were made. Returns all of these."""
        if any(node._erased for node in self.calls):
            raise Refused(f"{self.place}: one of its steps takes nodes away, so the next would not see the model as it was. Write them one after the other.")
        branch = Branch()
        for node, (args, kwargs) in self.calls.items():
            if node.args != args or node.kwargs != kwargs:
                branch.calls[node] = (node.args, node.kwargs)
                node.args, node.kwargs = args, kwargs
            if node.meta.get("val") is not self.values[node]:  # it has grown
                branch.values[node] = node.meta["val"]
                node.meta["val"] = self.values[node]
            marks = _marks(node)
            if marks != self.marks[node]:
                branch.marks[node] = marks
                _mark(node, self.marks[node])
        self.branches.append(branch)
        return {node for node in self.graph.nodes if node not in self.calls}

    def final(self, number, user, value):
        """What a node read in a branch where it reads `value` at the crossing."""
        then = self.branches[number].calls.get(user, self.calls[user])
        return next((now for was, now in zip(_leaves(self.calls[user]), _leaves(then)) if was is value), value)

    def rejoin(self, settled=()):
        """Put together what the branches did to each value; `settled` are the edges (user, value) for which that has been done."""
        for user, call in self.calls.items():
            changed = [branch.calls[user] for branch in self.branches if user in branch.calls]
            if changed and (user.args, user.kwargs) == call and not any((user, leaf) in settled for leaf in _leaves(call)):
                user.args, user.kwargs = self._call(user, changed)
            grown = [branch.values[user] for branch in self.branches if user in branch.values]
            if grown and user.meta.get("val") is self.values[user]:
                user.meta["val"] = grown[-1]
        if not settled:
            self._rejoin_marks()
        for node in reversed(list(self.graph.nodes)):
            if node not in self.calls and not node.users and node.op != "output":  # a sum took its place
                self.graph.fx.erase_node(node)

    def _call(self, user, changed):
        """How a node is called after the branches that changed its call."""
        if len(changed) == 1:
            return changed[0]
        (leaves, shape), others = pytree.tree_flatten(self.calls[user]), [pytree.tree_flatten(each) for each in changed]
        if any(other != shape for _, other in others):
            raise Refused(f"{self.place}: two of its steps change the way in which %{user.name} is called. Write them one after the other.")
        return pytree.tree_unflatten([self._argument(user, leaf, [other[at] for other, _ in others]) for at, leaf in enumerate(leaves)], shape)

    def _argument(self, user, was, given):
        news = tuple(dict.fromkeys(new for new in given if new is not was and new != was))
        if len(news) < 2:
            return news[0] if news else was
        if not isinstance(was, fx.Node) or not all(isinstance(new, fx.Node) for new in news):
            raise Refused(f"{self.place}: two of its steps change an argument of %{user.name}, and what they want cannot be added up. Write them one after the other.")
        return self._joined(was, news)

    def _joined(self, value, news):
        """The node of value + Σ(new - value), right after the last of the new ones."""
        if (value, news) in self.joined:
            return self.joined[value, news]
        site = news[0].meta.get("site", "")
        for new in news:
            if signature(new.meta["val"]) != signature(value.meta["val"]):
                raise Refused(f"{self.place} at {site}: two of its steps change one value, and one of them its size too; that cannot be added up. Write them one after the other.")
        last = max(news)
        meta = {key: news[0].meta[key] for key in ("path", "site", "stands_for") if key in news[0].meta}
        with self.graph.fx.inserting_before(last.next):
            total = news[0]
            for new in news[1:]:
                difference = new.args[1] if _adds_to(new, value) else self._made(_SUB, (new, value), meta)
                total = self.joined[value, news] = self._made(_ADD, (total, difference), meta)
        return total

    def _made(self, target, args, meta):
        node = self.graph.fx.call_function(target, args)
        with self.graph.fake_mode, torch.no_grad():
            node.meta = {**meta, "made": "parallel", "role": "made.parallel", "val": target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))}
        return node

    def _rejoin_marks(self):
        by_name = {node.name: node for node in self.graph.nodes}

        def live(name):
            node = by_name[name]
            while "live" in node.meta:
                node = by_name[node.meta["live"]]
            return node

        sums = {news: total for (_, news), total in self.joined.items()}
        for node, was in self.marks.items():
            changed = [branch.marks[node] for branch in self.branches if node in branch.marks]
            result = dict(was)
            for key in dict.fromkeys(key for marks in changed for key in marks):
                news = tuple(live(marks[key]) for marks in changed if marks.get(key) not in (None, was.get(key)))
                if news:
                    result[key] = (sums.get(news) or news[-1]).name
            if changed:
                _mark(node, result)


class Branch:
    """What one step did: `calls` node → its arguments then, `marks` node → the names of its live values then,
    `values` node → its value, where that has another size."""

    def __init__(self):
        self.calls, self.marks, self.values = {}, {}, {}


def _leaves(call):
    return pytree.tree_leaves(call)


def _adds_to(new, value):
    return new.target is _ADD and new.args[0] is value and len(new.args) == 2 and not new.kwargs and isinstance(new.args[1], fx.Node)


def _marks(node):
    """The names that a node holds of the values that stand for it, and for what its site reads."""
    live = {"live": node.meta["live"]} if "live" in node.meta else {}
    return {**live, **node.meta.get("handles", {})}


def _mark(node, marks):
    handles = {key: name for key, name in marks.items() if key != "live"}
    for key, value in (("live", marks.get("live")), ("handles", handles)):
        if value:
            node.meta[key] = value
        else:
            node.meta.pop(key, None)
