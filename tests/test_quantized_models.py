"""Models whose weights come in codes: checkpoints as bitsandbytes, GPTQ and AWQ write them, made by hand, and live modules of bitsandbytes.

Packing and numbers are written anew here from the formats' public definitions, in loops; the oracle is the plain model with these numbers.
"""

import copy
import functools
import json

import pytest
import torch
import transformers as T
from checks import close, rejects, rounding
from rewrite.kernels import dequant_fp4, dequant_nf4, tables
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from rewrite import Refused, export_onnx, load, merge, rewrite, save
from rewrite.capture.coded import Coded
from rewrite.cli import app
from rewrite.report import Size
from rewrite.store.pretrained import pretrained

LORA = {"passes": [{"pass": "lora", "where": "linear", "rank": 3}]}
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


@functools.cache
def plain():
    """A decoder with grouped heads and a bias on q, k, v; outputs and inputs divide by eight, as GPTQ and AWQ want."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, max_position_embeddings=64)
    model = T.Qwen2ForCausalLM(T.Qwen2Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter)) if parameter.dim() == 1 else None
    return model


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}


def output(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(14).view(2, 7)).logits


def words(codes, order):
    """Rows of codes of four bits → rows of int32 words: the i-th four bits of a word are those of the neighbour order[i]."""
    packed = [[sum(int(row[start + place]) << 4 * i for i, place in enumerate(order)) for start in range(0, len(row), 8)] for row in codes]
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in row] for row in packed], dtype=torch.int32)


def integer(w, groups, seed, symmetric):
    """(codes in × out, zeros groups × out, scales groups × out in half precision) of a weight, by rounding; `groups` says which group an input is of."""
    count = int(groups.max()) + 1
    codes, zeros, scales = torch.zeros(w.shape[1], w.shape[0], dtype=torch.int64), torch.zeros(count, w.shape[0], dtype=torch.int64), torch.zeros(count, w.shape[0], dtype=torch.float16)
    for g in range(count):
        part = w[:, groups == g]
        scales[g] = (part.abs().amax(1) / 7.5).half()
        zeros[g] = 8 if symmetric else torch.randint(6, 11, (w.shape[0],), generator=torch.Generator().manual_seed(seed + g))
        codes[groups == g] = (torch.round(part / scales[g].float()[:, None]) + zeros[g][:, None]).clamp(0, 15).long().T
    return codes, zeros, scales


def numbers(codes, zeros, scales, groups):
    """The weight out × in that codes stand for, in float64."""
    return ((codes - zeros[groups]).double() * scales[groups].double()).T


def gptq(name, w, seed, symmetric=False, act_order=False, less=1):
    groups = torch.arange(w.shape[1]) // 32
    if act_order:
        groups = groups[torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(seed))]
    codes, zeros, scales = integer(w, groups, seed, symmetric)
    stored = {"qweight": words(codes.T.tolist(), range(8)).T.contiguous(), "qzeros": words((zeros - less).tolist(), range(8)), "scales": scales, "g_idx": groups.int()}
    return stored, numbers(codes, zeros, scales, groups)


def awq(name, w, seed):
    groups = torch.arange(w.shape[1]) // 32
    codes, zeros, scales = integer(w, groups, seed, False)
    return {"qweight": words(codes.tolist(), INTERLEAVED), "qzeros": words(zeros.tolist(), INTERLEAVED), "scales": scales}, numbers(codes, zeros, scales, groups)


def bitsandbytes(name, w, seed, kind="nf4", double=True):
    """The tensors and the JSON of bytes beside them; the codes are those of our kernel, whose bits other tests compare with the library's."""
    module, table = {"nf4": (dequant_nf4, dequant_nf4.NF4), "fp4": (dequant_fp4, dequant_fp4.FP4)}[kind]
    codes, scales, nested = module.quantize(w, double)
    state = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(w.shape)}
    stored = {"weight": codes.view(-1, 1), "weight.quant_map": torch.tensor(table), "weight.absmax": scales if double else scales.view(torch.float32)}
    scale = scales.view(torch.float32).double() if not double else None
    if double:
        nested = nested.view(torch.float32)
        stored |= {"weight.nested_absmax": nested[:-1].clone(), "weight.nested_quant_map": torch.tensor(tables.dynamic())}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(nested[-1])}
        scale = torch.tensor([tables.dynamic()[s] * float(nested[i // 256]) + float(nested[-1]) for i, s in enumerate(scales.tolist())], dtype=torch.float64)
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    found = [table[code] * float(scale[i // 64]) for i, code in enumerate(code for byte in codes.tolist() for code in (byte // 16, byte % 16))]
    return stored, torch.tensor(found, dtype=torch.float64).view(w.shape)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32", "_load_in_4bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
WAYS = {
    "nf4": (bitsandbytes, {**BNB, "bnb_4bit_quant_type": "nf4"}),
    "fp4 single": (functools.partial(bitsandbytes, kind="fp4", double=False), {**BNB, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}),
    "gptq": (gptq, GPTQ),
    "gptq symmetric": (functools.partial(gptq, symmetric=True), {**GPTQ, "sym": True}),
    "gptq act order": (functools.partial(gptq, act_order=True), {**GPTQ, "desc_act": True}),
    "gptq v2": (functools.partial(gptq, less=0), {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
}


def written(folder, way, config):
    """(the plain model with the numbers that the codes stand for; the folder, as the libraries write it)."""
    model, tensors = copy.deepcopy(plain()), dict(plain().state_dict())
    for seed, (name, module) in enumerate(linears(model).items()):
        del tensors[f"{name}.weight"]
        stored, found = way(name, module.weight.detach(), 100 * seed)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in stored.items()}
        module.weight.data = found.float()
    plain().config.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "architectures": ["Qwen2ForCausalLM"], "quantization_config": config}))
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("name", WAYS)
def test_a_checkpoint_in_codes(name, tmp_path):
    reference = written(tmp_path, *WAYS[name])
    model = pretrained(tmp_path)
    assert sum(isinstance(module, Coded) for module in model.modules()) == 14
    floats = sum(p.numel() for p in model.parameters() if p.is_floating_point())
    assert floats == sum(p.numel() for p in plain().parameters()) - sum(m.weight.numel() for m in linears(plain()).values())  # none was made beside its codes
    close(reference=output(reference), result=output(model), drift=rounding(torch.float32))
    rejects(reference=output(plain()), result=output(model), drift=rounding(torch.float32))


@pytest.mark.parametrize("name", WAYS)
def test_a_plan_counts_the_bytes_of_codes(name, tmp_path):
    """From the config alone: tensor for tensor what the checkpoint becomes when it is read."""
    written(tmp_path, *WAYS[name])
    listed = lambda model: {path: (tuple(t.shape), t.dtype) for path, t in model.named_parameters()}  # noqa: E731
    reference, shapes = pretrained(tmp_path), pretrained(tmp_path / "config.json", weights=False)
    assert listed(shapes) == listed(reference) and Size.of(shapes) == Size.of(reference) and all(t.is_meta for t in shapes.parameters())
    assert Size.of(shapes).stored_bytes < Size.of(plain()).stored_bytes / 2


def test_a_plan_of_a_checkpoint_in_codes(tmp_path):
    (tmp_path / "base").mkdir()
    written(tmp_path / "base", *WAYS["nf4"])
    (tmp_path / "lora.json").write_text(json.dumps(LORA))
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "base" / "config.json"), str(tmp_path / "lora.json"), "--json"])
    assert done.exit_code == 0, done.output
    found, live = json.loads(done.stdout), rewrite(pretrained(tmp_path / "base"), LORA)
    assert found["base"]["stored_bytes"] == Size.of(pretrained(tmp_path / "base")).stored_bytes != Size.of(plain()).stored_bytes
    assert found["after"]["stored_bytes"] == live.report.applied[-1].after.stored_bytes and found["passes"][0]["sites"] == {"attention.q": 2, "attention.k": 2, "attention.v": 2, "attention.o": 2, "mlp.gate": 2, "mlp.up": 2, "mlp.down": 2}


@pytest.mark.parametrize(
    "config, coded",
    [
        ({**BNB, "llm_int8_skip_modules": ["lm_head", "model.layers.*.mlp"]}, 8),
        ({**GPTQ, "modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]]}, 6),
        ({**WAYS["awq"][1], "modules_to_not_convert": ["o_proj"]}, 12),
        ({"quant_method": "aqlm"}, 0),
    ],
)
def test_a_plan_heeds_what_a_config_leaves_out(config, coded, tmp_path):
    written(tmp_path, awq, config)
    assert sum(isinstance(module, Coded) for module in pretrained(tmp_path, weights=False).modules()) == coded


def test_a_checkpoint_in_codes_is_rewritten(tmp_path):
    """LoRA beside the codes: as the plain model's; saved, loaded, exported; what would need the float weight says so."""
    (tmp_path / "base").mkdir()
    reference, model = written(tmp_path / "base", *WAYS["gptq act order"]), pretrained(tmp_path / "base")
    live = rewrite(model, LORA)
    assert sum("dequant_int4" in str(node.target) for node in live.graph.nodes) == 14
    close(reference=output(reference), result=output(live), drift=rounding(torch.float32))
    factors = {path: tensor for path, tensor in live.named_parameters() if ".lora." in path}
    with torch.no_grad():
        for tensor in factors.values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
        for path, module in linears(reference).items():
            up, down = (factors[f"{path}.lora.default.{part}"] for part in ("up", "down"))
            module.weight += 16 / 3 * up @ down
    close(reference=output(reference), result=output(live), drift=rounding(torch.float32))
    kept = load_file(save(live, tmp_path / "adapter") / "adapter.safetensors")
    assert set(kept) == set(factors)
    again = load(pretrained(tmp_path / "base"), tmp_path / "adapter")
    close(reference=output(live), result=output(again), drift=0.0)
    assert export_onnx(live, tmp_path / "x.onnx").error < 1e-4
    with pytest.raises(Refused, match="its weight came in codes"):
        merge(live)
    with pytest.raises(Refused, match="its weight came in codes"):
        rewrite(model, {"passes": [{"pass": "quantize", "where": "linear"}]})
    twin = copy.deepcopy(live).to(torch.bfloat16)
    coded = {path: tensor for path, tensor in live.named_parameters() if not tensor.is_floating_point()}
    assert len(coded) == 14 * 4 and all(torch.equal(twin.get_parameter(path), tensor) for path, tensor in coded.items())  # a cast rounds none of them
    assert output(twin).dtype == torch.bfloat16


def test_the_command_takes_a_checkpoint_in_codes(tmp_path):
    (tmp_path / "base").mkdir()
    written(tmp_path / "base", *WAYS["awq"])
    (tmp_path / "lora.json").write_text(json.dumps(LORA))
    done = CliRunner().invoke(app, ["apply", str(tmp_path / "base"), str(tmp_path / "lora.json"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


@pytest.mark.parametrize(
    "config, reason",
    [
        ({**BNB, "load_in_4bit": False, "load_in_8bit": True}, "quantised by bitsandbytes: in eight bits"),
        ({**GPTQ, "bits": 8}, "quantised by gptq: in 8 bits"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "quantised by gptq: packed for marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "quantised by awq: packed for gemv"),
        ({"quant_method": "aqlm"}, "quantised by aqlm: that is not read"),
    ],
)
def test_checkpoints_that_are_not_read(config, reason, tmp_path):
    written(tmp_path, awq, config)
    with pytest.raises(Refused, match=reason):
        pretrained(tmp_path)


def without(way, key):
    def call(name, w, seed):
        stored, found = way(name, w, seed)
        return {other: value for other, value in stored.items() if not other.startswith(key)}, found

    return call


def uneven(name, w, seed):
    stored, found = gptq(name, w, seed)
    return {**stored, "g_idx": torch.zeros_like(stored["g_idx"])}, found


def other_blocks(name, w, seed):
    stored, found = bitsandbytes(name, w, seed)
    key = "weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(stored[key].tolist()))
    return {**stored, key: torch.tensor(list(json.dumps({**state, "blocksize": 128}).encode()), dtype=torch.uint8)}, found


@pytest.mark.parametrize(
    "way, config, reason",
    [
        (without(awq, "qzeros"), WAYS["awq"][1], "qzeros of it is not in the file"),
        (without(bitsandbytes, "weight.quant_state"), BNB, "is not all there"),
        (without(bitsandbytes, "weight.nested_quant_map"), BNB, "is not all there"),
        (other_blocks, BNB, "its blocks are of 128 entries"),
        (uneven, GPTQ, "different numbers of inputs"),
    ],
)
def test_damaged_checkpoints_say_what_is_wrong(way, config, reason, tmp_path):
    written(tmp_path, way, config)
    with pytest.raises(Refused, match=reason):
        pretrained(tmp_path)


@pytest.mark.parametrize("double", [True, False])
def test_live_modules_of_bitsandbytes_are_read(double, tmp_path):
    library = pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(plain())
    for path, module in linears(model).items():
        made = library.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double)
        made.load_state_dict(module.state_dict())
        model.set_submodule(path, made)
    with pytest.raises(Refused, match="not in codes yet"):
        rewrite(model, LORA)
    model = model.to("cpu").eval()
    live = rewrite(model, LORA)
    assert sum("dequant_nf4" in str(node.target) for node in live.graph.nodes) == 14 and isinstance(live, T.Qwen2ForCausalLM)
    reference = copy.deepcopy(plain())
    for path, module in linears(reference).items():
        weight = model.get_submodule(path).weight
        module.weight.data = library.functional.dequantize_4bit(weight.data, weight.quant_state)
    close(reference=output(reference), result=output(live), drift=rounding(torch.float32))
    rejects(reference=output(plain()), result=output(live), drift=rounding(torch.float32))
    first = model.model.layers[0].mlp.up_proj
    assert live.model.layers[0].mlp.up_proj.codes.data_ptr() == first.weight.data_ptr()  # not copied
    close(reference=output(live), result=output(load(model, save(live, tmp_path / "x"))), drift=0.0)
