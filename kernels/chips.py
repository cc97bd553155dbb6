"""What was measured on a chip, by its name: up to how many rows a product with codes is faster than making the weight and multiplying.

`python bench/kernels.py --only linear_int8,linear_int4,linear_nf4` prints what belongs here. A CPU goes by what PyTorch finds on it; one that is not
known makes the weight first. Nothing has been measured on a GPU yet: "cuda", which stands for every GPU without an entry, is what counting bytes
says of a product that reads nothing but codes, halved twice to be on the safe side.
"""

import functools

import torch

FEW_ROWS = {
    "cuda": {"linear_int8": 4, "linear_int4": 8, "linear_nf4": 8, "linear_fp4": 8, "linear_mxfp4": 8, "linear_fp8": 4},
    "AVX512 BF16": {"linear_int8": 16, "linear_int4": 256, "linear_nf4": 128, "linear_fp4": 128, "linear_mxfp4": 64},  # AMD EPYC, one thread, torch 2.13, 1024 × 1024
    "cpu": {},  # of an unknown kind
}


@functools.cache
def chip(device):
    if device.type == "cpu":
        kind = f"{torch.backends.cpu.get_cpu_capability()} {'BF16' if torch.cpu._is_avx512_bf16_supported() else ''}".strip()
        return kind if kind in FEW_ROWS else "cpu"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if name in FEW_ROWS else "cuda" if device.type == "cuda" else "cpu"


def few_rows(op, device):
    """Up to how many rows `op` takes codes as they are on a device."""
    return FEW_ROWS[chip(device)].get(op, 0)
