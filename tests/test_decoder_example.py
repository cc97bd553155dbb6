"""examples/decoder.py in small: a Llama from nothing, LoRA, save, load, merge, ONNX with cache."""

import importlib.util
import math
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "examples" / "decoder.py"


@pytest.fixture(scope="module")
def decoder():
    spec = importlib.util.spec_from_file_location("decoder_example", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns_and_every_copy_writes_the_same(decoder, tmp_path):
    found = decoder.main(decoder.SMALL, tmp_path / "out")
    assert found["code_after"] < found["code_before"]
    assert found["prose"] < math.log(decoder.SMALL.vocabulary)
    assert found["loaded_equal"] and found["onnx_equal"]
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert (tmp_path / "out" / "adapter" / "spec.json").is_file()


def test_another_adapter_writes_something_else(decoder):
    """The broken twin of the two equalities above: they can fail."""
    import torch
    import transformers

    from rewrite import rewrite

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, pad_token_id=0, eos_token_id=0)  # fmt: skip
    tokenizer = decoder.vocabulary(decoder.prose(("http",)), 300)
    live = rewrite(transformers.LlamaForCausalLM(config).eval(), decoder.SPEC)
    first = decoder.write(live, tokenizer, "Return the")
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if name.endswith(".up"):
                parameter.normal_()
    assert decoder.write(live, tokenizer, "Return the") != first
