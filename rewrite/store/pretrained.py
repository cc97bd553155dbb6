"""Opens a pretrained transformers model by folder or hub id: safetensors alone, and no code but transformers' own.

    "models/minilm"  ->  BertModel, with its weights
    "llama/config.json"  ->  LlamaForCausalLM on the meta device: shapes, no weights
    "llama-gptq"  ->  LlamaForCausalLM whose linears hold codes (`quantized`)
"""

import re
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from ..errors import Refused
from .quantized import in_shape, readable

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# what a config or weights that somebody wrote by hand makes transformers raise
FAILURES = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, ZeroDivisionError, IndexError, StrictDataclassError,
    SafetensorError,
)  # fmt: skip


def pretrained(name, *, weights=True):
    """The model of a folder or hub id, of the class that its config names, in eval mode, in the dtype it is stored in.

    With `weights=False` only config.json is read (`name` may be that file), and the model is on the meta device, codes among it where the config has any. Raises Refused in words
    for what is not there, is no model of transformers, needs code of its own, or has its weights in anything but safetensors.
    """
    where = _located(str(name), weights)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except FAILURES as error:
        raise Refused(f"{name}: its config cannot be read: {_first_line(error)}") from error
    cls = _class_of(config, name)
    if not weights:
        try:
            with torch.device("meta"):
                return in_shape(cls._from_config(config).eval(), config)
        except FAILURES as error:
            raise Refused(f"{name}: no {cls.__name__} can be made from its config: {type(error).__name__}: {_first_line(error)}") from error
    _refuse_other_formats(where, name)
    readable(config, name)
    try:
        model, found = cls.from_pretrained(where, config=config, use_safetensors=True, output_loading_info=True)
    except FAILURES as error:
        raise Refused(f"{name}: its weights cannot be read: {_first_line(error)} Only safetensors are read.") from error
    missing = sorted(found["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise Refused(f"{name}: {len(missing)} tensors of {cls.__name__} are not in its files ({shown}). Save it whole with save_pretrained().")
    return model.eval()


def _located(name, weights):
    """What transformers is to open: a folder, or the id of a model on the hub."""
    path = Path(name)
    try:
        if path.is_file():
            if weights:
                raise Refused(f"{name}: is a file. Give the folder with config.json and the weights in it.")
            return name
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise Refused(f"{name}: holds no config.json. Give a folder that save_pretrained() wrote.")
            return name
    except (OSError, ValueError) as error:  # a name that no file can have
        raise Refused(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not HUB_ID.fullmatch(name):
        raise Refused(f"{name}: is not there. Give a model folder, or an id of the Hugging Face hub such as org/model.")
    return name


def _class_of(config, name):
    """The transformers class that a config names first."""
    names = getattr(config, "architectures", None) or []
    if not names:
        raise Refused(f'{name}: its config names no class. Add for example "architectures": ["BertForSequenceClassification"].')
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise Refused(f"{name}: {names[0]} is not a model of transformers {transformers.__version__}; code that comes with a model is never run.")
    return cls


def _refuse_other_formats(where, name):
    """A local folder whose weights are pickles alone."""
    folder = Path(where)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))
    if others:
        raise Refused(f"{name}: its weights are in {others[0]}; only safetensors are read, as others can run code. Write it anew with save_pretrained().")
    raise Refused(f"{name}: holds no weights (*.safetensors). Give a folder that save_pretrained() wrote.")


def _first_line(error):
    """The first sentence or two of what a library says, on one line and ended."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    text = text if len(text) <= 240 else text[:237] + "…"
    return text if text.endswith((".", "!", "?", "…")) else text + "."
