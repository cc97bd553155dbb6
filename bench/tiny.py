"""A tiny random model of any architecture of transformers: the auto classes name them, a config shrinks by what its numbers are called.

    architectures()  ->  (Architecture("LlamaForCausalLM", "llama", ("causal LM",)), …)
    tiny(architecture)  ->  the model in eval mode, and how far its config could be shrunk

A number of a config is known by its name alone (layers, heads, widths, tables of ids). Where the parts do not fit together afterwards, the
next level is tried, which leaves the widths, then all but layers and vocabulary, as upstream's defaults have them. HINTS are for what
no name tells.
"""

import inspect
import re
from dataclasses import dataclass

import torch

TASKS = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "sequence to sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "image-text to text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
LARGEST = 120e6  # parameters
VOCABULARY = 199

# name of a number → what it becomes; the first that fits counts
LAYERS = object()
COUNTS = (
    (r"(text_|char_)?vocab(ulary)?_size\w*|\w*_vocab_size|vocab_size_\w+|n_vocab", VOCABULARY),
    (r"codebook_size", 64),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|max_seq_len(gth)?|max_sequence_length|seq_length", 64),
    (r"(num_|n_)?(\w*hidden_|encoder_|decoder_|num_encoder_|num_decoder_|num_text_|fusion_|\w+_)?(layers?|blocks)|n_layers?|depth|num_layers_\w+", LAYERS),
    (r"(num_)?(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_local_experts|n_experts", 4),
    (r"num_experts_per_tok(en)?|num_selected_experts|moe_topk|moe_top_k|moe_k|top_k_experts|num_experts_per_token", 2),
    (r"n_group|topk_group|num_expert_groups?", 1),
)
SHARED_HEADS = (r"(num_)?(key_value|kv)_heads|n_head_kv|multi_query_group_num", 2)
HEADS = (
    SHARED_HEADS,
    (r"(num_|n_)?(\w*attention_|encoder_attention_|decoder_attention_|\w+_)?(heads?)|n_heads?", 4),
)
WIDTHS = (
    (r"head_dim|attention_head_(size|dim)|d_kv|v_head_dim|key_head_dim|value_head_dim|linear_(key|value)_head_dim|kv_channels|mamba_(d_head|head_dim)", 8),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_nope_head_dim", 8),
    (r"(kv|q|o)_lora_rank|lora_rank\w*", 16),
    (r"\w*intermediate_size|\w*ffn_dim|d_ff|n_inner|ffn_hidden_size|inner_dim|mlp_dim|\w*ffn_hidden_size|hidden_dim", 56),
    (r"hidden_size(_global)?|d_model|n_embd|dim|emb_dim|embed_dim|embedding_size|projection_dim|\w*hidden_size|d_embed|word_embed_proj_dim|decoder_hidden_size", 32),
    (r"state_size|(mamba_)?d_state|\w*state_dim", 8),
)
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# (rules, layers): hybrids need more layers than two to have one of each kind
LEVELS = ((COUNTS + HEADS + WIDTHS, 2), (COUNTS + HEADS + WIDTHS, 4), (COUNTS + HEADS + WIDTHS, 8), (COUNTS, 2), (COUNTS, 4), (COUNTS[:4], 2), ((), 0))
IDS = re.compile(r"\w*(token|_id|index)\w*_(id|index|ids)|\w*token_id|\w+_token_index|\w*_token_ids?|eod_id|\w*_id")

# what no name of a number tells, by the type of the config
_PLANES = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1]))  # of a head of 8
_PERCEIVER = dict(d_latents=32, num_latents=8, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=1)
_WINDOWS = dict(embed_dim=24, depths=[2, 2], num_heads=[3, 6], image_size=32, window_size=2)  # shifted windows need more than one of them
_RESNET = dict(architecture="resnet18", model_args=dict(layers=[1, 1, 1, 1], channels=[8, 12, 16, 24]))
HINTS = {
    **{f"{kind}_text": _PLANES for kind in ("glm4v", "glm4v_moe", "glm_ocr", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen3_omni_moe")},
    "glm4v_moe_text": dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5, mrope_section=[1, 1, 0])),
    "ernie4_5_vl_moe_text": dict(moe_num_experts=4, moe_k=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2])),
    "aria": dict(projector_patch_to_query_dict={16: 4}),
    "blip-2": dict(image_token_index=190),
    "instructblip": dict(image_token_index=190, num_query_tokens=4),
    "instructblipvideo": dict(video_token_index=190, num_query_tokens=4),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0)),
    "molmo2_adapter": dict(vision_feature_layer=[1, 0]),
    "vipllava": dict(vision_feature_layers=[-2, -1]),
    "chameleon": dict(vocabulary_map={"<image>": 7, **{f"IMGIMG{'ABCDEFGHIJ'[n]}Z": 100 + n for n in range(8)}}),
    "chameleon_vqgan": dict(base_channels=32, channel_multiplier=[1, 1], embed_dim=16, latent_channels=16, num_embeddings=8, resolution=32),
    "emu3": dict(vocabulary_map={"<image>": 7}),
    "dots3_note_text": dict(per_layer_config={}),
    "dots3_note_vision_encoder": dict(mlp_layer_types=["dense", "sparse"], adapter_in_dim=32, adapter_out_dim=32),
    "dots3_note_audio_encoder": dict(adapter_input_size=32, adapter_out_dim=32),
    "diffusion_gemma_text": dict(num_experts=4, top_k_experts=2, moe_intermediate_size=24),
    "gemma4_assistant": dict(text_config=dict(model_type="gemma4_text", hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=2, num_hidden_layers=2)),
    "qwen2_5_omni_thinker": dict(vision_start_token_id=190),
    "qwen3_omni_moe_thinker": dict(vision_start_token_id=190),
    "bailing_hybrid": dict(layer_group_size=2),
    "nemotron_h": dict(n_groups=2, mamba_num_heads=4, mamba_head_dim=8),
    "cohere_compass_text": dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=10000.0))),
    "bamba": dict(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8),
    "deepseek_v2": dict(num_experts_per_tok=2, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1),
    "esm": dict(esmfold_config=None, pad_token_id=0, vocab_size=VOCABULARY),
    "gemma3": dict(mm_tokens_per_image=4),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "gemma4_unified_text": dict(num_kv_shared_layers=0),
    "gemma4_unified_vision": dict(mm_embed_dim=32, output_proj_dims=32, mm_posemb_size=16),
    "t5gemma2_encoder": dict(mm_tokens_per_image=4),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], num_layers=2),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], num_hidden_layers=2, mamba_n_heads=8, mamba_d_head=8),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_hidden_layers=2, use_mamba_kernels=False),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_hidden_layers=2, num_dense_layers=1),
    "longcat_flash": dict(qk_nope_head_dim=8, qk_rope_head_dim=4, head_dim=4, num_key_value_heads=None),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=2),
    "ministral": dict(head_dim=8),
    "musicgen_decoder": dict(num_codebooks=1),
    "musicgen_melody_decoder": dict(num_codebooks=1),
    "nemotron": dict(num_key_value_heads=2),
    "perceiver": _PERCEIVER,
    "zamba2": dict(num_hidden_layers=3, layers_block_type=["mamba", "mamba", "hybrid"], mamba_ngroups=1, n_mamba_heads=2),
    "recurrent_gemma": dict(num_hidden_layers=3, block_types=["recurrent", "recurrent", "attention"]),
    "reformer": dict(is_decoder=True, axial_pos_shape=[4, 16], axial_pos_embds_dim=[8, 24], attn_layers=["local", "lsh"], num_hashes=1, hash_seed=0),
    "xlstm": dict(hidden_size=128, embedding_dim=128),
    "shieldgemma2": dict(mm_tokens_per_image=4, yes_token_index=7, no_token_index=9),
    "timm_wrapper": _RESNET,
    "fast_vlm": dict(vision_config=dict(model_type="timm_wrapper", hidden_size=24, **_RESNET)),
    "gemma3n": dict(vision_config=dict(model_type="gemma3n_vision", hidden_size=24, vocab_size=10, vocab_offset=180, **_RESNET), vision_soft_tokens_per_image=4),
    "perception_lm": dict(vision_config=dict(model_type="timm_wrapper", architecture="vit_tiny_patch16_224", do_pooling=False, model_args=dict(img_size=64, embed_dim=32, depth=2, num_heads=4))),
    "qwen4_exp_text": dict(layer_types=["linear_attention", "indexed_attention"], num_hidden_layers=2, linear_num_key_heads=2, linear_num_value_heads=4, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2, hc_lowrank=8),
    "blt": dict(num_hidden_layers=2, encoder_hash_byte_group_vocab=64),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"], n_group=1, topk_group=1, num_experts_per_tok=2),
    "deepseek_ocr2_sam_vision_model": dict(global_attn_indexes=[1], window_size=2, output_channels=32, downsample_channels=[32, 32]),
    "emu3_vqgan": dict(base_channels=32, channel_multiplier=[1, 1], attn_resolutions=[3], temporal_downsample_factor=2),
    "gemma3n_audio": dict(vocab_size=9, vocab_offset=190),
    "granite4_vision": dict(
        vision_config=dict(model_type="clip_vision_model", hidden_size=64, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16),
        downsample_rate="1/2", deepstack_layer_map=[[-2, 0]], spatial_target_layers=[0, 1], image_grid_pinpoints=[[64, 64]],
    ),
    "hunyuan_vl_text": dict(head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 1, 1])),
    "kosmos-2": dict(latent_query_num=4),
    "muse_spark_audio": dict(patch_sizes=[4, 2], hidden_sizes=[16, 32], depths=[1, 1]),
    "step3p5": dict(sliding_window=8),
    "vibevoice_acoustic_tokenizer_encoder": dict(num_filters=4, downsampling_ratios=[2, 2], depths=[1, 1, 1]),
    "swin": _WINDOWS,
    "swinv2": _WINDOWS | dict(pretrained_window_sizes=[0, 0]),
    "donut-swin": _WINDOWS,
    "efficientnet": dict(width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320, image_size=64, num_block_repeats=[1, 2, 1, 1, 1, 1, 1]),
    "funnel": dict(block_sizes=[2, 1]),
    "cvt": dict(depth=[1, 2, 3]),  # its stage s reads entry s of its own layers' drop rates
    "hgnet_v2": dict(hidden_sizes=[256, 512, 1024, 2048]),
    "textnet": dict(stem_out_channels=16, image_size=[64, 64]),
    "xmod": dict(default_language="en_XX"),
}


@dataclass(frozen=True)
class Architecture:
    """A model class of the auto mappings: its name, the type of its config, the tasks under which it is listed."""

    name: str
    kind: str
    tasks: tuple[str, ...]

    def classes(self):
        """(the model's class, its config's class)."""
        import transformers
        from transformers import CONFIG_MAPPING

        model = getattr(transformers, self.name, None)
        config = CONFIG_MAPPING[self.kind] if self.kind in CONFIG_MAPPING else None
        if model is None:  # not public: beside its config
            home = config.__module__.replace("configuration_", "modeling_")
            model = getattr(__import__(home, fromlist=[self.name]), self.name)
        return model, getattr(model, "config_class", None) or config


def architectures():
    """Every class that the auto mappings of TASKS name, each once, in order of name."""
    from transformers.models.auto import modeling_auto

    found = {}
    for task, mapping in TASKS.items():
        for kind, names in getattr(modeling_auto, mapping).items():
            for name in names if isinstance(names, (tuple, list)) else (names,):
                kinds, tasks = found.setdefault(name, (kind, []))
                tasks.append(task) if task not in tasks else None
    return tuple(Architecture(name, kind, tuple(tasks)) for name, (kind, tasks) in sorted(found.items()))


def _given(architecture, config_class):
    """What the task asks of the config: a decoder that stands alone has to be told that it is one."""
    fields = _fields(config_class)
    alone = "causal LM" in architecture.tasks and "sequence to sequence" not in architecture.tasks
    return {"is_decoder": True} if alone and fields.get("is_decoder") is False else {}


def tiny(architecture, accepts, seed=0):
    """The smallest model that runs → (model, example of its inputs, level). accepts: model → an example that it accepts, or raises.

    Raises the reason of the level that came furthest, of the first where none did.
    """
    kind, config_class = architecture.classes()
    failures = []
    for level in range(len(LEVELS)):
        built = False
        try:
            config = shrunk(config_class, *LEVELS[level], _given(architecture, config_class))
            count = _parameters(kind, config)
            if count > LARGEST:
                raise ValueError(f"{count / 1e6:.0f} million parameters at the sizes of upstream's defaults")
            torch.manual_seed(seed)
            model = kind(config).eval()
            built = True
            return model, accepts(model), level
        except Exception as failure:  # whatever a constructor says to sizes that do not fit
            failures.append((built, failure))
    raise next((failure for built, failure in failures if built), failures[0][1])


def _parameters(kind, config):
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in kind(config).parameters())
    except Exception:  # a model that cannot be made without data is made with it
        return 0


def shrunk(config_class, rules, layers, given=None, tokens=None):
    """A config of this class with its numbers shrunk by the rules, and those of the configs in it.

    tokens: token of upstream → ours, for all configs of one model: an image's is not the end of the text, and one is the same in each of them.
    """
    tokens = {} if tokens is None else tokens
    fields = _fields(config_class)
    values = dict(given or {})
    hints = dict(HINTS.get(getattr(config_class, "model_type", None), {})) if rules else {}
    before = {len(values.get(name, default)) for name, default in fields.items() if isinstance(values.get(name, default), (list, tuple))}
    before &= {values.get(name, default) for name, default in fields.items() if re.fullmatch(COUNTS[3][0], name) and isinstance(values.get(name, default), int)}
    for name, kind in (getattr(config_class, "sub_configs", None) or {}).items():
        if name not in hints and name in fields and inspect.isclass(kind) and hasattr(kind, "sub_configs") and kind.__name__ != "AutoConfig":
            values[name] = shrunk(kind, rules, layers, tokens=tokens).to_dict()
        elif name not in hints and name in fields and kind.__name__ == "AutoConfig":
            default = getattr(config_class(), name, None)
            if default is not None:
                values[name] = shrunk(type(default), rules, layers, _other_than_default(default), tokens).to_dict()
    heads = values.get("num_attention_heads", fields.get("num_attention_heads"))
    for name, default in fields.items():
        number = values.get(name, default)
        if isinstance(number, bool) or not isinstance(number, int):
            continue
        for pattern, size in rules:
            if (pattern, size) == SHARED_HEADS and number == heads:
                continue  # one for each head, there and here
            if re.fullmatch(pattern, name):
                values[name] = min(layers if size is LAYERS else size, number) if number > 0 else number
                break
        else:
            if IDS.fullmatch(name) and number >= VOCABULARY and rules:
                values[name] = tokens.setdefault(number, VOCABULARY - 1 - len(tokens))
    for name, default in fields.items():
        listed = values.get(name, default)
        if isinstance(listed, (list, tuple)) and len(listed) in before and rules:  # one entry a layer
            values[name] = _some(listed, layers)
    rope = getattr(config_class(), "rope_parameters", None) if rules and "rope_parameters" in fields else None
    rope = values.get("rope_parameters") or rope
    if isinstance(rope, dict) and "mrope_section" in rope and len(rules) > len(COUNTS):
        half = int(8 * (rope.get("partial_rotary_factor") or 1)) // 2
        values["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    for name in ("depth", "depths", "num_hidden_layers", "num_layers"):
        if isinstance(fields.get(name), (list, tuple)) and rules:
            values[name] = [min(2, n) for n in fields[name]]
    for name in ("hidden_sizes", "embed_dim", "embed_dims"):  # a pyramid keeps its proportions
        widths = fields.get(name)
        if len(rules) > len(COUNTS) and isinstance(widths, (list, tuple)) and widths[0] > 16 and all(16 * width % widths[0] == 0 for width in widths):
            values[name] = [16 * width // widths[0] for width in widths]
    side, patch = fields.get("image_size"), values.get("patch_size", fields.get("patch_size"))
    if len(rules) > len(COUNTS) and isinstance(side, int) and isinstance(patch, int) and side > 4 * patch:
        stages = fields.get("depths", ())
        least = patch * 2 ** len(stages) if isinstance(stages, (list, tuple)) else 0  # each stage halves it
        values["image_size"] = min(side, max(4 * patch, least, 2 * (fields.get("output_stride") or 0)))
    for name, token in SPECIAL.items():
        if name in fields and not isinstance(values.get(name, fields[name]), int) and rules:
            values[name] = token
    config = config_class(**(values | hints))
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def _some(listed, count):
    """So many entries of a list, one of each kind as far as there is room."""
    kinds = sorted({str(entry): index for index, entry in reversed(list(enumerate(listed)))}.values())[:count]
    rest = [index for index in range(len(listed)) if index not in kinds]
    return [listed[index] for index in sorted(kinds + rest[: count - len(kinds)])]


def _fields(config_class):
    """The settings of a config by name, each with its default; through all the classes that hand on what they do not know."""
    found = {}
    for kind in reversed(config_class.__mro__):
        if "__init__" not in vars(kind):
            continue
        for name, parameter in inspect.signature(kind.__init__).parameters.items():
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name != "self":
                found[name] = None if parameter.default is parameter.empty else parameter.default
    return found


def _other_than_default(config):
    default = type(config)().to_dict()
    return {name: value for name, value in config.to_dict().items() if name in _fields(type(config)) and value != default.get(name)}
