"""Merging: what passes added becomes part of the base weights, in every layout; the graph is the untouched one again; the rest refuses in words."""

import functools

import pytest
import torch
import transformers as T
from checks import TOYS, captured, close, model_of, rejects, rounding, unchanged, wake
from models import SIZES, build, example
from torch import nn

from rewrite import Refused, Spec, merge, pipeline, rewrite, show, source


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", captured)


class Picture(nn.Module):
    """Convolutions with stride, padding, dilation; of one, two and three dimensions."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Conv1d(5, 10, 3, padding=1, dilation=1)
        self.first = nn.Conv2d(10, 7, (3, 5), stride=2, padding=(1, 2), dilation=(2, 1))
        self.second = nn.Conv2d(7, 11, 3, padding="same", dilation=2, bias=False)
        self.deep = nn.Conv3d(1, 6, (3, 2, 1), padding=(1, 0, 2))
        self.head = nn.Linear(6, 9)

    def forward(self, x):
        x = self.flat(x.flatten(2)).unflatten(-1, x.shape[2:])
        x = self.second(torch.tanh(self.first(torch.tanh(x))))
        return self.head(torch.tanh(self.deep(x.unsqueeze(1))).mean((2, 3, 4)))


def _albert():
    sizes = {**SIZES, "vocab_size": 99, "embedding_size": 20, "num_hidden_groups": 1, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0}
    return T.AlbertForSequenceClassification(T.AlbertConfig(**sizes)).eval()


@functools.cache
def base(family):
    torch.manual_seed(0)
    model = Picture().eval() if family == "picture" else _albert() if family == "albert" else build(family)
    model = model.float() if family == "mixtral" else model.double()  # PyTorch has no grouped product of float64
    with torch.no_grad():
        for value in {id(p): p for p in model.parameters() if p.dim() == 2}.values():
            value.mul_(value.shape[1] ** -0.5 / value.std())
    return model


def inputs_of(family, batch=2, length=7):
    if family == "picture":
        return {"x": torch.randn(batch, 5, 14, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    return {k: v.double() if v.is_floating_point() else v for k, v in example("bert" if family == "albert" else family, batch, length).items()}


def dtype_of(family):
    return next(base(family).parameters()).dtype


def output(model, family, *size):
    with torch.no_grad():
        made = model(**inputs_of(family, *size))
    return made if isinstance(made, torch.Tensor) else made.logits


def adapted(family, *passes):
    return wake(rewrite(base(family), {"passes": list(passes)}, example=inputs_of(family)), size=0.1)


def lora(where, rank=3, **more):
    return {"pass": "lora", "where": where, "rank": rank, **more}


def untouched(family):
    graph = captured(base(family), inputs_of(family))
    pipeline.apply(graph, Spec.parse({"passes": []}))
    return graph


def same_graphs(merged, family):
    """The merged graph and its variants read as the untouched ones; not a node, not a name is left."""
    for ours, theirs in zip(merged.graph.all(), untouched(family).all(), strict=True):
        assert show(ours) == show(theirs), ours.name
    assert list(merged.state_dict()) == list(base(family).state_dict())
    assert not merged.report.made and not any("made" in n.meta for part in merged.graph.all() for n in part.nodes)
    assert "lora" not in source(merged)


CASES = {
    "linears": ("llama", [lora("linear")]),
    "two adapters on one site": ("llama", [lora("attention.{q,v}"), lora("attention.q", 2, name="other")]),
    "three on one site": ("bert", [lora("mlp.*"), lora("linear", 2, name="fr", alpha=5), lora("mlp.down", 4, name="de")]),
    "thirds of c_attn": ("gpt2", [lora("attention.{q,v}")]),
    "c_attn whole, then its parts": ("gpt2", [lora("attention.qkv"), lora("attention.k", 2, name="k")]),
    "Conv1D": ("gpt2", [lora(["attention.o", "mlp.*"])]),
    "interleaved": ("gpt_neox", [lora(["attention.{q,k}", "linear"])]),
    "experts": ("mixtral", [lora("expert.{gate,up,down}", 2)]),
    "experts and router": ("mixtral", [lora(["expert.gate_up", "attention.*"], 2), lora("router", 2, name="router")]),
    "untied embedding": ("llama", [lora("embed"), lora("head")]),
    "patches": ("vit", [lora(["embed.patch", "linear"])]),
    "convolutions": ("picture", [lora("conv", 1)]),
    "a block used twice": ("albert", [lora(["linear", "attention.q", "mlp.*"])]),
    "encoder-decoder": ("t5", [lora("linear")]),
    "windows and norms": ("gemma3", [lora("linear")]),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_after_merging(case):
    family, passes = CASES[case]
    with unchanged(base(family)):
        live = adapted(family, *passes)
        text, before = show(live.graph), {n: p.detach().clone() for n, p in live.named_parameters()}
        merged = merge(live)
    for size in ((2, 7), (3, 11), (1, 1)):
        close(reference=output(live, family, *size), result=output(merged, family, *size), drift=rounding(dtype_of(family)))
    rejects(reference=output(live, family), result=output(base(family), family), drift=rounding(dtype_of(family)))
    same_graphs(merged, family)
    assert show(live.graph) == text and all(torch.equal(before[n], p) for n, p in live.named_parameters())
    assert merged.report.applied[-1].method == "merge" and merged.report.applied[-1].sites


def test_one_weight_wrong_is_seen():
    """The twin of the above: a merge that forgot one of the sites."""
    live = adapted("llama", lora("attention.{q,v}"))
    merged = merge(live)
    merged.model.layers[1].self_attn.v_proj.weight.data = base("llama").model.layers[1].self_attn.v_proj.weight.data
    rejects(reference=output(live, "llama"), result=output(merged, "llama"), drift=rounding(torch.float64))


def test_merge_in_a_spec_then_begin_again():
    """ReLoRA: merge and go on with a fresh adapter of the same name; twice merged is the sum."""
    passes = [lora("attention.q"), {"pass": "merge"}, lora("attention.q"), {"pass": "unfreeze", "where": "head"}]
    live = rewrite(base("llama"), {"passes": passes})
    close(reference=output(base("llama"), "llama"), result=output(live, "llama"), drift=rounding(torch.float64))
    assert len(live.report.made) == 4
    merged = merge(wake(live))
    close(reference=output(live, "llama"), result=output(merged, "llama"), drift=rounding(torch.float64))
    again = merge(wake(pipeline.rewrite(base("llama"), {"passes": passes}), seed=1))
    rejects(reference=output(merged, "llama"), result=output(again, "llama"), drift=rounding(torch.float64))


# ---- biases --------------------------------------------------------------------------------------------------------------


def test_created_biases_become_biases():
    """A weight without a bias gets one, under the name that its class reads."""
    live = adapted("llama", lora("attention.q"), {"pass": "bitfit", "where": "linear", "create": True})
    merged = merge(live)
    close(reference=output(live, "llama"), result=output(merged, "llama"), drift=rounding(torch.float64))
    assert sorted(merged.report.made) == sorted(f"{site.removesuffix('.weight')}.bias" for site, role in merged.report.applied[-1].sites)
    assert merged.model.layers[0].self_attn.q_proj.bias.any()


def test_biases_that_are_there_take_it_up():
    live = adapted("bert", lora("attention.q"), {"pass": "bitfit", "where": ["linear", "norm"]})
    for path in live.report.trains:
        nn.init.normal_(live.get_parameter(path))
    merged = merge(live)
    close(reference=output(live, "bert"), result=output(merged, "bert"), drift=rounding(torch.float64))
    assert [n for n in merged.state_dict()] == [n for n in base("bert").state_dict()]


# ---- what does not merge -------------------------------------------------------------------------------------------------


def reason(live, **options):
    with pytest.raises(Refused) as caught:
        merge(live, **options)
    return str(caught.value)


def test_an_activation_does_not_merge():
    found = reason(adapted("llama", {"pass": "adapter", "bottleneck": 5}))
    assert "model.layers.0.self_attn.o_proj.weight: what was added is not affine in x (an activation" in found and found.endswith("There is nothing to merge.")


def test_a_choice_between_alike_ones_does_not_merge():
    """Two adapters of one shape under names of one length: what stands for their values in the question must differ."""
    steps = [{"pass": "lora", "where": "head", "rank": 2, "name": name} for name in "ab"]
    live = wake(rewrite(model_of("gated"), {"passes": [{"choose": steps, "by": {"pass": "adapter_fusion"}}]}))
    with pytest.raises(Refused, match="not affine in x"):
        merge(live)


def test_rows_with_adapters_of_their_own_do_not_merge():
    """A gain on the input, picked by the number of the adapter: x is what is multiplied, not what picks."""
    ia3 = {"pass": "ia3", "where": "attention.q", "side": "input"}
    live = wake(rewrite(model_of("gated"), {"passes": [{"batch": {"a": [ia3], "b": [ia3]}}]}))
    with pytest.raises(Refused, match="merge.*: cannot fold"):
        merge(live)


def test_partial_merges_the_rest():
    passes = [lora("attention.{q,v}"), {"pass": "adapter", "where": "mlp", "bottleneck": 5}]
    live = adapted("llama", *passes)
    assert 'Say "partial": true to merge the rest.' in reason(live)
    merged = merge(live, partial=True)
    close(reference=output(live, "llama"), result=output(merged, "llama"), drift=rounding(torch.float64))
    assert {kind for kind in merged.report.made.values()} == {"adapter"}
    assert {site for site, _ in merged.report.applied[-1].sites} == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qv"}


def test_tied_embedding_does_not_merge():
    live = adapted("gpt2", lora("embed"))
    found = reason(live)
    assert "transformer.wte.weight is tied: another operation reads it" in found or "lm_head.weight is tied" in found, found


def test_tied_toy_does_not_merge():
    live = wake(rewrite(model_of("looped"), {"passes": [lora("head")]}, example=TOYS["looped"].inputs(2, 7)))
    assert "is tied" in reason(live)


def test_different_adapters_on_one_block_do_not_merge():
    """Both calls of a shared block carry the same tensors; adapters on one call alone are not what its weight can take up."""
    live = wake(rewrite(model_of("looped"), {"passes": [lora({"role": "attention.q", "expect": 2})]}, example=TOYS["looped"].inputs(2, 7)))
    assert len(live.report.made) == 2
    merged = merge(live.double())
    close(reference=TOYS["looped"].output(live), result=TOYS["looped"].output(merged), drift=rounding(torch.float64))


def test_nothing_to_merge():
    live = rewrite(base("llama"), {"passes": [{"pass": "unfreeze", "where": "head"}]})
    assert "no pass before it has added anything" in reason(live)
    with pytest.raises(Refused, match=r"passes\[0\]: merge: no pass before it has added anything"):
        rewrite(base("llama"), {"passes": [{"pass": "merge"}]})


# ---- other dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    """The sum is made in float64 and rounded once: the merged weight is the nearest one of its dtype, the output as near as rounding allows."""
    exact = adapted("llama", lora("linear"))
    live = rewrite(base("llama"), {"passes": [lora("linear")]}).to(dtype)
    with torch.no_grad():
        for path in live.report.made:
            live.get_parameter(path).copy_(exact.get_parameter(path))
    merged = merge(live)
    q = merged.model.layers[0].self_attn.q_proj
    old = live.model.layers[0].self_attn.q_proj
    assert q.weight.dtype == dtype
    want = old.weight.double() + 16 / 3 * old.lora.default.up.double() @ old.lora.default.down.double()
    close(reference=want.to(dtype), result=q.weight, drift=0.0)
    close(reference=output(live, "llama").double(), result=output(merged, "llama").double(), drift=rounding(dtype))
    rejects(reference=output(live, "llama").double(), result=output(base("llama"), "llama").double(), drift=min(rounding(dtype), 0.5))
