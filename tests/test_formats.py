"""Formats of weights: each against a formula of its own in float64 or another library's bits, under Triton's interpreter, compiled for chips that are not there.

The fp4 codes of the golden file are those of bitsandbytes 0.50.2.
"""

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import aot_codes
import pytest
import safetensors.torch
import torch
import transformers as T
from aot import fault
from checks import captured, close, rejects, rounding
from rewrite.kernels import dequant_fp4, dequant_fp8, dequant_int4, dequant_int8, dequant_mxfp4, dequant_nf4
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rewrite import Refused, Spec, SpecError, capture, export_onnx, load, pipeline, rewrite, save
from rewrite.store.fingerprint import fingerprint

GOLDEN = Path(__file__).parent / "golden" / "fp4.json"
FORMATS = {
    "nf4": {"double": False},
    "fp4": {},
    "int4": {"group_size": 32},
    "int4 zeros": {"group_size": 64, "symmetric": False},
    "int8": {},
    "int8 groups": {"group_size": 32},
    "fp8": {},
    "fp8 blocks": {"blocks": True},
    "mxfp4": {},
}


def weight(*shape, seed=0):
    """Rows of very different sizes, a row and a group of zeros."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-3, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    w[1] = 0
    w.flatten(1)[2, :32] = 0
    return w


def quantized(name, w):
    """(module, tensors) of a weight in a format."""
    options = FORMATS[name]
    module = {"nf4": dequant_nf4, "fp4": dequant_fp4, "int4": dequant_int4, "int8": dequant_int8, "fp8": dequant_fp8, "mxfp4": dequant_mxfp4}[name.split()[0]]
    given = {"group_size": "group"}
    return module, module.quantize(w, **{given.get(key, key): value for key, value in options.items()})


def numbers(module, tensors, shape, dtype, way="launch"):
    rest = () if module in (dequant_int8, dequant_fp8) else (list(shape),)
    return getattr(module, way)(*tensors, *rest, dtype)


def halves(codes, low_first=True):
    """Two codes of each byte, along the last dimension, one by one."""
    order = (lambda byte: (byte % 16, byte // 16)) if low_first else (lambda byte: (byte // 16, byte % 16))
    return torch.tensor([[code for byte in row for code in order(byte)] for row in codes.tolist()])


# ---- each format, by a formula of its own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda c: c["shape"])
def test_fp4_is_what_bitsandbytes_has(case):
    rows, columns = map(int, case["shape"].split("×"))
    w = ((torch.arange(rows * columns) * 7919 % 1009 - 504).float() / 4096).view(rows, columns)
    w[2] = 0
    text = lambda t: t.view(torch.uint8).numpy().tobytes().hex()  # noqa: E731
    codes, scales, _ = dequant_fp4.quantize(w, double=False)
    assert (text(codes), text(scales)) == (case["codes"], case["single"])
    assert text(dequant_fp4.quantize(-w, double=False)[0]) != case["codes"]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_numbers_beside_bitsandbytes(kind, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    w, module = weight(37, 56).bfloat16(), {"nf4": dequant_nf4, "fp4": dequant_fp4}[kind]
    theirs, state = functional.quantize_4bit(w, quant_type=kind, compress_statistics=double)
    scales, nested = state.absmax, None
    if double:
        nested = torch.cat([state.state2.absmax, state.offset[None]]).view(torch.int32)
    else:
        codes, own, _ = module.quantize(w, double=False)
        assert torch.equal(codes, theirs.view(-1)) and torch.equal(own.view(torch.float32), scales)
    result = module.launch(theirs.view(-1), scales if double else scales.view(torch.int32), nested, [37, 56], torch.bfloat16)
    close(reference=functional.dequantize_4bit(theirs, state), result=result, drift=0.0)
    rejects(reference=functional.dequantize_4bit(theirs, state), result=result.roll(1), drift=0.0)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_by_groups(group, symmetric):
    w = weight(7, 256)
    codes, scales, zeros = dequant_int4.quantize(w, group, symmetric)
    found = dequant_int4.launch(codes, scales, zeros, [7, 256], torch.float32)
    code, scale = halves(codes).double(), scales.view(torch.float32).double()
    for row in range(7):
        for start in range(0, 256, group):
            part, own, used = w[row, start : start + group].double(), code[row, start : start + group], scale[row, start // group]
            low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
            step = max(-low, high) / 7.5 if symmetric else (high - low) / 15
            assert step == 0 or abs(float(used) / step - 1) < 1e-6
            zero = 8 if symmetric else int(zeros[row, start // group])
            close(reference=((own - zero) * used).float(), result=found[row, start : start + group], drift=0.0)
            if step:
                assert (found[row, start : start + group] - part).abs().max() <= (0.5001 if symmetric else 1.0001) * step and own.min() < own.max()
    swapped = codes >> 4 | codes << 4  # the first entry in the upper half
    rejects(reference=found, result=dequant_int4.launch(swapped, scales, zeros, [7, 256], torch.float32), drift=0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_what_eager_code_makes_is_the_reference(name):
    w = weight(517, 1024)  # of more than two pieces
    module, tensors = quantized(name, w)
    for dtype in (torch.float32, torch.bfloat16):
        found = numbers(module, tensors, w.shape, dtype)
        close(reference=numbers(module, tensors, w.shape, dtype, "reference"), result=found, drift=0.0)
        rejects(reference=found, result=found.roll(1, 0), drift=0.0)


def test_zeros_pay_where_a_group_lies_to_one_side():
    w = torch.rand(5, 128, generator=torch.Generator().manual_seed(0)) + 1.0
    error = [float((dequant_int4.launch(*dequant_int4.quantize(w, 64, kind), [5, 128], torch.float32) - w).square().mean()) for kind in (True, False)]
    assert error[1] < error[0]


@pytest.mark.parametrize("group", [None, 32, 64])
def test_int8_by_groups(group):
    w = weight(5, 128)
    codes, scales = dequant_int8.quantize(w, group)
    found, scale = dequant_int8.launch(codes, scales, torch.float32), scales.view(torch.float32).double()
    for row in range(5):
        for number in range(128 // (group or 128)):
            part = slice(number * (group or 128), (number + 1) * (group or 128))
            largest = w[row, part].abs().max()
            close(reference=(codes[row, part].double() * scale[row, number]).float(), result=found[row, part], drift=0.0)
            assert (found[row, part] - w[row, part]).abs().max() <= 0.5001 * largest / 127 and int(codes[row, part].abs().max()) == (127 if largest else 0)
    if group:
        rejects(reference=found, result=dequant_int8.launch(codes, scales.roll(1, 1), torch.float32), drift=0.05)


def test_every_code_of_fp8_is_torch_s():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    one = torch.ones(1, 1).view(torch.int32)
    for way in ("reference", "launch"):
        found = numbers(dequant_fp8, (codes, one), None, torch.float32, way)
        assert torch.equal(found.nan_to_num(1000.0), codes.view(torch.float8_e4m3fn).float().nan_to_num(1000.0))
        assert not torch.equal(found.nan_to_num(1000.0), codes.view(torch.float8_e4m3fnuz).float().nan_to_num(1000.0))


@pytest.mark.parametrize("blocks", [False, True])
def test_fp8_is_torch_s_cast(blocks):
    w = weight(150, 300)
    codes, scales = dequant_fp8.quantize(w, blocks)
    assert tuple(scales.shape) == ((2, 3) if blocks else (150, 1))
    found, scale = dequant_fp8.launch(codes, scales, torch.float32), scales.view(torch.float32)
    close(reference=found, result=dequant_fp8.reference(codes, scales, torch.float32), drift=0.0)
    tall, wide = (128, 128) if blocks else (1, 300)
    for row in range(0, 150, tall):
        for column in range(0, 300, wide):
            part, own = w[row : row + tall, column : column + wide], scale[row // tall, column // wide]
            if part.any():
                assert abs(float(own) * 448 / float(part.abs().max()) - 1) < 1e-6
            reference = (part / own).clamp(-448, 448).to(torch.float8_e4m3fn).float() * own
            close(reference=reference, result=found[row : row + tall, column : column + wide], drift=0.0)
    rejects(reference=w, result=found, drift=1e-3)
    rejects(reference=found, result=dequant_fp8.launch(codes, scales.roll(1, 0), torch.float32), drift=0.05)


def test_mxfp4_is_what_the_specification_says():
    """Written anew, in Python's floats: the power of two of the largest, over 2^2; the nearest of the eight numbers, the even code in the middle."""
    w = weight(5, 96)
    w[3, :32] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9, 6.5, 0.0, 0.26, 4.0] + [0.0] * 20) * 2.0**-5
    codes, scales = dequant_mxfp4.quantize(w)
    code, found = halves(codes), dequant_mxfp4.launch(codes, scales, [5, 96], torch.float32)
    numbers_of = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    reference = torch.zeros(5, 96)
    for row in range(5):
        for start in range(0, 96, 32):
            part = w[row, start : start + 32].tolist()
            largest = max(map(abs, part))
            if not largest:
                continue
            power = 0
            while 2.0 ** (power + 1) <= largest:
                power += 1
            while 2.0**power > largest:
                power -= 1
            assert int(scales[row, start // 32]) == power - 2 + 127
            for i, x in enumerate(part):
                distance = [abs(abs(x) / 2.0 ** (power - 2) - number) for number in numbers_of]
                best = min(range(8), key=lambda c: (distance[c], c % 2))
                assert int(code[row, start + i]) % 8 == best
                reference[row, start + i] = (-1) ** (x < 0) * numbers_of[best] * 2.0 ** (power - 2)
    close(reference=reference, result=found, drift=0.0)
    swapped = codes >> 4 | codes << 4
    rejects(reference=reference, result=dequant_mxfp4.launch(swapped, scales, [5, 96], torch.float32), drift=0.05)


@pytest.mark.parametrize("name, bits", [("nf4", 4 + 32 / 64), ("fp4", 4 + 8 / 64), ("int4", 4 + 32 / 32), ("int4 zeros", 4 + 40 / 64), ("int8 groups", 8 + 32 / 32), ("fp8", 8 + 32 / 256), ("mxfp4", 4 + 8 / 32)])
def test_bytes_are_those_that_the_docstring_counts(name, bits):
    module, tensors = quantized(name, weight(256, 256))
    found = 8 * sum(t.numel() * t.element_size() for t in tensors if t is not None) / 256**2
    assert bits <= found < bits + 0.01


@pytest.mark.parametrize("name", FORMATS)
def test_the_registered_op_is_whole(name):
    shape = (6, 32, 2)
    module, tensors = quantized(name, weight(*shape))
    rest = () if module in (dequant_int8, dequant_fp8) else (list(shape),)
    op = getattr(module, module.__name__.rpartition(".")[2])
    torch.library.opcheck(op.overload, (*tensors, *rest, torch.bfloat16), test_utils=("test_schema", "test_faketensor"))
    close(reference=module.reference(*tensors, *rest, torch.float16), result=op(*tensors, *rest, torch.float16), drift=0.0)


# ---- the Triton bodies -----------------------------------------------------------------------------------------------------


def test_triton_bodies_under_the_interpreter():
    """In a process of its own: the interpreter must be chosen before Triton is imported."""
    done = subprocess.run([sys.executable, Path(__file__).with_name("dequantised.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    broken = {name: count for name, count in report.items() if name.endswith("broken")}
    assert {name.split()[0] for name in broken} == {name.split()[0] for name in FORMATS} and all(broken.values())
    assert len(report) >= 3 * len(broken) and not any(count for name, count in report.items() if name not in broken)


@pytest.mark.parametrize("name", aot_codes.FORMATS)
def test_bodies_compile_for_hopper(name):
    found = aot_codes.compiled(90, name, "bf16")
    assert fault(90, found) is None, fault(90, found)


# ---- the pass ----------------------------------------------------------------------------------------------------------------


@functools.cache
def even():
    """A decoder whose rows divide into groups of 32 and 64."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=192, max_position_embeddings=64)
    return T.LlamaForCausalLM(T.LlamaConfig(**sizes)).eval()


@pytest.fixture(autouse=True)
def capture_once(monkeypatch):
    monkeypatch.setattr(pipeline, "capture", lambda model, example=None: captured(model, example) if model is even() else capture(model, example))


def step(name, where="linear"):
    return {"pass": "quantize", "where": where, "format": name.split()[0], **FORMATS[name]}


def output(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(14).view(2, 7) % 30).logits


def stand_in(live, name, path):
    """The weight that stands for a quantised one, as the reference of its kernel has it, in float32."""
    module, _ = quantized(name, weight(4, 64))
    parts = [getattr(live.get_submodule(f"{path}.quantize.default"), part, None) for part in ("codes", "scales", "nested", "zeros")]
    third = {"nf4": parts[2:3], "fp4": parts[2:3], "int4": parts[3:4]}.get(name.split()[0], [])
    return numbers(module, (*parts[:2], *third), even().get_parameter(f"{path}.weight").shape, torch.float32, "reference")


@pytest.mark.parametrize("name", FORMATS)
def test_the_live_model_is_the_one_with_these_numbers(name):
    live, plain = rewrite(even(), {"passes": [step(name)]}), copy.deepcopy(even())
    assert len(live.report.released) == 7
    for path, figures in live.report.figures["passes[0]"].items():
        w, found = plain.get_parameter(f"{path}.weight").detach(), stand_in(live, name, path)
        error = float((found.double() - w.double()).square().mean().sqrt() / w.double().square().mean().sqrt())
        assert figures["rms error"] == pytest.approx(error, rel=1e-4) and 1e-4 < error < 0.2
        assert f"{figures['rms error']:.3g} {path}" in str(live.report)
        w.copy_(found)
    close(reference=output(plain), result=output(live), drift=rounding(torch.float32))
    rejects(reference=output(even()), result=output(live), drift=rounding(torch.float32))


@functools.cache
def experts():
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, num_local_experts=3, max_position_embeddings=64)
    return T.MixtralForCausalLM(T.MixtralConfig(**sizes)).eval()


@pytest.mark.parametrize("name", ["nf4", "int4 zeros", "fp8 blocks"])
def test_experts_are_quantised_one_by_one(name, monkeypatch):
    monkeypatch.setattr(pipeline, "capture", lambda model, example=None: captured(model, example))
    live, plain = rewrite(experts(), {"passes": [{**step(name), "where": "expert.*"}]}), copy.deepcopy(experts())
    assert len(live.report.released) == 2
    for path in live.report.released:
        stacked = plain.get_parameter(path).data
        for w in stacked:
            module, tensors = quantized(name, w.clone())
            w.copy_(numbers(module, tensors, w.shape, torch.float32, "reference"))
    close(reference=output(plain), result=output(live), drift=rounding(torch.float32))
    rejects(reference=output(experts()), result=output(live), drift=rounding(torch.float32))


def test_fewer_bits_and_larger_groups_err_more():
    w, error = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), {}
    for name in (*FORMATS, "int4 wide"):
        module, tensors = quantized(name, w) if name in FORMATS else (dequant_int4, dequant_int4.quantize(w, 128))
        error[name] = float((numbers(module, tensors, w.shape, torch.float32) - w).square().mean())
    assert error["int8 groups"] < error["int8"] < error["fp8"] < error["int4"] < error["int4 wide"]
    assert error["nf4"] < error["fp4"] and error["nf4"] < error["mxfp4"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"format": "nf4", "group_size": 64}, '"group_size" is not an option of nf4, which has double'),
        ({"format": "int4", "double": True}, '"double" is not an option of int4, which has group_size, symmetric'),
        ({"format": "mxfp4", "blocks": True}, '"blocks" is not an option of mxfp4, which has none'),
        ({"format": "int8", "symmetric": True}, '"symmetric" is not an option of int8, which has group_size'),
        ({"format": "int4", "group_size": 48}, "expected 32 or 64 or 128 or null, got 48|expected one of 32, 64, 128 or .*, got 48"),
        ({"format": "int5"}, 'got "int5"'),
    ],
)
def test_options_of_another_format(options, words):
    with pytest.raises(SpecError, match=words):
        rewrite(even(), {"passes": [{"pass": "quantize", "where": "linear", **options}]})


@pytest.mark.parametrize(
    "step, words",
    [
        ({"where": "head"}, "a head's outputs are compared with each other"),
        ({"where": "embed"}, "looked up one by one"),
        ({"where": "mlp.up", "format": "int4", "group_size": 128}, "its rows of 64 entries do not divide into groups of 128; 32, 64 would do"),
    ],
)
def test_sites_that_are_left_as_they_are(step, words):
    with pytest.raises(Refused, match=words):
        rewrite(even(), {"passes": [{"pass": "quantize", **step}]})


def test_a_refused_site_keeps_its_weight():
    live = rewrite(even(), {"passes": [{**step("int4"), "where": ["linear", "head"], "allow_refusals": True}]})
    assert len(live.report.released) == 7 and [path for path, _ in live.report.applied[0].refused] == ["lm_head"]


class Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, after each op; `most` is the peak."""

    def __init__(self, tensors):
        self.known, self.most = {}, 0
        self.see(tensors)

    def see(self, values):
        for value in pytree.tree_leaves(values):
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and not value.is_meta:
                storage = value.untyped_storage()
                self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.known = {key: (ref, size) for key, (ref, size) in self.known.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.known.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.see(found)
        return found


class Side(torch.nn.Module):
    """Linears of a million entries side by side."""

    def __init__(self):
        super().__init__()
        self.each = torch.nn.ModuleList(torch.nn.Linear(256, 4096, bias=False) for _ in range(3))
        self.head = torch.nn.Linear(4096, 2, bias=False)

    def forward(self, x):
        return self.head(sum(linear(x) for linear in self.each).relu())


@pytest.mark.parametrize("name", ["nf4", "int4 zeros", "int8", "fp8 blocks"])
def test_a_donated_model_needs_the_codes_of_one_weight_beside_it(name, monkeypatch):
    """In bfloat16 and small pieces: at the peak one weight's codes and a few pieces are there beside the model."""
    monkeypatch.setattr("rewrite.kernels.pieces.ENTRIES", 2**15)
    monkeypatch.setattr("rewrite.kernels.tables.CHUNK", 2**15)
    peaks = {}
    for donate in (True, False):
        model = Side().bfloat16()
        example, size = (torch.zeros(2, 256, dtype=torch.bfloat16),), 3 * 2 * 2**20 + 16384
        graph, base = capture(model, example), fingerprint(model)
        with Alive(list(model.parameters())) as alive:
            pipeline.rewritten(graph, Spec.parse({"passes": [step(name)]}), base, donated=model if donate else None)
        peaks[donate] = alive.most - size
    assert peaks[True] <= 2 * 2**20 < peaks[False]


# ---- on disk, in other programs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_codes_come_back_from_disk(name, tmp_path):
    live = rewrite(even(), {"passes": [step(name)]})
    kept = set(safetensors.torch.load_file(save(live, tmp_path / "codes", whole=True) / "adapter.safetensors"))
    assert kept == {path for path in live.state_dict() if ".quantize." in path} and any(path.endswith("codes") for path in kept)
    close(reference=output(live), result=output(load(even(), tmp_path / "codes")), drift=0.0)
    rejects(reference=output(live), result=output(even()), drift=0.0)


@pytest.mark.parametrize("name", FORMATS)
def test_onnx_makes_numbers_of_codes(name, tmp_path, monkeypatch):
    """In ONNX Runtime as in PyTorch, and the codes stay codes: the file is smaller than the weights."""
    monkeypatch.setattr("rewrite.emit.writer.SMALL", 2**10)
    live = rewrite(even(), {"passes": [step(name)]})
    report = export_onnx(live, tmp_path / "x.onnx")
    codes = sum(t.numel() * t.element_size() for path, t in live.state_dict().items() if ".quantize." in path)
    weights = sum(even().get_parameter(path).numel() * 4 for path in live.report.released)
    assert report.error < 1e-5 and codes < report.bytes < codes + 0.5 * weights
