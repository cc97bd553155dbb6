"""Tiny random models of many families: odd, distinct, rectangular sizes, so that a transposed weight cannot pass."""

import functools

import torch
import transformers as T

SIZES = dict(vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56)
GROUPED = dict(num_key_value_heads=2, head_dim=10)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
ENC_DEC = dict(d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=56, decoder_ffn_dim=56, dropout=0.1, attention_dropout=0.1, max_position_embeddings=64)  # fmt: skip
VISION = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, image_size=32, patch_size=8)

FAMILIES = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES, **GROUPED, **SPECIAL, attention_dropout=0.1)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**SIZES, **GROUPED, **SPECIAL, attention_dropout=0.1)),
    "gemma3": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**SIZES, **GROUPED, **SPECIAL, sliding_window=4, layer_types=["sliding_attention", "full_attention"])),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=99, n_embd=24, n_layer=2, n_head=4, n_inner=56, n_positions=64, **SPECIAL)),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SIZES, **SPECIAL, rotary_pct=1.0, attention_dropout=0.1, hidden_dropout=0.1)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**SIZES, **GROUPED, **SPECIAL, num_local_experts=4, attention_dropout=0.1)),
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(vocab_size=99, hidden_size=24, num_hidden_layers=2, state_size=7, **SPECIAL)),
    "bert": lambda: T.BertForSequenceClassification(T.BertConfig(**SIZES, max_position_embeddings=64, num_labels=3, pad_token_id=0)),
    "roberta": lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**SIZES, **SPECIAL, max_position_embeddings=64, num_labels=3)),
    "distilbert": lambda: T.DistilBertForSequenceClassification(T.DistilBertConfig(vocab_size=99, dim=24, n_layers=2, n_heads=4, hidden_dim=56, max_position_embeddings=64, num_labels=3, pad_token_id=0)),
    "deberta_v2": lambda: T.DebertaV2ForSequenceClassification(T.DebertaV2Config(**SIZES, max_position_embeddings=64, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, num_labels=3, pad_token_id=0)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=99, d_model=24, d_kv=10, d_ff=56, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(vocab_size=99, **ENC_DEC, **SPECIAL, decoder_start_token_id=1, forced_eos_token_id=2)),
    "whisper": lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(vocab_size=99, **{k: v for k, v in ENC_DEC.items() if k != "max_position_embeddings"}, **SPECIAL, num_mel_bins=8, max_source_positions=32, max_target_positions=64, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[])),
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**VISION, num_labels=3, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)),
    "clip": lambda: T.CLIPModel(T.CLIPConfig(text_config=dict(**SIZES, eos_token_id=98, max_position_embeddings=64), vision_config=VISION)),
}  # fmt: skip


def build(family, seed=0):
    """A tiny model of a family, in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def example(family, batch=2, length=7, seed=0):
    """Inputs of a family at the sizes asked for, the last row padded where the family takes a mask (vision: `length` is unused)."""
    g = torch.Generator().manual_seed(seed * 10007 + batch * 101 + length)
    ids = lambda n=length: torch.randint(3, 97, (batch, n), generator=g)
    mask = torch.ones(batch, length, dtype=torch.long)
    if length > 2:
        mask[-1, -2:] = 0
    pixels = lambda: {"pixel_values": torch.randn(batch, 3, 32, 32, generator=g)}
    if family in ("t5", "bart"):
        return {"input_ids": ids(), "attention_mask": mask, "decoder_input_ids": ids(length + 2)}
    if family == "whisper":
        return {"input_features": torch.randn(batch, 8, 64, generator=g), "decoder_input_ids": ids()}
    if family == "vit":
        return pixels()
    if family == "clip":
        return {"input_ids": ids(), "attention_mask": mask, **pixels()}
    if family == "mamba":
        return {"input_ids": ids()}
    return {"input_ids": ids(), "attention_mask": mask}


@functools.cache
def captured(family):
    """The capture of a family's tiny model, made once per test session: to be read, not to be changed."""
    from rewrite.capture.model import capture

    return capture(build(family))
