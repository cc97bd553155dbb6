"""The family of lora_linears: against its references in float64, gradients, what backward keeps, the registered ops.

Errors are measured as in test_kernels.py: K times that of the plain ops in the same dtype, plus one rounding of it.
"""

import functools
import importlib
import itertools

import pytest
import torch
from interpreted import error
from rewrite.kernels.lora_linear import lora_linear
from rewrite.kernels.lora_linears import lora_linears
from test_kernels import allowed
from torch.utils._python_dispatch import TorchDispatchMode

CASES = {  # adapters of each linear, format, lead and width of x, dtype, how x lies
    "three": ((1, 1, 1), None, (7, 19), "float32", "rows"),
    "three, bf16": ((1, 1, 1), None, (2, 5, 64), "bfloat16", "rows"),
    "two on one, fp16": ((2,), None, (5, 33), "float16", "rows"),
    "strided": ((1, 2), None, (9, 21), "float32", "columns"),
    "no rows": ((1, 1), None, (0, 8), "float32", "rows"),
    "nf4": ((1,), "nf4", (6, 64), "float32", "rows"),
    "nf4, bf16, two": ((1, 1), "nf4", (3, 4, 64), "bfloat16", "columns"),
    "int8": ((1, 1, 1), "int8", (4, 33), "float32", "rows"),
    "int4": ((2, 1), "int4", (4, 128), "float32", "rows"),
    "no rows of codes": ((1,), "int8", (0, 16), "bfloat16", "rows"),
}
RANKS, OUTS, SCALES = (3, 1, 5, 2), (13, 7, 10), (0.75, 1.5, -0.5, 2.0)


@functools.cache
def made(name):
    """(op, arguments, gradients of its results): in float64, to be cast."""
    counts, form, shape, _, lies = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    new = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    op, width, number = lora_linears(counts, form), shape[-1], itertools.count()
    arguments, grads = [new(*shape[:-2], shape[-1], shape[-2]).mT if lies == "columns" else new(*shape)], []
    for i, count in enumerate(counts):
        w = new(OUTS[i], width) * width**-0.5
        if form is None:
            arguments.append(w)
        else:
            arguments += importlib.import_module(f"rewrite.kernels.dequant_{form}").quantize(w.float())
            arguments += [] if form == "int8" else [[OUTS[i], width]]
        arguments.append(new(OUTS[i]) if i != 1 else None)
        for _ in range(count):
            rank, scale = RANKS[at := next(number)], SCALES[at]
            arguments += [new(rank, width) * width**-0.5, new(OUTS[i], rank), scale]
        grads.append(new(*shape[:-1], OUTS[i]))
    return op, arguments, grads


def cast(values, dtype):
    return [v.detach().to(dtype, copy=True) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]


def run(function, arguments, grads, dtype):
    """Results and gradients."""
    given = [a.detach().clone(memory_format=torch.preserve_format).requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in cast(arguments, dtype)]
    found = function(*given)
    found = list(found) if isinstance(found, (tuple, list)) else [found]
    torch.autograd.backward(found, cast(grads, dtype))
    return [y.detach() for y in found] + [a.grad for a in given if isinstance(a, torch.Tensor) and a.requires_grad]


@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_the_plain_ops(name):
    op, arguments, grads = made(name)
    dtype = getattr(torch, CASES[name][3])
    exact = run(op.reference, arguments, grads, torch.float64)
    plain, ours, registered = (run(f, arguments, grads, dtype) for f in (op.reference, op.launch, op))
    assert len(exact) == len(ours) == len(registered)
    for reference, usual, one, two in zip(exact, plain, ours, registered):
        limit = allowed(error(reference, usual), CASES[name][3])
        assert one.shape == two.shape == reference.shape
        assert error(reference, one) <= limit and error(reference, two) <= limit
    if exact[0].numel():
        broken = run(op.launch, [0.9 * a if isinstance(a, float) else a for a in arguments], grads, dtype)
        limits = [allowed(error(a, b), CASES[name][3]) for a, b in zip(exact, plain)]
        assert all(error(exact[i], broken[i]) > limits[i] for i in (*range(len(grads)), -1, -2))  # results, and gradients of the last adapter


@pytest.mark.parametrize("name", ["three", "strided", "nf4"])
def test_gradients(name):
    op, arguments, _ = made(name)
    given = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in cast(arguments, torch.float64)]
    for function in (op.reference, op.launch, op):
        assert torch.autograd.gradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("name", ["three", "two on one, fp16", "nf4"])
def test_registered_ops_are_whole(name):
    op, arguments, _ = made(name)
    given = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in cast(arguments, torch.float32)]
    torch.library.opcheck(op.overload, tuple(given))


@pytest.mark.parametrize("name", ["three", "nf4"])
def test_backward_keeps_x_and_what_it_shrinks_to(name):
    op, arguments, _ = made(name)
    counts, form, shape, *_ = CASES[name]
    given = cast(arguments, torch.float32)
    trained = [i for i, a in enumerate(given) if isinstance(a, torch.Tensor) and a.is_floating_point() and i + 1 < len(given) and (isinstance(given[i + 1], float) or isinstance(given[min(i + 2, len(given) - 1)], float))]
    given = [a.requires_grad_() if i in (0, *trained) else a for i, a in enumerate(given)]
    own, kept = {a.untyped_storage().data_ptr() for a in given if isinstance(a, torch.Tensor)}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    def entries(function):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function(*given)
        return sum(kept.values()), y

    rank, (ours, _), (plain, _) = sum(RANKS[: sum(counts)]), entries(op.launch), entries(op.reference)
    rows = shape[0]
    assert ours == rows * rank + (rank * shape[-1] if len(counts) > 1 else 0)  # the shrunk rows; all `down` as one matrix
    assert form is None or plain >= ours + OUTS[0] * shape[-1]  # the plain ops keep the weight as numbers


def test_a_result_that_nobody_reads_costs_nothing():
    op, arguments, grads = made("three")
    given = [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in cast(arguments, torch.float32)]
    op.launch(*given)[1].backward(grads[1].float())
    assert given[6].grad is not None and given[1].grad is None


class Launches(TorchDispatchMode):
    """How many ops are run that are no views."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not op.is_view and op.__name__.split(".")[0] not in ("_unsafe_view", "detach")
        return op(*args, **(kwargs or {}))


def test_launches_of_three_linears():
    op, arguments, grads = made("three")
    given = cast(arguments, torch.float32)
    given = [a if a is None or isinstance(a, float) else a.requires_grad_(i == 0 or i % 5 in (3, 4)) for i, a in enumerate(given)]
    trained = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
    each = lambda function: lambda x, *rest: [function(x, *rest[i : i + 5]) for i in (0, 5, 10)]  # noqa: E731
    counts, grads = [], cast(grads, torch.float32)
    for function in (each(lora_linear.reference), each(lora_linear.launch), op.launch):
        with Launches() as forward:
            found = function(*given)
        with Launches() as backward:
            torch.autograd.grad(found, trained, grads)
        counts.append((forward.count, backward.count))
    assert counts == [(15, 23), (9, 26), (8, 21)]  # as the file says of itself


def test_autocast():
    for name in ("three", "nf4"):
        op, arguments, grads = made(name)

        def under(function):
            def call(*given):
                with torch.autocast("cpu", torch.bfloat16):
                    found = function(*given)
                return [y.float() for y in (found if isinstance(found, tuple) else (found,))]

            return run(call, arguments, grads, torch.float32)  # noqa: B023

        exact, plain, ours = run(op.reference, arguments, grads, torch.float64), under(op.reference), under(op.launch)
        for reference, usual, result in zip(exact, plain, ours):
            assert result.dtype == torch.float32 and error(reference, result) <= allowed(error(reference, usual), "bfloat16")


@pytest.mark.parametrize("name", ["three, bf16", "two on one, fp16", "strided", "nf4"])
def test_what_a_compiler_is_given_is_as_exact(name):
    op, arguments, grads = made(name)
    dtype, exact = getattr(torch, CASES[name][3]), run(op.reference, arguments, grads, torch.float64)
    compiled = torch.compile(op.launch, backend="eager", fullgraph=True)
    plain, ours = run(op.reference, arguments, grads, dtype), run(compiled, arguments, grads, dtype)
    limits = [allowed(error(reference, usual), CASES[name][3]) for reference, usual in zip(exact, plain)]
    assert all(error(reference, one) <= limit for reference, one, limit in zip(exact, ours, limits))
    broken = run(compiled, [0.9 * a if isinstance(a, float) else a for a in arguments], grads, dtype)
    assert all(error(exact[i], broken[i]) > limits[i] for i in (*range(len(grads)), -1, -2))


def test_compiles_as_one_node():
    op, arguments, grads = made("nf4")
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    found = torch.compile(op.overload, backend=backend, fullgraph=True)(*cast(arguments, torch.float32))
    assert op.overload in seen and error(op.reference(*cast(arguments, torch.float64)), found) < 1e-5


def test_a_compiler_keeps_what_is_shrunk_and_no_float_copy_of_codes():
    op, arguments, grads = made("nf4")
    n, k, rank, m = OUTS[0], 64, RANKS[0], 6

    def kept(function):
        torch._dynamo.reset()
        given, found = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in cast(arguments, torch.float32)], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(tuple(t.shape)) or t, lambda t: t):
            torch.compile(function, backend="aot_eager_decomp_partition")(*given).backward(grads[0].float())
        return found

    plain, ours = kept(op.reference), kept(op.launch)
    assert any(set(shape) == {n, k} for shape in plain) and not any(set(shape) == {n, k} for shape in ours)
    assert (m, rank) in ours
