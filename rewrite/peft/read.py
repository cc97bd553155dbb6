"""Reads a PEFT folder: its config and tensors become a spec with the roles of this model, and a live model with those tensors.

    adapter_config.json         {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], …}
    adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, …
    -->
    {"passes": [{"pass": "lora", "where": "attention.{q,v}", …}]}

The tensors say which modules are adapted, and the config must say the same. Nothing is handed back unless every tensor has its place.
"""

import json
import math
import os
import re
import stat
from collections import defaultdict

import safetensors
import torch

from ..capture.model import capture
from ..edit.reading import names_of
from ..errors import Refused, SpecError
from ..graph import attribute
from ..pipeline import rewritten
from ..roles.find import everywhere
from ..roles.where import parse as parse_where
from ..spec.parse import Spec, read_json
from ..store.fingerprint import fingerprint, stored_tensors
from .methods import ANY_LAYER, EMBEDDED, PLAIN_STARTS, method_of, plain_pattern, rank_left
from .prompts import PROMPTS, TAKES, read_prompt

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"
PREFIX = "base_model.model."
#: keys of a config that change nothing of what the adapter computes, or that are read for all methods
_ANYTHING = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "fan_in_fan_out", "ensure_weight_tying")
_MODULES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias")


def read(model, folder, example=None):
    """The live model of a PEFT folder on `model`, which is not changed. Raises Refused, with the key or the tensor, for what has no counterpart."""
    config, tensors = read_config(folder), _read_tensors(folder)
    try:
        if config.get("peft_type") in PROMPTS:
            _refuse_keys(config, TAKES)
            return read_prompt(model, config, tensors, example)
        method = method_of(config)
        _refuse_keys(config, method.takes)
        own, shared, rest = _sorted(tensors, method, config)
        _refuse_other_modules(model, config, own)
        if method.kind == "ADALORA":
            own = {module: found for module, found in own.items() if rank_left(config, module) != 0}
        base, graph = fingerprint(model), capture(model, example)
        found = _Found(graph)
        steps = _steps(config, method, own, found)
        trained = _trained(model, rest, own, config)
        steps += _trained_steps(trained, found, graph)
        live = rewritten(graph, Spec.parse({"passes": steps}), base)
        _put(live, method, own, shared, trained, found)
    except (Refused, SpecError) as reason:
        raise Refused(f"{folder}: {reason}") from reason
    return live


# ---- files -----------------------------------------------------------------------------------------------------------------


def read_config(folder):
    """The config of a folder, a dict. Raises Refused for a folder that is not of this kind, or holds a pickle in place of the tensors."""
    for name in (CONFIG, TENSORS):
        path = folder / name
        if not os.path.lexists(path):
            pickle = next((n for n in sorted(os.listdir(folder)) if n.endswith(".bin")), None)
            more = f"; {pickle} is a pickle, which can run code and is never read. Save it anew with PEFT (safe_serialization=True)." if pickle else ". Give a folder that PEFT's save_pretrained() wrote."
            raise Refused(f"{folder}: {name} is missing{more}")
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise Refused(f"{path}: is not a plain file. What a link points to is not read: copy the file itself into the folder.")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise Refused(f"{folder / CONFIG}: expected an object, got {type(config).__name__}.")
    return config


def _read_tensors(folder):
    path, tensors = folder / TENSORS, {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():
                tensors[name] = file.get_tensor(name).clone()
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{path}: truncated, damaged, or no safetensors file ({error}). Copy it again.") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise Refused(f"{path}: {name} is {tensor.dtype}, not a floating dtype.")
        if not torch.isfinite(tensor).all():
            raise Refused(f"{path}: {name} holds values that are NaN or infinite. Take an earlier one.")
    return tensors


def _refuse_keys(config, takes):
    """A key that we do not know may hold nothing."""
    for key, value in config.items():
        if key not in (*_ANYTHING, *_MODULES, *takes) and value not in (None, False, 0, 0.0, "", [], {}):
            raise Refused(f'"{key}": {json.dumps(value)[:60]} has no counterpart here. Merge the adapter with PEFT and load the merged model')
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise Refused(f'"init_lora_weights": {start!r} changes the weights that the adapter stands on. Convert it with PEFT first (path_initial_model_for_weight_conversion)')
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise Refused(f'"bias": {config["bias"]!r} is not one of "none", "all", "lora_only"')


# ---- what the tensors are --------------------------------------------------------------------------------------------------


def _sorted(tensors, method, config):
    """(module → our name → tensor, our name → shared tensor, the rest: base tensor's name → tensor)."""
    names = {theirs: ours for ours, theirs in method.tensors.items()} | {EMBEDDED[theirs]: ours for ours, theirs in method.tensors.items() if theirs in EMBEDDED and method.name == "lora"}
    beside = {f"base_model.{theirs}": ours for ours, theirs in method.shared}
    own, shared, rest = defaultdict(dict), {}, {}
    for name, tensor in tensors.items():
        if name in beside:
            shared[beside[name]] = tensor
            continue
        if not name.startswith(PREFIX):
            raise Refused(f"{name} is not a tensor of {config['peft_type']}")
        place = name.removeprefix(PREFIX)
        theirs = next((t for t in names if place.endswith(f".{t}")), None)
        if theirs is not None:
            own[place.removesuffix(f".{theirs}")][names[theirs]] = tensor
        elif ".original_module." not in place:  # what a module was before it was trained
            plain = place.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            if plain in rest and not torch.equal(rest[plain], tensor):
                raise Refused(f"{name} stands twice, with other values")
            rest[plain] = tensor
    if not own:
        raise Refused(f"holds no tensor of {config['peft_type']}, such as {next(iter(names))}")
    for module, found in own.items():
        missing = method.tensors.keys() - found.keys()
        if missing:
            raise Refused(f"{module} lacks {', '.join(sorted(method.tensors[m] for m in missing))}")
    if method.shared and not shared:
        shared = _drawn(config, method)
    if {ours for ours, _ in method.shared} != shared.keys():
        raise Refused(f"lacks one of {', '.join(theirs for _, theirs in method.shared)}")
    return dict(own), shared, rest


def _drawn(config, method):
    """The shared tensors of a folder without them ("save_projection": false): the generator from which `_put` draws them in turn."""
    key = config.get("projection_prng_key")
    if config.get("save_projection", True) or type(key) is not int:
        raise Refused('holds no vera_A and vera_B, and "save_projection" and "projection_prng_key" do not say how they were drawn')
    return dict.fromkeys((ours for ours, _ in method.shared), torch.Generator().manual_seed(key))


def is_target(config, module):
    """Whether a config's lists pick a module, by PEFT's rules."""
    excluded, wanted = config.get("exclude_modules") or (), config["target_modules"]
    if any(module == e or module.endswith(f".{e}") for e in excluded):
        return False
    if any(f".{m}." in f".{module}." for m in config.get("modules_to_save") or ()):
        return False
    if module in wanted:
        return True
    if not any(module.endswith(f".{target}") for target in wanted):
        return False
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or ANY_LAYER
    if layers is None or layers == []:
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){plain_pattern(pattern, 'layers_pattern')}\.(\d+)\.", module)
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _refuse_other_modules(model, config, own):
    """The modules that the tensors name must be those that the config picks in this model."""
    modules = dict(model.named_modules())
    for module in own:
        if module not in modules:
            raise Refused(f"{module} is not a module of this {type(model).__name__}. Load the base that it was trained on")
    wanted = config.get("target_modules")
    if isinstance(wanted, str) or isinstance(config.get("exclude_modules"), str):
        return  # a regular expression from somewhere may run for years: the tensors say what it picked
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = config.get(key) if key == "target_modules" else config.get(key) or []
        if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise Refused(f'"{key}": expected a list of text, got {json.dumps(value)[:60]}')
    picked = {name for name, module in modules.items() if name and is_target(config, name) and getattr(module, "weight", None) is not None}
    for word, names in (("not picked by its config", own.keys() - picked), ("picked by its config and without tensors", picked - own.keys())):
        if names:
            raise Refused(f"{min(names)} is {word}: config and tensors are not of one adapter, or this is not its base")


# ---- the spec --------------------------------------------------------------------------------------------------------------


class _Found:
    """The sites of a graph, and how a `where` picks some of them."""

    def __init__(self, graph):
        self.sites = everywhere(graph)
        self.whole = defaultdict(list)
        for site in self.sites:
            if site.operation is not None and site.layout.rows is None:
                self.whole[site.path].append(site)

    def where(self, chosen):
        """A where that picks just these sites: roles alone where it can, else roles with paths."""
        by_role = defaultdict(list)
        for site in chosen:
            by_role[site.role].append(site)
        names, each = [], []
        for role, sites in by_role.items():
            if {s.path for s in self.sites if role in s.roles} <= {s.path for s in sites}:
                names.append(role)
                continue
            paths = sorted({s.path for s in sites})
            one = {"role": role, "path": paths}
            other = sorted({s.path for s in self.sites if parse_where(one).hits(s)} - set(paths))
            each.append({**one, "not": {"path": other}} if other else one)
        made = [*names, *each]
        picked = {site for site in self.sites if parse_where(made).hits(site)}
        if picked != set(chosen):
            raise Refused(f"{(picked ^ set(chosen)).pop()} cannot be told from its neighbours by role and path")
        return made[0] if len(made) == 1 else made


def _steps(config, method, own, found):
    """One step of a spec for each set of options."""
    groups = {}
    for module in own:
        sites = found.whole.get(module)
        if not sites:
            raise Refused(f"{module} has no site of its own in the captured graph")
        options = method.options(config, module, sites[0].layout.kind)
        groups.setdefault(json.dumps(options, sort_keys=True), (options, []))[1].extend(sites)
    return [{"pass": method.name, "where": found.where(sites), **options} for options, sites in groups.values()]


def _trained(model, rest, own, config):
    """The base tensors that the folder replaces: modules_to_save and biases. One that is as the model has it (an adapted embedding) is left out."""
    base, kept = stored_tensors(model), {}
    whole = tuple(m for m in config.get("modules_to_save") or () if isinstance(m, str))
    for name, tensor in rest.items():
        module = name.rpartition(".")[0]
        if name not in base:
            raise Refused(f"{name} is not a tensor of this {type(model).__name__}")
        if tensor.shape != base[name].shape:
            raise Refused(f"{name} is {tuple(tensor.shape)}, and the model's is {tuple(base[name].shape)}")
        is_bias = name.endswith(".bias") and (config.get("bias") == "all" or config.get("bias") == "lora_only" and module in own)
        if any(module == m or module.endswith(f".{m}") or f".{m}." in f".{module}." for m in whole) or is_bias:
            kept[name] = tensor
        elif module not in own or not torch.equal(tensor.to(base[name].dtype).cpu(), base[name].detach().cpu()):
            raise Refused(f'{name} is another than the model\'s, and neither "modules_to_save" nor "bias" says so')
    tied = next((other for name in kept for other, tensor in base.items() if tensor is base[name] and other not in kept), None)
    if tied is not None:
        raise Refused(f"{tied} is tied to what the folder replaces, and would change with it. Untie the base first, as PEFT does")
    return kept


def _trained_steps(trained, found, graph):
    """Steps that let the base tensors train which the folder replaces."""
    if not trained:
        return []
    sites = {site for name in trained for site in found.sites if name in _stored(site)}
    covered = {name for site in sites for name in _stored(site)}
    covered |= {name for one in covered for name in names_of(graph.root, attribute(graph.root, one))}
    lost = sorted(trained.keys() - covered)
    if lost:
        raise Refused(f"{lost[0]} is replaced by the folder, and is at no site of this model's graph")
    whole = [site for site in found.sites if site in sites and set(_stored(site)) <= trained.keys() and site.layout.rows is None]
    biases = [site for site in found.sites if site in sites and site not in whole and site.layout.rows is None]
    steps = [{"pass": "unfreeze", "where": found.where(whole)}] if whole else []
    return steps + ([{"pass": "bitfit", "where": found.where(biases)}] if biases else [])


def _stored(site):
    """The paths of the weight and the bias of a site."""
    return [node.target for name in ("w", "b") if (node := site.handles.get(name)) is not None and node.op == "get_attr"]


# ---- putting ---------------------------------------------------------------------------------------------------------------


def _put(live, method, own, shared, trained, found):
    """Every tensor of the folder in its place; Refused where a shape is another, where one has no place, or a place none."""
    places, filled = {}, set()
    for module, tensors in own.items():
        site = found.whole[module][0]
        base = ".".join(part for part in (site.owner, method.name, NAME, site.label) if part)
        step = next(s for s in live.spec.passes if s.method == method.name and parse_where(s.where).hits(site))
        options = {**vars(step.options), "role": site.role}
        weight = live.get_submodule(module).weight
        for ours, tensor in tensors.items():
            places[f"{base}.{ours}"] = (tensor, lambda t, o=ours, w=weight, p=options: method.laid(o, t, w, p), f"{module}.{method.tensors[ours]}")
    for ours, tensor in shared.items():
        path = f"{method.name}.{NAME}.{ours}"
        places[path] = (_kaiming(attribute(live, path), tensor) if isinstance(tensor, torch.Generator) else tensor, lambda t: t, ours)
    if places.keys() != live.report.made.keys():
        raise Refused(f"{min(places.keys() ^ live.report.made.keys())}: the tensors of the folder are not those of the spec")
    if trained.keys() != live.report.trains:
        raise Refused(f"{min(trained.keys() ^ live.report.trains)} is tied to another tensor, or a part of what trains here, and PEFT trains it by itself")
    values = {}
    for path, (tensor, laid, said) in places.items():
        here = attribute(live, path)
        if tensor.shape != laid(here.detach()).shape:
            raise Refused(f"{said} is {tuple(tensor.shape)}; on this model it would be {tuple(laid(here.detach()).shape)}")
        # the layouts are turns and axes of one, so the numbers of the places lead back
        turn = laid(torch.arange(here.numel()).reshape(here.shape)).flatten()
        values[path] = torch.empty(here.numel(), dtype=tensor.dtype).index_copy_(0, turn, tensor.flatten()).reshape(here.shape)
        filled.add(path)
    for name, tensor in (values | trained).items():
        here = attribute(live, name)
        value = tensor.to(here.dtype)
        if not torch.isfinite(value).all():
            raise Refused(f"{name} does not fit into {here.dtype}: it would be infinite")
        with torch.no_grad():
            here.copy_(value)


def _kaiming(here, generator):
    """A shared matrix as PEFT draws it: uniform within sqrt(6 / inputs), from the config's key."""
    bound = math.sqrt(2.0) / math.sqrt(here.shape[1]) * math.sqrt(3.0)
    return torch.empty(here.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
