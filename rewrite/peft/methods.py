"""What PEFT calls what our passes call: kinds, options, tensors, and how a tensor of ours is laid out there.

    {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": true}, q_proj
    <->
    {"pass": "lora", "rank": 8, "alpha": 45.25…}

Sites are named by modules there and by role here; `read` and `write` go between the two.
"""

import math
import re
from dataclasses import dataclass
from typing import Callable

from ..errors import Refused


@dataclass(frozen=True)
class Method:
    """A pass with a counterpart in PEFT.

    `tensors`: our name → theirs, under the path of the module; `shared`: those beside the modules. `laid(name, tensor, weight, options)` gives a
    tensor of ours in the layout of theirs. `options(config, module, kind)` gives the options of a step, `config(module → options)` the keys
    of a config (there options have the site's `role` too). `takes`: keys of a config that may be anything, or whose values `options` reads.
    """

    kind: str
    name: str
    tensors: dict[str, str]
    takes: tuple[str, ...]
    options: Callable
    config: Callable
    laid: Callable = lambda name, tensor, weight, options: tensor
    shared: tuple[tuple[str, str], ...] = ()


# ---- laying out ------------------------------------------------------------------------------------------------------------


def _lora_laid(name, tensor, weight, options):
    if name == "up":
        return tensor.reshape(*tensor.shape, *[1] * (weight.dim() - 2))
    if name == "magnitude":
        return tensor.flatten() if weight.dim() == 2 else tensor.transpose(0, 1)
    return tensor


def _hira_laid(name, tensor, weight, options):
    if weight.dim() == 2:
        return tensor
    return tensor.reshape(tensor.shape[0], *weight.shape[1:]) if name == "down" else tensor.reshape(*tensor.shape, *[1] * (weight.dim() - 2))


def _flat(name, tensor, weight, options):
    return tensor.flatten()


def _ia3_laid(name, tensor, weight, options):
    return tensor.reshape(1, -1) if _on_input(options) else tensor.reshape(-1, 1)


def _on_input(options):
    return options["role"] == "mlp.down" if options.get("side") is None else options["side"] == "input"


# ---- options ---------------------------------------------------------------------------------------------------------------


#: any name of a list of layers
ANY_LAYER = "[^.]*"


def plain_pattern(key, where):
    """A path of modules, as a regular expression; Refused for more than that, which could run for years."""
    if key == ANY_LAYER or isinstance(key, str) and re.fullmatch(r"\^?(?:[\w.-]|\\[.-])+\$?", key):
        return key
    raise Refused(f'"{where}": {key!r} is more than a path of modules. Write the paths one by one')


def of_pattern(config, key, module, usual):
    """PEFT's rank_pattern and alpha_pattern: the value of the first path that a module's ends with."""
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise Refused(f'"{key}": expected an object, got {given!r}')
    return next((value for path, value in given.items() if re.match(rf"(.*\.)?({plain_pattern(path, key)})$", module)), usual)


def _scaled(config, module, alpha="lora_alpha"):
    rank = of_pattern(config, "rank_pattern", module, config.get("r", 8))
    scale = of_pattern(config, "alpha_pattern", module, config.get(alpha, 8))
    if type(rank) is not int or rank < 1 or isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise Refused(f"rank {rank!r} and alpha {scale!r} at {module} are not a whole number above 0 and a number")
    return {"rank": rank, "alpha": float(scale * math.sqrt(rank)) if config.get("use_rslora") else float(scale)}


def _lora(config, module, kind):
    usual = config.get("lora_dropout") or 0.0
    return {**_scaled(config, module), **({"dropout": usual} if usual and kind != "embedding" else {})}


def _dora(config, module, kind):
    _none(config, "lora_dropout", "our dora has no dropout")
    return _scaled(config, module)


def _loha(config, module, kind):
    return _scaled(config, module, "alpha")


def _hira(config, module, kind):
    _none(config, "hira_dropout", "our hira has no dropout")
    rank = of_pattern(config, "rank_pattern", module, config.get("r", 32))
    return {"rank": rank, "alpha": float(rank)}  # PEFT has no scale there


def _vera(config, module, kind):
    _none(config, "vera_dropout", "our vera has no dropout")
    return {"rank": config.get("r", 256), "initial": config.get("d_initial", 0.1)}


def rank_left(config, module):
    """How many ranks adalora has left at a module, or None where it has not cut yet."""
    kept = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
    return None if kept is None else sum(bool(k) for k in kept) if isinstance(kept, list) else kept


def _adalora(config, module, kind):
    _none(config, "lora_dropout", "our adalora has no dropout")
    left, alpha = rank_left(config, module), config.get("lora_alpha", 8)
    rank = config.get("init_r", 12) if left is None else left
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise Refused(f"rank {rank!r} and alpha {alpha!r} at {module} are not a whole number above 0 and a number")
    alpha = (alpha if alpha > 0 else config["init_r"]) * rank / (config.get("init_r", 12) + ADALORA_BIT)
    target = config.get("target_r", 8) if left is None else rank  # what it has cut stays cut
    return {"rank": rank, "alpha": alpha, "target": target, **{ours: config.get(theirs) for ours, theirs in _ADALORA.items() if config.get(theirs) is not None}}


def _adalora_config(options):
    first, *others = options.values()
    most = max(each["rank"] for each in options.values())
    alphas = [each["alpha"] * (most + ADALORA_BIT) / each["rank"] for each in options.values()]
    other = next((key for each in others for key in _ADALORA if each[key] != first[key]), None) or (max(alphas) - min(alphas) > 1e-9 * abs(alphas[0]) and "alpha")
    if other:
        raise Refused(f"PEFT's adalora has one {other} for all modules")
    kept = {f"{module}.lora_E": [at < each["rank"] for at in range(most)] for module, each in options.items()}
    given = {"init_r": most, "target_r": min(each["target"] for each in options.values()), "lora_alpha": alphas[0], **{theirs: first[ours] for ours, theirs in _ADALORA.items()}}
    is_cut = any(each["rank"] != most for each in others + [first])
    return {**given, "lora_dropout": 0.0, "fan_in_fan_out": False, "init_lora_weights": True, "rank_pattern": kept if is_cut else None}


def _adalora_laid(name, tensor, weight, options):
    return tensor.reshape(-1, 1) if name == "scale" else tensor


def _ia3(config, module, kind):
    inner = config.get("feedforward_modules") or []
    is_inner = re.fullmatch(inner, module) if isinstance(inner, str) else any(module.endswith(name) for name in inner)
    return {"side": "input" if is_inner else "output"}


def _none(config, key, reason):
    if config.get(key):
        raise Refused(f'"{key}" is {config[key]!r}, and {reason}: the model would train otherwise. Set it to 0 in the folder\'s config to go on without')


def _usual(values):
    return max(sorted(set(values)), key=values.count)


def _patterns(options, alpha, **more):
    """The keys of a config for ranks and alphas by module: the most frequent ones, and patterns for the others."""
    rank, scale = _usual([each["rank"] for each in options.values()]), _usual([each.get("alpha", 16.0) for each in options.values()])
    key = lambda module: "^" + re.escape(module)  # noqa: E731
    ranks = {key(module): each["rank"] for module, each in options.items() if each["rank"] != rank}
    alphas = {key(module): each.get("alpha", 16.0) for module, each in options.items() if each.get("alpha", 16.0) != scale}
    return {"r": rank, alpha: int(scale) if scale == int(scale) else scale, "rank_pattern": ranks, "alpha_pattern": alphas, **more}


def _lora_config(options):
    dropouts = {each["dropout"] for each in options.values() if each.get("dropout") is not None}
    if len(dropouts) > 1:
        raise Refused(f"PEFT has one dropout for all modules, not {sorted(dropouts)}")
    return _patterns(options, "lora_alpha", lora_dropout=max(dropouts, default=0.0), use_rslora=False, fan_in_fan_out=False, init_lora_weights=True)


def _dora_config(options):
    return _patterns(options, "lora_alpha", lora_dropout=0.0, use_dora=True, fan_in_fan_out=False, init_lora_weights=True)


def _loha_config(options):
    return _patterns(options, "alpha", rank_dropout=0.0, module_dropout=0.0, use_effective_conv2d=False, init_weights=True)


def _hira_config(options):
    other = next((module for module, each in options.items() if each.get("alpha", 16.0) != each["rank"]), None)
    if other is not None:
        raise Refused(f"PEFT's hira has no scale: alpha must be the rank, at {other} it is {options[other].get('alpha', 16.0)}")
    given = _patterns(options, "alpha")
    return {"r": given["r"], "rank_pattern": given["rank_pattern"], "hira_dropout": 0.0, "init_weights": True}


def _vera_config(options):
    ranks, starts = ({each.get(key, 0.1) for each in options.values()} for key in ("rank", "initial"))
    if len(ranks) > 1:
        raise Refused(f"PEFT's vera has one rank for all modules, not {sorted(ranks)}")
    return {"r": ranks.pop(), "d_initial": starts.pop(), "projection_prng_key": 0, "save_projection": True, "vera_dropout": 0.0, "init_weights": True}


def _ia3_config(options):
    return {"feedforward_modules": [module for module, each in options.items() if _on_input(each)], "fan_in_fan_out": False, "init_ia3_weights": True}


#: options of adalora → PEFT's keys
_ADALORA = {"steps": "total_step", "warmup": "tinit", "final": "tfinal", "every": "deltaT", "sensitivity": "beta1", "uncertainty": "beta2", "orthogonality": "orth_reg_weight"}
#: PEFT divides adalora's update by rank + 1e-5
ADALORA_BIT = 1e-5
_LORA_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "use_dora", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config")
_PAIR = {"down": "lora_A.weight", "up": "lora_B.weight"}

METHODS = (
    Method("LORA", "lora", _PAIR, _LORA_KEYS, _lora, _lora_config, _lora_laid),
    Method("LORA", "dora", {**_PAIR, "magnitude": "lora_magnitude_vector"}, _LORA_KEYS, _dora, _dora_config, _lora_laid),
    Method("LOHA", "loha", {"up1": "hada_w1_a", "down1": "hada_w1_b", "up2": "hada_w2_a", "down2": "hada_w2_b"},
           ("r", "alpha", "rank_pattern", "alpha_pattern", "init_weights"), _loha, _loha_config),
    Method("HIRA", "hira", {"down": "hira_A", "up": "hira_B"}, ("r", "rank_pattern", "hira_dropout", "init_weights"), _hira, _hira_config, _hira_laid),
    Method("VERA", "vera", {"scale": "vera_lambda_d", "gain": "vera_lambda_b"}, ("r", "d_initial", "projection_prng_key", "save_projection", "vera_dropout", "init_weights"),
           _vera, _vera_config, _flat, (("down", "vera_A"), ("up", "vera_B"))),
    Method("ADALORA", "adalora", {"down": "lora_A", "scale": "lora_E", "up": "lora_B"}, (*_LORA_KEYS, "init_r", "target_r", *_ADALORA.values()), _adalora, _adalora_config, _adalora_laid),
    Method("IA3", "ia3", {"gain": "ia3_l"}, ("feedforward_modules", "init_ia3_weights"), _ia3, _ia3_config, _ia3_laid),
)  # fmt: skip
#: what PEFT calls lora's tensors on an embedding
EMBEDDED = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}
#: initialisations after which the weights that the adapter stands on are the model's own
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def method_of(config):
    """The Method that a config names."""
    kind = config.get("peft_type")
    name = "dora" if config.get("use_dora") and kind == "LORA" else None
    found = [m for m in METHODS if m.kind == kind and (name is None or m.name == name)]
    if not found:
        kinds = ", ".join(dict.fromkeys(m.kind for m in METHODS))
        raise Refused(f'"peft_type" {kind!r} has no counterpart here. These have: {kinds}, PREFIX_TUNING, PROMPT_TUNING')
    return found[0]
