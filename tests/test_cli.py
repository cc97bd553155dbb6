"""The command line: what it prints and writes, its exit codes, its errors in words on standard error."""

import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import safetensors.torch
import torch
from models import build, example
from typer.testing import CliRunner

from rewrite.cli import app
from rewrite.pipeline import merge, rewrite
from rewrite.spec.parse import Spec
from rewrite.store.folder import load, save
from rewrite.store.pretrained import pretrained

LORA = {"passes": [{"pass": "lora", "where": "attention.{q,v}", "rank": 4}, {"pass": "unfreeze", "where": "head"}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny models, specs, and an adapter that was trained a little."""
    folder = tmp_path_factory.mktemp("cli")
    for family in ("llama", "bert"):
        build(family).save_pretrained(folder / family)
    (folder / "lora.json").write_text(json.dumps(LORA))
    (folder / "wrong.json").write_text(json.dumps({"passes": [{"pass": "lora", "rank": "8"}, {"pass": "lorra"}]}))
    live = rewrite(pretrained(folder / "llama"), LORA)
    generator = torch.Generator().manual_seed(0)
    for parameter in live.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save(live, folder / "adapter")
    return folder


@pytest.fixture
def run(place, tmp_path, monkeypatch):
    """Runs the command in a folder where the models and specs are: (exit code, standard output, standard error)."""
    for item in place.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)

    def call(*args):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


# -- what it does --------------------------------------------------------------------------------------------------------------------


def test_apply_writes_a_folder_that_loads(run, place):
    code, out, err = run("apply", "llama", "lora.json", "--out", "made/new")
    assert code == 0 and err == ""
    assert "lora" in out and "attention.q ×2" in out and "saved in made/new" in out
    live = load(pretrained("llama"), "made/new")
    assert live.spec == Spec.parse(LORA)
    inputs = example("llama")
    assert torch.equal(live(**inputs).logits, pretrained("llama")(**inputs).logits)  # lora starts at zero


def test_roles_lists_sites_and_sums_up(run):
    code, out, _ = run("roles", "llama")
    assert code == 0
    assert "attention.q     model.layers.{0..1}.self_attn.q_proj" in out
    assert out.splitlines()[-1].startswith("attention.{q,k,v,o")
    assert run("roles", "llama/config.json")[1] == out  # weights are not read


def test_show_prints_the_graph_before_and_after(run):
    code, out, _ = run("show", "llama")
    assert code == 0 and "@model.layers.0.self_attn.q_proj.weight" in out and "lora" not in out
    code, out, _ = run("show", "llama/config.json", "lora.json")
    assert code == 0 and "@model.layers.0.self_attn.q_proj.lora.default.down" in out
    assert "@lm_head.weight ❄" not in out and "@model.norm.weight ❄" in out


def test_plan_counts_what_really_comes_to_be(run, place):
    code, out, err = run("plan", "llama/config.json", "lora.json", "--json")
    assert code == 0 and err == ""
    plan = json.loads(out)
    live = load(pretrained("llama"), "adapter")
    parameters = list(live.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    assert plan["base"]["parameters"] == sum(p.numel() for p in build("llama").parameters())
    assert plan["after"]["trainable"] == trainable == sum(step["trainable_added"] for step in plan["passes"])
    assert plan["after"]["frozen"] == sum(p.numel() for p in parameters) - trainable
    assert plan["after"]["stored_bytes"] == sum(p.numel() * p.element_size() for p in parameters)
    assert [step["pass"] for step in plan["passes"]] == ["lora", "unfreeze"]
    assert plan["passes"][0]["sites"] == {"attention.q": 2, "attention.v": 2}
    assert plan["passes"][0]["stored_bytes_added"] == 4 * plan["passes"][0]["trainable_added"]
    assert plan["passes"][1]["stored_bytes_added"] == 0


def test_plan_prints_a_table(run):
    code, out, _ = run("plan", "llama/config.json", "lora.json")
    assert code == 0
    assert "18,696 parameters, 74.8 kB" in out and "+864" in out and "+2,376" in out and "3,240 (16.564%)" in out


def test_plan_keeps_the_dtype_of_the_config(run, tmp_path):
    config = json.loads(Path("llama/config.json").read_text())
    Path("half.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert json.loads(run("plan", "half.json", "lora.json", "--json")[1])["base"]["stored_bytes"] == 2 * 18696


def test_plan_of_a_large_shape_needs_no_memory(run):
    """A Llama-70B's width, of which all weights would take 14 GB even at four layers."""
    config = json.loads(Path("llama/config.json").read_text())
    wide = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
    Path("wide.json").write_text(json.dumps({**config, **wide}))
    code, out, _ = run("plan", "wide.json", "lora.json", "--json")
    assert code == 0
    assert json.loads(out)["base"]["parameters"] == 2 * 128256 * 8192 + 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) + 8192


@pytest.mark.parametrize("source", [None, "lora.json", "adapter"])
def test_export_writes_onnx_that_computes_the_same(run, source):
    code, out, err = run("export", "llama", *([source] if source else []), "--to", "x.onnx")
    assert code == 0 and err == "" and out.startswith("x.onnx: ")
    live = {None: lambda: pretrained("llama"), "lora.json": lambda: pretrained("llama"), "adapter": lambda: load(pretrained("llama"), "adapter")}[source]()
    _check("x.onnx", live)


def test_export_merges_first(run):
    assert run("export", "llama", "adapter", "--merge", "--to", "x.onnx")[0] == 0
    _check("x.onnx", load(pretrained("llama"), "adapter"))
    assert run("export", "llama", "adapter", "--to", "y.onnx")[0] == 0
    assert os.path.getsize("x.onnx") < os.path.getsize("y.onnx")  # no adapters are left


def test_a_merged_model_that_was_saved_exports_too(run):
    live = merge(load(pretrained("llama"), "adapter"))
    save(live, "merged")
    assert run("export", "llama", "merged", "--to", "x.onnx")[0] == 0
    _check("x.onnx", live)


def _check(path, live):
    inputs = example("llama", batch=1, length=9)
    inputs["position_ids"] = torch.arange(9)[None]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
    with torch.no_grad():
        wanted = live(**inputs).logits
    assert (torch.from_numpy(found) - wanted).abs().max() < 2e-5 * wanted.square().mean().sqrt()


def test_export_with_a_cache_has_its_inputs_and_outputs(run):
    code, out, _ = run("export", "llama", "--cache", "--to", "x.onnx")
    assert code == 0 and "past_key_values.0.key" in out and "present.1.value" in out


def test_export_writes_programs(run):
    code, out, _ = run("export", "llama", "adapter", "--to", "x.pt2")
    assert code == 0 and out.startswith("x.pt2: ")
    assert isinstance(torch.export.load("x.pt2"), torch.export.ExportedProgram)


def test_schema_is_the_one_of_the_code(run):
    code, out, _ = run("schema")
    assert code == 0 and json.loads(out) == Spec.schema()


def test_demo_is_handed_its_options(run, monkeypatch):
    calls = []
    monkeypatch.setattr(importlib.import_module("rewrite.demo"), "demo", lambda **options: calls.append(options))
    assert run("demo", "--all", "--model", "bert", "--out", "here")[0] == 0 and run("demo")[0] == 0
    assert calls[0] == {"model": "bert", "everything": True, "out": Path("here")}
    assert calls[1] == {"model": None, "everything": False, "out": Path("demo-out")}


@pytest.mark.parametrize("command", ["apply", "roles", "show", "plan", "export", "demo", "schema"])
def test_every_command_has_help_with_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and f"rewrite {command}" in out.split("Examples:")[1]
    assert command in run("--help")[1]


# -- bad input -----------------------------------------------------------------------------------------------------------------------


def refused(run, *args):
    """The message of a command that must end with code 1; nothing may be printed to standard output, or left in the folder."""
    before = sorted(os.listdir())
    code, out, err = run(*args)
    assert code == 1 and out == "" and "Traceback" not in err, (code, out, err)
    assert sorted(os.listdir()) == before
    return err


SPECS = {  # what is wrong with a spec: (the spec's text, what the message must say)
    "not JSON": ("{", "SpecError   x.json: not JSON: line 1, column 2"),
    "unknown pass": ('{"passes": [{"pass": "lorra"}]}', 'SpecError   x.json: passes[0]: "lorra" is not a pass. Did you mean "lora"?'),
    "unknown option": ('{"passes": [{"pass": "lora", "rank": 4, "alfa": 3}]}', '"alfa" is not an option of lora. Did you mean "alpha"?'),
    "unknown role": ('{"passes": [{"pass": "lora", "rank": 4, "where": "attention.qq"}]}', 'passes[0].where: "attention.qq" is not a role. Did you mean'),
    "wrong type": ('{"passes": [{"pass": "lora", "rank": "4"}]}', 'x.json: passes[0].rank: expected int, got "4"'),
    "rank 0": ('{"passes": [{"pass": "lora", "rank": 0}]}', "x.json: passes[0].rank: expected int ≥ 1, got 0"),
    "NaN": ('{"passes": [{"pass": "lora", "rank": 4, "alpha": NaN}]}', "x.json: passes[0].alpha: expected a finite number, got NaN"),
    "rank above the weight": ('{"passes": [{"pass": "lora", "rank": 25}]}', "(40×24): rank 25 is above the smaller side of (40, 24)"),
    "nothing hit": ('{"passes": [{"pass": "lora", "rank": 4, "where": "conv"}]}', 'found no site for "conv".  This model has: attention.{q,k,v,o'),
    "no such path": ('{"passes": [{"pass": "lora", "rank": 4, "where": {"role": "linear", "path": "layers.7.**"}}]}', "found no site for"),
    "not as many": ('{"passes": [{"pass": "lora", "rank": 4, "where": {"role": "attention.q", "expect": 3}}]}', "found 2 sites for"),
    "senseless order": ('{"passes": [{"pass": "merge"}, {"pass": "lora", "rank": 4}]}', "Refused     passes[0]: merge: no pass before it has added anything."),
    "twice": ('{"passes": [{"pass": "lora", "rank": 4}, {"pass": "lora", "rank": 5}]}', 'under the name "default". Give one of them another "name".'),
    "partly twice": (
        '{"passes": [{"pass": "lora", "rank": 4}, {"pass": "lora", "rank": 4, "where": "attention.q"}]}',
        'another "name"',
    ),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_wrong_spec(run, case):
    text, message = SPECS[case]
    Path("x.json").write_text(text)
    assert message in refused(run, "plan", "llama/config.json", "x.json")


@pytest.mark.parametrize("case", ["unknown option", "rank above the weight"])
def test_a_wrong_spec_leaves_nothing_behind(run, case):
    """Neither what is wrong before the model is read, nor what the model shows to be wrong."""
    text, message = SPECS[case]
    Path("x.json").write_text(text)
    assert message in refused(run, "apply", "llama", "x.json", "--out", "made")


def test_every_mistake_stands_under_the_first(run):
    lines = refused(run, "apply", "llama", "wrong.json", "--out", "made").splitlines()
    assert lines[0] == 'SpecError   wrong.json: passes[0].rank: expected int, got "8"'
    assert lines[1].startswith('            wrong.json: passes[1]: "lorra" is not a pass.')


def _adapter(change):
    """A copy of the adapter in the folder `bad`, changed."""
    load_ = safetensors.torch.load_file
    os.makedirs("bad")
    for name in ("spec.json", "adapter.safetensors"):
        Path("bad", name).write_bytes(Path("adapter", name).read_bytes())
    with safetensors.safe_open("bad/adapter.safetensors", "pt") as file:
        metadata = file.metadata()
    change(load_("bad/adapter.safetensors"), metadata)


def _write(tensors, metadata):
    safetensors.torch.save_file(tensors, "bad/adapter.safetensors", metadata)


ADAPTERS = {
    "truncated": (lambda t, m: os.truncate("bad/adapter.safetensors", 3000), "bad/adapter.safetensors: truncated or damaged (3000 bytes; "),
    "foreign names": (lambda t, m: _write({**t, "x.weight": torch.zeros(3)}, m), "1 foreign (x.weight)"),
    "missing names": (lambda t, m: _write({n: v for n, v in t.items() if n != "lm_head.weight"}, m), "1 missing (lm_head.weight)"),
    "wrong shapes": (lambda t, m: _write({**t, "lm_head.weight": torch.zeros(24, 99)}, m), "lm_head.weight was (99, 24), is (24, 99)"),
    "wrong dtypes": (lambda t, m: _write({**t, "lm_head.weight": t["lm_head.weight"].half()}, m), "lm_head.weight was float32, is float16"),
    "other values": (lambda t, m: _write({**t, "lm_head.weight": t["lm_head.weight"] * 2}, m), "lm_head.weight has other values"),
    "another spec": (lambda t, m: Path("bad/spec.json").write_text(json.dumps({**LORA, "seed": 1})), "not the spec that adapter.safetensors was saved with"),
    "no spec": (lambda t, m: os.unlink("bad/spec.json"), "bad: spec.json is missing."),
    "a pickle": (lambda t, m: Path("bad/adapter.safetensors").write_bytes(pickle.dumps(t)), "is a pickle, which can run code and is never read"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_wrong_adapter(run, case):
    change, message = ADAPTERS[case]
    _adapter(change)
    err = refused(run, "export", "llama", "bad", "--to", "x.onnx")
    assert err.startswith("Refused     ") and message in err


def test_another_base(run):
    torch.manual_seed(7)
    build("llama", seed=7).save_pretrained("other")
    err = refused(run, "export", "other", "adapter", "--to", "x.onnx")
    assert "adapter: was saved on another base." in err and "Load the base that it was trained on." in err
    assert "the class was LlamaForCausalLM, is BertForSequenceClassification" in refused(run, "export", "bert", "adapter", "--to", "x.onnx")


def test_an_unwritable_folder(run):
    Path("file").write_text("mine")
    for out in ("file", "file/deeper", "/proc/made", "llama"):
        assert "Nothing was written." in refused(run, "apply", "llama", "lora.json", "--out", out)
    for to in ("file/x.onnx", "nowhere/x.pt2", "/proc/x.onnx"):
        assert refused(run, "export", "llama", "--to", to).startswith("Refused     ")
    assert Path("file").read_text() == "mine"


MODELS = {  # what is wrong with a model folder: (how it comes to be, what the message must say)
    "not there": (lambda: None, "x/y/z", "x/y/z: is not there."),
    "no config": (lambda: os.makedirs("m"), "m", "m: holds no config.json."),
    "config not JSON": (lambda: _model("{"), "m", "m: its config cannot be read: "),
    "no model type": (lambda: _model("{}"), "m", "m: its config cannot be read: "),
    "unknown type": (lambda: _model('{"model_type": "lama"}'), "m", "m: its config cannot be read: "),
    "no class": (lambda: _model('{"model_type": "llama"}'), "m", "m: its config names no class."),
    "unknown class": (lambda: _model('{"model_type": "llama", "architectures": ["Lama"]}'), "m", "Lama is not a model of transformers"),
    "not a model": (lambda: _model('{"model_type": "llama", "architectures": ["pipeline"]}'), "m", "pipeline is not a model of transformers"),
    "own code": (lambda: _model('{"model_type": "my", "architectures": ["My"], "auto_map": {"AutoConfig": "my.My"}}'), "m", "its config cannot be read"),
    "no weights": (lambda: _model(None), "m", "m: holds no weights (*.safetensors)."),
    "pickled weights": (lambda: _model(None, "pytorch_model.bin"), "m", "m: its weights are in pytorch_model.bin; only safetensors are read"),
    "broken weights": (lambda: _model(None, "model.safetensors"), "m", "m: its weights cannot be read: "),
    "a file": (lambda: None, "lora.json", "lora.json: is a file."),
}


def _model(config, weights=None):
    os.makedirs("m")
    Path("m/config.json").write_text(config if config is not None else Path("llama/config.json").read_text())
    if weights:
        Path("m", weights).write_bytes(b"\x80\x04 not weights")


@pytest.mark.parametrize("case", MODELS)
def test_a_wrong_model(run, case):
    make, name, message = MODELS[case]
    make()
    assert message in refused(run, "apply", name, "lora.json", "--out", "made")


def test_a_model_with_missing_tensors(run):
    _model(None)
    tensors = safetensors.torch.load_file("llama/model.safetensors")
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, "m/model.safetensors", {"format": "pt"})
    assert "1 tensors of LlamaForCausalLM are not in its files (model.norm.weight)" in refused(run, "apply", "m", "lora.json", "--out", "made")


def test_a_config_that_makes_no_model(run):
    config = json.loads(Path("llama/config.json").read_text())
    _model(json.dumps({**config, "hidden_size": -24}))
    assert refused(run, "plan", "m", "lora.json").startswith("Refused     m: ")
    Path("m/config.json").write_text(json.dumps({**config, "hidden_size": "24"}))
    assert refused(run, "plan", "m", "lora.json").startswith("Refused     m: ")


# -- as a person runs it -------------------------------------------------------------------------------------------------------------


def command(*args, **keys):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    call = [sys.executable, "-c", "from rewrite.cli import main; main()", *map(str, args)]
    return subprocess.run(call, capture_output=True, text=True, env=environment, timeout=300, **keys)


def test_exit_codes(place, tmp_path):
    assert command("schema").returncode == 0
    wrong = command("apply", place / "llama", place / "wrong.json", "--out", tmp_path / "made")
    assert wrong.returncode == 1 and wrong.stdout == "" and wrong.stderr.startswith("SpecError   ") and "Traceback" not in wrong.stderr
    for usage in (["apply", "llama"], ["nothing"], ["export", "llama", "--to", "x.txt"]):
        done = command(*usage)
        assert done.returncode == 2 and done.stdout == "" and "Usage:" in done.stderr, usage
    hub = command("roles", "nobody-there/nothing-there")
    assert hub.returncode == 1 and hub.stderr.startswith("Refused     nobody-there/nothing-there: its config cannot be read: ")
    assert list(tmp_path.iterdir()) == []


def test_public_names_are_the_functions_not_the_files_of_the_same_name():
    code = "import rewrite.capture.model, rewrite.roles.find; from rewrite import *; from rewrite import __all__, pipeline; print(*sorted(map(type, map(eval, __all__)), key=str))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "module" not in done.stdout and done.stdout.count("function") > 10, done


def test_help_waits_for_nothing_heavy():
    code = "import rewrite.cli, sys; sys.exit(', '.join(m for m in ('torch', 'transformers', 'onnx', 'pydantic') if m in sys.modules) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"imported: {done.stderr}"
