"""Blocks that are run again for backward from what leaves the last of them: nothing in between is kept.

    x -> block -> … -> block -> y     -->     reversible((block, …), …, (block, …))      in the printed source

Kept is what enters the first block, the last one, and each that names no inverse. The inputs of the others are computed back from their outputs, by
the inverse that is printed as another body of the block (`emit/coupled.py`), last block first; then each runs once more with gradients. That is three
runs of a block where plain training has one. To compute back is to divide, so that errors grow from block to block: where what was computed
back meets what a block really gave, the two are compared. Without gradients, and under torch.compile, the blocks are called one after another.
"""

import contextlib

import torch
from torch.autograd.function import once_differentiable

from ..errors import Refused

DRIFT = 1e-2  # how far from what a block gave may what is computed back be, relative to its norm


def reversible(*steps):
    """What the last block gives. steps: (block, its arguments, its body or None, the body of its inverse or None); the two streams come from the block before."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        streams = ()
        for block, given, body, _ in steps:
            streams = _call(block, (*streams, *given), body)
        return streams
    places, leaves = {}, []  # a tensor -> its place among the inputs of the Function, each once

    def place(value):
        if not isinstance(value, torch.Tensor):
            return None, value
        if id(value) not in places:
            places[id(value)] = len(leaves)
            leaves.append(value)
        return places[id(value)], None

    blocks = [
        (block, [place(value) for value in given], body, inverse, [(place(p)[0], p) for p in block.parameters() if p.requires_grad]) for block, given, body, inverse in steps
    ]
    result = _Reversible.apply(blocks, *leaves)
    return result if len(result) > 1 else result[0]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks, *leaves):
        ctx.blocks, ctx.draws, entered = blocks, [], []
        device = leaves[0].device
        ctx.precision = device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        streams = ()
        for block, given, body, inverse, _ in blocks:
            before = _draws(device)
            entered += streams if inverse is None else ()
            streams = _call(block, (*streams, *_values(given, leaves)), body)
            streams = streams if isinstance(streams, tuple) else (streams,)
            ctx.draws.append(None if all(torch.equal(a, b) for a, b in zip(before, _draws(device))) else before)
        ctx.save_for_backward(*leaves, *entered)
        return streams

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        count = len(ctx.needs_input_grad) - 1
        leaves, entered = ctx.saved_tensors[:count], list(ctx.saved_tensors[count:])
        total, streams = [None] * count, None  # what leaves the block, where it is computed back
        for i, (block, given, body, inverse, trained) in reversed(list(enumerate(ctx.blocks))):
            left = streams
            if inverse is not None:
                with torch.no_grad(), _as_before(ctx, leaves, ctx.draws[i]):
                    streams = _call(block, (*streams, *_values(given, leaves)), inverse)
            else:
                streams = [entered.pop() for _ in range(2 if i else 0)][::-1]
            entering = [value.detach().requires_grad_() for value in streams]
            own = {at: leaves[at].detach().requires_grad_(ctx.needs_input_grad[at + 1]) for at, _ in given if at is not None}
            with torch.enable_grad(), _as_before(ctx, leaves, ctx.draws[i]):
                result = _call(block, (*entering, *_values(given, own)), body)
            if inverse is None and left is not None:
                _compare(result, left, i)
            pairs = [(y, g) for y, g in zip(result if isinstance(result, tuple) else (result,), gradients) if g is not None and y.requires_grad]
            asked = [(at, value) for at, value in own.items() if value.requires_grad] + trained
            wanted = [*entering, *(value for _, value in asked)]
            found = torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True) if pairs and wanted else [None] * len(wanted)
            for (at, _), gradient in zip(asked, found[len(entering) :]):
                if gradient is not None:
                    total[at] = gradient if total[at] is None else total[at] + gradient
            gradients = found[: len(entering)]
        return None, *total


def _compare(result, left, i):
    """Raise Refused where what was computed back is not what the block gives."""
    far = max(((there - here).norm() / here.norm()).item() for here, there in zip(result, left))
    if not far <= DRIFT:
        raise Refused(
            f"reversible blocks: what left block {i} of the chain was computed back from what left the last one with an error of {far:.1e}, and gradients would be wrong.\n"
            'Keep more of it (a smaller "every"), or let more of the streams go on (a larger "alpha" or "beta"), or train in a wider dtype.'
        )


def _call(block, values, body):
    return block(*values) if body is None else block(*values, body=body)


def _values(given, leaves):
    return [value if at is None else leaves[at] for at, value in given]


def _draws(device):
    """Where the generators stand: of the host, and of the device."""
    return [torch.get_rng_state()] if device.type == "cpu" else [torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)]


@contextlib.contextmanager
def _as_before(ctx, leaves, draws):
    """The precision of the forward pass, and its random numbers where the block drew some."""
    kind, dtype, enabled = ctx.precision
    with torch.autocast(kind, dtype=dtype, enabled=enabled):
        if draws is None:
            yield
            return
        device = leaves[0].device
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type="cuda" if device.type == "cpu" else device.type):
            torch.set_rng_state(draws[0])
            if len(draws) > 1:
                torch.get_device_module(device).set_rng_state(draws[1], device)
            yield
