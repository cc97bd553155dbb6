"""Each invariant, with a graph that violates it: what it says names the node or tensor, and the pass that is to blame."""

import operator

import pytest
import torch
from checks import TOYS, captured, model_of
from torch import nn

from rewrite import Broken, Refused, Spec, pipeline, rewrite, show
from rewrite import graph as g
from rewrite.report import Report
from rewrite.verify import INVARIANTS, Record, verify

aten = torch.ops.aten
LORA = {"passes": [{"pass": "lora", "where": "attention.q", "rank": 4}]}


class Case:
    """The graph of a toy, and the Record of what must stay of it."""

    def __init__(self, toy="written", spec=None):
        self.graph = captured(model_of(toy), TOYS[toy].inputs(2, 7))
        self.record = Record.of(self.graph, Report(), self.graph.all())
        self.record.report = pipeline.apply(self.graph, Spec.parse(spec or {"passes": []}))

    def find(self, target):
        return next(n for n in self.graph.nodes if n.target is target)

    def after(self, node, target, args, value=None):
        """A new node right after `node`, made by a pass called "broken", in whose place it is read."""
        with self.graph.fx.inserting_after(node):
            new = self.graph.fx.call_function(target, args)
        new.meta = {"path": "", "made": "broken", "val": node.meta["val"] if value is None else value}
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return new

    def says(self, invariant, *words):
        with pytest.raises(Broken) as caught:
            verify(self.graph, self.record, "broken")
        text = str(caught.value)
        assert text.startswith(f'after pass "broken": {invariant}: '), text
        for word in words:
            assert word in text, text


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("spec", [None, LORA])
def test_sound_graphs_pass(toy, spec):
    case = Case(toy, spec)
    for part in case.graph.all():
        verify(part, Record.of(part, case.record.report, case.graph.all()), "sound")


def test_every_invariant_has_its_test():
    tested = {name.removeprefix("test_broken_").rpartition("__")[0] or name.removeprefix("test_broken_") for name in globals() if name.startswith("test_broken_")}
    assert tested == {invariant.__name__ for invariant in INVARIANTS}


def test_broken_lint():
    case = Case()
    linear = case.find(aten.linear.default)
    linear.args = (next(reversed(linear.users)), *linear.args[1:])  # reads what comes after it
    case.says("lint", linear.name)


def test_broken_canonical__foreign_function():
    case = Case()
    linear = case.find(aten.linear.default)
    case.after(linear, torch.relu, (linear,))
    case.says("canonical", "relu", "neither an ATen op")


def test_broken_canonical__method():
    case = Case()
    linear = case.find(aten.linear.default)
    with case.graph.fx.inserting_after(linear):
        case.graph.fx.call_method("relu", (linear,)).meta = {"val": linear.meta["val"]}
    case.says("canonical", "a method call")


def test_broken_canonical__module():
    case = Case()
    linear = case.find(aten.linear.default)
    with case.graph.fx.inserting_after(linear):
        case.graph.fx.call_module("norm", (linear,)).meta = {"val": linear.meta["val"]}
    case.says("canonical", "not opaque")


def test_broken_canonical__outputs():
    case = Case()
    output = next(reversed(case.graph.nodes))
    output.args = (output.args[0][0],)
    case.says("canonical", "one flat tuple")


def test_broken_constants_exist():
    case = Case()
    g.remove(case.graph.root, "head.bias")
    case.says("constants_exist", "@head.bias is not on the module tree")


def test_broken_constants_exist__twice():
    case = Case()
    read = next(n for n in case.graph.nodes if n.target == "head.bias")
    with case.graph.fx.inserting_before(read):
        case.graph.fx.create_node("get_attr", "head.bias").meta = dict(read.meta)
    case.says("constants_exist", "@head.bias stands twice")


def test_broken_shapes_agree():
    case = Case()
    linear = case.find(aten.linear.default)
    case.after(linear, aten.transpose.int, (linear, -1, -2))
    case.says("shapes_agree", "transpose")


def test_broken_shapes_agree__dtype():
    case = Case()
    linear = case.find(aten.linear.default)
    case.after(linear, aten.to.dtype, (linear, torch.float64))
    case.says("shapes_agree", "float64")


def test_broken_shapes_agree__does_not_run():
    case = Case()
    linear = case.find(aten.linear.default)
    case.after(linear, aten.mm.default, (linear, linear))
    case.says("shapes_agree", "mm(")


def test_broken_signature_kept__input():
    case = Case()
    with case.graph.fx.inserting_after(case.graph.placeholders[-1]):
        case.graph.fx.placeholder("task").meta = dict(case.graph.placeholders[-1].meta)
    case.says("signature_kept", "'task'")


def test_broken_signature_kept__output():
    case = Case()
    output = next(reversed(case.graph.nodes))
    output.args = ((*output.args[0], case.find(aten.linear.default)),)
    case.says("signature_kept", "1 outputs before, now 2")


def test_broken_no_orphans():
    case = Case(spec=LORA)
    g.install(case.graph.root, "head.lora.default.down", nn.Parameter(torch.zeros(2, 24)))
    case.record.report.made["head.lora.default.down"] = "lora"
    case.says("no_orphans", "@head.lora.default.down was made, and nothing reads it")


def test_broken_aliases_kept():
    case = Case("looped")
    root = case.graph.root
    assert root.head.weight is root.tokens.weight
    root.head.weight = nn.Parameter(root.head.weight.detach().clone(), requires_grad=False)
    case.says("aliases_kept", "tokens.weight and head.weight were one tensor, now they are 2")


def test_broken_grads_declared():
    case = Case(spec=LORA)
    case.graph.root.head.weight.requires_grad_(True)
    case.says("grads_declared", "@head.weight would train, and no pass said so")


class Deep(nn.Module):
    """Eighteen blocks that are alike."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)) for _ in range(18))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("how", ("shape", "size of its own tensor", "freed", "unread", "gone"))
def test_one_copy_of_a_block_is_broken(how):
    """That seventeen others are sound says nothing of the eighteenth."""
    case = Case.__new__(Case)
    case.graph = captured(Deep().eval(), {"x": torch.randn(2, 6)})
    case.record = Record.of(case.graph, Report(), case.graph.all())
    case.record.report = pipeline.apply(case.graph, Spec.parse({"passes": [{"pass": "lora", "where": "linear", "rank": 4}]}))
    verify(case.graph, case.record, "sound")
    path = "layers.16.0.lora.default.down"
    read = next(n for n in case.graph.nodes if n.target == path)
    (use,) = read.users
    if how == "shape":
        case.after(use, aten.transpose.int, (use, -1, -2))
        case.says("shapes_agree", "transpose")
    elif how == "size of its own tensor":
        read.meta = {**read.meta, "val": next(n for n in case.graph.nodes if n.target == "layers.16.2.lora.default.down").meta["val"]}
        case.says("shapes_agree", "linear")
    elif how == "freed":
        case.graph.root.get_parameter("layers.16.0.weight").requires_grad_(True)
        case.says("grads_declared", "@layers.16.0.weight would train")
    elif how == "unread":
        use.args = (use.args[0], next(n for n in case.graph.nodes if n.target == "layers.15.0.lora.default.down"))
        case.says("no_orphans", f"@{path} was made, and nothing reads it")
    else:
        g.remove(case.graph.root, path)
        case.says("constants_exist", f"@{path} is not on the module tree")


# ---- through the pipeline --------------------------------------------------------------------------------------------------


def test_the_error_shows_what_the_pass_changed():
    case = Case()
    before, linear = show(case.graph), case.find(aten.linear.default)
    case.after(linear, operator.matmul, (linear, linear))
    with pytest.raises(Broken) as caught:
        verify(case.graph, case.record, "broken", before)
    text = str(caught.value)
    assert "--- before broken" in text and "+++ after broken" in text and "\n+%matmul_4 = matmul(%linear, %linear)" in text


def test_a_pass_that_breaks_the_graph_is_named(monkeypatch):
    """A fault of the engine under a pass is Broken, not a live model that is wrong."""
    from rewrite.passes.freeze import Freeze

    monkeypatch.setattr(pipeline, "capture", captured)

    def apply(self, edit, sites):
        edit.graph.root.head.weight.requires_grad_(True)
        return ()

    monkeypatch.setattr(Freeze, "apply", apply)
    with pytest.raises(Broken, match=r'after pass "freeze": grads_declared: @head\.weight would train'):
        rewrite(model_of("written"), {"passes": [{"pass": "freeze", "where": "norm"}]}, example=TOYS["written"].inputs(2, 7))


def test_refusals_are_not_faults():
    assert not issubclass(Refused, Broken) and not issubclass(Broken, Refused)
