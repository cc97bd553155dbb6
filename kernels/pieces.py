"""A weight and its codes a piece at a time: about a million entries, so that neither making nor judging the codes of a large weight needs a float copy of it."""

import functools

import torch

ENTRIES, ROWS, BLOCK, NESTED = 2**20, 128, 64, 256


def by_rows(quantize):
    """A format's `quantize`, of whole rows in pieces; a piece ends where a block of 128 rows does."""

    @functools.wraps(quantize)
    def call(w, *options, **named):
        step = _rows(w)
        if len(w) <= step:
            return quantize(w, *options, **named)
        made, tall = None, ()
        for start in range(0, len(w), step):
            found = quantize(w[start : start + step], *options, **named)
            if made is None:
                tall = [t is None or step // len(t) for t in found]  # rows that share an entry
                made = tuple(t if t is None else t.new_empty(-(-len(w) // rows), *t.shape[1:]) for t, rows in zip(found, tall))
            for whole, t, rows in zip(made, found, tall):
                if t is not None:
                    whole[start // rows : start // rows + len(t)] = t
        return made

    return call


def _rows(w):
    return max(1, ENTRIES // max(1, w[0].numel()) // ROWS) * ROWS


def pieces(w, codes, scales, nested, zeros):
    """(part of w, its codes, scales, nested scales, zeros), one after another; all that belongs to one expert."""
    if codes.dim() > 1:
        step = _rows(w)
        tall = 1 if scales.shape[0] == len(w) else ROWS  # rows that share their scales
        for start in range(0, len(w), step):
            end = min(start + step, len(w))
            part = slice(start // tall, -(-end // tall))
            yield w[start:end], codes[start:end], scales[part], None, zeros if zeros is None else zeros[part]
        return
    flat = w.reshape(-1)
    for start in range(0, flat.numel(), ENTRIES):
        part = flat[start : start + ENTRIES]
        block = slice(start // BLOCK, (start + ENTRIES) // BLOCK)
        outer = slice(start // (BLOCK * NESTED), min((start + ENTRIES) // (BLOCK * NESTED), nested.numel() - 1)) if nested is not None else None
        yield part, codes[start // 2 : (start + ENTRIES) // 2], scales[block], nested if nested is None else torch.cat([nested[outer], nested[-1:]]), None
