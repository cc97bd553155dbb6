"""Methods that act while training, step by step: PEFT as the oracle where it has them, a formula written anew elsewhere."""

import copy

import peft
import pytest
import torch
from checks import TOYS, captured, close, model_of, rejects, rounding, tensor_of, unchanged
from loops import base, batch, ce, ours, run, same, state, stir, tuned
from peft.optimizers import create_loraplus_optimizer
from torch.nn import functional as F

from rewrite import Refused, SpecError, compact, load, merge, pipeline, rewrite, save, training

EXACT = rounding(torch.float64)
#: transformers computes losses in float32 whatever the model is in
SINGLE = rounding(torch.float32)
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


# ---- adalora ---------------------------------------------------------------------------------------------------------------

RANK, TARGET, STEPS, WARMUP, FINAL, EVERY = 6, 3, 24, 4, 6, 3
ADALORA = {"pass": "adalora", "where": "attention.{q,v}", "steps": STEPS, "rank": RANK, "target": TARGET, "warmup": WARMUP, "final": FINAL, "every": EVERY, "alpha": 8.0 * RANK / (RANK + 1e-5)}
NAMES = {"down": "lora_A", "scale": "lora_E", "up": "lora_B"}


def peft_adalora():
    torch.manual_seed(1)
    config = peft.AdaLoraConfig(init_r=RANK, target_r=TARGET, total_step=STEPS, tinit=WARMUP, tfinal=FINAL, deltaT=EVERY, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")
    return peft.get_peft_model(copy.deepcopy(base()), config).double().train()


def tensors_of(wrapped, live):
    """(PEFT's tensor, ours), turned alike, for each tensor of each site."""
    theirs = dict(wrapped.base_model.model.named_parameters())
    for path, _ in live.named_parameters():
        site, _, name = path.rpartition(".adalora.default.")
        if site:
            yield path, theirs[f"{site}.{NAMES[name]}.default"], tensor_of(live, path)


def test_adalora_is_peft_s():
    """24 steps with a falling budget: the same masks after each step, the same losses, the same weights at the end."""
    wrapped, live, broken = peft_adalora(), tuned(ADALORA), tuned({**ADALORA, "target": TARGET + 1})
    with torch.no_grad():
        for twin in (live, broken):
            for _, theirs, ours in tensors_of(wrapped, twin):
                ours.copy_(theirs.view(ours.shape))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 0.2, momentum=0.9)  # Adam would blow the rounding of losses up
    t, other = training(live), training(broken)
    ours, others = (one.optimizer(torch.optim.SGD, 0.2, momentum=0.9) for one in (t, other))
    differed = False
    for i in range(STEPS):
        loss = wrapped(**batch(i)).loss
        loss.backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(i)
        optimizer.zero_grad()
        mine = t.step(ours, lambda: live(**batch(i)))
        other.step(others, lambda: broken(**batch(i)))
        close(reference=loss, result=(mine + t.penalty).to(loss.dtype), drift=SINGLE)
        scales = [(theirs.view(-1), scale, tensor_of(broken, path)) for path, theirs, scale in tensors_of(wrapped, live) if path.endswith("scale")]
        for theirs, scale, twin in scales:
            assert torch.equal(theirs == 0, scale == 0), i
            differed = differed or not torch.equal(theirs == 0, twin == 0)
    assert sum(int(scale.count_nonzero()) for _, scale, _ in scales) == TARGET * len(scales)
    assert len({int(scale.count_nonzero()) for _, scale, _ in scales}) > 1, "ranks were allotted site by site"
    assert differed
    for path, theirs, ours in tensors_of(wrapped, live):
        close(reference=theirs.view(ours.shape), result=ours, drift=SINGLE)
    rejects(reference=torch.cat([theirs for theirs, _, _ in scales]), result=torch.cat([twin for _, _, twin in scales]), drift=SINGLE)


def test_a_compact_adalora_has_the_ranks_that_were_allotted():
    short = {**ADALORA, "steps": 10, "warmup": 2, "final": 3, "every": 2}
    live = tuned(short)
    run(live, 10)
    small = compact(live)
    ranks = [len(tensor_of(small, path)) for path in small.report.made if path.endswith("scale")]
    assert sum(ranks) == 4 * TARGET and len(set(ranks)) > 1
    close(reference=ours(live).logits, result=ours(small).logits, drift=EXACT)
    rejects(reference=ours(base()).logits, result=ours(small).logits, drift=EXACT)
    fresh = compact(tuned(short))
    assert {len(tensor_of(fresh, path)) for path in fresh.report.made if path.endswith("scale")} == {RANK}, "none is cut before training"


# ---- one method after the other ----------------------------------------------------------------------------------------------


def test_lora_plus_is_peft_s():
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION)
    wrapped = peft.get_peft_model(copy.deepcopy(base()), config).double().train()
    spec = {"pass": "lora", "where": "attention.{q,v}", "rank": 4}
    live, equal = tuned({**spec, "lr_ratio": 16.0}), tuned(spec)
    theirs = dict(wrapped.base_model.model.named_parameters())
    twin = lambda path: theirs[path.replace(".lora.default.down", ".lora_A.default.weight").replace(".lora.default.up", ".lora_B.default.weight")]  # noqa: E731
    with torch.no_grad():
        for one in (live, equal):
            for path in one.report.made:
                tensor_of(one, path).copy_(twin(path))
    optimizer = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=16.0)
    mine, other = (training(one).optimizer(torch.optim.AdamW, 2e-3, weight_decay=0.0) for one in (live, equal))
    assert "steps_done" not in live.state_dict() and not equal.report.hooked
    for i in range(5):
        ours(wrapped, i).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        training(live).step(mine, lambda: ours(live, i))
        training(equal).step(other, lambda: ours(equal, i))
    for path in live.report.made:
        close(reference=twin(path), result=tensor_of(live, path), drift=EXACT)
    rejects(reference=twin(path), result=tensor_of(equal, path), drift=EXACT)


DYLORA = {"pass": "dylora", "where": "attention.{q,v}", "rank": 5, "alpha": 3.0}


def test_dylora_at_a_rank_is_lora_of_that_rank():
    live = stir(tuned(DYLORA)).eval()
    with pytest.raises(Refused, match="dylora: rank 6 was not trained: choose one from 1 to 5"):
        training(live).choose(rank=6)
    for rank in (1, 3, 5):
        training(live).choose(rank=rank)
        lora = tuned({"pass": "lora", "where": "attention.{q,v}", "rank": rank, "alpha": 3.0}).eval()
        with torch.no_grad():
            for path in lora.report.made:
                whole = tensor_of(live, path.replace(".lora.", ".dylora."))
                tensor_of(lora, path).copy_(whole[:rank] if path.endswith("down") else whole[:, :rank])
        close(reference=ours(lora).logits, result=ours(live).logits, drift=EXACT)
        close(reference=ours(lora).logits, result=ours(merge(live)).logits, drift=EXACT)
        training(live).choose(rank=rank % 5 + 1)
        rejects(reference=ours(lora).logits, result=ours(live).logits, drift=EXACT)


@pytest.mark.parametrize("only_last", [False, True])
def test_a_step_of_dylora_trains_the_rows_of_its_rank(only_last):
    live = stir(tuned({**DYLORA, "lowest": 2, "only_last": only_last}))
    t, drawn = training(live), set()
    optimizer = t.optimizer(torch.optim.SGD, 0.1)
    for i in range(12):
        before = state(live)
        t.step(optimizer, lambda: ours(live, i))
        rank = int(live.dylora.default.pick.count_nonzero())
        drawn.add(rank)
        for path, parameter in live.named_parameters():
            if parameter.requires_grad:
                moved = (parameter != before[path]).flatten(1).any(1) if path.endswith("down") else (parameter != before[path]).any(0)
                assert moved.tolist() == [rank - 1 <= row < rank if only_last else row < rank for row in range(5)], path
    assert drawn == {2, 3, 4, 5}


def test_a_choice_compiles_once():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    live, counter = tuned(DYLORA), CompileCounter()
    compiled = torch.compile(live, backend=counter, fullgraph=True)
    t = training(compiled)
    optimizer = t.optimizer(torch.optim.SGD, 0.1)
    picks = set()
    for i in range(4):
        t.step(optimizer, lambda: ce(compiled(input_ids=batch(i)["input_ids"]).logits, batch(i)["labels"]))
        picks.add(tuple(live.dylora.default.pick.tolist()))
    assert len(picks) > 1 and counter.frame_count == 1


PERIODIC = {"pass": "periodic_lora", "where": "attention.{q,v}", "rank": 2, "every": 4}


@pytest.mark.parametrize("momentum", [0.0, 0.25])
def test_periodic_lora_folds_and_begins_again(momentum, tmp_path):
    live = tuned({**PERIODIC, "momentum": momentum})
    t = training(live)
    optimizer = t.optimizer(torch.optim.AdamW, 0.01, weight_decay=0.0)
    path = "model.layers.1.self_attn.v_proj"
    place, first = f"{path}.periodic_lora.default", tensor_of(base(), f"{path}.weight").detach()
    with unchanged(base()):
        for i in range(3):
            t.step(optimizer, lambda: ours(live, i))
        assert torch.equal(first, tensor_of(live, f"{path}.weight"))
        t.before_forward()
        ours(live, 3).loss.backward()
        optimizer.step()
        up, down, unfolded = tensor_of(live, f"{place}.up").clone(), tensor_of(live, f"{place}.down").clone(), ours(live).logits.detach()
        t.after_step(optimizer)
        optimizer.zero_grad()
        close(reference=unfolded, result=ours(live).logits, drift=EXACT)
        close(reference=first + (1 - momentum) * 16.0 / 2 * up @ down, result=tensor_of(live, f"{path}.weight"), drift=EXACT)
        assert torch.equal(tensor_of(live, f"{place}.up"), momentum * up) and torch.equal(tensor_of(live, f"{place}.down"), down) == (momentum > 0)
        assert bool(optimizer.state[tensor_of(live, f"{place}.up")]) == (momentum > 0)
        for i in range(8):
            t.step(optimizer, lambda: ours(live, i))
        assert torch.linalg.matrix_rank((tensor_of(live, f"{path}.weight") - first).float(), rtol=1e-5) == (6 if not momentum else 6)
        assert not tensor_of(live, f"{path}.weight").requires_grad
    again = load(base(), save(live, tmp_path / "saved")).train()
    close(reference=ours(live).logits, result=ours(again).logits, drift=0.0)
    rejects(reference=first, result=tensor_of(live, f"{path}.weight"), drift=EXACT)


def test_what_a_hook_writes_is_not_tied():
    with pytest.raises(Refused, match=r"periodic_lora at head \(20×24\): its weight is tied: another operation would see what is written into it"):
        rewrite(model_of("looped"), {"passes": [{**PERIODIC, "where": "head"}]}, example=TOYS["looped"].inputs(2, 7))
    live = rewrite(model_of("looped"), {"passes": [{**PERIODIC, "every": 1}]}, example=TOYS["looped"].inputs(2, 7))  # a block that is used twice is one site
    t = training(live)
    t.step(t.optimizer(torch.optim.SGD, 0.1), lambda: TOYS["looped"].loss(live))
    up = next(path for path in live.report.made if path.endswith("up"))
    assert not tensor_of(live, up).any() and len(live.report.hooked["passes[0]"].sites) == 2


def test_sora_takes_proximal_steps():
    live = stir(tuned({"pass": "sora", "where": "attention.{q,v}", "rank": 6, "sparsity": 2.0}), kinds=("down", "up"), size=1.0)
    t = training(live)
    optimizer = t.optimizer(torch.optim.SGD, 0.2)
    gates = [path for path in live.report.made if path.endswith("gate")]
    for i in range(6):
        before = {path: tensor_of(live, path).detach().clone() for path in gates}
        grads = torch.autograd.grad(ours(live, i).loss, [tensor_of(live, path) for path in gates])
        t.step(optimizer, lambda: ours(live, i))
        for path, grad in zip(gates, grads):
            moved = before[path] - 0.2 * grad
            expected = moved.sign() * (moved.abs() - 0.2 * 2.0).clamp(min=0)
            close(reference=expected, result=tensor_of(live, path), drift=EXACT)
            if i == 0:
                rejects(reference=moved, result=tensor_of(live, path), drift=EXACT)
    assert 0 < sum(int(tensor_of(live, path).count_nonzero()) for path in gates) < 6 * len(gates)


def test_compact_leaves_out_what_is_zero(tmp_path):
    live = stir(tuned({"pass": "sora", "where": "attention.{q,v,o}", "rank": 6}, {"pass": "unfreeze", "where": "head"}), size=0.5)
    sites = next(iter(live.report.hooked.values())).views(live)
    with torch.no_grad():
        live.lm_head.weight.mul_(1.1)
        for zeros, site in zip((3, 6, 1, 3, 0, 6), sites):
            site.gate[:zeros] = 0
    small = compact(live)
    close(reference=ours(live).logits, result=ours(small).logits, drift=EXACT)
    ranks = {path: len(tensor_of(small, path)) for path in small.report.made if path.endswith("gate")}
    assert sorted(ranks.values()) == [3, 3, 5, 6] and len(small.spec.passes) == 4
    assert small.spec.to_dict()["passes"][0]["rank"] == 3 and len(small.spec.passes[0].where) == 2
    again = load(base(), save(small, tmp_path / "small")).train()
    close(reference=ours(small).logits, result=ours(again).logits, drift=0.0)
    before = state(live)
    run(small, 2)
    same(before, state(live))
    close(reference=ours(compact(small)).logits, result=ours(small).logits, drift=EXACT)
    with torch.no_grad():
        tensor_of(again, next(path for path in small.report.made if path.endswith("gate")))[0] = 0
    rejects(reference=ours(live).logits, result=ours(again).logits, drift=EXACT)
    with pytest.raises(Refused, match="compact: a merge has changed the base weights. Compact before you merge."):
        compact(tuned({"pass": "lora", "where": "attention.q", "rank": 2}, {"pass": "merge"}, {"pass": "sora", "where": "attention.v", "rank": 2}))
    with pytest.raises(Refused, match="compact: no pass of this model leaves anything out. Its passes: lora"):
        compact(tuned({"pass": "lora", "where": "attention.q", "rank": 2}))


def test_adamix_runs_one_copy_in_training_and_the_mean_elsewhere():
    model, inputs = model_of("written"), TOYS["written"].inputs(2, 7)
    live = rewrite(model, {"passes": [{"pass": "adamix", "where": "mlp", "copies": 3, "width": 5}]}, example=inputs)
    stir(live)
    t = training(live)
    seen = set()
    sites = next(iter(live.report.hooked.values())).views(live)
    for mode in (True, True, True, False):
        live.train(mode)
        t.before_forward()
        g_done = tensor_of(live, "steps_done")
        g_done += 1
        adapters = []
        for site in sites:
            i, j = int(site.pick_down.argmax()), int(site.pick_up.argmax())
            seen.add((i, j))
            take = (lambda each, at: each[at]) if mode else (lambda each, at: each.mean(0))
            adapters.append([take(each, at).detach() for each, at in ((site.down, i), (site.down_bias, i), (site.up, j), (site.up_bias, j))])
        twin = copy.deepcopy(model)
        for block, (down, down_bias, up, up_bias) in zip(twin.blocks, adapters):
            block.down.register_forward_hook(lambda m, a, y, d=down, db=down_bias, u=up, ub=up_bias: y + F.linear(F.gelu(F.linear(y, d, db)), u, ub))
        close(reference=TOYS["written"].output(twin), result=TOYS["written"].output(live), drift=SINGLE)
        rejects(reference=TOYS["written"].output(twin), result=TOYS["written"].output(live.train(not mode)), drift=SINGLE)
    assert len(seen) > 2


def test_adamix_asks_two_runs_to_agree():
    live = stir(tuned({"pass": "adamix", "where": "mlp", "copies": 3, "width": 5, "consistency": 0.7}))
    t, runs = training(live), []

    def forward():
        runs.append(ours(live))
        return runs[-1]

    t.before_forward()
    loss = t.loss(forward)
    p, q = (run.logits.softmax(-1) for run in runs)
    divergence = 0.5 * ((p * (p / q).log()).sum(-1).mean() + (q * (q / p).log()).sum(-1).mean())
    assert len(runs) == 2 and divergence > 0
    close(reference=runs[0].loss + 0.7 * divergence, result=loss, drift=EXACT)
    rejects(reference=runs[0].loss + 0.35 * divergence, result=loss, drift=EXACT)
    with pytest.raises(Refused, match="adamix: its two runs are compared by their logits"):
        t.loss(lambda: ours(live).loss)


def test_mezo_is_the_paper_s_formula():
    lora = {"pass": "lora", "where": "attention.{q,v}", "rank": 3}
    live, twin = stir(tuned(lora, {"pass": "mezo", "epsilon": 1e-2})), stir(tuned(lora))
    t = training(live)
    optimizer = t.optimizer(torch.optim.SGD, 0.05, weight_decay=0.1)
    names = [name for name, p in twin.named_parameters() if p.requires_grad]
    for i in range(3):
        seed = t._generator(live.report.hooked["passes[1]"], "step").initial_seed()
        mine = t.step(optimizer, lambda: ours(live, i))
        assert all(p.grad is None for p in live.parameters())
        generator = torch.Generator().manual_seed(seed)
        z = {name: torch.randn(tensor_of(twin, name).shape, generator=generator, dtype=torch.float64) for name in names}
        at = lambda length: torch.func.functional_call(twin, {name: tensor_of(twin, name).detach() + length * z[name] for name in names}, kwargs={"input_ids": batch(i)["input_ids"]}).logits  # noqa: E731
        above, below = (ce(at(length), batch(i)["labels"]) for length in (1e-2, -1e-2))
        slope = (above - below) / 2e-2
        close(reference=(above + below) / 2, result=mine, drift=EXACT)
        for name in names:
            value = tensor_of(twin, name)
            broken = value.detach() - 0.05 * slope * z[name]
            value.data = value.detach() - 0.05 * (slope * z[name] + 0.1 * value.detach())
            close(reference=value, result=tensor_of(live, name), drift=1e-9)
            rejects(reference=broken, result=tensor_of(live, name), drift=1e-9)
    assert t.done == 3
    with pytest.raises(Refused, match="mezo and mezo each want a step of their own"):
        twice = tuned(lora, {"pass": "mezo"}, {"pass": "mezo"})
        training(twice).step(optimizer, lambda: ours(twice))


@pytest.mark.parametrize("structured", [False, True])
def test_diff_pruning_s_gates_and_penalty(structured):
    live = stir(tuned({"pass": "diff_pruning", "where": "attention.{q,v}", "initial": 0.4, "sparsity": 0.01, "structured": structured}))
    t = training(live)
    (hooked,) = live.report.hooked.values()
    t.before_forward()
    for mode in (True, False):
        twin = copy.deepcopy(base()).train(mode)
        expected = 0.0
        for site in hooked.views(live):
            gate = ((site.openness + mode * site.noise).sigmoid() * 3 - 1.5).clamp(0, 1)
            entries = site.openness.sigmoid()  # log(-low/high) is 0
            if structured:
                gate = gate * ((site.openness_of_all + mode * site.noise_of_all).sigmoid() * 3 - 1.5).clamp(0, 1)
                entries = entries * site.openness_of_all.sigmoid()
            weight = twin.get_parameter(f"{site.path}.weight")
            weight.data = weight.detach() + (gate * site.diff).detach()
            expected = expected + 0.01 * entries.sum()
        close(reference=ours(twin).logits, result=ours(live.train(mode)).logits, drift=EXACT)
        rejects(reference=ours(twin).logits, result=ours(live.train(not mode)).logits, drift=EXACT)
    (penalty,) = t._call("penalty")
    close(reference=expected, result=penalty, drift=EXACT)
    rejects(reference=1.01 * expected, result=penalty, drift=EXACT)


def test_hooks_of_a_batch_are_those_of_each_adapter():
    """Two adapters train in one batch with the noise, the penalty and the rows that each would have alone."""
    own = lambda i: {"pass": "diff_pruning", "where": "attention.q", "initial": 0.4, "sparsity": 0.01 * (i + 1)}  # noqa: E731
    for same_options in (True, False):
        steps = [own(0), own(0 if same_options else 1)]
        live = tuned({"batch": {"fr": [steps[0]], "de": [steps[1]]}})
        alone = [tuned(step) for step in steps]
        t = training(live)
        optimizer = t.optimizer(torch.optim.SGD, 0.1)
        rows = batch(1, rows=4)
        ids = torch.tensor([0, 1, 1, 0])
        for _ in range(2):
            t.step(optimizer, lambda: ce_of_rows(live(input_ids=rows["input_ids"], adapter_ids=ids).logits, rows["labels"]))
            for i, one in enumerate(alone):
                mine = rows["input_ids"][ids == i]
                training(one).step(training(one).optimizer(torch.optim.SGD, 0.1), lambda: ce_of_rows(one(input_ids=mine).logits, mine))
        assert len(live.report.hooked) == 2
        for hooked, one in zip(live.report.hooked.values(), alone):
            (single,) = one.report.hooked.values()
            for a, b in zip(hooked.views(live), single.views(one)):
                for name in b.names:
                    close(reference=getattr(b, name), result=getattr(a, name), drift=EXACT)
            rejects(reference=b.diff, result=hooked.views(live)[0].diff, drift=EXACT)
    with pytest.raises(SpecError, match=r"adalora does something to its tensors while training \(after_step, remembers\)"):
        tuned({"batch": {"fr": [ADALORA]}})


def ce_of_rows(logits, ids):
    return sum(ce(logits[i : i + 1], ids[i : i + 1]) for i in range(len(ids)))


def test_hooks_inside_parallel():
    live = stir(tuned({"parallel": [DYLORA, {"pass": "lora", "where": "attention.{q,v}", "rank": 2, "lr_ratio": 4.0}]}))
    before = state(live)
    t = training(live)
    t.step(t.optimizer(torch.optim.SGD, 0.1), lambda: ours(live))
    assert len(live.report.hooked) == 2 and set(t.factors().values()) == {4.0}
    rank, up = int(live.dylora.default.pick.count_nonzero()), next(path for path in live.report.made if path.endswith("dylora.default.up"))
    assert (tensor_of(live, up) != before[up]).any(0).tolist() == [row < rank for row in range(5)]


def test_diff_pruning_keeps_the_largest():
    live = stir(tuned({"pass": "diff_pruning", "where": "attention.{q,v}"}))
    (hooked,) = live.report.hooked.values()
    before = torch.cat([site.diff.detach().flatten() for site in hooked.views(live)])  # every gate is open: initial is 5
    training(live).choose(kept=0.1)
    after = torch.cat([site.diff.detach().flatten() for site in hooked.views(live)])
    kept = before.abs().argsort(descending=True)[: int(0.1 * len(before))]
    expected = torch.zeros_like(before).index_put((kept,), before[kept])
    close(reference=expected, result=after, drift=0.0)
    rejects(reference=before, result=after, drift=0.0)


def test_penalties_close_gates():
    """With a strong penalty and a loss that does not need them, the gates of diff pruning close."""
    live = tuned({"pass": "diff_pruning", "where": "attention.q", "initial": 1.0, "sparsity": 1.0})
    run(live, 5, lr=0.5)
    (hooked,) = live.report.hooked.values()
    assert all((site.openness < 0).all() for site in hooked.views(live))


def test_a_threshold_mask_trains_straight_through():
    live = tuned({"pass": "threshold_mask", "where": "attention.q"})
    path = "model.layers.0.self_attn.q_proj"
    score = tensor_of(live, f"{path}.threshold_mask.default.score")
    generator = torch.Generator().manual_seed(0)
    score.data.copy_(0.01 * torch.randn(score.shape, generator=generator, dtype=torch.float64))
    twin = copy.deepcopy(base()).train().requires_grad_(False)
    weight = twin.get_parameter(f"{path}.weight")
    weight.data, original = weight * (score.detach() >= 5e-3), weight.detach().clone()
    weight.requires_grad_(True)
    close(reference=ours(twin).logits, result=ours(live).logits, drift=EXACT)
    ours(live).loss.backward()
    ours(twin).loss.backward()
    close(reference=weight.grad * original, result=score.grad, drift=EXACT)
    rejects(reference=weight.grad * weight.detach(), result=score.grad, drift=EXACT)
