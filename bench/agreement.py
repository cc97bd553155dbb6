"""PEFT's hand-kept tables beside our roles: what each names in a model, where the two differ, and why.

    differences("ia3", ["q_proj", "v_proj"], modules, sites)  ->  ("theirs alone: attention.q", "ours alone: attention.k", …)
    explained("gemma", "ia3", "theirs alone: attention.q")    ->  the reason, with the input that shows who is right; None where nobody has found it
"""

import re

TABLES = {"lora": "LORA_TARGET", "ia3": "IA3_TARGET", "norms": "LNTUNING_TARGET"}
WANTED = {"lora": {"attention.q", "attention.v"}, "ia3": {"attention.k", "attention.v", "mlp.down"}, "norms": {"norm"}}

_SCALED = "(IA)³ scales keys and values. The table scales queries; q·l meets k as q meets k·l, so without rotation the scores are the same for every input."
_UNUSED = "A decoder that stands alone never runs its cross-attention. Any input_ids: the weights of encoder_attn get no gradient in the original either."
# type of the config, table, difference (regular expressions) → who is right, and by which input
EXPLAINED = (
    (".*", "(lora|ia3|norms)", r"no role: encoder_attn.*", _UNUSED),
    ("deberta|bloom|codegen|falcon|gpt.*|mpt", "ia3", r"theirs with: attention\.q", "One weight makes q, k and v; the table scales all its outputs. Any two tokens: PEFT's scores move with l twice, by q and by k; ours are the slices of k and v."),
    ("bart|gpt_neo", "ia3", r"(theirs|ours) alone: attention\.[qk]", _SCALED),
    ("gemma.*|gptj|phi|qwen.*", "ia3", r"(theirs|ours) alone: attention\.[qk]", "(IA)³ scales keys; the table names q_proj. With rotation between, two tokens at different places tell the two apart: the roles of both are as their names say."),
    ("opt", "ia3", r"(theirs|ours) alone: attention\.[qv]", "(IA)³ scales keys and values; the table names q_proj and k_proj and leaves v_proj out. One token: its output is v whatever q and k are, so the table's vectors change nothing."),
    ("bert|roberta|deberta.*", "ia3", r"theirs alone: attention\.o", "`output.dense` ends two paths, `attention.output.dense` too. Zero the values of a layer: that weight gives its bias alone, so it stands behind attention, not in the MLP."),
    ("mt5", "ia3", r"(theirs|ours) alone: mlp\.(up|down)", "(IA)³ scales what the down projection takes. `wi_1` makes one factor of it, so scaling its output is the same for every input: act(wi_0 x) · (l · wi_1 x)."),
    ("mixtral", "ia3", r"no module: w2", "The table names modules of an older transformers; the experts are one 3-D weight now. `model.named_modules()` has no w2."),
    ("phi", "lora", r"theirs alone: mlp\.(up|down)", "The table takes the MLP too, by choice: fc1 and fc2 are mlp.up and mlp.down by our roles, for every input."),
    ("rwkv", "lora", r"theirs alone: linear.*|theirs alone: mixer.*|no role: .*", "No attention: r gates a running mean of v, weighted by exp(k) that decays with distance; no score of two tokens is made. Any input: that sum, written out, is the block's output. A block that stays one call to the original has plain linears inside."),
    ("qwen2|qwen3", "norms", r"ours alone: norm", "The table names one norm of a block, by choice. `input_layernorm`, the last `norm` (and Qwen3's q_norm and k_norm) divide by the root of the mean square too: any input."),
    (".*", "norms", r"ours alone: norm", "The table leaves norms out that divide by mean square or deviation as those that it names do: any input, scaled by 2, gives the same behind both, up to their eps."),
    (".*", "norms", r"no module: .*", "The table names a norm of another variant of the architecture. `model.named_modules()` of this config has none of that name."),
    ("llava", "norms", r"theirs alone: (embed|head).*|no role: (model\.)?multi_modal_projector.*", "LN tuning of LLaVA, by its authors' choice, trains embeddings, head and projector whole; those are no norms: an input scaled by 2 gives twice the output behind the head."),
)  # fmt: skip


def agreement(model, sites):
    """table → what PEFT names in this model, its roles and the differences from ours; {} where PEFT does not know the architecture."""
    from peft.utils import constants

    kind = getattr(getattr(model, "config", None), "model_type", None)
    modules = [path for path, module in model.named_modules() if any(True for _ in module.parameters())]
    found = {}
    for name, part in TABLES.items():
        targets = getattr(constants, f"TRANSFORMERS_MODELS_TO_{part}_MODULES_MAPPING").get(kind)
        if targets is None:
            continue
        paths = [path for path in modules if _is_target(path, targets)]
        at = _roles(sites)
        entry = {"targets": targets, "modules": len(paths), "roles": sorted({role for path in paths for role in at.get(path, ())})}
        apart = differences(name, targets, modules, sites)
        if apart:
            entry["differences"] = {text: explained(kind, name, text) for text in apart}
        found[name] = entry
    return found


def _roles(sites):
    """path of a module → the roles of its weights."""
    found = {}
    for site in sites:
        if site.layout.kind or site.role == "norm":
            for path in {site.owner, site.path}:
                found.setdefault(path, set()).add(site.role)
    return found


def differences(table, targets, modules, sites):
    """Where the modules that the targets name, and those of the roles which the method is for, are not the same; each kind of difference once."""
    wanted, at = WANTED[table], _roles(sites)
    paths = [path for path in modules if _is_target(path, targets)]
    found = [f"no module: {target}" for target in ([] if isinstance(targets, str) else targets) if not any(_is_target(path, [target]) for path in paths)]
    for path in paths:
        roles = {role for role in at.get(path, ()) if role.count(".") < 2 and role != "attention.qkv"}
        if path not in at:
            found.append("no role: " + ".".join(part for part in path.split(".")[-2:] if not part.isdigit()))
        elif not roles & wanted:
            found += [f"theirs alone: {role}" for role in sorted(roles)]
        elif table == "ia3":
            found += [f"theirs with: {role}" for role in sorted(roles - wanted)]
    for path, roles in at.items():
        if path in modules and path not in paths:
            found += [f"ours alone: {role}" for role in sorted(roles & wanted)]
    return tuple(dict.fromkeys(found))


def explained(kind, table, text):
    """Why the two differ there; None where no explanation is known."""
    fits = (why for kinds, tables, texts, why in EXPLAINED if re.fullmatch(kinds, kind) and re.fullmatch(tables, table) and re.fullmatch(texts, text))
    return next(fits, None)


def _is_target(path, targets):
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)
