"""Linears that read one x, each with its low-rank adapters, their weights as numbers or in codes: a family of ops, made when asked for.

    lora_linears((1, 1, 1))       q, k, v = (x w_i' + b_i + scale_i * (x down_i') up_i')      what x becomes by all `down` is one product
    lora_linears((2,))            y = x w' + b + scale_0 * (x down_0') up_0' + scale_1 * (x down_1') up_1'
    lora_linears((1,), "nf4")     the same as lora_linear, w = dequant_nf4(codes, scales, nested, shape, x's dtype)

Shapes as in lora_linear; the arguments of a linear stand one after the other: w (or what `dequant_<format>` asks for), b, then down, up and scale of
each adapter. Backward keeps x once, x down' of all adapters, and no float copy of a weight in codes: it is made from them again. Bytes of the shrink, in
elements: x is read once, M·K, where n adapters by themselves read it n times; likewise the gradients of all `down` of the registered op's backward.
Launches of q, k and v, forward and backward, x and the adapters training: separate ops 15 + 23, lora_linear each 9 + 26, this 8 + 21. There is no Triton body:
a tile that adds the low-rank part before it is stored would save one launch for each linear and one reading and writing of y, which at K = 4096 is a twelfth
of the product's own time on an H200 by its data sheet (bfloat16, 4.8 TB/s, 0.8 PFLOP/s reached), so that its product may be that much slower than cuBLAS's and no more;
where one is measured to be (`chips`), that body is the one to call for each linear.
"""

import functools
import importlib
import inspect

import torch
from torch.nn import functional as F

from rewrite.kernels.lora_linear import gradients, lora_linear
from rewrite.kernels.op import Op, cast_once


def over_codes(format):
    """The product with a weight in codes, few rows with codes as they are: it keeps no float copy, neither in eager mode nor where a compiler chooses what is kept."""
    return getattr(importlib.import_module(f"rewrite.kernels.linear_{format}"), f"linear_{format}")


def _run(x, linears):
    """Linears as `_read` gives them, in eager mode: the library's products, what adapters add in place."""
    rows = x.reshape(-1, x.shape[-1])
    downs = [down for _, _, adapters in linears for down, _, _ in adapters]
    parts = iter([torch.mm(rows, downs[0].t())] if len(downs) == 1 else torch.mm(rows, torch.cat(downs).t()).split([len(down) for down in downs], 1))
    found = []
    for w, b, adapters in linears:
        y = w(rows, b) if callable(w) else F.linear(rows, w, b)
        for _, up, scale in adapters:
            y.addmm_(next(parts), up.t(), alpha=scale)
        found.append(y.view(*x.shape[:-1], y.shape[1]))
    return found


def lora_linears(counts, format=None):
    """The op of linears with so many adapters each. It has `counts` and `format`; over codes `over`, the op that makes its weights, and `uncoded`, the op over numbers."""
    return _made(counts, format)  # one for each choice, however it is asked for: to define a name again takes the op of before away


@functools.cache
def _made(counts, format):
    if counts == (1,) and format is None:
        return lora_linear
    over = None if format is None else getattr(importlib.import_module(f"rewrite.kernels.dequant_{format}"), f"dequant_{format}")
    named = [inspect.Parameter("w", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=torch.Tensor)]
    if over is not None:
        named = [p for p in inspect.signature(over.reference, eval_str=True).parameters.values() if p.annotation is not torch.dtype]
    width, product = len(named), None if over is None else over_codes(format)

    def read(given, weight):
        """[(w, b, [(down, up, scale), …])] of the arguments behind x; `weight` makes w of what stands for it."""
        found, i = [], 0
        for count in counts:
            start = i + width + 1
            adapters = [given[j : j + 3] for j in range(start, start + 3 * count, 3)]
            found.append((weight(*given[i : i + width]), given[i + width], adapters))
            i = start + 3 * count
        return found

    def reference(x, *given):
        weight = (lambda w: w) if over is None else lambda *codes: over(*codes, x.dtype)
        found = []
        for w, b, adapters in read(given, weight):
            y = F.linear(x, w, b)
            for down, up, scale in adapters:
                y = y + scale * F.linear(F.linear(x, down), up)
            found.append(y)
        return found[0] if len(found) == 1 else tuple(found)

    def traced(x, *given):
        """As lora_linear has it, with one shrink."""
        linears = read(given, (lambda w: w) if over is None else lambda *codes: codes)
        downs, found = [down for _, _, adapters in linears for down, _, _ in adapters], []
        parts = iter(F.linear(x, torch.cat(downs)).split([len(down) for down in downs], -1))
        for w, b, adapters in linears:
            y = F.linear(x, w, b) if over is None else product.launch(x, *w, b)
            for _, up, scale in adapters:
                y = y + F.linear(scale * next(parts), up)
            found.append(y)
        return found[0] if len(found) == 1 else tuple(found)

    def turned(x, w, b, *adapters):
        """As Conv1D writes it: rows of x, w stored in × out."""
        y = torch.addmm(b, x, w)
        for i in range(0, len(adapters), 3):
            y = y + adapters[i + 2] * F.linear(torch.mm(x, adapters[i].permute(1, 0)), adapters[i + 1])
        return y

    def fake(x, *given):
        found = [x.new_empty(*x.shape[:-1], len(adapters[0][1])) for _, _, adapters in read(given, lambda *w: w)]
        return found[0] if len(found) == 1 else tuple(found)

    def launch(x, *given):
        if torch.compiler.is_compiling():  # as lora_linear has it
            return (reference if torch.compiler.is_exporting() else traced)(x, *given)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return cast_once(launch, kind, x, *given)
        weight = (lambda w: w) if over is None else lambda *codes: lambda rows, b: product.launch(rows, *codes, b)
        found = _run(x, read(given, weight))
        return found[0] if len(found) == 1 else tuple(found)

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, torch.Tensor)))
        ctx.rest = tuple(None if isinstance(a, torch.Tensor) else (a,) for a in inputs)

    def backward(ctx, *grads):
        tensors = iter(ctx.saved_tensors)
        x, *given = [next(tensors) if a is None else a[0] for a in ctx.rest]
        weight = (lambda w: w) if over is None else lambda *codes: over(*codes, x.dtype)
        rows, dx, found, at = x.reshape(-1, x.shape[-1]), None, [None] * len(given), width
        for g, (w, b, adapters) in zip(grads, read(given, weight)):
            g, needs = g.reshape(-1, g.shape[-1]), ctx.needs_input_grad
            down, up = (adapters[0][0], adapters[0][2] * adapters[0][1]) if len(adapters) == 1 else (torch.cat([a[0] for a in adapters]), torch.cat([a[2] * a[1] for a in adapters], 1))
            wanted = (needs[0], over is None and needs[at], needs[at + 1], any(needs[at + 2 + 3 * j] for j in range(len(adapters))), any(needs[at + 3 + 3 * j] for j in range(len(adapters))))
            part, dw, found[at], ddown, dup = gradients(g, rows, rows @ down.mT, w, down, up, 1.0, wanted)
            if over is None:
                found[at - 1] = dw
            dx, column = part if dx is None else dx.add_(part), 0
            for j, (own, _, scale) in enumerate(adapters):
                place = slice(column, column + len(own))
                found[at + 1 + 3 * j] = None if ddown is None else ddown[place]
                found[at + 2 + 3 * j] = None if dup is None else dup[:, place] * scale
                column = place.stop
            at += 1 + 3 * len(adapters) + width
        return dx if dx is None else dx.view(x.shape), *found

    parameters = [inspect.Parameter("x", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=torch.Tensor)]
    for i, count in enumerate(counts):
        of = "" if len(counts) == 1 else f"_{i}"
        asked = [*((p.name, p.annotation) for p in named), ("b", torch.Tensor | None)]
        for j in range(count):
            one = "" if count == 1 else f"_{j}"
            asked += [(f"down{one}", torch.Tensor), (f"up{one}", torch.Tensor), (f"scale{one}", float)]
        parameters += [inspect.Parameter(name + of, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in asked]
    given = torch.Tensor if len(counts) == 1 else tuple[(torch.Tensor,) * len(counts)]
    reference.__signature__ = turned.__signature__ = inspect.Signature(parameters, return_annotation=given)
    launch.__qualname__ = f"lora_linears({counts!r}, {format!r}).launch"  # where it is found
    op = Op(reference, launch, fake, "_".join(map(str, ("lora_linears", *counts, *([format] if format else ())))))
    op.counts, op.format = counts, format
    if over is not None:
        op.over, op.uncoded = over, lora_linears(counts)
    elif len(counts) == 1:
        op.turned = turned
    return op.differentiates(keep, backward)


lora_linear.counts, lora_linear.format = (1,), None
