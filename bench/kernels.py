"""Every op beside what it replaces: checked first, then timed, in one run; a table, and JSON with machine and versions.

    python bench/kernels.py [--only lora_linear,linear_nf4] [--quick] [--minutes 7] [--tune] [--out bench/results/kernels.json]

An op's author adds a function to `OPS` that yields rows of the table (`Row`): what is computed, by which ways, the fewest bytes and operations that it
takes. Each way, and its gradients where they are timed, must be as exact as the plain ops in the same dtype (within a factor of two, against float64):
one that is not, or that fails, is listed and not timed, and where it is ours the script ends with 1. A time is the median of interleaved rounds; `×` is the first way's time over it (above 1 is faster than the first), and the share that of the larger of two floors, bytes over the
bandwidth of a copy and operations over the rate of a matrix product, both measured in this run.
On a GPU a way runs over several sets of inputs, together four times its L2, in one CUDA graph, so that each set is read from memory; on a CPU over two sets,
which its caches may hold: then a share may be above 100 %.
A way that reads on the host cannot be captured, and its time has the host's in it. Rows that a target names come first, and the target is printed where
the device is the one that it speaks of. What could not run here is listed with the reason. Where the minutes are used up, the rows left out are listed too.
`--tune` first measures the tiles on a GPU, then writes what the run found, up to how many rows codes are faster as they are, to the chip's file in kernels/tuned.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Callable

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]  # this file is not a package of that name

import torch  # noqa: E402
from rewrite.kernels import chips, dequant_fp4, dequant_fp8, dequant_int4, dequant_int8, dequant_mxfp4, dequant_nf4, few_rows, liger  # noqa: E402
from rewrite.kernels import dora_linear as dora_linears  # noqa: E402
from rewrite.kernels import dora_norm as norm  # noqa: E402
from rewrite.kernels import gated_linear as gated  # noqa: E402
from rewrite.kernels import grouped_lora as grouped  # noqa: E402
from rewrite.kernels import linear_cross_entropy as head  # noqa: E402
from rewrite.kernels import linear_fp4 as fp4  # noqa: E402
from rewrite.kernels import linear_fp8 as fp8  # noqa: E402
from rewrite.kernels import linear_int4 as int4  # noqa: E402
from rewrite.kernels import linear_int8 as int8  # noqa: E402
from rewrite.kernels import linear_mxfp4 as mxfp4  # noqa: E402
from rewrite.kernels import linear_nf4 as nf4  # noqa: E402
from rewrite.kernels import lora_dropout as dropout  # noqa: E402
from rewrite.kernels import lora_linear as lora  # noqa: E402
from rewrite.kernels import lora_linears as linears  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

K = 2.0  # an error may be K times that of the plain ops in the same dtype
OTHERS = ("float weight", "LoRA", "one adapter", "F.dropout")  # ways to another result, which is not compared
PEERS = ("PEFT", "bitsandbytes", "Liger")  # what others have made: where it fails here, that is no failure of ours
CHECKED = 64  # rows of a result that are compared with float64
SHAPES = {"7B": ((4096, 4096), (11008, 4096), (4096, 11008)), "70B": ((8192, 8192), (28672, 8192), (8192, 28672)), "small": ((512, 512), (1376, 512))}
dora = dora_linears.dora_linear()
RANKS, ROWS = (8, 16, 64), (1, 4, 16, 64, 512, 4096, 16384)


@dataclass(frozen=True)
class Row:
    """`make(new)` gives ({name: Way} over fresh tensors of `new(*size)`, a function that gives the way in float64 to the first rows of the result).

    The way named "plain ops" sets the error that is allowed. `bytes`, `operations`: the fewest, for the floor. `backward`: each way's gradients too.
    """

    op: str
    label: str
    make: Callable
    bytes: int
    operations: int
    backward: bool = False
    missing: dict = field(default_factory=dict)  # way → why it does not run here
    targets: tuple = ()


@dataclass(frozen=True)
class Target:
    """What a way is to reach on an H200: so many times as fast as another way, or as the best of them, a share of a copy's bandwidth, or bytes kept by another over its own."""

    way: str
    over: str  # a way, "best", "copy" or "kept by <way>"
    least: float

    def reached(self, row, ways, peaks):
        """The figure, or None where one of its ways did not run."""
        if self.way not in ways:
            return None
        own = ways[self.way]
        if self.over == "copy":
            return row.bytes / own["seconds"] / peaks["bytes a second"]
        if self.over == "best":
            return min(found["seconds"] for name, found in ways.items() if name not in OTHERS and not name.startswith(row.op)) / own["seconds"]
        if self.over.startswith("kept by "):
            other = ways.get(self.over.removeprefix("kept by "))
            return other and other["kept bytes"] / max(1, own["kept bytes"])
        return ways[self.over]["seconds"] / own["seconds"] if self.over in ways else None


@dataclass(frozen=True)
class Way:
    """A function of nothing, and the tensors that a backward step asks gradients for."""

    run: Callable
    leaves: tuple = ()
    captured: bool = True  # else it reads on the host

    def kept(self):
        """Bytes that one call keeps for backward, each storage once; what a second call keeps too, weights and x, is not its own."""
        calls = []
        for _ in range(2):
            found = {}
            with torch.autograd.graph.saved_tensors_hooks(lambda t, found=found: found.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
                calls.append((found, self.run()))
        (one, _), (two, _) = calls
        return sum(size for address, size in one.items() if address not in two)

    def step(self, grad):
        return torch.autograd.grad(self.run(), self.leaves, grad)


def doubles(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def sizes(device, rows=ROWS, ranks=RANKS):
    """(shape, rank, rows) of the table."""
    if device.type == "cuda":
        return [(shape, rank, m) for family in ("7B", "70B") for shape in SHAPES[family] for rank in ranks for m in rows]
    return [(shape, ranks[len(ranks) // 2], m) for shape in SHAPES["small"] for m in rows if m <= 512]


# ---- the ops -------------------------------------------------------------------------------------------------------------


def lora_linear(device, dtype):
    """One adapter beside a linear with a frozen base: forward alone for few rows, forward and backward for many."""
    missing = {} if device.type == "cuda" else {"lora_linear, Triton": "no GPU"}
    for (n, k), rank, m in sizes(device):
        def make(new, n=n, k=k, rank=rank, m=m):
            x, w, down, up = new(m, k), new(n, k) * k**-0.5, new(rank, k) * k**-0.5, new(n, rank)
            leaves = [t.requires_grad_() for t in (x, down, up)]
            ways = {
                "PEFT": _peft(*leaves, w, False),
                "PEFT, adapters in float32": _peft(*leaves, w, True),
                "plain ops": Way(lambda: lora.reference(x, w, None, down, up, 2.0), leaves),
                "addmm": Way(lambda: torch.addmm(x @ w.mT, x @ down.mT, up.mT, alpha=2.0), leaves),
                "lora_linear": Way(lambda: lora.launch(x, w, None, down, up, 2.0), leaves),
            }
            if device.type == "cuda" and rank <= 64:
                ways["lora_linear, Triton"] = Way(lambda: lora.launch(x, w, None, down, up, 2.0, lora.fused_product), leaves)

            def exact():
                few, full, *pair = doubles(x[:CHECKED], w, down, up)
                return Way(lambda: lora.reference(few, full, None, *pair, 2.0), (few, *pair))

            return ways, exact

        backward, passes = m >= 512, 2 if m >= 512 else 1
        targets = (Target("lora_linear", "best", 0.98), *([Target("lora_linear", "PEFT", 1.5 if m <= 1024 else 1.05)] if backward and not 1024 < m < 8192 else []))
        size = torch.finfo(dtype).bits // 8
        moved = size * passes * (n * k + m * (n + k) + rank * (n + k))
        yield Row("lora_linear", f"{m} × ({n} × {k}), rank {rank}", make, moved, 2 * m * (passes * n * k + (2 * passes - 1) * rank * (n + k)), backward, missing, targets)


def _peft(x, down, up, w, wide, magnitude=None):
    """PEFT's layer over the same tensors, as a way."""
    layer, own = _peft_layer(down, up, w, wide, magnitude)
    return Way(lambda: layer(x), (x, *own))


def _peft_layer(down, up, w, wide, magnitude=None):
    """PEFT's layer and what trains in it; its adapters in float32 as `autocast_adapter_dtype` makes them, or in the dtype of the base. With a magnitude, DoRA."""
    import peft

    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype)
    layer.weight = nn.Parameter(w, requires_grad=False)
    config = peft.LoraConfig(r=down.shape[0], lora_alpha=2 * down.shape[0], target_modules=["0"], use_dora=magnitude is not None)
    theirs = peft.get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=wide).base_model.model[0].to(w.device)
    a, b = (nn.Parameter(t.detach().to(torch.float32 if wide else t.dtype)) for t in (down, up))
    theirs.lora_A["default"].weight, theirs.lora_B["default"].weight = a, b
    if magnitude is None:
        return theirs, (a, b)
    own = theirs.lora_magnitude_vector["default"].weight = nn.Parameter(magnitude.detach().view(-1))
    return theirs, (a, b, own)


def dora_linear(device, dtype):
    """A step of DoRA beside one of LoRA, which is another result; beside the weight put together, and PEFT's."""
    for (n, k), rank, m in sizes(device, ranks=(16,)):
        if m < 512:
            continue

        def make(new, n=n, k=k, rank=rank, m=m):
            x, w, down, up, magnitude = new(m, k), new(n, k) * k**-0.5, new(rank, k) * k**-0.5, new(n, rank), new(n, 1).abs()
            leaves = [t.requires_grad_() for t in (x, down, up, magnitude)]
            ways = {
                "PEFT": _peft(*leaves[:3], w, False, magnitude),
                "plain ops": Way(lambda: dora.reference(x, w, None, down, up, magnitude, 2.0), leaves),
                "dora_linear": Way(lambda: dora.launch(x, w, None, down, up, magnitude, 2.0), leaves),
                "LoRA": Way(lambda: lora.launch(x, w, None, down, up, 2.0), leaves[:3]),
            }

            def exact():
                few, full, *rest = doubles(x[:CHECKED], w, down, up, magnitude)
                return Way(lambda: dora.reference(few, full, None, *rest, 2.0), (few, *rest))

            return ways, exact

        size = torch.finfo(dtype).bits // 8
        yield Row("dora_linear", f"{m} × ({n} × {k}), rank {rank}", make, size * (3 * n * k + 2 * m * (n + k)), 2 * m * (2 * n * k + 3 * rank * (n + k)), True, targets=(Target("dora_linear", "LoRA", 1 / 1.1),))


def gated_mlp(device, dtype):
    """A step of a whole gated MLP with an adapter on gate, up and down, and what it keeps for backward; frozen base."""
    shapes = ((11008, 4096), (28672, 8192)) if device.type == "cuda" else ((1376, 512),)
    both, rest = linears.lora_linears((1, 1)), gated.gated_linear("silu", 1)
    missing = {} if _runs_liger(device) else {"Liger": "not installed, or no GPU"}
    targets = Target("gated_linear", "kept by PEFT", 1 / 0.75), Target("gated_linear", "PEFT", 1.0)
    for (inner, k), m in itertools.product(shapes, (1024, 4096, 16384) if device.type == "cuda" else (128, 512)):
        def make(new, inner=inner, k=k, m=m, rank=16):
            x, wide = new(m, k), [new(inner, k) * k**-0.5, new(inner, k) * k**-0.5, new(k, inner) * inner**-0.5]
            pairs = [(new(rank, w.shape[1]) * w.shape[1] ** -0.5, new(w.shape[0], rank) * rank**-0.5) for w in wide]
            leaves = [t.requires_grad_() for t in (x, *(t for pair in pairs for t in pair))]
            gate, up, down = ((w, None, *pair, 2.0) for w, pair in zip(wide, pairs))

            def block(first, second, last):
                return Way(lambda: last(F.silu(first(x)) * second(x)), leaves)

            def peft(wide_adapters, gated=lambda e, g: F.silu(e) * g):
                theirs = [_peft_layer(*pair, w, wide_adapters) for w, pair in zip(wide, pairs)]
                first, second, last = (layer for layer, _ in theirs)
                return Way(lambda: last(gated(first(x), second(x))), (x, *(p for _, own in theirs for p in own)))

            ways = {
                "PEFT": peft(False),
                "PEFT, adapters in float32": peft(True),
                "plain ops": block(*(lambda t, given=given: lora.reference(t, *given) for given in (gate, up, down))),
                "lora_linear each": block(*(lambda t, given=given: lora.launch(t, *given) for given in (gate, up, down))),
                "gated_linear": Way(lambda: rest.launch(*both.launch(x, *gate, *up), *down), leaves),
            }
            if _runs_liger(device):
                from liger_kernel.ops.swiglu import LigerSiLUMulFunction

                ways["Liger, PEFT's adapters"] = peft(False, LigerSiLUMulFunction.apply)

            def exact():
                few, *full = doubles(x[:CHECKED], *wide, *(t for pair in pairs for t in pair))
                gate, up, down = ((w, None, *full[3 + 2 * i : 5 + 2 * i], 2.0) for i, w in enumerate(full[:3]))
                return Way(lambda: lora.reference(F.silu(lora.reference(few, *gate)) * lora.reference(few, *up), *down), (few, *full[3:]))

            return ways, exact

        size = torch.finfo(dtype).bits // 8
        yield Row("gated_mlp", f"{m} × ({k}, {inner}), rank 16", make, size * (6 * inner * k + m * (2 * k + 8 * inner)), 12 * m * inner * k, True, missing, targets)


def linear_int8(device, dtype):
    yield from _coded(device, dtype, int8.linear_int8, 8, dequant_int8.quantize)


def linear_int4(device, dtype):
    yield from _coded(device, dtype, int4.linear_int4, 4.5, lambda w: (*dequant_int4.quantize(w, 64), list(w.shape)))


def linear_nf4(device, dtype):
    yield from _coded(device, dtype, nf4.linear_nf4, 4.127, lambda w: (*dequant_nf4.quantize(w), list(w.shape)), _bitsandbytes)


def linear_mxfp4(device, dtype):
    yield from _coded(device, dtype, mxfp4.linear_mxfp4, 4.25, lambda w: (*dequant_mxfp4.quantize(w), list(w.shape)))


def _coded(device, dtype, op, bits, quantize, peer=None):
    """Few rows times a weight in codes: as they are, the weight made first, and the float weight, which is another result and is not compared."""
    missing = {} if device.type == "cuda" else {f"{op.name}, Triton": "no GPU"}
    if peer is not None and _installed("bitsandbytes") is None:
        missing["bitsandbytes"] = "not installed"
    for (n, k), _, m in sizes(device, rows=(1, 4, 16, 64, 256), ranks=(0,)):
        def make(new, n=n, k=k, m=m):
            x, w = new(m, k), new(n, k) * k**-0.5
            codes = quantize(w)
            ways = {
                "float weight": Way(lambda: F.linear(x, w)),
                "plain ops": Way(lambda: F.linear(x, op.dequant.launch(*codes, x.dtype))),
                op.name: Way(lambda: op.launch(x, *codes, None)),
            }
            if op.unsuited(x, *codes) is None:
                ways[f"{op.name}, codes as they are"] = Way(lambda: op.fast(x, *codes, None))
            if peer is not None and _installed("bitsandbytes"):
                ways["bitsandbytes"] = peer(x, w)
            return ways, lambda: Way(lambda: F.linear(x[:CHECKED].double(), op.dequant.launch(*codes, torch.float32).double()))

        targets = (Target(op.name, "best", 0.98), *([Target(op.name, "copy", 0.8)] if bits < 5 and m <= 16 and n * k * bits / 8 >= 2**26 else []))
        yield Row(op.name, f"{m} × ({n} × {k})", make, int(n * k * bits / 8) + torch.finfo(dtype).bits // 8 * m * (n + k), 2 * m * n * k, missing=missing, targets=targets)


def linear_fp4(device, dtype):
    yield from _coded(device, dtype, fp4.linear_fp4, 4.127, lambda w: (*dequant_fp4.quantize(w), list(w.shape)))


def linear_fp8(device, dtype):
    yield from _coded(device, dtype, fp8.linear_fp8, 8, dequant_fp8.quantize)


def lora_nf4(device, dtype):
    """An adapter beside a weight in nf4, at decoding; bitsandbytes' product with two addmm is what people run."""
    op = linears.lora_linears((1,), "nf4")
    missing = {} if _installed("bitsandbytes") else {"bitsandbytes": "not installed"}
    for (n, k), rank, m in sizes(device, rows=(1, 4, 16), ranks=(16,)):
        def make(new, n=n, k=k, rank=rank, m=m):
            x, w, down, up = new(m, k), new(n, k) * k**-0.5, new(rank, k) * k**-0.5, new(n, rank)
            codes = (*dequant_nf4.quantize(w), [n, k])
            ways = {
                "plain ops": Way(lambda: lora.reference(x, dequant_nf4.dequant_nf4.launch(*codes, x.dtype), None, down, up, 2.0)),
                "lora_linears": Way(lambda: op.launch(x, *codes, None, down, up, 2.0)),
            }
            if _installed("bitsandbytes"):
                base = _bitsandbytes(x, w).run
                ways["bitsandbytes and addmm"] = Way(lambda: torch.addmm(base(), x @ down.mT, up.mT, alpha=2.0))
            return ways, lambda: Way(lambda: lora.reference(*doubles(x[:CHECKED], dequant_nf4.dequant_nf4.launch(*codes, torch.float32)), None, *doubles(down, up), 2.0))

        size = torch.finfo(dtype).bits // 8
        moved = int(n * k * 4.127 / 8) + size * (m * (n + k) + rank * (n + k))
        yield Row("lora_nf4", f"{m} × ({n} × {k}), rank {rank}", make, moved, 2 * m * (n * k + rank * (n + k)), missing=missing, targets=(Target("lora_linears", "bitsandbytes and addmm", 1.3),))


def lora_linears(device, dtype):
    """q, k and v that read one x: a step by one op with one shrink, and by three."""
    op = linears.lora_linears((1, 1, 1))
    for (n, k), rank, m in sizes(device, rows=(512, 4096), ranks=(16,)):
        def make(new, n=n, k=k, rank=rank, m=m):
            x, each = new(m, k).requires_grad_(), [(new(n, k) * k**-0.5, (new(rank, k) * k**-0.5).requires_grad_(), new(n, rank).requires_grad_()) for _ in range(3)]
            leaves = (x, *(t for _, *pair in each for t in pair))
            peft = [_peft_layer(down, up, w, False) for w, down, up in each]
            ways = {
                "PEFT": Way(lambda: torch.cat([layer(x) for layer, _ in peft], 1), (x, *(p for _, own in peft for p in own))),
                "plain ops": Way(lambda: torch.cat([lora.reference(x, w, None, down, up, 2.0) for w, down, up in each], 1), leaves),
                "lora_linear each": Way(lambda: torch.cat([lora.launch(x, w, None, down, up, 2.0) for w, down, up in each], 1), leaves),
                "lora_linears": Way(lambda: torch.cat(op.launch(x, *(a for w, down, up in each for a in (w, None, down, up, 2.0))), 1), leaves),
            }

            def exact():
                few, *full = doubles(x[:CHECKED], *(t for own in each for t in own))
                parts = [full[i : i + 3] for i in range(0, 9, 3)]
                return Way(lambda: torch.cat([lora.reference(few, w, None, down, up, 2.0) for w, down, up in parts], 1), (few, *(t for _, *pair in parts for t in pair)))

            return ways, exact

        size = torch.finfo(dtype).bits // 8
        yield Row("lora_linears", f"{m} × 3 ({n} × {k}), rank {rank}", make, size * 6 * (n * k + m * n), 12 * m * n * k, True)


def lora_dropout(device, dtype):
    """A step of a linear whose adapter drops entries of x out, p = 0.05, from one seed; F.dropout, which people run, draws others."""
    for (n, k), rank, m in sizes(device, rows=(512, 4096), ranks=(16,)):
        def make(new, n=n, k=k, rank=rank, m=m):
            x, w, down, up = new(m, k).requires_grad_(), new(n, k) * k**-0.5, (new(rank, k) * k**-0.5).requires_grad_(), new(n, rank).requires_grad_()
            leaves, way = (x, down, up), dropout.way_of(x)
            ones = torch.ones_like(x.detach())

            def separate(drop):
                return Way(lambda: F.linear(x, w) + 2.0 * F.linear(F.linear(drop(x), down), up), leaves, captured=False)

            ways = {
                "F.dropout": separate(lambda t: F.dropout(t, 0.05)),
                "plain ops": separate(lambda t: t * way.dropped(ones, 0.05, 7)),
                "lora_dropout": Way(lambda: F.linear(x, w).addmm_(dropout.Shrunk.apply(x, down, 0.05, 7, way), up.t(), alpha=2.0), leaves),
                "LoRA": Way(lambda: lora.launch(x, w, None, down, up, 2.0), leaves, captured=False),
            }

            def exact():
                few, full, *pair = doubles(x[:CHECKED], w, down, up)
                drawn = way.dropped(ones, 0.05, 7)[:CHECKED].double()
                return Way(lambda: F.linear(few, full) + 2.0 * F.linear(F.linear(few * drawn, pair[0]), pair[1]), (few, *pair))

            return ways, exact

        size = torch.finfo(dtype).bits // 8
        yield Row("lora_dropout", f"{m} × ({n} × {k}), rank {rank}", make, size * 2 * (n * k + m * (n + k)), 4 * m * n * k, True)


def dora_norm(device, dtype):
    """The norms of the rows of a weight with its update, while the update trains."""
    for (n, k), rank, _ in sizes(device, rows=(1,)):
        def make(new, n=n, k=k, rank=rank):
            w, down, up = new(n, k) * k**-0.5, new(rank, k) * k**-0.5, new(n, rank)
            trained = up.detach().requires_grad_()

            def ours():
                with torch.enable_grad():
                    return norm.launch(w, down, trained, 2.0)

            return {"plain ops": Way(lambda: norm.reference(w, down, up, 2.0)), "dora_norm": Way(ours)}, lambda: Way(lambda: norm.reference(*doubles(w, down, up), 2.0))

        yield Row("dora_norm", f"({n} × {k}), rank {rank}", make, torch.finfo(dtype).bits // 8 * n * k, 2 * n * k * rank, targets=(Target("dora_norm", "best", 0.98),))


def dequantise(device, dtype):
    """A weight made from its codes, by each format."""
    formats = {"int8": (dequant_int8, 8), "int4": (dequant_int4, 4.5), "nf4": (dequant_nf4, 4.127), "fp4": (dequant_fp4, 4.127), "fp8": (dequant_fp8, 8), "mxfp4": (dequant_mxfp4, 4.25)}
    for ((n, k), _, _), (form, (module, bits)) in itertools.product(sizes(device, rows=(1,), ranks=(0,)), formats.items()):
        def make(new, n=n, k=k, form=form, module=module):
            op = getattr(module, f"dequant_{form}")
            codes = module.quantize(new(n, k), *((64,) if form == "int4" else ()))
            codes = codes if form in ("int8", "fp8") else (*codes, [n, k])
            ways = {"plain ops": Way(lambda: op.reference(*codes, dtype)), f"dequant_{form}": Way(lambda: op.launch(*codes, dtype))}
            return ways, lambda: Way(lambda: op.reference(*codes, torch.float32)[:CHECKED].double())

        yield Row("dequantise", f"{form} ({n} × {k})", make, int(n * k * bits / 8) + torch.finfo(dtype).bits // 8 * n * k, 0)


def linear_cross_entropy(device, dtype):
    """A step of a frozen head with its loss, from what it reads; a tenth of the tokens has no label. Kept: beside x and w."""
    shapes = ((32000, 4096), (128256, 8192)) if device.type == "cuda" else ((4000, 512),)
    missing = {} if _runs_liger(device) else {"Liger": "not installed, or no GPU"}
    for (n, k), m in itertools.product(shapes, (1024, 4096, 16384) if device.type == "cuda" else (256, 1024)):
        def make(new, n=n, k=k, m=m):
            x, w, labels = new(m, k).requires_grad_(), new(n, k) * k**-0.5, torch.arange(m, device=device) * 7919 % n
            labels[::10] = head.IGNORED
            given = (x, w, None, labels, (labels != head.IGNORED).sum())
            ways = {"plain ops": Way(lambda: head.reference(*given)[None], (x,)), "linear_cross_entropy": Way(lambda: head.launch(*given)[None], (x,))}
            if _runs_liger(device):
                ways["Liger"] = _liger(*given)

            def exact():
                full, *rest = doubles(x, w)
                return Way(lambda: head.launch(full, *rest, None, *given[3:])[None], (full,))

            return ways, exact

        size = torch.finfo(dtype).bits // 8
        yield Row("linear_cross_entropy", f"{m} × ({n} × {k})", make, size * (2 * n * k + 2 * m * k), 4 * m * n * k, True, missing)


def of_liger(device, dtype):
    """A step of a model's own norm, positions and gate: plain PyTorch, and the library behind the same op. On a GPU alone. A gate reads copies, for its backward writes over them."""
    if not _runs_liger(device):
        return
    for m, k, inner in itertools.product((1024, 16384), (4096, 8192), (11008,)):
        def norm(new, m=m, k=k):
            x, w = new(m, k).requires_grad_(), new(k).requires_grad_()
            ways = {name: Way(lambda f=f: f(x, w, 1e-5), (x, w)) for name, f in (("plain ops", liger.rms_norm.reference), ("rms_norm", liger.rms_norm.launch))}

            def exact():
                few, full = doubles(x[:CHECKED], w)
                return Way(lambda: full * few * torch.rsqrt(few.square().mean(-1, keepdim=True) + 1e-5), (few, full))

            return ways, exact

        def positions(new, m=m, k=k):
            heads, angles = k // 128, new(1, 1, m // 4, 64)
            q, k = (new(4, m // 4, n, 128).transpose(1, 2).requires_grad_() for n in (heads, heads // 4))
            cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
            both = lambda f: lambda: torch.cat(f(cos, sin, q, 64, k, 64), 1)  # noqa: E731
            ways = {name: Way(both(f), (q, k)) for name, f in (("plain ops", liger.ropes.reference), ("ropes", liger.ropes.launch))}

            def exact():
                wide = doubles(q, k)
                return Way(lambda: torch.cat(liger.ropes.reference(cos.double(), sin.double(), wide[0], 64, wide[1], 64), 1), wide)

            return ways, exact

        def gate(new, m=m, inner=inner):
            e, g = (new(m, inner).requires_grad_() for _ in range(2))
            ways = {name: Way(lambda f=f: f(e.clone(), g.clone()), (e, g)) for name, f in (("plain ops", liger.swiglu.reference), ("swiglu", liger.swiglu.launch))}

            def exact():
                few = doubles(e[:CHECKED], g[:CHECKED])
                return Way(lambda: F.silu(few[0]) * few[1], few)

            return ways, exact

        size = torch.finfo(dtype).bits // 8
        yield Row("of_liger", f"rms_norm, {m} × {k}", norm, size * 5 * m * k, 0, True)
        yield Row("of_liger", f"ropes, {m} × {k} and a fourth", positions, size * 5 * m * k, 0, True)
        if k == 4096:
            yield Row("of_liger", f"swiglu, {m} × {inner}", gate, size * 8 * m * inner, 0, True)


def _runs_liger(device):
    return device.type == "cuda" and bool(_installed("liger_kernel", "liger-kernel"))


def _liger(x, w, b, labels, items):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Loss

    def run():
        found = Loss.apply(x, w, labels, b, None, head.IGNORED, 0.0, 0.0, "sum")
        return ((found[0] if isinstance(found, tuple) else found) / items)[None]

    return Way(run, (x,), captured=False)  # it asks the device for a number while it runs


def _bitsandbytes(x, w):
    import bitsandbytes

    codes, state = bitsandbytes.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    return Way(lambda: bitsandbytes.matmul_4bit(x, codes.t(), state))


def grouped_lora(device, dtype):
    """Eight adapters, or one for every row, over rows of a batch that decode, and over eight rows that prefill."""
    missing = {} if device.type == "cuda" else {"grouped_lora, Triton": "no GPU"}
    kinds = ((8, 8, 1), (64, 8, 1), (64, 64, 1), (8, 8, 512)) if device.type == "cuda" else ((8, 8, 1), (8, 8, 16), (32, 32, 1))
    for (n, k), rank, _ in sizes(device, rows=(1,)):
        for batch, adapters, length in kinds:
            def make(new, n=n, k=k, rank=rank, batch=batch, adapters=adapters, length=length):
                y, x, down, up = new(batch, length, n), new(batch, length, k), new(adapters, rank, k) * k**-0.5, new(adapters, n, rank)
                slot, mask = torch.arange(batch, device=device) % adapters, torch.ones(batch, dtype=torch.bool, device=device)
                given = (y, x, down, up, slot, mask, 2.0)
                leaves = tuple(t.requires_grad_() for t in given[1:4])
                ways = {
                    "plain ops": Way(lambda: grouped.in_a_batch(*given), leaves),  # what a batch runs
                    "grouped_lora": Way(lambda: grouped.launch(*given), leaves),
                    "grouped_lora, library": Way(lambda: grouped.launch(*given, way=grouped.ByLibrary([(slot, mask)], look=True)), leaves),
                }

                def exact():
                    few = max(1, CHECKED // length)
                    wide = doubles(y[:few], x[:few], down, up)
                    return Way(lambda: grouped.reference(*wide, slot[:few], mask[:few], 2.0), tuple(wide[1:]))

                return ways, exact

            size = torch.finfo(dtype).bits // 8
            moved = size * (batch * length * (2 * n + k) + min(batch, adapters) * rank * (n + k))
            yield Row("grouped_lora", f"{batch} × {length} of {adapters} adapters ({n} × {k}), rank {rank}", make, moved, 2 * batch * length * rank * (n + k), length >= 512, missing)


def grouped_linear(device, dtype):
    """32 rows that decode, of 1, 8 or 32 adapters, their base linear included, beside PEFT's batch of mixed adapters."""
    for ((n, k), rank, _), adapters in itertools.product(sizes(device, rows=(1,), ranks=(16,)), (8, 32)):
        def make(new, n=n, k=k, rank=rank, adapters=adapters, batch=32):
            x, w, down, up = new(batch, 1, k), new(n, k) * k**-0.5, new(adapters, rank, k) * k**-0.5, new(adapters, n, rank)
            mask, row = torch.ones(batch, dtype=torch.bool, device=device), torch.arange(batch, device=device)
            slot, theirs = row % adapters, _peft_batch(down, up, w)
            names = [str(i % adapters) for i in range(batch)]
            ways = {
                "PEFT's mixed batch": Way(lambda: theirs(x, adapter_names=names), captured=False),
                "plain ops": Way(lambda: grouped.in_a_batch(F.linear(x, w), x, down, up, slot, mask, 2.0)),
                "grouped_lora": Way(lambda: grouped.launch(F.linear(x, w), x, down, up, slot, mask, 2.0)),
                "grouped_lora, launched": Way(lambda: grouped.launch(F.linear(x, w), x, down, up, slot, mask, 2.0), captured=False),  # as PEFT's is, which no graph holds
                "one adapter": Way(lambda zeros=torch.zeros_like(slot): grouped.launch(F.linear(x, w), x, down[:1], up[:1], zeros, mask, 2.0)),
            }

            def exact():
                few, full, *pair = doubles(x, w, down, up)
                return Way(lambda: grouped.reference(F.linear(few, full), few, *pair, slot, mask, 2.0))

            return ways, exact

        targets = (Target("grouped_lora", "one adapter", 1 / 1.15),) if adapters == 32 else (Target("grouped_lora, launched", "PEFT's mixed batch", 5.0),)
        size = torch.finfo(dtype).bits // 8
        yield Row("grouped_linear", f"32 × 1 of {adapters} adapters ({n} × {k}), rank {rank}", make, size * (n * k + 32 * (n + k) + adapters * rank * (n + k)), 64 * (n * k + rank * (n + k)), targets=targets)


def _peft_batch(down, up, w):
    """PEFT's layer with an adapter for each of a stack, named by their numbers."""
    import peft

    layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta", dtype=w.dtype)
    layer.weight = nn.Parameter(w, requires_grad=False)
    config = peft.LoraConfig(r=down.shape[1], lora_alpha=2 * down.shape[1], target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(layer), config, adapter_name="0", autocast_adapter_dtype=False)
    for i in range(1, len(down)):
        model.add_adapter(str(i), config)
    theirs = model.base_model.model[0].to(w.device)
    for i, (a, b) in enumerate(zip(down, up)):
        theirs.lora_A[str(i)].weight, theirs.lora_B[str(i)].weight = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
    return theirs.eval()


def grouped_loras(device, dtype):
    """Adapters of four ranks over the rows of a batch: one op, and one for each rank."""
    missing = {} if device.type == "cuda" else {"grouped_loras, Triton": "no GPU"}
    for (n, k), _, _ in sizes(device, rows=(1,), ranks=(0,)):
        for batch, length in ((32, 1), (8, 512)) if device.type == "cuda" else ((8, 1), (8, 16)):
            def make(new, n=n, k=k, batch=batch, length=length):
                y, x, row, each = new(batch, length, n), new(batch, length, k), torch.arange(batch, device=device), []
                for g, rank in enumerate((8, 16, 32, 64)):  # two adapters of each rank
                    each.append((new(2, rank, k) * k**-0.5, new(2, n, rank), row // 4 % 2, row % 4 == g, 2.0))
                given = [a for group in each for a in group]
                leaves = tuple(t.requires_grad_() for t in (x, *(t for group in each for t in group[:2])))

                def by_rank(op):
                    out = y
                    for group in each:
                        out = op(out, x, *group)
                    return out

                ways = {
                    "plain ops": Way(lambda: by_rank(grouped.in_a_batch), leaves),  # what a batch runs
                    "one op for each rank": Way(lambda: by_rank(grouped.launch), leaves),
                    "grouped_loras": Way(lambda: grouped.grouped_loras(4).launch(y, x, *given), leaves),
                }

                def exact():
                    few = max(1, CHECKED // length)
                    wide = [a if isinstance(a, float) else doubles(a)[0] if a.is_floating_point() else a[:few] for a in given]
                    first = doubles(x[:few])[0]
                    return Way(lambda: grouped.grouped_loras(4).reference(y[:few].double(), first, *wide), (first, *(a for a in wide if isinstance(a, torch.Tensor) and a.requires_grad)))

                return ways, exact

            size = torch.finfo(dtype).bits // 8
            moved = size * (batch * length * (2 * n + k) + 2 * (8 + 16 + 32 + 64) * (n + k))
            yield Row("grouped_loras", f"{batch} × {length} of ranks 8, 16, 32, 64 ({n} × {k})", make, moved, 2 * batch * length * 30 * (n + k), length >= 512, missing)


#: an op's author adds a function here
OPS = (
    lora_linear, linear_nf4, linear_int4, lora_nf4, gated_mlp, grouped_linear, dora_linear, lora_linears, linear_cross_entropy, grouped_lora, grouped_loras,
    linear_int8, linear_fp8, linear_mxfp4, linear_fp4, lora_dropout, of_liger, dora_norm, dequantise,
)  # fmt: skip


# ---- measuring -----------------------------------------------------------------------------------------------------------


def _installed(name, distribution=None):
    try:
        return version(distribution or name) if importlib.util.find_spec(name) else None
    except PackageNotFoundError:
        return None


def ceilings(device, dtype):
    """Bytes a second of a copy (read and written) and operations a second of a matrix product, on random data."""
    count, side = (2**30, 8192) if device.type == "cuda" else (2**25, 1024)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target, a, b = torch.empty_like(source), *(torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copy, product = (clock({"one": [run]}, device, 7)["one"] for run in (lambda: target.copy_(source), lambda: a @ b))
    return {"bytes a second": 2 * count / copy, "operations a second": 2 * side**3 / product}


def clock(functions, device, rounds, failed=None, direct=()):
    """Seconds of one call of each way: the median of interleaved rounds; {way: functions, one for each set of inputs}. What a graph cannot capture goes to `failed`, by reason."""
    measured, pool = {}, torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # one graph at a time runs, and nobody reads what it makes
    for name, runs in functions.items():
        try:
            if device.type == "cpu":
                measured[name] = functools.partial(_host, runs)
            else:
                measured[name] = launched(runs) if name in direct else replayed(runs, pool)
        except Exception as caught:  # whatever a library raises under capture costs its own figures, not the run's
            if failed is None:
                raise
            failed[name] = f"a CUDA graph does not capture it: {_first_line(caught)}"
    times = {name: [] for name in measured}
    for _ in range(rounds + 1):
        for name, measure in measured.items():
            times[name].append(measure() / len(functions[name]))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _first_line(caught):
    return f"{type(caught).__name__}: {caught}".splitlines()[0][:200]


def _host(runs):
    start = time.perf_counter()
    for run in runs:
        run()
    return time.perf_counter() - start


def replayed(runs, pool):
    """A function that gives the seconds of one replay of all runs, captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for run in runs:
                run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for run in runs:
            run()
    return functools.partial(_on_device, graph.replay)


def launched(runs):
    """The same for what no CUDA graph can hold, launched one by one."""
    return functools.partial(_on_device, lambda: [run() for run in runs])


def _on_device(run):
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def error(reference, result):
    return float((reference - result.double()).square().mean().sqrt() / reference.square().mean().sqrt().clamp(min=1e-30))


def checked(row, ways, exact):
    """(way → error of its result and gradients, way → what is wrong with it): against float64, over the first rows."""
    reference = exact.run().detach()
    rows, found, wrong = len(reference), {}, {}
    grad = torch.zeros_like(ways["plain ops"].run().detach())
    if row.backward:
        grad[:rows] = torch.randn(grad[:rows].shape, device=grad.device, dtype=torch.float32).to(grad.dtype)  # the other rows ask for nothing
        expected = exact.step(grad[:rows].to(reference.dtype))
    for name, way in sorted(ways.items(), key=lambda pair: pair[0] != "plain ops"):
        try:
            with torch.no_grad():
                found[name] = [error(reference, way.run()[:rows])]
            if row.backward and name not in OTHERS:
                found[name] += [error(e.flatten(), g.flatten()[: e.numel()]) for e, g in zip(expected, way.step(grad), strict=True)]
        except Exception as caught:  # a kernel that a chip does not take, a library that is made for another one: they cost their own figures, not the run's
            if name == "plain ops":
                raise
            found.pop(name, None)
            wrong[name] = _first_line(caught)
            continue
        for what, own, plain in zip(("its result", *(f"gradient {i}" for i in range(1, len(found[name])))), found[name], found["plain ops"]):
            if name not in OTHERS and not own <= K * plain + torch.finfo(grad.dtype).eps:
                wrong[name] = f"{what} is off by {own:.1e}, that of the plain ops by {plain:.1e}"
    return {name: max(values) for name, values in found.items()}, wrong


def case(row, device, dtype, peaks, rounds):
    """What is reported of one row, as JSON has it."""
    generator = torch.Generator(device).manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)  # noqa: E731
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets = [row.make(new) for _ in range(max(2, min(-(-4 * cache // row.bytes), 256)))]
    (ways, exact), kept = sets[0], {}
    found, wrong = checked(row, ways, exact())
    timed = {name: [own[name] for own, _ in sets] for name in ways if name not in wrong}
    direct = [name for name in timed if not ways[name].captured]
    if row.backward:
        grad = torch.randn_like(ways["plain ops"].run().detach())
        times = clock({name: [functools.partial(way.step, grad) for way in own] for name, own in timed.items()}, device, rounds, wrong, direct)
        kept = {name: {"kept bytes": ways[name].kept()} for name in times}
    else:
        with torch.no_grad():
            times = clock({name: [way.run for way in own] for name, own in timed.items()}, device, rounds, wrong, direct)
    floor = max(row.bytes / peaks["bytes a second"], row.operations / peaks["operations a second"])
    first = next(iter(times.values()))
    results = {name: {"seconds": t, "times the first": first / t, "share of the floor": floor / t, "error": found[name], **kept.get(name, {})} for name, t in times.items()}
    reached = [{"way": t.way, "over": t.over, "least": t.least, "reached": t.reached(row, results, peaks)} for t in row.targets] if _is_named(device) else []
    return {"op": row.op, "case": row.label, "backward": row.backward, "ways": results, "targets": reached, "wrong": wrong, "did not run": row.missing}


def _is_named(device):
    """Is this the device that targets speak of?"""
    return device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)


#: tiles that are tried on a GPU
TILES = {
    "few_rows": [{"BLOCK_N": n, "num_warps": w, "num_stages": s} for n in (16, 32, 64) for w in (4, 8) for s in (2, 3, 4)],
    "lora_linear": [
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        lora.CONFIGS["default"],
    ],
}


def tiles(device, dtype):
    """kernel → tiles that were the fastest in all, of those that are right; lora_linear's only where they were faster than the library's two products each time."""
    new = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    times = {"few_rows": [], "lora_linear": []}
    for (n, k), rows in itertools.product(SHAPES["7B"], (1, 16)):
        x = new(rows, k)
        sets = [dequant_int4.quantize(new(n, k) * k**-0.5, 64) for _ in range(24)]  # more than the L2 holds
        exact = F.linear(x, dequant_int4.dequant_int4.launch(*sets[0], [n, k], dtype)).double()
        run = lambda given, config, x=x, n=n: few_rows.product(x, *given[:2], None, n, "int4", config=config)  # noqa: E731
        times["few_rows"].append(_tried("few_rows", run, sets, exact, device))
    for (n, k), rows in itertools.product(SHAPES["7B"], (16, 512, 4096)):
        x, w, down, up = new(rows, k), new(n, k) * k**-0.5, new(16, k) * k**-0.5, new(n, 16)
        given = (x, w.mT, x @ down.mT, up.mT, None, 2.0)
        run = lambda given, config: lora.plain_product(*given) if config is None else lora.fused_product(*given, config)  # noqa: E731
        times["lora_linear"].append(_tried("lora_linear", run, [given], lora.plain_product(*given).double(), device))
    best = {}
    for kernel, each in times.items():
        whole = [config for config in each[0] if all(config in found for found in each)]
        if kernel == "lora_linear":
            whole = [config for config in whole if all(found[config] <= found["null"] for found in each)]
        fastest = min(whole, key=lambda config: sum(found[config] / min(found.values()) for found in each), default="null")
        if fastest != "null":
            best[kernel] = json.loads(fastest)
    return best


def _tried(kernel, run, sets, exact, device):
    """Tiles as JSON → seconds: of those that the chip holds and that are right. For lora_linear also null, the library's products."""
    right = {}
    for config in (*TILES[kernel], *([None] if kernel == "lora_linear" else ())):
        try:
            if error(exact, run(sets[0], config)) < 2e-2:
                right[json.dumps(config)] = [functools.partial(run, given, config) for given in sets]
        except Exception:  # more shared memory or registers than the chip has: no candidate
            continue
    return clock(right, device, 5, {})


def write_tuned(device, machine, results, configs, folder=chips.FOLDER):
    """The chip's file, of what this run found beside what it has of ops that did not run; the path."""
    own = chips.name(device)
    path = folder / f"{own.lower().replace(' ', '-')}.json"
    before = json.loads(path.read_text()) if path.exists() else {"few_rows": {}, "configs": {}}
    found = {op: {"most": most, "by": "measured"} for op, most in crossings(results).items()}
    value = {"chip": own, "device": machine["machine"], "versions": {name: machine[name] for name in ("torch", "triton")}, "few_rows": before["few_rows"] | found, "configs": before["configs"] | configs}
    path.write_text(json.dumps(value, indent=1) + "\n")
    return path


def crossings(results):
    """op → up to how many rows, of those that were timed, taking codes as they are was faster at each shape than making the weight: what `chips` is to say."""
    faster = {}
    for result in results:
        named, ways = f"{result['op']}, codes as they are", result["ways"]
        if named in ways:
            rows = int(result["case"].split()[0])
            faster.setdefault(result["op"], {}).setdefault(rows, []).append(ways[named]["seconds"] < ways["plain ops"]["seconds"])
    most = {}
    for op, found in faster.items():
        most[op] = max(itertools.takewhile(lambda rows: all(found[rows]), sorted(found)), default=0)
    return most


def table(results):
    from rich.table import Table

    shown = Table("op", "case", "way", "µs", "×", "of the floor", "error", "kept MB")
    for result in results:
        for i, (name, found) in enumerate(result["ways"].items()):
            left = (result["op"], result["case"] + (", with backward" if result["backward"] else "")) if i == 0 else ("", "")
            shown.add_row(*left, name, f"{found['seconds'] * 1e6:.0f}", f"{found['times the first']:.2f}", f"{found['share of the floor']:.0%}", f"{found['error']:.0e}", f"{found['kept bytes'] / 1e6:.1f}" if "kept bytes" in found else "")
    return shown


def main():
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of ops, with commas between")
    parser.add_argument("--quick", action="store_true", help="three rows of each op")
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--tune", action="store_true", help="write the chip's file in kernels/tuned")
    parser.add_argument("--out", type=Path, help="write JSON here")
    given = parser.parse_args()
    if given.tune and given.quick:
        parser.error("--tune needs all rows of an op, which --quick leaves out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    dtype, console, begun = torch.bfloat16, Console(width=150), time.monotonic()
    names = given.only.split(",") if given.only else [op.__name__ for op in OPS]
    if unknown := set(names) - {op.__name__ for op in OPS}:
        raise SystemExit(f"no op {', '.join(sorted(unknown))}. There are {', '.join(op.__name__ for op in OPS)}.")
    urgency = lambda row: (not row.targets, "rank" in row.label and "rank 16" not in row.label, -len(row.targets))  # noqa: E731
    each = [sorted(op(device, dtype), key=urgency)[: 3 if given.quick else None] for op in OPS if op.__name__ in names]
    rows = [row for turn in itertools.zip_longest(*each) for row in turn if row is not None]  # in turn, so that every op has its share of the minutes
    peaks = ceilings(device, dtype)
    machine = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {chips.chip(device)}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}",
        **{name: _installed(name) for name in ("torch", "triton", "peft", "bitsandbytes")}, **peaks,
    }  # fmt: skip
    console.print(f"{machine['machine']}, torch {machine['torch']}, {dtype}; a copy {peaks['bytes a second'] / 1e9:.0f} GB/s, a product {peaks['operations a second'] / 1e12:.2f} TFLOP/s")
    results, left = [], []
    configs = tiles(device, dtype) if given.tune and device.type == "cuda" else {}
    for row in rows:
        if time.monotonic() - begun > 60 * given.minutes:
            left.append(f"{row.op}, {row.label}")
            continue
        try:
            results.append(case(row, device, dtype, peaks, 5 if given.quick else 11))
        except Exception as caught:  # too little memory, say: what else there is to measure is measured
            results.append({"op": row.op, "case": row.label, "backward": row.backward, "ways": {}, "targets": [], "wrong": {"all": _first_line(caught)}, "did not run": row.missing})
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a graph keeps a pool of its own
        if given.out:  # what is measured is not lost with what comes after
            given.out.write_text(json.dumps({**machine, "rows": results}, indent=1) + "\n")
    results.sort(key=lambda result: names.index(result["op"]))
    console.print(table(results))
    console.print("up to how many rows codes were faster as they are:", crossings(results))
    for name, reason in sorted({pair for result in results for pair in result["did not run"].items()}):
        console.print(f"did not run: {name}: {reason}")
    for result in results:
        for target in result["targets"]:
            if target["reached"] is not None:
                verdict = "holds" if target["reached"] >= target["least"] else "is missed"
                console.print(f"target {verdict}: {result['op']}, {result['case']}: {target['way']} over {target['over']}: {target['reached']:.2f}, at least {target['least']:.2f}")
    wrong = [(result, name, reason) for result in results for name, reason in result["wrong"].items()]
    for result, name, reason in wrong:
        console.print(f"not timed: {result['op']}, {result['case']}: {name}: {reason}")
    if given.tune:
        console.print(f"written: {write_tuned(device, machine, results, configs).name}")
    if left:
        console.print(f"left out after {given.minutes:g} minutes: {len(left)} rows, from {left[0]} on")
    if given.out:
        given.out.write_text(json.dumps({**machine, "crossings": crossings(results), "left out": left, "configs": configs, "rows": results}, indent=1) + "\n")
    if any(not name.startswith(PEERS) for _, name, _ in wrong):
        raise SystemExit("A way of ours is wrong or failed: see above.")


if __name__ == "__main__":
    main()
