"""What is known of a chip, by its name: a file of `tuned/` for each, that `python bench/kernels.py --tune` writes.

    few_rows    op → up to how many rows a product with codes is faster than making the weight and multiplying, and how that is known: measured or counted
    configs     kernel → tiles that were measured to be the fastest; for lora_linear, faster than two products of the library, without which those run

A CPU goes by what PyTorch finds on it; one without a file makes the weight first. A GPU without one goes by that of "cuda", and by the tiles that a
kernel itself has, which every chip from sm_80 on holds.
"""

import functools
import json
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("tuned")


@functools.cache
def tuned():
    """Chip → what its file has."""
    found = (json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")))
    return {each["chip"]: each for each in found}


def name(device):
    """What a file says that it is of."""
    if device.type == "cpu":
        beside = ("BF16", torch.cpu._is_avx512_bf16_supported()), ("AMX", torch.cpu._is_amx_tile_supported())  # products in bfloat16 are several times faster with the latter
        return " ".join((torch.backends.cpu.get_cpu_capability(), *(word for word, has in beside if has)))
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def chip(device):
    """The name under which a device has a file: its own, or that of its kind."""
    own = name(device)
    return own if own in tuned() else "cuda" if device.type == "cuda" else "cpu"


@functools.cache
def few_rows(op, device):
    """Up to how many rows `op` takes codes as they are on a device."""
    return tuned().get(chip(device), {}).get("few_rows", {}).get(op, {}).get("most", 0)


@functools.cache
def config(kernel, device):
    """The tiles measured for a kernel on a device, or None."""
    return tuned().get(chip(device), {}).get("configs", {}).get(kernel)
