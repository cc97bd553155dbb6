"""Whole models as ONNX: every family and every variant, caches, adapters, refusals, what ONNX Runtime gets wrong, and broken twins."""

import functools
import os

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewrite import merge, rewrite
from rewrite.capture.model import capture
from rewrite.emit import agree, onnx, writer
from rewrite.emit.onnx import export_onnx
from rewrite.errors import Broken, Refused
from rewrite.graph import Graph
from tests.models import FAMILIES, build, example
from tests.test_onnx_ops import graph_of, run, x

torch.set_num_threads(1)
WHOLE = [family for family in FAMILIES if family != "mamba"]  # its scan is a loop over the length


@functools.cache
def captured(family):
    return capture(build(family))


def tensors(output):
    return [t for t in torch.utils._pytree.tree_leaves(tuple(output.values())) if isinstance(t, torch.Tensor)]


def weights(path):
    return {name: value.const_value for name, value in ir.load(path).graph.initializers.items()}


@pytest.mark.parametrize("family", WHOLE)
def test_every_graph_of_a_family_agrees_at_other_sizes(family, tmp_path):
    main = captured(family)
    assert not main.opaque
    for graph in main.all():
        report = export_onnx(main, tmp_path / "a.onnx", variant=graph.name)
        again = export_onnx(main, tmp_path / "b.onnx", variant=graph.name, check=False)
        assert report.error < 2e-5 and again.error is None
        assert len(report.sizes) == (3 if graph.name in ("past", "next") else 2)
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
        assert not report.notes, "an op of the test models left the own table"
        assert "loss" not in report.outputs and "labels" not in report.inputs
        assert os.listdir(tmp_path) in (["a.onnx", "b.onnx"], ["b.onnx", "a.onnx"])


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "vit", "clip"])
def test_the_file_is_the_model(family, tmp_path):
    """Against the model itself, not its graph; the main inputs are named as the model names them."""
    model = build(family)
    export_onnx(captured(family), tmp_path / "m.onnx")
    session = agree.session(tmp_path / "m.onnx")
    names = {item.name for item in session.get_inputs()}
    for batch, length in ((1, 9), (4, 5)):
        given = example(family, batch, length, seed=3)
        with torch.no_grad():
            wanted = model(**given, use_cache=False) if hasattr(model.config, "use_cache") else model(**given)
        feeds = {name: value.numpy() for name, value in given.items()} | _defaults(names - set(given), given)
        got = dict(zip((item.name for item in session.get_outputs()), session.run(None, feeds)))
        wanted = {name: value for name, value in wanted.items() if isinstance(value, torch.Tensor)}
        assert wanted.keys() <= got.keys()
        assert max(agree.difference(value.numpy(), got[name]) for name, value in wanted.items()) < 2e-5


def _defaults(missing, given):
    """What leaving out an input means: positions from 0, everything valid, one segment."""
    out = {}
    for name in missing:
        ids = given["decoder_input_ids"] if name.startswith("decoder") else given["input_ids"]
        known = {"position_ids": torch.arange(ids.shape[1]).expand_as(ids), "token_type_ids": torch.zeros_like(ids)}
        out[name] = known.get(name.removeprefix("decoder_"), torch.ones_like(ids)).numpy()
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_greedy_decoding_in_onnx_runtime(family, tmp_path):
    """Prefill with an empty cache, then token by token: the tokens of `generate`, with a batch that is padded on the left."""
    model = build(family)
    report = export_onnx(captured(family), tmp_path / "past.onnx", cache=True)
    cached = [name for name in report.inputs if name.startswith("past")]
    assert [name for name in report.outputs if name != "logits"] == [name.replace("past_key_values", "present") for name in cached]
    session = agree.session(tmp_path / "past.onnx")
    shapes = {item.name: item.shape for item in session.get_inputs()}
    assert shapes["input_ids"] == ["batch", "length"] and shapes["attention_mask"] == ["batch", "length + past"]
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    sizes = {"batch": 2, "past": 0}
    past = {name: np.zeros([sizes.get(size, size) for size in shapes[name]], np.float32) for name in cached}
    positions, tokens, step, mask = (mask.cumsum(-1) - 1).clamp(min=0).numpy(), ids.numpy(), ids.numpy(), mask.numpy()
    for _ in range(6):
        feeds = {"input_ids": step, "attention_mask": mask, "position_ids": positions} | past
        got = dict(zip(report.outputs, session.run(None, {name: feeds[name] for name in report.inputs})))
        step = got["logits"][:, -1].argmax(-1)[:, None]
        tokens, mask = np.concatenate([tokens, step], 1), np.concatenate([mask, np.ones_like(step)], 1)
        positions = positions[:, -1:] + 1
        past = {name: got[name.replace("past_key_values", "present")] for name in past}
    assert np.array_equal(tokens, wanted.numpy())


def test_sizes_and_parts_have_names(tmp_path):
    report = export_onnx(captured("t5"), tmp_path / "t5.onnx")
    session = agree.session(tmp_path / "t5.onnx")
    assert [item.shape for item in session.get_inputs() if item.name.endswith("input_ids")] == [["batch", "length"], ["batch", "target"]]
    assert "logits" in report.outputs and str(tmp_path / "t5.onnx") in str(report)


def test_tied_weights_are_stored_once(tmp_path):
    model = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    report = export_onnx(captured("gpt2"), tmp_path / "g.onnx")
    stored = sum(tensor.nbytes for tensor in weights(tmp_path / "g.onnx").values())
    wanted = sum(p.numel() * 4 for p in model.parameters())
    assert wanted <= stored < wanted + 4000
    assert "transformer.wte.weight" in weights(tmp_path / "g.onnx") and report.bytes > stored


def test_constant_tables_are_computed_once(tmp_path):
    """A rotary table that depends on no input is stored; a weight that other nodes read is not stored twice."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("freq", x(6))
            self.weight = nn.Parameter(x(300, 90))

        def forward(self, ids):
            table = torch.outer(torch.arange(9.0), self.freq).cos()
            return table[ids] @ self.weight[:6] + (F.linear(table[ids], self.weight.t()[:, :6] * 2)[..., :1] + self.weight.t().sum())

    graph = graph_of(Table(), torch.randint(0, 2, (3, 5)))
    export_onnx(graph, tmp_path / "t.onnx")
    ops = [node.op_type for node in ir.load(tmp_path / "t.onnx").graph]
    assert "Cos" not in ops and "Range" not in ops
    assert sum(tensor.nbytes for tensor in weights(tmp_path / "t.onnx").values()) < 4 * 300 * 90 + 100_000


def test_rows_that_see_nothing(tmp_path):
    """Rows whose mask is False, -inf or the most negative number throughout: PyTorch's answer, not ONNX Runtime's."""

    def body(q, mask):
        lowest = torch.finfo(q.dtype).min
        heads = q.view(q.shape[0], q.shape[1], 2, 4).transpose(1, 2)
        allowed = mask[:, None, None, :].bool() & torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        out = [F.scaled_dot_product_attention(heads, heads, heads, attn_mask=allowed)]
        for value in (lowest, float("-inf"), -1e4):
            added = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, value)
            out.append(F.scaled_dot_product_attention(heads, heads, heads, attn_mask=added))
        return tuple(out)

    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    graph = graph_of(body, x(3, 5, 8), mask)
    export_onnx(graph, tmp_path / "a.onnx")
    for wanted, got in zip(body(x(3, 5, 8), mask), run(tmp_path / "a.onnx", x(3, 5, 8), mask), strict=True):
        assert agree.difference(wanted.numpy(), got) < 2e-5


def test_a_wrong_optimisation_is_told_and_worked_around(tmp_path):
    """ONNX Runtime moves a zero padding into a MaxPool, which pads with -inf: right in the file, wrong as optimised."""
    graph = graph_of(lambda a: F.max_pool2d(F.pad(-a.abs() - 1, (1, 1, 1, 1)), 3, 2), x(2, 3, 8, 8), static=())
    report = export_onnx(graph, tmp_path / "p.onnx")
    assert report.disabled_optimizers == ("Pad_Fusion",) and any("Pad_Fusion" in note for note in report.notes)


def test_large_weights_go_into_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "LARGE", 1000)
    report = export_onnx(captured("bert"), tmp_path / "b.onnx")
    assert sorted(os.listdir(tmp_path)) == ["b.onnx", "b.onnx.data"]
    assert report.error < 2e-5 and report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    agree.session(tmp_path / "b.onnx")


def test_a_kernel_is_written_as_its_reference(tmp_path):
    def reference(a, weight, down):
        return F.linear(a, weight) + F.silu(F.linear(a, down))

    def kernel(a, weight, down):
        raise AssertionError("the fast twin does not run here")

    kernel.reference = reference
    plain = graph_of(lambda a: (F.linear(a, torch.ones(6, 5)) * 2, a), x(), static=(0,))
    [mul] = [node for node in plain.nodes if node.target == torch.ops.aten.mul.Tensor]
    [a] = plain.placeholders
    with plain.fx.inserting_before(mul):
        called = plain.fx.call_function(kernel, (a, mul.args[0].args[1], mul.args[0].args[1]))
        called.meta = dict(mul.meta)
    mul.replace_all_uses_with(called)
    report = export_onnx(plain, tmp_path / "k.onnx")
    weight = torch.ones(6, 5)
    assert agree.difference(reference(x(), weight, weight).numpy(), run(tmp_path / "k.onnx", x())[0]) < 2e-5
    assert any("decomposed" in note for note in report.notes)
    assert [node.op_type for node in ir.load(tmp_path / "k.onnx").graph].count("MatMul") == 1, "equal products are written once"


def test_a_cast_model_exports_in_its_new_dtype(tmp_path):
    graph = capture(build("llama"))
    graph.root.to(torch.float64)
    report = export_onnx(graph, tmp_path / "d.onnx", check=False)
    session_types = {value.name: value.dtype for value in ir.load(tmp_path / "d.onnx").graph.outputs}
    assert session_types["logits"] == ir.DataType.DOUBLE and report.nodes > 100
    graph.root.to(torch.float16)
    assert export_onnx(graph, tmp_path / "h.onnx").error < 2e-2


PLAIN = {
    "recurrent": (lambda: nn.LSTM(5, 4, batch_first=True), (3, 7, 5)),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ELU()), (2, 3, 9, 9)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules(name, tmp_path):
    build_module, shape = PLAIN[name]
    module = build_module().eval()
    report = export_onnx(capture(module, (x(*shape),)), tmp_path / "p.onnx")
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(module(x(*shape)))
    assert report.error < 2e-5 and len(report.sizes) == 2
    assert max(agree.difference(w.numpy(), g) for w, g in zip(wanted, run(tmp_path / "p.onnx", x(*shape)), strict=True)) < 2e-5


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_rewritten_and_merged_models(family, tmp_path):
    """Adapters with weights that matter: the live model's graphs, and the same model merged, which has no node more than the original."""
    live = rewrite(build(family), {"passes": [{"pass": "lora", "where": "linear", "rank": 3}]})
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    plain = export_onnx(captured(family), tmp_path / "plain.onnx")
    report = export_onnx(live, tmp_path / "live.onnx")
    merged = export_onnx(merge(live), tmp_path / "merged.onnx")
    assert max(report.error, merged.error) < 2e-5
    assert merged.nodes == plain.nodes < report.nodes
    assert any(".lora.default." in name for name in weights(tmp_path / "live.onnx"))
    feeds = {name: value.numpy() for name, value in example(family, 3, 8).items()}
    got = []
    for name in ("live", "merged", "plain"):
        session = agree.session(tmp_path / f"{name}.onnx")
        given = example(family, 3, 8)
        missing = {item.name for item in session.get_inputs()} - set(given)
        got.append(session.run(["logits"], feeds | _defaults(missing, given))[0])
    assert agree.difference(got[0], got[1]) < 2e-5 < agree.difference(got[0], got[2])
    for variant in live.graph.variants:
        assert export_onnx(live, tmp_path / "v.onnx", variant=variant).error < 2e-5


def test_rounding_is_told_from_mistakes(tmp_path, monkeypatch):
    """Where PyTorch's own float32 is further from float64 than 2e-5, ONNX Runtime may be as far, and no further."""
    weight = x(16, 96)
    near = weight + 1e-3 * x(16, 96, seed=1)
    graph = graph_of(lambda a: (F.linear(a, weight) - F.linear(a, near)) * a.cos()[..., :1], x(3, 4, 96))
    report = export_onnx(graph, tmp_path / "r.onnx")
    assert report.error > 2e-5 and any(note.startswith("rounding: against float64") for note in report.notes)
    monkeypatch.setitem(writer.OWN, "aten::cos", lambda w, node, a: w.op("Sin", a, dtype=a.dtype))
    with pytest.raises(Broken):
        export_onnx(graph, tmp_path / "r.onnx")


# refusals: in words, before anything is written


def refused(tmp_path, *args, match, **kwargs):
    with pytest.raises(Refused, match=match):
        export_onnx(*args, **kwargs)
    assert not os.listdir(tmp_path)


def test_random_ops_are_refused_with_their_place(tmp_path):
    words = r"toy: %rand_like \(aten::rand_like\): .* random numbers\n.*test_onnx"
    refused(tmp_path, graph_of(lambda a: a + torch.rand_like(a), x()), tmp_path / "r.onnx", match=words)
    refused(tmp_path, graph_of(lambda a: F.dropout(a, 0.5, training=True), x()), tmp_path / "r.onnx", match="always on")


def test_ops_without_a_translation_are_refused_with_their_place(tmp_path):
    graph = graph_of(lambda a: torch.linalg.eigvalsh(a @ a.t()), x(), static=(0,))
    refused(tmp_path, graph, tmp_path / "e.onnx", match=r"%.*eig.*no ONNX translation[\s\S]*Nothing was written")


def test_a_translation_that_loops_over_data_is_refused(tmp_path):
    """torchlib's `while` over an ONNX value would never end; a model that stays opaque in part is refused by its parts."""
    bag = graph_of(lambda ids: F.embedding_bag(ids, torch.ones(9, 6)), torch.randint(0, 9, (3, 5)))
    refused(tmp_path, bag, tmp_path / "b.onnx", match="embedding_bag.*no ONNX translation")
    refused(tmp_path, captured("mamba"), tmp_path / "m.onnx", match=r"2 part\(s\)[\s\S]*backbone.layers.0.mixer: .*mamba_selective_scan")


def test_opaque_modules_are_refused_by_path_and_reason(tmp_path):
    graph = graph_of(lambda a: a * 2, x())
    [mul] = [node for node in graph.nodes if node.op == "call_function"]
    with graph.fx.inserting_after(mul):
        call = graph.fx.call_module("mixer.0", (mul,))
    mul.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    graph.opaque["mixer.0"] = "a loop over time steps"
    refused(tmp_path, graph, tmp_path / "o.onnx", match=r"1 part\(s\)[\s\S]*mixer.0: a loop over time steps")


def test_bad_targets_and_variants(tmp_path):
    graph = captured("bert")
    refused(tmp_path, graph, tmp_path, match="is a folder")
    refused(tmp_path, graph, tmp_path / "none" / "m.onnx", match="cannot write in")
    refused(tmp_path, graph, tmp_path / "m.onnx", cache=True, match=r"no graph 'past' \(cache=True\). It has: 'forward'")
    refused(tmp_path, build("bert"), tmp_path / "m.onnx", match="carries no graph")
    refused(tmp_path, _on_meta(), tmp_path / "m.onnx", match="meta device")


def _on_meta():
    graph = graph_of(nn.Linear(5, 4), x(), static=(0,))
    graph.root.to("meta")
    return graph


def test_a_file_that_stands_is_replaced_only_by_one_that_agrees(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    monkeypatch.setitem(writer.OWN, "aten::tanh", lambda w, node, a: w.op("Sigmoid", a, dtype=a.dtype))
    with pytest.raises(Broken, match="differ at"):
        export_onnx(captured("bert"), path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["m.onnx"]
    monkeypatch.undo()
    export_onnx(captured("bert"), path)
    assert path.read_bytes() != b"old"


# broken twins: each wrong translation must be rejected by the check itself

TWINS = {
    "aten::silu": lambda w, node, a: w.op("Sigmoid", a, dtype=a.dtype),
    "aten::gelu": lambda w, node, a, approximate="none": w.op("Mul", a, w.op("Sigmoid", a, dtype=a.dtype), dtype=a.dtype),
    "aten::scaled_dot_product_attention": lambda w, node, q, k, v, *args, scale=None, **rest: w.op("Attention", q, k, v, scale=scale, dtype=q.dtype),
    "aten::layer_norm": lambda w, node, a, sizes, g, b, eps, *args: w.op("LayerNormalization", a, g, b, axis=-1, epsilon=eps + 1e-3, dtype=a.dtype),
    "aten::cat": lambda w, node, parts, dim=0: w.op("Concat", *reversed(parts), axis=dim % node.meta["val"].ndim, dtype=parts[0].dtype),
}


@pytest.mark.parametrize("op, family", zip(TWINS, ["llama", "bert", "llama", "bert", "llama"]))
def test_broken_twins_are_rejected(op, family, tmp_path, monkeypatch):
    monkeypatch.setitem(writer.OWN, op, TWINS[op])
    with pytest.raises(Broken, match="ONNX Runtime"):
        export_onnx(captured(family), tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)


def test_the_measure_of_agreement():
    a = np.array([1.0, -2.0, 3.0], np.float32)
    assert agree.difference(a, a) == 0
    assert agree.difference(a, a + np.float32(1e-3)) > 2e-5
    for broken in (a[:2], np.array([1.0, np.nan, 3.0], np.float32), a.reshape(1, 3)):
        assert agree.difference(a, broken) == float("inf")
    nan = np.array([1.0, np.nan, np.inf], np.float32)
    assert agree.difference(nan, nan) == 0 and agree.difference(nan, -nan) == float("inf")
    assert agree.difference(np.array([1, 2]), np.array([1, 3])) == float("inf")
    assert isinstance(captured("bert"), Graph)
