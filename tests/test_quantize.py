"""New base values and weights in codes: what the passes say of themselves, against bitsandbytes, PEFT and formulas written anew.

The weight of the golden file is made of integers, so that any machine has the same; bitsandbytes 0.50.2 made the codes (its plain torch
backend the scales in eight bits).
"""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as T
from checks import TOYS, captured, close, model_of, rejects, rounding, tensor_of, unchanged, wake
from rewrite.kernels import dequant_int8, dequant_nf4, tables
from torch.nn import functional as F

from rewrite import Refused, export_onnx, load, merge, pipeline, rewrite, save
from rewrite.store.fingerprint import facts

GOLDEN = Path(__file__).parent / "golden" / "nf4.json"
NF4, INT8 = ({"pass": "quantize", "where": "linear", "format": name} for name in ("nf4", "int8"))
LORA = {"pass": "lora", "where": "linear", "rank": 3}


def weight(rows, columns):
    """A weight that every machine makes alike: integers over a power of two."""
    return ((torch.arange(rows * columns) * 7919 % 1009 - 504).float() / 4096).view(rows, columns)


def gated(spec, **kwargs):
    return rewrite(model_of("gated"), {"passes": spec}, **kwargs)


def numbers(live, path, format="nf4"):
    """The weight that stands for a quantised one, by the formula of the paper, in float64."""
    part = {name: tensor_of(live, f"{path}.quantize.default.{name}") for name in (("codes", "scales") if format == "int8" else ("codes", "scales", "nested"))}
    if format == "int8":
        return part["codes"].double() * part["scales"].view(torch.float32).double()
    nested = part["nested"].view(torch.float32).double()
    level = torch.tensor(tables.dynamic(), dtype=torch.float64)[part["scales"].long()]
    scale = torch.stack([level[i] * nested[i // 256] + nested[-1] for i in range(len(level))])
    codes = torch.stack([part["codes"] // 16, part["codes"] % 16], 1).view(-1).long()
    value = torch.tensor(dequant_nf4.NF4, dtype=torch.float64)[codes]
    return torch.stack([v * scale[i // 64] for i, v in enumerate(value)])


# ---- formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda c: c["shape"])
def test_nf4_is_what_bitsandbytes_has(case):
    rows, columns = map(int, case["shape"].split("×"))
    codes, scales, nested = dequant_nf4.quantize(weight(rows, columns))
    text = lambda t: t.view(torch.uint8).numpy().tobytes().hex()  # noqa: E731
    assert (text(codes), text(scales), text(nested)) == (case["codes"], case["scales"], case["nested"])
    assert text(dequant_nf4.quantize(weight(rows, columns), double=False)[1]) == case["single"]
    assert text(dequant_nf4.quantize(weight(rows, columns) * 1.001)[0]) + text(dequant_nf4.quantize(weight(rows, columns) * 1.001)[2]) != case["codes"] + case["nested"]


@pytest.mark.parametrize("shape, dtype", [((37, 55), torch.float32), ((128, 256), torch.bfloat16), ((300, 512), torch.float16), ((1024, 700), torch.float32)])
def test_nf4_beside_bitsandbytes(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.02
    w[3] = 0
    theirs, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
    codes, scales, _ = dequant_nf4.quantize(w, double=False)
    assert torch.equal(theirs.view(-1), codes) and torch.equal(state.absmax, scales.view(torch.float32))
    close(reference=functional.dequantize_4bit(theirs, state), result=dequant_nf4.launch(codes, scales, None, list(shape), dtype), drift=0.0)
    theirs, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    codes, scales, nested = dequant_nf4.quantize(w)
    assert torch.equal(theirs.view(-1), codes) and torch.equal(torch.cat([state.state2.absmax, state.offset[None]]), nested.view(torch.float32))
    # their search on a CPU is approximate near the middle between two numbers, and answers a neighbour there
    other = state.absmax != scales
    assert int((state.absmax.int() - scales.int()).abs().max()) <= 1 and float(other.float().mean()) < 0.01


@pytest.mark.parametrize("shape", [(37, 55), (3, 5), (64, 64), (9, 24, 3)])
@pytest.mark.parametrize("double", [True, False])
def test_dequantising_is_the_formula(shape, double):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scales, nested = dequant_nf4.quantize(w, double)
    result = dequant_nf4.launch(codes, scales, nested, list(shape), torch.float32)
    scale = scales.view(torch.float32) if nested is None else None
    if scale is None:
        scale = torch.tensor(tables.dynamic())[scales.long()] * nested.view(torch.float32)[:-1].repeat_interleave(256)[: len(scales)] + nested.view(torch.float32)[-1]
    number = torch.tensor(dequant_nf4.NF4)[torch.stack([codes >> 4, codes & 15], 1).flatten().long()][: w.numel()]
    reference = (number * scale.repeat_interleave(64)[: w.numel()]).view(shape)
    close(reference=reference, result=result, drift=0.0)
    close(reference=reference, result=dequant_nf4.dequant_nf4(codes, scales, nested, list(shape), torch.float32), drift=0.0)
    swapped = codes >> 4 | codes << 4  # the first entry in the lower half
    rejects(reference=reference, result=dequant_nf4.launch(swapped, scales, nested, list(shape), torch.float32), drift=0.05)
    error = (result - w).abs().view(-1) / scale.repeat_interleave(64)[: w.numel()]
    assert error.max() < 0.16  # half of the widest gap, between -1 and -0.696, and the scale's own rounding


def test_int8_keeps_each_row():
    w = torch.randn(11, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 11)[:, None]
    codes, scales = dequant_int8.quantize(w)
    error = (dequant_int8.dequant_int8(codes, scales, torch.float32) - w).abs().amax(1) / w.abs().amax(1)
    assert error.max() < 0.51 / 127 and codes.abs().amax(1).min() == 127
    turned = dequant_int8.quantize(w.mT.contiguous())  # a scale for each column
    assert ((dequant_int8.dequant_int8(*turned, torch.float32).mT - w).abs().amax(1) / w.abs().amax(1)).max() > 0.51 / 127


# ---- quantize ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [NF4, INT8], ids=["nf4", "int8"])
def test_the_live_model_is_the_one_with_these_numbers(step):
    live, plain = gated([step]), copy.deepcopy(model_of("gated")).double()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if f"{name}.weight" in live.report.released:
                module.weight.copy_(numbers(live, name, step["format"]).view(module.weight.shape))
    assert len(live.report.released) == 14 and not set(live.report.released) & set(live.state_dict())
    reference = TOYS["gated"].output(plain)
    close(reference=reference, result=TOYS["gated"].output(copy.deepcopy(live).double()), drift=rounding(torch.float32))
    rejects(reference=reference, result=TOYS["gated"].output(model_of("gated")).double(), drift=rounding(torch.float32))


def test_lora_over_codes_trains_as_the_formula_says():
    """Gradients of the QLoRA example against a float64 model whose weights are the dequantised ones, with LoRA written out."""
    live = wake(gated([NF4, LORA]))
    plain = copy.deepcopy(model_of("gated")).double()
    factors = {}

    def added(module, args, output, name):
        down, up = factors[name]
        return output + 16 / 3 * F.linear(F.linear(args[0], down), up)

    for name, module in plain.named_modules():
        if f"{name}.weight" in live.report.released:
            module.weight.data = numbers(live, name).view(module.weight.shape)
            factors[name] = [tensor_of(live, f"{name}.lora.default.{part}").detach().double().requires_grad_() for part in ("down", "up")]
            module.register_forward_hook(lambda m, a, y, name=name: added(m, a, y, name))
    TOYS["gated"].loss(plain).backward()
    TOYS["gated"].loss(live).backward()
    for name, (down, up) in factors.items():
        for part, reference in (("down", down.grad), ("up", up.grad)):
            result = tensor_of(live, f"{name}.lora.default.{part}").grad.double()
            close(reference=reference, result=result, drift=rounding(torch.float32))
            rejects(reference=reference, result=result * 1.01, drift=rounding(torch.float32))


def test_codes_outlive_casts_and_copies(tmp_path):
    model = model_of("gated")
    live = wake(rewrite(model, {"passes": [NF4, LORA]}), size=0.02)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items() if ".quantize." in name}
    low = copy.deepcopy(live).to(torch.bfloat16)
    assert all(torch.equal(value, low.state_dict()[name]) for name, value in before.items())
    assert TOYS["gated"].output(low).dtype == torch.bfloat16
    close(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(low).float(), drift=rounding(torch.bfloat16))
    again = load(model, save(low, tmp_path / "low"))
    close(reference=TOYS["gated"].output(low), result=TOYS["gated"].output(again), drift=0.0)


def test_codes_are_made_anew_on_load_and_compared(tmp_path):
    model = model_of("gated")
    live = rewrite(model, {"passes": [NF4]})
    small, large = ((save(live, tmp_path / name, whole=whole) / "adapter.safetensors").stat().st_size for name, whole in (("a", False), ("b", True)))
    assert large - small > sum(t.numel() * t.element_size() for n, t in live.state_dict().items() if ".quantize." in n)
    for name in ("a", "b"):
        close(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(load(model, tmp_path / name)), drift=0.0)
    path = next(iter(live.report.derived))
    live.report.derived[path] = facts({"x": tensor_of(live, path) + 1})["x"]
    tensor_of(live, path).add_(1)  # as if another machine had made it otherwise
    with pytest.raises(Refused, match=rf"{path} has other values: it was not stored, .*whole=True"):
        load(model, save(live, tmp_path / "c"))


def test_what_trains_is_stored_though_it_was_derived(tmp_path):
    model = model_of("gated")
    live = rewrite(model, {"passes": [{"pass": "pissa", "where": "attention.q", "rank": 3}, {"pass": "unfreeze", "where": "attention.q"}]})
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    close(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(load(model, save(live, tmp_path / "x"))), drift=0.0)


def test_a_donated_model_lets_go_weight_by_weight(monkeypatch):
    """At no time are more than the model, the codes so far and one weight in memory."""
    from rewrite.edit import derive

    model = copy.deepcopy(model_of("gated"))
    sizes = {name: p.numel() * 4 for name, p in model.named_parameters()}
    seen, original = [], derive.let_go

    def let_go(edit, site):
        original(edit, site)
        if edit.main:
            seen.append(sum(sizes[name] for name, p in model.named_parameters() if p.numel()))

    monkeypatch.setattr("rewrite.edit.edit.let_go", let_go)
    before = sum(sizes.values())
    live = rewrite(model, {"passes": [NF4]}, donate=True)
    steps = [a - b for a, b in zip([before, *seen], seen)]
    assert all(step > 0 for step in steps) and len(steps) == 14 and max(steps) == 56 * 24 * 4
    assert seen[-1] == before - sum(sizes[name] for name in live.report.released)
    close(reference=TOYS["gated"].output(gated([NF4])), result=TOYS["gated"].output(live), drift=0.0)
    kept = copy.deepcopy(model_of("gated"))
    rewrite(kept, {"passes": [NF4]})
    assert all(p.numel() for p in kept.parameters())


def test_a_fused_projection_is_one_weight():
    sizes = dict(vocab_size=20, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = T.GPT2LMHeadModel(T.GPT2Config(**sizes)).eval()
    live = rewrite(model, {"passes": [{**INT8, "where": "linear"}, LORA]})
    assert "transformer.h.0.attn.c_attn.weight" in live.report.released and len(live.report.released) == 8
    close(reference=TOYS["gated"].output(model), result=TOYS["gated"].output(live), drift=0.05)
    with pytest.raises(Refused, match="name all of its parts"):
        rewrite(model, {"passes": [{**INT8, "where": "attention.q"}]})


@pytest.mark.parametrize(
    "steps, reason",
    [
        ([NF4, {**INT8, "name": "again"}], "quantize stands in the place of its weight"),
        ([{"pass": "dora", "where": "linear", "rank": 2}, NF4], "dora stands in the place of its weight"),
        ([{**NF4, "where": "embed"}], "rows of its weight are looked up one by one"),
        ([NF4, {"pass": "unfreeze", "where": "attention.q"}], "stored in codes"),
        ([NF4, LORA, {"pass": "merge"}], 'stored as torch.uint8, not as numbers.*Say "dequantize": true'),
    ],
)
def test_refusals(steps, reason):
    with unchanged(model_of("gated")), pytest.raises(Refused, match=reason):
        rewrite(model_of("gated"), {"passes": steps})


def test_a_tied_weight_keeps_its_values():
    with unchanged(model_of("looped")), pytest.raises(Refused, match="reads @tokens.weight as well"):
        rewrite(model_of("looped"), {"passes": [{"pass": "pissa", "where": "head", "rank": 3}]}, example=TOYS["looped"].inputs(2, 7))


def test_skips_by_where():
    live = gated([{**NF4, "where": {"role": "linear", "not": {"path": "**.q_proj"}}}])
    assert "model.layers.0.self_attn.q_proj.weight" in live.state_dict() and "model.layers.0.self_attn.k_proj.weight" not in live.state_dict()


def test_a_dora_over_codes_starts_from_their_numbers():
    live = gated([NF4, {"pass": "dora", "where": "attention.q", "rank": 2}])
    close(reference=TOYS["gated"].output(gated([NF4])), result=TOYS["gated"].output(live), drift=1e-5)


def test_onnx_has_the_numbers_made_from_codes(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, intermediate_size=296, max_position_embeddings=64)
    model = T.LlamaForCausalLM(T.LlamaConfig(**sizes)).eval()
    files = {}
    for name, steps in {"float": [], "int8": [INT8], "nf4": [NF4]}.items():
        report = export_onnx(rewrite(model, {"passes": steps}), tmp_path / f"{name}.onnx")
        assert report.error < 1e-4
        files[name] = report.bytes
    assert files["int8"] < 0.5 * files["float"] and files["nf4"] < 0.35 * files["float"]


@pytest.mark.parametrize("form", [NF4, INT8], ids=["nf4", "int8"])
@pytest.mark.parametrize("added", [LORA, {"pass": "dora", "where": "linear", "rank": 2}], ids=["lora", "dora"])
def test_merged_into_the_numbers_of_the_codes(form, added, tmp_path):
    adapted = {**added, "where": ["attention.{q,v}", "mlp.down"]}
    live, model = gated([{**form, "where": "linear"}, adapted]), model_of("gated")
    wake(live)
    merged = merge(live, dequantize=True)
    close(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(merged), drift=rounding(torch.float32))
    there = {path for path in model.state_dict() if path.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight"))}
    assert live.report.released.keys() - merged.report.released.keys() == there and there <= merged.report.folded <= model.state_dict().keys()
    assert all("mlp.up" in path or "o_proj" in path or "k_proj" in path or "gate" in path or "head" in path for path in merged.report.made)  # these keep their codes
    path = "model.layers.1.mlp.down_proj"
    if added is LORA:
        one = rewrite(model, {"passes": [{**form, "where": "linear"}]})
        node = next(n for n in one.graph.nodes if n.meta.get("stands_for") == f"{path}.weight")
        numbers = node.target(*(tensor_of(one, a.target) if isinstance(a, torch.fx.Node) and a.op == "get_attr" else a if not isinstance(a, torch.fx.Node) else torch.float32 for a in node.args))
        low = live.get_submodule(path).lora.default
        wanted = (numbers.double() + LORA.get("alpha", 16) / LORA["rank"] * low.up.double() @ low.down.double()).float()
        close(reference=wanted, result=merged.get_parameter(f"{path}.weight"), drift=1e-6)
        rejects(reference=numbers, result=merged.get_parameter(f"{path}.weight"), drift=1e-6)
    again = load(model, save(merged, tmp_path / "merged"))
    close(reference=TOYS["gated"].output(merged), result=TOYS["gated"].output(again), drift=0.0)
    assert not any(name in merged.state_dict() for name in live.state_dict() if f"{path}." in name)


# ---- pissa ---------------------------------------------------------------------------------------------------------------


def test_pissa_is_peft_s():
    peft = pytest.importorskip("peft")
    model = model_of("gated")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    live = rewrite(model, {"passes": [{"pass": "pissa", "where": ["attention.{q,v}", "mlp.down"], "rank": 4, "alpha": 8.0}]})
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            ours = lambda part: tensor_of(live, f"{name}.{part}").detach()  # noqa: B023, E731
            close(reference=module.base_layer.weight.detach(), result=ours("weight"), drift=rounding(torch.float32))
            rejects(reference=module.base_layer.weight.detach(), result=model.get_parameter(f"{name}.weight").detach(), drift=rounding(torch.float32))
            product = module.lora_B["default"].weight @ module.lora_A["default"].weight  # the signs of singular vectors are free
            close(reference=product.detach(), result=ours("pissa.default.up") @ ours("pissa.default.down"), drift=rounding(torch.float32))
    close(reference=TOYS["gated"].output(theirs), result=TOYS["gated"].output(live), drift=rounding(torch.float32))


def test_pissa_merges_back_into_the_base():
    live = gated([{"pass": "pissa", "where": "linear", "rank": 4}])
    merged = merge(live)
    assert not merged.report.made and not merged.report.derived
    for name, parameter in model_of("gated").named_parameters():
        close(reference=parameter, result=merged.get_parameter(name), drift=rounding(torch.float32))
    rejects(reference=model_of("gated").get_parameter("model.layers.0.mlp.up_proj.weight"), result=live.get_parameter("model.layers.0.mlp.up_proj.weight"), drift=rounding(torch.float32))


def test_a_randomised_decomposition_comes_close():
    exact, fast = (gated([{"pass": "pissa", "where": "mlp.up", "rank": 4, "niter": niter}]) for niter in (0, 16))
    path = "model.layers.0.mlp.up_proj"
    left = [tensor_of(live, f"{path}.weight").norm() for live in (exact, fast)]  # the exact one leaves the least there is
    assert left[0] <= left[1] <= 1.02 * left[0] < 0.98 * model_of("gated").get_parameter(f"{path}.weight").norm()


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", lambda model, example=None: captured(model, example) if any(model is model_of(name) for name in TOYS) else capture_anew(model, example))


def capture_anew(model, example):
    from rewrite import capture

    return capture(model, example)


# ---- loftq ---------------------------------------------------------------------------------------------------------------


def test_loftq_leaves_less_than_quantising_round_by_round():
    left = [max(f["rms error"] for f in gated([{"pass": "loftq", "where": "mlp.up", "rank": 4, "rounds": rounds}]).report.figures["passes[0]"].values()) for rounds in (1, 3, 8)]
    plain = max(f["rms error"] for f in gated([{**NF4, "where": "mlp.up"}]).report.figures["passes[0]"].values())
    assert left[2] < left[1] < left[0] < plain


def test_loftq_is_the_paper_s_alternation():
    """Written anew: Q = q(W - AB), AB = the best rank-r fit of W - Q, rounds times."""
    live, path = gated([{"pass": "loftq", "where": "mlp.up", "rank": 4, "rounds": 3}]), "model.layers.0.mlp.up_proj"
    w = model_of("gated").get_parameter(f"{path}.weight").detach()
    fit = torch.zeros_like(w)
    for _ in range(3):
        codes = dequant_nf4.quantize(w - fit)
        rest = (w - dequant_nf4.launch(*codes, list(w.shape), torch.float32)).double()
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        before, fit = fit, ((u[:, :4] * s[:4]) @ vh[:4]).float()
    part = {name: tensor_of(live, f"{path}.loftq.default.{name}").detach() for name in ("down", "up", "codes", "scales", "nested")}
    numbers = dequant_nf4.launch(part["codes"], part["scales"], part["nested"], list(w.shape), torch.float32)
    close(reference=dequant_nf4.launch(*codes, list(w.shape), torch.float32), result=numbers, drift=rounding(torch.float32))
    close(reference=fit, result=4.0 * part["up"] @ part["down"], drift=rounding(torch.float32))
    rejects(reference=before, result=4.0 * part["up"] @ part["down"], drift=rounding(torch.float32))


def test_loftq_comes_back_from_disk(tmp_path):
    live = wake(gated([{"pass": "loftq", "where": "linear", "rank": 4, "rounds": 2}]), size=0.05)
    folder = save(live, tmp_path / "x")
    close(reference=TOYS["gated"].output(live), result=TOYS["gated"].output(load(model_of("gated"), folder)), drift=0.0)
