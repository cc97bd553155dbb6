"""Every op beside what it replaces: checked first, then timed, in one run; a table, and JSON with machine and versions.

    python bench/kernels.py [--only lora_linear,linear_nf4] [--quick] [--minutes 7] [--out bench/results/kernels.json]

An op's author adds a function to `OPS` that yields rows of the table (`Row`): what is computed, by which ways, the fewest bytes and operations that it
takes. Each way must be as exact as the plain ops in the same dtype (within a factor of two, against float64) before it is timed. A time is the median of
interleaved rounds; `×` is the first way's time over it (above 1 is faster than the first), and the share that of the larger of two floors, bytes over the
bandwidth of a copy and operations over the rate of a matrix product, both measured in this run.
On a GPU a way runs over several sets of inputs, together four times its L2, in one CUDA graph, so that each set is read from memory; on a CPU over two sets,
which its caches may hold: then a share may be above 100 %.
What could not run here is listed with the reason. Where the minutes are used up, the rows left out are listed too.
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
from rewrite.kernels import chips, dequant_int4, dequant_int8, dequant_mxfp4, dequant_nf4  # noqa: E402
from rewrite.kernels import dora_linear as dora_linears  # noqa: E402
from rewrite.kernels import gated_linear as gated  # noqa: E402
from rewrite.kernels import grouped_lora as grouped  # noqa: E402
from rewrite.kernels import linear_cross_entropy as head  # noqa: E402
from rewrite.kernels import linear_int4 as int4  # noqa: E402
from rewrite.kernels import linear_int8 as int8  # noqa: E402
from rewrite.kernels import linear_mxfp4 as mxfp4  # noqa: E402
from rewrite.kernels import linear_nf4 as nf4  # noqa: E402
from rewrite.kernels import lora_linear as lora  # noqa: E402
from rewrite.kernels import lora_linears as linears  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

K = 2.0  # an error may be K times that of the plain ops in the same dtype
OTHERS = ("float weight", "LoRA")  # ways to another result, which is not compared
ASKING = ("Liger",)  # ways that ask the device for a number while they run, which no CUDA graph can hold: launched one by one
CHECKED = 64  # rows of a result that are compared with float64
SHAPES = {"7B": ((4096, 4096), (11008, 4096), (4096, 11008)), "70B": ((8192, 8192), (28672, 8192), (8192, 28672)), "small": ((512, 512), (1376, 512))}
dora = dora_linears.dora_linear()
RANKS, ROWS = (8, 16, 64), (1, 4, 16, 64, 512, 4096, 16384)


@dataclass(frozen=True)
class Row:
    """`make(new)` gives ({name: Way} over fresh tensors of `new(*size)`, a function that says in float64 what the first rows of the result are).

    The way named "plain ops" sets the error that is allowed. `bytes`, `operations`: the fewest, for the floor. `backward`: each way's gradients too.
    """

    op: str
    label: str
    make: Callable
    bytes: int
    operations: int
    backward: bool = False
    missing: dict = field(default_factory=dict)  # way → why it does not run here


@dataclass(frozen=True)
class Way:
    """A function of nothing, and the tensors that a backward step asks gradients for."""

    run: Callable
    leaves: tuple = ()

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
            wide = [t.detach()[:CHECKED].double() if t is x else t.detach().double() for t in (x, w, down, up)]
            return ways, lambda: lora.reference(*wide[:2], None, *wide[2:], 2.0)

        backward, passes = m >= 512, 2 if m >= 512 else 1
        size = torch.finfo(dtype).bits // 8
        moved = size * passes * (n * k + m * (n + k) + rank * (n + k))
        yield Row("lora_linear", f"{m} × ({n} × {k}), rank {rank}", make, moved, 2 * m * (passes * n * k + (2 * passes - 1) * rank * (n + k)), backward, missing)


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
            wide = [t.detach()[:CHECKED].double() if t is x else t.detach().double() for t in (x, w, down, up, magnitude)]
            return ways, lambda: dora.reference(*wide[:2], None, *wide[2:], 2.0)

        size = torch.finfo(dtype).bits // 8
        yield Row("dora_linear", f"{m} × ({n} × {k}), rank {rank}", make, size * (3 * n * k + 2 * m * (n + k)), 2 * m * (2 * n * k + 3 * rank * (n + k)), True)


def gated_mlp(device, dtype):
    """A step of a whole gated MLP with an adapter on gate, up and down, and what it keeps for backward; frozen base."""
    shapes = ((11008, 4096), (28672, 8192)) if device.type == "cuda" else ((1376, 512),)
    both, rest = linears.lora_linears((1, 1)), gated.gated_linear("silu", 1)
    for (inner, k), m in itertools.product(shapes, (1024, 4096, 16384) if device.type == "cuda" else (128, 512)):
        def make(new, inner=inner, k=k, m=m, rank=16):
            x, wide = new(m, k), [new(inner, k) * k**-0.5, new(inner, k) * k**-0.5, new(k, inner) * inner**-0.5]
            pairs = [(new(rank, w.shape[1]) * w.shape[1] ** -0.5, new(w.shape[0], rank) * rank**-0.5) for w in wide]
            leaves = [t.requires_grad_() for t in (x, *(t for pair in pairs for t in pair))]
            gate, up, down = ((w, None, *pair, 2.0) for w, pair in zip(wide, pairs))

            def block(first, second, last):
                return Way(lambda: last(F.silu(first(x)) * second(x)), leaves)

            def peft(wide_adapters):
                theirs = [_peft_layer(*pair, w, wide_adapters) for w, pair in zip(wide, pairs)]
                way = block(*(layer for layer, _ in theirs))
                return Way(way.run, (x, *(p for _, own in theirs for p in own)))

            ways = {
                "PEFT": peft(False),
                "PEFT, adapters in float32": peft(True),
                "plain ops": block(*(lambda t, given=given: lora.reference(t, *given) for given in (gate, up, down))),
                "lora_linear each": block(*(lambda t, given=given: lora.launch(t, *given) for given in (gate, up, down))),
                "gated_linear": Way(lambda: rest.launch(*both.launch(x, *gate, *up), *down), leaves),
            }
            exact = [t.detach().double() if isinstance(t, torch.Tensor) else t for given in (gate, up, down) for t in given]
            few = x.detach()[:CHECKED].double()
            return ways, lambda: lora.reference(F.silu(lora.reference(few, *exact[:5])) * lora.reference(few, *exact[5:10]), *exact[10:])

        size = torch.finfo(dtype).bits // 8
        yield Row("gated_mlp", f"{m} × ({k}, {inner}), rank 16", make, size * (6 * inner * k + m * (2 * k + 8 * inner)), 12 * m * inner * k, True)


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
            exact = x.detach().double(), w.double(), None, *given[3:]
            return ways, lambda: head.launch(*exact)[None]

        size = torch.finfo(dtype).bits // 8
        yield Row("linear_cross_entropy", f"{m} × ({n} × {k})", make, size * (2 * n * k + 2 * m * k), 4 * m * n * k, True, missing)


def _runs_liger(device):
    return device.type == "cuda" and bool(_installed("liger_kernel", "liger-kernel"))


def _liger(x, w, b, labels, items):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Loss

    def run():
        found = Loss.apply(x, w, labels, b, None, head.IGNORED, 0.0, 0.0, "sum")
        return ((found[0] if isinstance(found, tuple) else found) / items)[None]

    return Way(run, (x,))


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
    for (n, k), _, m in sizes(device, rows=(1, 4, 16, 64), ranks=(0,)):
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
            wide = x[:CHECKED].double()
            return ways, lambda: F.linear(wide, op.dequant.launch(*codes, torch.float32).double())

        yield Row(op.name, f"{m} × ({n} × {k})", make, int(n * k * bits / 8) + torch.finfo(dtype).bits // 8 * m * (n + k), 2 * m * n * k, missing=missing)


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
                few = max(1, CHECKED // length)
                wide = [t.detach().double() for t in (y[:few], x[:few], down, up)]
                return ways, lambda: grouped.reference(*wide, slot[:few], mask[:few], 2.0)

            size = torch.finfo(dtype).bits // 8
            moved = size * (batch * length * (2 * n + k) + min(batch, adapters) * rank * (n + k))
            yield Row("grouped_lora", f"{batch} × {length} of {adapters} adapters ({n} × {k}), rank {rank}", make, moved, 2 * batch * length * rank * (n + k), length >= 512, missing)


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
                few = max(1, CHECKED // length)
                wide = [a if isinstance(a, float) else a.detach() for a in given]
                wide = [a if isinstance(a, float) else a.double() if a.is_floating_point() else a[:few] for a in wide]
                return ways, lambda: grouped.grouped_loras(4).reference(y[:few].double(), x[:few].detach().double(), *wide)

            size = torch.finfo(dtype).bits // 8
            moved = size * (batch * length * (2 * n + k) + 2 * (8 + 16 + 32 + 64) * (n + k))
            yield Row("grouped_loras", f"{batch} × {length} of ranks 8, 16, 32, 64 ({n} × {k})", make, moved, 2 * batch * length * 30 * (n + k), length >= 512, missing)


#: an op's author adds a function here
OPS = (lora_linear, dora_linear, gated_mlp, linear_cross_entropy, linear_int8, linear_int4, linear_nf4, linear_mxfp4, grouped_lora, grouped_loras)


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


def clock(functions, device, rounds):
    """Seconds of one call of each way: the median of interleaved rounds; {way: functions, one for each set of inputs}."""
    if device.type == "cuda":
        measured = {name: (launched if name in ASKING else replayed)(runs) for name, runs in functions.items()}
    else:
        measured = {name: functools.partial(_host, runs) for name, runs in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, measure in measured.items():
            times[name].append(measure() / len(functions[name]))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _host(runs):
    start = time.perf_counter()
    for run in runs:
        run()
    return time.perf_counter() - start


def replayed(runs):
    """A function that gives the seconds of one replay of all runs, captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for run in runs:
                run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
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


def case(row, device, dtype, peaks, rounds):
    """What is reported of one row, as JSON has it."""
    generator = torch.Generator(device).manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)  # noqa: E731
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = max(2, min(-(-4 * cache // row.bytes), 64))
    sets = [row.make(new) for _ in range(count)]
    ways, exact = sets[0]
    exact, found, kept = exact(), {}, {}
    with torch.no_grad():
        for name, way in ways.items():
            found[name] = error(exact, way.run()[: exact.shape[0]])
    allowed = K * found["plain ops"] + torch.finfo(dtype).eps
    for name, value in found.items():
        if name not in OTHERS and not value <= allowed:
            raise SystemExit(f"{row.op}, {row.label}: {name} is off by {value:.1e}, the plain ops by {found['plain ops']:.1e}")
    if row.backward:
        with torch.no_grad():
            grad = torch.randn_like(ways["plain ops"].run())
        functions = {name: [lambda way=sets[i][0][name]: way.step(grad) for i in range(count)] for name in ways}
        times = clock(functions, device, rounds)
        kept = {name: {"kept bytes": way.kept()} for name, way in ways.items()}
    else:
        with torch.no_grad():
            times = clock({name: [sets[i][0][name].run for i in range(count)] for name in ways}, device, rounds)
    floor = max(row.bytes / peaks["bytes a second"], row.operations / peaks["operations a second"])
    first = next(iter(times.values()))
    results = {name: {"seconds": t, "times the first": first / t, "share of the floor": floor / t, "error": found[name], **kept.get(name, {})} for name, t in times.items()}
    return {"op": row.op, "case": row.label, "backward": row.backward, "ways": results, "did not run": row.missing}


def crossings(results):
    """op → the most rows at which taking codes as they are was faster than making the weight: what `chips` is to say."""
    most = {}
    for result in results:
        named = f"{result['op']}, codes as they are"
        if named in result["ways"] and result["ways"][named]["seconds"] < result["ways"]["plain ops"]["seconds"]:
            most[result["op"]] = max(most.get(result["op"], 0), int(result["case"].split()[0]))
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
    parser.add_argument("--out", type=Path, help="write JSON here")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    dtype, console, begun = torch.bfloat16, Console(width=150), time.monotonic()
    names = given.only.split(",") if given.only else [op.__name__ for op in OPS]
    if unknown := set(names) - {op.__name__ for op in OPS}:
        raise SystemExit(f"no op {', '.join(sorted(unknown))}. There are {', '.join(op.__name__ for op in OPS)}.")
    each = [list(op(device, dtype))[: 3 if given.quick else None] for op in OPS if op.__name__ in names]
    rows = [row for turn in itertools.zip_longest(*each) for row in turn if row is not None]  # in turn, so that every op has its share of the minutes
    peaks = ceilings(device, dtype)
    machine = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, {chips.chip(device)}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}",
        **{name: _installed(name) for name in ("torch", "triton", "peft", "bitsandbytes")}, **peaks,
    }  # fmt: skip
    console.print(f"{machine['machine']}, torch {machine['torch']}, {dtype}; a copy {peaks['bytes a second'] / 1e9:.0f} GB/s, a product {peaks['operations a second'] / 1e12:.2f} TFLOP/s")
    results, left = [], []
    for row in rows:
        if time.monotonic() - begun > 60 * given.minutes:
            left.append(f"{row.op}, {row.label}")
            continue
        results.append(case(row, device, dtype, peaks, 5 if given.quick else 11))
    results.sort(key=lambda result: names.index(result["op"]))
    console.print(table(results))
    console.print("up to how many rows codes were faster as they are:", crossings(results))
    for name, reason in sorted({pair for result in results for pair in result["did not run"].items()}):
        console.print(f"did not run: {name}: {reason}")
    if left:
        console.print(f"left out after {given.minutes:g} minutes: {len(left)} rows, from {left[0]} on")
    if given.out:
        given.out.write_text(json.dumps({**machine, "crossings": crossings(results), "left out": left, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
