"""PEFT's folders of prefixes and prompts, of decoders: one tensor, `prompt_embeddings`, with a row for each place.

    prefix_tuning   (places, layers × 2 × width)    of each layer the keys, then the values
    prompt_tuning   (places, width)
"""

import json

import safetensors.torch
import torch

from ..capture.model import capture
from ..errors import Refused
from ..pipeline import rewritten
from ..spec.parse import Spec
from ..store.fingerprint import fingerprint

PROMPTS = {"PREFIX_TUNING": "prefix_tuning", "PROMPT_TUNING": "prompt_tuning"}
TENSOR = "prompt_embeddings"
#: keys that say how the tensor came to be, or repeat its shape
TAKES = (
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "encoder_hidden_size", "prefix_projection", "init_weights",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
)  # fmt: skip


def read_prompt(model, config, tensors, example):
    """The live model of a folder's config and tensors, whose keys have been looked at."""
    if config.get("task_type") != "CAUSAL_LM" or config.get("num_transformer_submodules") not in (None, 1):
        raise Refused(f'"task_type" is {config.get("task_type")!r}: prefixes and prompts are read for decoders alone (CAUSAL_LM)')
    if tensors.keys() != {TENSOR} or tensors[TENSOR].dim() != 2 or not tensors[TENSOR].numel():
        raise Refused(f"holds {', '.join(sorted(tensors)) or 'nothing'}, not one table {TENSOR}")
    table, method = tensors[TENSOR], PROMPTS[config["peft_type"]]
    if config.get("num_virtual_tokens") != table.shape[0]:
        raise Refused(f'"num_virtual_tokens" is {config.get("num_virtual_tokens")!r}, and {TENSOR} has {table.shape[0]} rows')
    step = {"pass": method, "length": table.shape[0], **({"shift": True} if method == "prefix_tuning" else {})}
    live = rewritten(capture(model, example), Spec.parse({"passes": [step]}), fingerprint(model))
    own = _own(live, method)
    if sum(value.shape[1] for value in own) != table.shape[1] or table.shape[0] != own[0].shape[0]:
        raise Refused(f"{TENSOR} is {tuple(table.shape)}; on this model it would be ({own[0].shape[0]}, {sum(value.shape[1] for value in own)})")
    with torch.no_grad():
        for value, part in zip(own, table.split([value.shape[1] for value in own], 1)):
            if not part.to(value.dtype).isfinite().all():
                raise Refused(f"{TENSOR} does not fit into {value.dtype}: it would be infinite")
            value.copy_(part)
    return live


def prompt_files(live, others):
    """(config, tensors) of a live model whose spec is one prefix or prompt; `others` are tensors that differ from the base beside it."""
    (step, *more), kind = live.spec.passes, {name: kind for kind, name in PROMPTS.items()}
    if more or step.method not in kind:
        raise Refused("a folder of PEFT's holds one method: a prefix or a prompt stands alone there")
    own = _own(live, step.method)
    if not type(live).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise Refused(f"prefixes and prompts are written for decoders alone, not for {type(live).__name__}")
    if others or live.report.trains:
        raise Refused(f"{min({*others, *live.report.trains})} differs from the base too")
    layers = live.config.num_hidden_layers
    if step.method == "prefix_tuning" and (step.options.inner or not step.options.shift or len(own) != 2 * layers or len({value.shape for value in own}) != 1):
        raise Refused('PEFT reads a prefix of every layer, all of one width, that the model counts as tokens and that no network makes ("shift": true, "inner": 0)')
    heads = getattr(live.config, "num_key_value_heads", None) or live.config.num_attention_heads
    config = {"peft_type": kind[step.method], "task_type": "CAUSAL_LM", "num_virtual_tokens": step.options.length, "token_dim": own[0].shape[1], "num_transformer_submodules": 1}
    config |= {"num_attention_heads": heads, "num_layers": layers, "inference_mode": True, "base_model_name_or_path": getattr(live.config, "_name_or_path", "") or None}
    table = torch.cat([value.detach() for value in own], 1).cpu().contiguous()
    return json.dumps(config, indent=2, sort_keys=True).encode(), safetensors.torch.save({TENSOR: table}, {"format": "pt"})


def _own(live, method):
    """The new tensors of all layers in the order of PEFT's table."""
    (applied,) = [one for one in live.report.applied if one.method == method]
    names = ("keys", "values") if method == "prefix_tuning" else ("prompt",)
    own = [live.get_parameter(f"{site}.{method}.{applied.name}.{name}".lstrip(".")) for site, _ in applied.sites for name in names if f"{site}.{method}.{applied.name}.{name}".lstrip(".") in live.report.made]
    if len(own) != len(live.report.made):
        raise Refused(f"{len(live.report.made)} new tensors, of which PEFT's table would hold {len(own)}")
    return own
