"""Inputs beside the model's own: bound, checked, handed on by `generate` and trainers, named by exports; the hypernetwork that reads one."""

import copy
import inspect
import math
import pickle
from dataclasses import dataclass

import onnxruntime
import pytest
import torch
import transformers as T
from checks import TOYS, close, model_of, rejects, rounding, tensor_of, train, wake
from models import build
from torch.nn import functional as F

from rewrite import Pass, Refused, Spec, export_onnx, load, rewrite, save, show
from rewrite.contract import Input
from rewrite.emit.program import export_program

HYPERFORMER = {"pass": "hyperformer", "tasks": 3, "bottleneck": 6, "embedding": 5, "hidden": 9}
TASKS = torch.tensor([2, 0, 1])


def hyper(family="llama", **more):
    return wake(rewrite(build(family), {"passes": [{**HYPERFORMER, **more}]})).eval()


def ids(batch=3, length=7, seed=0):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Scaled(Pass):
    """Another pass with the same input: each row's output scaled by its task's number."""

    tasks: int = 3
    role = "mlp"
    inputs = {"task_ids": Input(values=range(3))}

    def params(self, y):
        return {"by": y.new_zeros(self.tasks, y.shape[-1])}

    def output(self, y, task_ids, by):
        return y * (1 + by.index_select(0, task_ids)).unsqueeze(1)


@dataclass(frozen=True)
class Otherwise(Scaled):
    """The same name, another meaning."""

    inputs = {"task_ids": Input(values=range(5))}


# ---- the paper's formula -------------------------------------------------------------------------------------------------


def by_hand(model, live, ids, tasks, norm=True):
    """The toy `written` with the adapters of Mahabadi et al. in plain loops over rows, in float64."""
    t = {name.rpartition(".")[2]: tensor_of(live, name).detach().double() for name in live.report.made}
    model = copy.deepcopy(model).double()

    def adapter(h, block, place):
        rows = []
        for row, task in zip(h, tasks):
            known = torch.cat([t["task"][task], t["layer"][block], t["place"][place]])
            z = t["mix_out"] @ torch.relu(t["mix_in"] @ known + t["mix_in_bias"]) + t["mix_out_bias"]
            down, up = (t["down"] @ z).reshape(6, 24), (t["up"] @ z).reshape(24, 6)
            a = row @ down.T
            new = (a * 0.5 * (1 + torch.erf(a / math.sqrt(2)))) @ up.T
            if norm:
                new = (new - new.mean(-1, keepdim=True)) / torch.sqrt(new.var(-1, keepdim=True, unbiased=False) + 1e-5)
                new = new * (t["gamma"] @ z) + t["beta"] @ z
            rows.append(row + new)
        return torch.stack(rows)

    x = model.tokens(ids)
    for number, block in enumerate(model.blocks):
        h = block.norm1(x)
        q, k, v = (f(h).unflatten(-1, (block.heads, -1)).transpose(1, 2) for f in (block.query, block.key, block.value))
        attended = (torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)
        x = x + adapter(block.out(attended), number, 0)
        x = x + adapter(block.down(F.gelu(block.up(block.norm2(x)))), number, 1)
    return model.head(model.norm(x).mean(1))


@pytest.mark.parametrize("norm", [True, False])
def test_hyperformer_is_the_papers_formula(norm):
    model, example = model_of("written"), TOYS["written"].inputs(3, 7)
    live = wake(rewrite(model, {"passes": [{**HYPERFORMER, "norm": norm}]}, example).double(), size=0.5)
    wanted = by_hand(model, live, example["ids"], TASKS, norm)
    close(reference=wanted, result=live(example["ids"], task_ids=TASKS), drift=1e-12)
    rejects(reference=wanted, result=live(example["ids"], task_ids=TASKS.flip(0)), drift=1e-12)


def test_each_task_trains_alone():
    """A row's gradient reaches its own task's embedding and what is shared, and no other task's."""
    live = hyper()
    live(input_ids=ids(), labels=ids(), task_ids=torch.tensor([2, 0, 0])).loss.backward()
    rows = live.hyperformer.default.task.grad.abs().sum(1)
    assert rows[0] > 0 and rows[2] > 0 and rows[1] == 0


# ---- calls ---------------------------------------------------------------------------------------------------------------


def test_a_batch_of_tasks_is_each_row_alone():
    live, given = hyper(), ids()
    both = live(input_ids=given, task_ids=TASKS).logits
    for row in range(3):
        close(reference=both[row : row + 1], result=live(input_ids=given[row : row + 1], task_ids=TASKS[row : row + 1]).logits, drift=rounding(torch.float32))
    rejects(reference=both, result=live(input_ids=given, task_ids=TASKS.roll(1)).logits, drift=rounding(torch.float32))


def test_words_for_what_does_not_fit():
    live = hyper()
    for wrong, words in [
        ({}, r"task_ids is missing; the graph takes \(batch\) of int64"),
        ({"task_ids": TASKS[:2]}, r"task_ids is \(2,\), but batch is 3"),
        ({"task_ids": TASKS[:, None]}, r"task_ids is \(3, 1\), the graph takes \(batch\) of int64"),
        ({"task_ids": TASKS.float()}, "task_ids is float32, the graph takes"),
        ({"task_ids": TASKS + 1}, "task_ids holds 3; its entries are 0 to 2"),
        ({"task_ids": TASKS - 1}, "task_ids holds -1; its entries are 0 to 2"),
        ({"task_ids": [0, 1, 2]}, "task_ids is a list"),
    ]:
        with pytest.raises(Refused, match=words):
            live(input_ids=ids(), **wrong)
    close(reference=live(input_ids=ids(), task_ids=TASKS).logits, result=live(input_ids=ids(), task_ids=TASKS.int()).logits, drift=0.0)
    with pytest.raises(Refused, match="task_ids"):
        rewrite(build("llama"), {"passes": []})(input_ids=ids(), task_ids=TASKS)


def test_a_default_stands_for_what_is_left_out():
    live = hyper(tasks=1)
    close(reference=live(input_ids=ids(), task_ids=torch.zeros(3, dtype=torch.long)).logits, result=live(input_ids=ids()).logits, drift=0.0)


def scores(live, given, beams, **more):
    """What `generate` finds for each row: the logits of each step, or the score of the best beam."""
    asked = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    if beams > 1:
        return live.generate(given, **asked, num_beams=beams, output_scores=True, **more).sequences_scores
    return torch.stack(live.generate(given, **asked, output_logits=True, **more).logits, 1)


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_hands_tasks_on(family, beams):
    where = {"where": {"role": "mlp", "path": "decoder.**" if family == "t5" else "**"}}
    live, given = hyper(family, **where), ids()
    together = scores(live, given, beams, task_ids=TASKS)
    alone = [scores(live, given[row : row + 1], beams, task_ids=TASKS[row : row + 1]) for row in range(3)]
    close(reference=together, result=torch.cat(alone), drift=rounding(torch.float32))
    rejects(reference=together, result=scores(live, given, beams, task_ids=TASKS.roll(1)), drift=rounding(torch.float32))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_an_encoder_and_a_decoder_each_take_what_they_need(side):
    live = hyper("t5", where={"role": "mlp", "path": f"{side}.**"})
    names = {graph.name for graph in live.graph.all() if "task_ids" in graph.inputs}
    assert names == {"encoder": {"forward", "encoder"}, "decoder": {"forward", "first", "next"}}[side]
    given, target = ids(), ids(3, 4, seed=1)
    whole = live(input_ids=given, decoder_input_ids=target, task_ids=TASKS, use_cache=False).logits
    parts = live(input_ids=given, decoder_input_ids=target, task_ids=TASKS, use_cache=True).logits
    close(reference=whole, result=parts, drift=rounding(torch.float32))
    rejects(reference=whole, result=live(input_ids=given, decoder_input_ids=target, task_ids=TASKS.roll(1), use_cache=True).logits, drift=rounding(torch.float32))
    generated = live.generate(given, task_ids=TASKS, num_beams=2, do_sample=False, max_new_tokens=4)
    assert generated.shape[0] == 3


def test_trainer_keeps_the_column(tmp_path):
    live = hyper()
    assert "task_ids" in inspect.signature(live.forward).parameters
    rows = [{"input_ids": row, "labels": row, "task_ids": torch.tensor(i % 3), "elsewhere": 1} for i, row in enumerate(ids(6))]

    class Columns(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, i):
            return rows[i]

    trainer = T.Trainer(live, T.TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=3, report_to=[], use_cpu=True, disable_tqdm=True), train_dataset=Columns())
    kept = next(iter(trainer.get_train_dataloader()))
    assert {"input_ids", "labels", "task_ids"} <= kept.keys() and "elsewhere" not in kept
    before = live.hyperformer.default.task.detach().clone()
    trainer.train()
    assert not torch.equal(before, live.hyperformer.default.task)


def test_it_learns_what_only_the_task_tells():
    """The same words, another class for each task: without the input no model could."""
    toy, model = TOYS["written"], model_of("written")
    live = rewrite(model, {"passes": [HYPERFORMER]}, toy.inputs(3, 7))
    given = toy.inputs(1, 7)["ids"].expand(3, -1)
    loss = lambda live, tasks=TASKS: F.cross_entropy(live(given, task_ids=tasks), TASKS)  # noqa: E731
    assert train(live, loss, steps=60)[-1] < 0.2
    assert train(rewrite(model, {"passes": [HYPERFORMER]}, toy.inputs(3, 7)), lambda live: loss(live, TASKS * 0), steps=60)[-1] > 1.0


# ---- sharing, refusals ---------------------------------------------------------------------------------------------------


def test_two_passes_share_one_input():
    spec = Spec.parse({"passes": [HYPERFORMER, {"pass": "scaled"}]}, passes=[Scaled])
    live = wake(rewrite(build("llama"), spec))
    assert live.graph.inputs.count("task_ids") == 1 and "%task_ids: input" in show(live.graph)
    logits = live(input_ids=ids(), task_ids=TASKS).logits
    rejects(reference=logits, result=live(input_ids=ids(), task_ids=TASKS.roll(1)).logits, drift=rounding(torch.float32))
    with pytest.raises(Refused, match="another pass has an input 'task_ids'"):
        rewrite(build("llama"), Spec.parse({"passes": [HYPERFORMER, {"pass": "otherwise"}]}, passes=[Otherwise]))


def test_what_cannot_have_an_input_says_so():
    @dataclass(frozen=True)
    class Taken(Scaled):
        inputs = {"attention_mask": Input()}

        def output(self, y, attention_mask, by):
            return y * (1 + by.index_select(0, attention_mask)).unsqueeze(1)

    with pytest.raises(Refused, match="the model has an input 'attention_mask' of its own"):
        rewrite(build("llama"), Spec.parse({"passes": [{"pass": "taken"}]}, passes=[Taken]))
    with pytest.raises(Refused, match='the same layer and place.*"path"'):
        hyper("t5")


# ---- what leaves the process ---------------------------------------------------------------------------------------------


def test_exports_name_it(tmp_path):
    live, given = hyper(), ids()
    for cache in (False, True):
        report = export_onnx(live, tmp_path / f"{cache}.onnx", cache=cache)
        assert "task_ids" in report.inputs
    runner = onnxruntime.InferenceSession(tmp_path / "False.onnx")
    feeds = {"input_ids": given, "attention_mask": torch.ones_like(given), "position_ids": torch.arange(7).expand(3, 7)}
    feeds = {item.name: {**feeds, "task_ids": TASKS}[item.name].numpy() for item in runner.get_inputs()}
    logits = live(input_ids=given, task_ids=TASKS).logits.detach()
    close(reference=logits, result=torch.from_numpy(runner.run(["logits"], feeds)[0]), drift=2e-5)
    feeds["task_ids"] = TASKS.roll(1).numpy()
    rejects(reference=logits, result=torch.from_numpy(runner.run(["logits"], feeds)[0]), drift=2e-5)
    module = torch.export.load(export_program(live, tmp_path / "live.pt2")).module()
    named = {name: torch.from_numpy(value) for name, value in feeds.items()} | {"task_ids": TASKS}
    close(reference=logits, result=module(**named)["logits"], drift=rounding(torch.float32))


def test_copies_know_it(tmp_path):
    live, given = hyper(), ids()
    logits = live(input_ids=given, task_ids=TASKS).logits
    for twin in (load(build("llama"), save(live, tmp_path / "saved")), copy.deepcopy(live), pickle.loads(pickle.dumps(live))):
        close(reference=logits, result=twin(input_ids=given, task_ids=TASKS).logits, drift=0.0)
        with pytest.raises(Refused, match="task_ids is missing"):
            twin(input_ids=given)
