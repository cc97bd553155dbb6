"""Writes a live model as a folder of PEFT's: the spec becomes a config with module names, the new tensors get PEFT's names and layout.

    {"passes": [{"pass": "lora", "where": "attention.{q,v}", "rank": 8}, {"pass": "unfreeze", "where": "head"}]}
    -->
    adapter_config.json         {"peft_type": "LORA", "target_modules": ["model.layers.0.self_attn.q_proj", …], "modules_to_save": ["lm_head"], …}
    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, …
"""

import json
import re

import safetensors.torch
from torch import nn

from ..edit.batch import Batch
from ..errors import Refused
from ..graph import attribute
from ..spec.forms import Form
from .methods import EMBEDDED, METHODS
from .prompts import PROMPTS, prompt_files
from .read import CONFIG, NAME, PREFIX, TENSORS

#: passes that only say what trains: PEFT knows it as "modules_to_save" and "bias"
_TRAINING = ("unfreeze", "freeze", "bitfit")
_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


def files(live, changed):
    """{name of a file: its bytes} for a live model; `changed` are all tensors that differ from the base, by name. Refused for what PEFT cannot say."""
    try:
        return _files(live, changed)
    except Refused as reason:
        raise Refused(f"save as PEFT: {reason}. Nothing was written; save() without a format takes every spec.") from reason


def _files(live, changed):
    if any(getattr(step, "method", None) in PROMPTS.values() for step in live.spec.passes):
        config, table = prompt_files(live, set(changed) - live.report.made.keys())
        return {CONFIG: config, TENSORS: table}
    method, steps = _method(live)
    modules = _modules(live, method, steps)
    config, tensors = method.config(modules), {}
    for module, options in modules.items():
        owner = live.get_submodule(module)
        for ours, theirs in method.tensors.items():
            value = attribute(live, f"{module}.{method.name}.{options['name']}.{ours}").detach()
            theirs = EMBEDDED.get(theirs, theirs) if isinstance(owner, nn.Embedding) else theirs
            tensors[f"{PREFIX}{module}.{theirs}"] = method.laid(ours, value, owner.weight, options)
    (name,) = {options["name"] for options in modules.values()} if method.shared else (NAME,)
    for ours, theirs in method.shared:
        tensors[f"base_model.{theirs}"] = attribute(live, f"{method.name}.{name}.{ours}").detach()
    trained = sorted(live.report.trains)
    other = sorted(set(changed) - live.report.made.keys() - live.report.trains - set(live.report.memory))
    if other:
        raise Refused(f"{other[0]} differs from the base, and PEFT's folders hold adapters alone")
    for path in trained:
        module, _, leaf = path.rpartition(".")
        tensors[f"{PREFIX}{module}.base_layer.{leaf}" if module in modules else PREFIX + path] = attribute(live, path).detach()
    config |= _training(live, trained, modules, method) | {"target_modules": _targets(live, modules), "peft_type": method.kind, "inference_mode": True}
    kind = type(live).__name__
    config |= {"task_type": next((task for end, task in _TASKS.items() if kind.endswith(end)), None)}
    config |= {"base_model_name_or_path": getattr(getattr(live, "config", None), "_name_or_path", "") or None}
    content = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    return {CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(), TENSORS: safetensors.torch.save(content, {"format": "pt"})}


def _method(live):
    """The one Method of a live model's spec, and the numbers of its steps."""
    known = {method.name: method for method in METHODS}
    for step in live.spec.passes:
        if isinstance(step, Form | Batch):
            raise Refused(f"{step.place}: {step} has no counterpart in a folder of PEFT's")
        if step.method not in (*known, *_TRAINING):
            raise Refused(f'{step.place}: "{step.method}" has no counterpart in PEFT. These have: {", ".join(known)}')
    steps = [number for number, step in enumerate(live.spec.passes) if step.method in known]
    names = {live.spec.passes[number].method for number in steps}
    if len(names) != 1:
        raise Refused(f"a folder of PEFT's holds one method, and this spec has {', '.join(sorted(names)) or 'none'}")
    return known[names.pop()], steps


def _modules(live, method, steps):
    """module → the options of its step, with the site's `role` and the step's `name`."""
    found = {}
    for number in steps:
        step, applied = live.spec.passes[number], live.report.applied[number]
        for place, role in applied.sites:
            module = place.partition("#")[0]
            owner = live.get_submodule(module) if "[" not in module and not isinstance(_at(live, module), nn.Parameter) else None
            if getattr(owner, "weight", None) is None or f"{module}.{method.name}.{step.name}.{next(iter(method.tensors))}" not in live.report.made:
                raise Refused(f"{step.place}: {method.name} at {place} is on a part of a module, and PEFT adapts whole modules. For a fused projection name the whole: attention.qkv")
            options = {**vars(step.options), "role": role, "name": step.name}
            if found.setdefault(module, options) != options:
                raise Refused(f"{step.place}: {module} is adapted twice, and PEFT adapts a module once in a folder")
    made = {f"{module}.{method.name}.{options['name']}" for module, options in found.items()} | {f"{method.name}.{live.spec.passes[n].name}" for n in steps}
    other = next((path for path in live.report.made if path.rpartition(".")[0] not in made), None)
    if other is not None:
        raise Refused(f"{other} has no counterpart in PEFT")
    return found


def _at(live, path):
    value = live
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _training(live, trained, modules, method):
    """The keys "modules_to_save" and "bias" for the base tensors that train."""
    tied = next((name for name, value in live.named_parameters(remove_duplicate=False) for path in trained if name != path and value is attribute(live, path)), None)
    if tied is not None:
        raise Refused(f"{tied} is tied to another tensor, which PEFT would train by itself")
    base = {name for name, _ in live.named_parameters() if name not in live.report.made}
    own = lambda module: {name for name in base if name.rpartition(".")[0] == module}  # noqa: E731
    whole = sorted({module for path in trained if own(module := path.rpartition(".")[0]) <= set(trained) and module not in modules})
    left = {path for path in trained if path.rpartition(".")[0] not in whole}
    biases = {name for name in base if name.endswith(".bias")}
    sets = {"none": set(), "lora_only": {f"{module}.bias" for module in modules} & base, "all": {b for b in biases if b.rpartition(".")[0] not in whole}}
    bias = next((word for word, names in sets.items() if names == left), None)
    if bias is None or (left and method.kind != "LORA"):
        raise Refused(f"{min(left)} trains, and PEFT trains whole modules that are not adapted, or with lora all biases, or those of the adapted modules")
    return {"modules_to_save": whole or None, **({"bias": bias} if method.kind in ("LORA", "VERA", "ADALORA") else {})}


def _targets(live, modules):
    """A list of paths; a regular expression where a path is the end of another one's that is not meant."""
    names = [name for name, _ in live.named_modules()]
    if any(name.endswith(f".{module}") and name not in modules for name in names for module in modules):
        return "|".join(re.escape(module) for module in sorted(modules))
    return sorted(modules)
