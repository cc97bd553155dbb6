"""Checkpoints whose weights are codes already, as Hugging Face's configs name them: read into `Coded`, without a float copy and without the libraries that wrote them.

    bitsandbytes   weight (n/2, 1), weight.absmax, weight.quant_map, weight.nested_…, weight.quant_state.bitsandbytes__nf4 (JSON in bytes)
    gptq           qweight (in/8, out), qzeros (groups, out/8), scales (groups, out), g_idx (in): eight codes in an int32, the lowest bits first
    awq            qweight (in, out/8), qzeros (groups, out/8), scales (groups, out): eight codes in an int32, in the order 0 2 4 6 1 3 5 7

transformers builds the model and reads all other tensors; which modules have codes is read off the files' headers. GPTQ: Frantar et al. 2022,
arXiv:2210.17323; its files store each zero less one ("gptq") or as it is ("gptq_v2"). AWQ: Lin et al. 2023, arXiv:2306.00978.
"""

import json

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..capture.coded import BLOCK, NESTED, Coded, table_codes
from ..errors import Refused

METHOD = "rewrite_codes"
#: AWQ: which of eight neighbours the i-th four bits of a word hold
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
EIGHT = tuple(range(8))
ZERO = 8  # of symmetric groups


def readable(config, name):
    """Let transformers build the model of a config with codes by this file. Nothing to do for a config without; Refused for codes of other kinds."""
    given, method = _stated(config)
    if given is None:
        return
    reason = _unread(method, given)
    if reason:
        raise Refused(f"{name}: its config says that its weights are quantised by {method or 'an unnamed method'}: {reason}. bitsandbytes in four bits, GPTQ and AWQ in four bits are read.")
    AUTO_QUANTIZER_MAPPING[METHOD], AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Reader, Codes
    config.quantization_config = {"quant_method": METHOD, "given": {**given, "quant_method": method}}


def in_shape(model, config):
    """The model of a config with codes, made on the meta device: each linear that its method quantises gives way to a Coded of codes that are shapes alone.

    Which ones is the method's custom, for a config does not say: all but the head and those that it names. Codes of other kinds stay float weights.
    """
    given, method = _stated(config)
    if given is None or _unread(method, given):
        return model
    named = given.get("llm_int8_skip_modules" if method == "bitsandbytes" else "modules_to_not_convert")
    skipped = HfQuantizer.get_modules_to_not_convert(model, named)
    only = tuple(name for some in given.get("modules_in_block_to_quantize") or () for name in ([some] if isinstance(some, str) else some))
    for path, linear in list(model.named_modules()):
        in_block = method == "bitsandbytes" or any(part.isdigit() for part in path.split("."))  # the others go block by block
        if isinstance(linear, (nn.Linear, Conv1D)) and in_block and should_convert_module(path, skipped) and (not only or path.endswith(only)):
            out_dim, in_dim = _size(linear, path)
            model.set_submodule(path, Coded(in_dim, out_dim, linear.bias).fill(**_shapes(out_dim, in_dim, method, given)).eval())
    return model


def _shapes(out_dim, in_dim, method, given):
    """What `_of_tables` or `_of_words` would give, without numbers."""
    new = lambda dtype, *shape: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    if method == "bitsandbytes":
        blocks, double = -(-out_dim * in_dim // BLOCK), given.get("bnb_4bit_use_double_quant", False)
        nested = new(torch.int32, -(-blocks // NESTED) + 1) if double else None
        return {"format": given.get("bnb_4bit_quant_type", "fp4"), "codes": new(torch.uint8, -(-out_dim * in_dim // 2)), "scales": new(torch.uint8 if double else torch.int32, blocks), "nested": nested}
    size = given.get("group_size", 128)
    groups = in_dim // size if size > 0 else 1
    return {
        "format": "int4",
        "codes": new(torch.uint8, out_dim, in_dim // 2),
        "scales": new(torch.int32, out_dim, groups),
        "zeros": None if method == "gptq" and given.get("sym", True) else new(torch.uint8, out_dim, groups),
        "order": new(torch.int64, in_dim) if given.get("desc_act") else None,
    }


def _stated(config):
    """(what a config says of its codes, by which method they were made); (None, None) for one without."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None, None
    given = given if isinstance(given, dict) else given.to_dict()
    return given, str(given.get("quant_method") or ("bitsandbytes" if given.get("load_in_4bit") or given.get("load_in_8bit") else ""))


def _unread(method, given):
    if method == "bitsandbytes":
        return None if given.get("load_in_4bit") else "in eight bits"
    if method not in ("gptq", "awq"):
        return "that is not read"
    if given.get("bits", 4) != 4:
        return f"in {given['bits']} bits"
    if method == "awq" and str(given.get("version") or given.get("format") or "gemm").lower() != "gemm":
        return f"packed for {given.get('version') or given.get('format')}"
    if method == "gptq" and given.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        return f"packed for {given['checkpoint_format']}"
    return None


class Codes(QuantizationConfigMixin):
    """What transformers wants a config of; `given` is that of the checkpoint."""

    def __init__(self, given=None, **kwargs):
        super().__init__(quant_method=METHOD)
        self.given = given


class Reader(HfQuantizer):
    """transformers' hooks around reading weights: before, linears with codes give way to a Coded; after, it gets its codes."""

    is_trainable = True

    def is_serializable(self):
        return False

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        given, self.files, self.coded = self.quantization_config.given, _where(checkpoint_files), {}
        ends = ".weight.absmax" if given["quant_method"] == "bitsandbytes" else ".qweight"
        for key in self.files:
            if key.endswith(ends):
                path = _path(model, key.removesuffix(ends))
                linear, bias = model.get_submodule(path), f"{key.removesuffix(ends)}.bias" in self.files
                out_dim, in_dim = _size(linear, path)
                held = nn.Parameter(torch.empty(out_dim, device="meta", dtype=linear.weight.dtype), requires_grad=False) if bias else None
                model.set_submodule(path, Coded(in_dim, out_dim, held))
                self.coded[path] = key.removesuffix(ends)
        if not self.coded:
            raise Refused(f"its config says that its weights are quantised by {given['quant_method']}, and its files have none that are.")

    def _process_model_after_weight_loading(self, model, **kwargs):
        given = self.quantization_config.given
        with _Open() as opened:
            for path, stem in self.coded.items():
                parts = {key[len(stem) + 1 :]: opened.get(file, key) for key, file in self.files.items() if key.startswith(f"{stem}.") and key != f"{stem}.bias"}
                module = model.get_submodule(path)
                made = _of_tables(path, parts) if given["quant_method"] == "bitsandbytes" else _of_words(path, parts, given, module)
                module.fill(**made)
        self.remove_quantization_config(model)
        for module in model.modules():
            if getattr(getattr(module, "config", None), "_is_quantized", False):
                module.config._is_quantized = False
        return model


class _Open:
    """Files that stay open while many of their tensors are read."""

    def __enter__(self):
        self.files = {}
        return self

    def __exit__(self, *error):
        self.files.clear()

    def get(self, file, key):
        if file not in self.files:
            self.files[file] = safe_open(file, framework="pt")
        return self.files[file].get_tensor(key)


def _where(files):
    """The tensors of some files: name → file. Headers alone are read."""
    found = {}
    for file in files or ():
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _path(model, stem):
    """Where the module of a checkpoint's name is in the model: there, below its base model, or above."""
    prefix = model.base_model_prefix
    names = {name for name, _ in model.named_modules()}
    for path in (stem, f"{prefix}.{stem}", stem.removeprefix(f"{prefix}.")):
        if path in names:
            return path
    raise Refused(f"{stem} has codes in the file, and the model has no module of that name.")


def _size(module, path):
    if not hasattr(module, "weight") or module.weight.dim() != 2:
        raise Refused(f"{path} has codes in the file, and {type(module).__name__} is no linear.")
    if isinstance(module, nn.Linear):
        return module.weight.shape
    return module.weight.shape[::-1]  # Conv1D stores in × out; codes are made of out × in


def _of_tables(path, parts):
    """The tensors of a weight that bitsandbytes has written."""
    stated = next((key for key in parts if ".quant_state.bitsandbytes__" in key), None)
    try:
        state = json.loads(bytes(parts[stated].numpy()).decode())
        kind, block, nested = state["quant_type"], state["blocksize"], None
        if "weight.nested_absmax" in parts:
            nested = parts["weight.nested_absmax"], state["nested_blocksize"], parts["weight.nested_quant_map"], float(state["nested_offset"])
        given = path, kind, parts["weight"], parts["weight.absmax"], block, parts["weight.quant_map"], nested
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise Refused(f"{path}: what bitsandbytes writes beside its codes is not all there, or cannot be read: {type(error).__name__}: {error}.") from error
    return {"format": kind, **table_codes(*given)}


def _of_words(path, parts, given, module):
    """The tensors of a weight that GPTQ or AWQ has written."""
    missing = [name for name in ("qweight", "qzeros", "scales") if name not in parts]
    if missing:
        raise Refused(f"{path}: {', '.join(missing)} of it {'is' if len(missing) == 1 else 'are'} not in the file.")
    awq = given["quant_method"] == "awq"
    order = INTERLEAVED if awq else EIGHT
    codes = unpacked(parts["qweight"], order) if awq else unpacked(parts["qweight"].T, order).T  # in × out
    zeros, scales = unpacked(parts["qzeros"], order), parts["scales"]
    if codes.shape != (module.in_features, module.out_features) or zeros.shape != scales.shape or module.in_features % len(scales):
        raise Refused(f"{path}: codes of {tuple(codes.shape)} with scales of {tuple(scales.shape)}, where the model has {module.in_features} inputs and {module.out_features} outputs.")
    if not awq and given.get("checkpoint_format", "gptq") == "gptq":
        zeros = (zeros + 1) & 15  # stored less one
    codes, column = _in_groups(path, codes, parts.get("g_idx"), len(scales))
    codes = codes.T.contiguous()
    return {
        "format": "int4",
        "codes": codes[:, ::2] | codes[:, 1::2] << 4,
        "scales": scales.T.float().contiguous().view(torch.int32),
        "zeros": None if bool((zeros == ZERO).all()) else zeros.T.contiguous(),
        "order": column,
    }


def unpacked(words, order):
    """The codes of four bits in int32 words, (rows, words) → (rows, 8 · words): the i-th four bits of a word belong to its neighbour order[i]."""
    found = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for i, place in enumerate(order):
        found[..., place] = (words >> 4 * i & 15).to(torch.uint8)
    return found.flatten(-2)


def _in_groups(path, codes, group, groups):
    """(codes with the inputs of each group side by side, for each input its place there, or None where they stand so already)."""
    length = len(codes)
    even = torch.arange(length) // (length // groups)
    if group is None or torch.equal(group.long(), even):
        return codes, None
    place = torch.argsort(group.long(), stable=True)
    if not torch.equal(group.long()[place], even):
        raise Refused(f"{path}: its g_idx gives its {groups} groups different numbers of inputs.")
    return codes[place], torch.argsort(place)
