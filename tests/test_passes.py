"""The checks that every file of passes/ gets without one being written for it; `Pass.example` says how the pass is shown.

golden · holds still · wakes · learns · merges · round trip · refuses · leaves the rest
"""

import copy
import dataclasses
import functools
import importlib
import json
import re
import typing
from pathlib import Path

import pytest
import torch
from checks import OUTSIDE, TOYS, captured, changeable, close, learned, model_of, rejects, rounding, tensor_of, train, unchanged, wake

from rewrite import Pass, Refused, Spec, SpecError, export_onnx, load, merge, pipeline, rewrite, save, show, training
from rewrite import graph as g
from rewrite.spec.options import COMMON, common, options_schema
from rewrite.spec.parse import builtin_names, pass_of
from rewrite.text import line

GOLDEN = Path(__file__).parent / "golden"
SIZES = [(2, 7), (3, 11), (1, 1)]
PASSES = OUTSIDE or builtin_names()


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


def class_of(name):
    return pass_of(importlib.import_module(name if "." in name else f"rewrite.passes.{name}"))


def spec_of(name, seed=0):
    """The spec that shows a pass, as a dict: what it wants before it, then its example."""
    if class_of(name).example is Pass.example:
        pytest.fail(f'{name} has no example: give the class `example = {{"where": …}}`, a step of a spec that shows it, without "pass"', pytrace=False)
    return {"seed": seed, "passes": class_of(name).shown(name)}


def own(spec):
    """The step of a pass in the spec that shows it, and its place."""
    last, place = spec["passes"][-1], f"passes[{len(spec['passes']) - 1}]"
    return (last["by"], f"{place}.by") if "by" in last else (last, place)


@functools.cache
def outcome(name, toy):
    """A toy with a pass applied, or why there is none: no site for it, or none that the pass accepts. One per process."""
    try:
        return anew(name, toy)
    except Refused as reason:
        if not is_unfit(reason):
            raise
        return str(reason)


def anew(name, toy, seed=0):
    """A toy with a pass applied, from the model on."""
    return rewrite(model_of(toy), spec_of(name, seed), example=TOYS[toy].inputs(2, 7))


def shared(name, toy):
    """A toy with a pass applied, to be read only; skips the test where there is none."""
    found = outcome(name, toy)
    return pytest.skip(found) if isinstance(found, str) else found


def rewritten(name, toy):
    """The same, a copy to be changed."""
    return copy.deepcopy(shared(name, toy))


def is_unfit(reason):
    """Whether a toy has no site for a pass, or the pass declines every one of them in words."""
    return "found no site" in str(reason) or re.search(r"\b(\d+) of \1 sites refused", str(reason)) is not None


def accepts(name, toy):
    """Whether a toy has sites for a pass."""
    return not isinstance(outcome(name, toy), str)


@functools.cache
def untouched(toy):
    graph = captured(model_of(toy), TOYS[toy].inputs(2, 7))
    pipeline.apply(graph, Spec.parse({"passes": []}))
    return graph


def lines(graph):
    """name → text of each node but the constants, in graph order."""
    return {node.name: line(node, graph.root) for node in graph.nodes if node.op != "get_attr"}


every_pass = pytest.mark.parametrize("name", PASSES)
every_toy = pytest.mark.parametrize("toy", TOYS)


@every_pass
def test_some_toy_shows_it(name):
    assert any(accepts(name, toy) for toy in TOYS), f"no toy has a site for the example of {name}"


# ---- golden --------------------------------------------------------------------------------------------------------------


def picture(name, toy):
    """The text of the first site before and after a pass, and its new tensors; of a pass that lengthens, of the first that has some."""
    spec, live, before = Spec.parse(spec_of(name)), shared(name, toy), untouched(toy)
    after, report = live.graph, live.report
    if spec.passes[:-1]:
        before = captured(model_of(toy))
        pipeline.apply(before, dataclasses.replace(spec, passes=spec.passes[:-1]))
    was, now = lines(before), lines(after)
    shown = [one for one in report.applied if one.sites][0 if getattr(spec.passes[-1], "where", "by") is None else -1]
    sites = [site for site in shown.sites if not class_of(name).lengthens or any(path.startswith(f"{site[0]}.") for path in report.made)]
    site, role = sites[0]
    near = next(s for s in pipeline.roles(untouched(toy)) if s.name == site and s.role == role)
    own = {near.node.name, *(n.name for n in (near.operation,) if n is not None)}

    def part(graph, texts):
        made = [n.name for n in graph.nodes if n.name in texts and n.meta.get("site") == near.path and "made" in n.meta]
        return [text for node, text in texts.items() if node in own or node in made]

    users = [now[n] for n in now if n in was and was[n] != now[n] and n not in own and any(f"%{own_}" in was[n] for own_ in own)]
    new = [p for p in report.made if (p in report.feeds and p.startswith(near.path) or any(f"@{p}" in text for text in part(after, now))) and report.made[p] == shown.method.rpartition(".")[2]]
    values = [(p, g.attribute(after.root, p)) for p in new]
    made = [f"@{p}  {tuple(v.shape)}{'' if v.requires_grad else ' ❄'}{'  for what follows from the base' if p in report.feeds else ''}" for p, v in values]
    made += [f"@{p}  another value" for p in report.derived if p not in report.made and p.startswith(near.path)]
    text = [json.dumps(spec_of(name), ensure_ascii=False), "", f"{role} at {site or 'the model'}", "", *part(before, was), "", "-->", "", *part(after, now), *users[:1], *([""] if made else []), *made]
    return _sizes_by_name("\n".join(text).replace("\n\n\n", "\n\n") + "\n")


def _sizes_by_name(text):
    """Symbols of sizes as words, in the order in which they come."""
    words = {}
    return re.sub(r"\b[su]\d+\b", lambda m: words.setdefault(m[0], ("batch", "length")[len(words)] if len(words) < 2 else m[0]), text)


def shown(name):
    """The picture on the first toy that the pass accepts."""
    return picture(name, next(toy for toy in TOYS if accepts(name, toy)))


@every_pass
def test_golden(name, request):
    found, file = shown(name), GOLDEN / f"{name}.txt"
    if name in OUTSIDE:
        return print(found)  # to be read: `-s` shows it
    if request.config.getoption("--update-golden"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(found)
    assert file.exists(), f"no {file.name}: run with --update-golden and read what it writes"
    assert found == file.read_text()


def test_every_golden_has_its_pass():
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(builtin_names())


# ---- holds still, wakes, learns ------------------------------------------------------------------------------------------


@every_toy
@every_pass
def test_holds_still(name, toy):
    live, model = shared(name, toy), model_of(toy)
    measured = live.report.figures.get(live.report.applied[-1].place)
    if measured:
        assert {site.partition("#")[0] for site, _ in live.report.applied[-1].sites} == set(measured) and all(0 < value < 1 for figures in measured.values() for value in figures.values())
    for batch, length in SIZES:
        if class_of(name).whole_sequence and length == 1:
            continue  # one token is all tokens
        if class_of(name).drift is None:  # no identity at initialisation: it is there from the first call on, at every size
            rejects(reference=TOYS[toy].output(model, batch, length), result=TOYS[toy].output(live, batch, length), drift=rounding(torch.float32))
            continue
        close(reference=TOYS[toy].output(model, batch, length), result=TOYS[toy].output(live, batch, length), drift=class_of(name).drift)
    if class_of(name).drift is None:
        return
    broken = rewritten(name, toy)
    with torch.no_grad():
        next(p for p in broken.parameters() if p.dim() == 2).mul_(1.01)
    rejects(reference=TOYS[toy].output(model), result=TOYS[toy].output(broken), drift=class_of(name).drift)


def is_shift_of_keys(live, path):
    """A vector added to every key: softmax does not see what all keys share (unless positions turn it)."""
    site = next((site for one in live.report.applied for site, role in one.sites if role == "attention.k" and path.startswith(f"{site}.")), None)
    return site is not None and tensor_of(live, path).dim() == 1


#: steps after which a factor behind one that starts at zero has had its gradient
FIRST_STEPS = 3


def asleep(live, toy):
    """The new tensors that train and have not moved in the first steps: all factors of a product start at zero, or none is read where it counts."""
    starts = {path: tensor_of(live, path).detach().clone() for path in changeable(live) if tensor_of(live, path).requires_grad and not is_shift_of_keys(live, path)}
    if starts:
        t = training(live.train())
        optimizer = t.optimizer(torch.optim.SGD, 0.1)
        for _ in range(FIRST_STEPS):
            t.step(optimizer, lambda: toy.forward(live))
        live.eval()
    return sorted(path for path, start in starts.items() if torch.equal(start, tensor_of(live, path)))


@every_toy
@every_pass
def test_wakes(name, toy):
    live = rewritten(name, toy).double()
    if class_of(name).mixes() and live.spec.passes[-1].by.options.freezes_choices:
        wake(live)  # what it mixes was trained before
    lost = asleep(live, TOYS[toy])
    assert not lost, f"no gradient comes to {', '.join(lost)} in the first {FIRST_STEPS} steps: they never learn. Let one factor of a product start away from zero; give what is not to train as frozen(…)."
    wake(live)
    changing = [p for p in changeable(live) if not is_shift_of_keys(live, p)]
    if any(p.requires_grad for p in live.parameters()):
        TOYS[toy].loss(live).backward()
    before, generator = {mode: TOYS[toy].output(live.train(mode), 3, 11) for mode in (False, True)}, torch.Generator().manual_seed(1)
    for path in changing:
        tensor, drawn = tensor_of(live, path), path.rpartition(".")[2] in class_of(name).drawn
        old = tensor.detach().clone()
        with torch.no_grad():  # what is drawn may count by its sign alone
            tensor.sub_(3 * tensor.sign()) if drawn else tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        rejects(reference=before[drawn], result=TOYS[toy].output(live.train(drawn), 3, 11), drift=rounding(torch.float64))
        with torch.no_grad():
            tensor.copy_(old)
    close(reference=before[False], result=TOYS[toy].output(live.eval(), 3, 11), drift=0.0)
    for path, tensor in live.named_parameters():
        if path in live.report.made and tensor.requires_grad and path in changing:
            assert tensor.grad is not None and tensor.grad.any(), f"{path} gets no gradient"
        if path not in live.report.made and path not in live.report.trains:
            assert not tensor.requires_grad and tensor.grad is None, f"{path} is frozen and has a gradient"
        if path in live.report.trains:
            assert tensor.requires_grad and tensor.grad is not None, f"{path} was to train"


@every_toy
@every_pass
def test_learns(name, toy):
    live = rewritten(name, toy)
    if not any(p.requires_grad for p in live.parameters()):
        return  # a pass that lets nothing train (a merge)
    frozen = {n: p.detach().clone() for n, p in live.named_parameters() if not p.requires_grad}
    assert not learned(train(rewritten(name, toy), TOYS[toy].loss, steps=3, lr=0.0))
    if class_of(name).mixes() and live.spec.passes[-1].by.options.freezes_choices:
        wake(live)  # what it mixes was trained before
        frozen = {n: live.get_parameter(n).detach().clone() for n in frozen}
    losses = train(live.train(), TOYS[toy].loss)
    assert learned(losses), f"{losses[0]:.3f} → {losses[-1]:.3f}"
    for path, value in frozen.items():
        assert torch.equal(value, live.get_parameter(path)), f"{path} is frozen and moved"


# ---- merges --------------------------------------------------------------------------------------------------------------


@every_toy
@every_pass
def test_merges(name, toy):
    live = wake(rewritten(name, toy).double())
    try:
        merged = merge(live)
    except Refused as reason:
        assert re.search(r"merge(\(live\))?: ", str(reason)) and len(str(reason)) < 1500
        return
    assert not [p for p in merged.report.made if ".bias" not in p]
    for batch, length in SIZES:
        close(reference=TOYS[toy].output(live, batch, length), result=TOYS[toy].output(merged, batch, length), drift=rounding(torch.float64))
    rejects(reference=TOYS[toy].output(live), result=TOYS[toy].output(model_of(toy)).double(), drift=rounding(torch.float64))


# ---- round trip ----------------------------------------------------------------------------------------------------------


@every_pass
def test_spec_round_trip(name):
    spec = Spec.parse(spec_of(name, seed=7))
    assert Spec.parse(json.loads(spec.to_json())) == spec
    assert Spec.parse(spec.to_dict(full=True)) == spec


@every_toy
@every_pass
def test_save_load_export(name, toy, tmp_path):
    live = wake(rewritten(name, toy))
    again = load(model_of(toy), save(live, tmp_path / "saved"), [class_of(one) for one in OUTSIDE], TOYS[toy].inputs(2, 7))
    close(reference=TOYS[toy].output(live), result=TOYS[toy].output(again), drift=0.0)
    if changeable(live):
        rejects(reference=TOYS[toy].output(live), result=TOYS[toy].output(rewritten(name, toy)), drift=0.0)
    assert {n: p.requires_grad for n, p in live.named_parameters()} == {n: p.requires_grad for n, p in again.named_parameters()}
    for number, each in enumerate((live, again)):
        export_onnx(each, tmp_path / f"{number}.onnx")
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


# ---- refuses -------------------------------------------------------------------------------------------------------------


@every_pass
def test_refuses_a_where_that_hits_nothing(name):
    spec = spec_of(name)
    step, place = own(spec)
    step["where"] = "router"
    kind, told = Refused, f'{place}: {name} found no site for "router".  This model has: attention'
    if "where" not in common(class_of(name)):
        kind, told = SpecError, f"{place}: {name} works where the steps of its choose do" if class_of(name).mixes() else f"{place}: {name} works on the whole graph"
    with unchanged(model_of("gated")), pytest.raises(kind, match=re.escape(told)):
        rewrite(model_of("gated"), spec)


@every_pass
def test_refuses_impossible_options(name):
    _, place = own(spec_of(name))
    assert not {f.name for f in dataclasses.fields(class_of(name))} & set(COMMON)
    hints = typing.get_type_hints(class_of(name))
    for option in [f.name for f in dataclasses.fields(class_of(name))]:
        for wrong in ({}, float("nan"), [[]], *([] if type(None) in typing.get_args(hints[option]) else [None])):
            broken = json.loads(json.dumps(spec_of(name)))
            own(broken)[0][option] = wrong
            with pytest.raises(SpecError, match=rf"{re.escape(place)}\.{option}(\[0\])?: expected "):
                rewrite(model_of("gated"), broken)
    broken = json.loads(json.dumps(spec_of(name)))
    own(broken)[0]["no_such_option"] = 1
    with pytest.raises(SpecError, match=rf"{re.escape(place)}.*no_such_option"):
        rewrite(model_of("gated"), broken)


#: larger than any size of the toys, and no multiple of one
HUGE = 131
#: how the engine passes on what torch says
BARE = re.compile(r"(fails here|does not fit here): \w+Error")


def whole_numbers(cls):
    """The options of a pass that are whole numbers."""
    parts = {name: [part, *part.get("anyOf", ())] for name, part in options_schema(cls).get("properties", {}).items()}
    return [name for name, of in parts.items() if any(each.get("type") == "integer" for each in of)]


@every_pass
def test_huge_sizes_work_or_are_refused_in_words(name):
    toy = next(toy for toy in TOYS if accepts(name, toy))
    for option in whole_numbers(class_of(name)):
        spec = spec_of(name)
        own(spec)[0][option] = HUGE
        try:
            pipeline.apply(captured(model_of(toy), TOYS[toy].inputs(2, 7)), Spec.parse(spec))
        except (SpecError, Refused) as reason:
            assert not BARE.search(str(reason)), f"{name}: {option} {HUGE}: refuse() should say why, in words: {reason}"
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise AssertionError(f"{name}: {option} {HUGE}: refuse() should say why, in words: {type(error).__name__}: {error}") from error


# ---- leaves the rest -----------------------------------------------------------------------------------------------------


def reads(value, made):
    """The node itself, or, for one that a pass made, the captured nodes and made ones behind it."""
    found, todo = set(), [value]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes if node in made else []
    return {node.name for node in found} | {name for node in found for name in node.meta.get("fused", ())}


@every_toy
@every_pass
def test_leaves_other_nodes(name, toy):
    live, before = shared(name, toy), untouched(toy)
    graph = live.graph
    old = [n for n in before.nodes if n.op != "get_attr"]
    new = {n.name: n for n in graph.nodes}
    made = {n for n in graph.nodes if "made" in n.meta}
    fused = {name for n in graph.nodes for name in n.meta.get("fused", ())}
    old = [n for n in old if n.name not in fused]
    assert [n.name for n in old] == [n.name for n in graph.nodes if n.op != "get_attr" and n not in made]
    for node in old:
        twin = new[node.name]
        assert (twin.op, twin.target, set(twin.kwargs)) == (node.op, node.target, set(node.kwargs))
        given, now = node.all_input_nodes, twin.all_input_nodes
        if True in node.args and True not in twin.args:  # a causal attention whose mask is written out
            now = [b for b in now if b not in made or b.meta["val"].dtype is not torch.bool]
        assert len(given) == len(now), line(twin, graph.root)
        for a, b in zip(given, now):
            if a.op == "get_attr" and a.target in live.report.released:
                assert b in made and not live.report.released.keys() & reads(b, made)
                continue
            assert a.target == b.target if a.op == "get_attr" == b.op else a.name == b.name or (b in made and a.name in reads(b, made)), line(twin, graph.root)
        if all(a.name == b.name for a, b in zip(given, now)):
            assert line(twin).partition("  ")[0] == line(node).partition("  ")[0]


@every_toy
@every_pass
def test_leaves_the_model(name, toy):
    model, example = model_of(toy), TOYS[toy].inputs(2, 7)
    output, noise = TOYS[toy].output(model), torch.get_rng_state()
    shared(name, toy)
    with unchanged(model):
        live = anew(name, toy)
        assert torch.equal(noise, torch.get_rng_state())
        assert set(model.state_dict()) - set(live.report.released) <= set(live.state_dict())
        spec = {"passes": [*spec_of(name)["passes"], {"pass": "unfreeze", "where": "model"}]}
        if class_of(name).no_grad:  # nothing below its sites can train
            with pytest.raises(Refused, match="runs without gradients"):
                rewrite(model, spec, example=example)
        else:
            train(rewrite(model, spec, example=example).train(), TOYS[toy].loss, steps=2)
        try:
            wake(live)
            merge(live)
        except Refused:
            pass  # what does not merge says so in test_merges
        live.to(torch.bfloat16)
        live.requires_grad_(True)
    close(reference=output, result=TOYS[toy].output(model), drift=0.0)


@every_toy
@every_pass
def test_same_spec_same_text(name, toy):
    one, two = shared(name, toy), anew(name, toy)
    assert show(one.graph) == show(two.graph)
    for path in one.report.made:
        assert torch.equal(tensor_of(one, path), tensor_of(two, path)), path
    other = anew(name, toy, seed=1)
    assert show(one.graph) == show(other.graph)
    for path in one.report.made:
        if tensor_of(one, path).unique().numel() == 1:
            assert torch.equal(tensor_of(one, path), tensor_of(other, path)), path
