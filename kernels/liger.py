"""What liger-kernel has ready, an op for each: norms, rotary positions, gates. On a GPU where the library is installed its autograd functions run, elsewhere the reference.

    rms_norm(x, w, eps)                     y = w * x / r                   r = sqrt(mean(x²) + eps) and x / r in float32; x / r is rounded, then multiplied with w
    rms_norm_offset(x, w, eps, offset)      y = (w + offset) * x / r        all of it in float32, as Gemma has it
    rope(cos, sin, x, half)                 y = x * cos + (-x_2, x_1) * sin         x_1 the first `half` columns of x, x_2 the others
    ropes(cos, sin, q, half, k, half)       that of q and that of k
    swiglu(e, g)                            y = silu(e) * g
    geglu(e, g)                             y = gelu_tanh(e) * g

Shapes: x (…, K), w (K); cos and sin (B, 1, S, D) or (1, 1, S, D), q (B, H, S, D), k (B, G, S, D); e, g (…, K), y like x.
The library writes over what it is given: the positions' function over q and k, its backward over their gradients, the gates' backward over e and g. So q, k and
those gradients are copied first (4 passes over q and k, the separate ops have about 10); e and g are not, autograd is told instead, which then refuses a second
backward of one forward, and `unfit` declines where something else reads them. The norm's backward is asked not to write over anything.
Of cos and sin the library reads the first half of the columns: `unfit` declines where the second is not seen to be the same.
Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989.
"""

import functools
import importlib

import torch
from torch.nn import functional as F

from rewrite.kernels.op import Op

_aten = torch.ops.aten
#: what gives each column of its result from that column of its first argument
BY_COLUMN = {
    _aten.cos.default, _aten.sin.default, _aten.mul.Tensor, _aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten.type_as.default,
    _aten.unsqueeze.default, _aten.expand.default, _aten.contiguous.default, _aten.clone.default,
}  # fmt: skip


@functools.cache
def library():
    """liger_kernel.ops, or None."""
    try:
        return importlib.import_module("liger_kernel.ops")
    except ImportError:
        return None


def missing():
    """Why the references run here, or None."""
    if library() is None:
        return "liger-kernel is not installed, or does not load"
    return None if torch.cuda.is_available() else "there is no GPU"


def runs(*tensors):
    """Does the library take these? Where dtypes differ, PyTorch would widen."""
    first = tensors[0]
    if torch.compiler.is_compiling() or not first.is_cuda or first.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not first.numel():
        return False
    return all(t.dtype == first.dtype for t in tensors) and library() is not None


class _Everywhere(Op):
    """An op found in the model's own nodes too. `sign`: the target of a node that each occurrence has."""

    everywhere = True

    def __init__(self, name, reference, launch, sign):
        launch.__qualname__ = f"{name}.launch"  # where it is found
        super().__init__(reference, launch, name=name)
        self.sign = sign


def _again(reference):
    """The rule of a registered op, by what its reference says."""

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*(a for a in inputs if isinstance(a, torch.Tensor)))
        ctx.rest = tuple(None if isinstance(a, torch.Tensor) else (a,) for a in inputs)

    def backward(ctx, *grads):
        tensors = iter(ctx.saved_tensors)
        given = [next(tensors).detach().requires_grad_(needed) if a is None else a[0] for a, needed in zip(ctx.rest, ctx.needs_input_grad)]
        wanted = [a for a, needed in zip(given, ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(reference(*given), wanted, grads))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

    return keep, backward


# ---- norms ---------------------------------------------------------------------------------------------------------------


def normed(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    h = x.to(torch.float32)
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def launch_norm(x, w, eps):
    return library().LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False) if runs(x, w) else normed(x, w, eps)


def normed_offset(x: torch.Tensor, w: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    h = x.to(torch.float32)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * (w.to(torch.float32) + offset)).type_as(x)


def launch_offset(x, w, eps, offset):
    return library().LigerRMSNormFunction.apply(x, w, eps, offset, "gemma", False) if runs(x, w) else normed_offset(x, w, eps, offset)


def norm_unfit(occurrence):
    """Why the library's norm is another one, or None."""
    x, w = (a.meta["val"] for a in occurrence.args[:2])
    return None if w.dim() == 1 and w.shape[0] == x.shape[-1] else "its weight is not one number for each column"


rms_norm = _Everywhere("rms_norm", normed, launch_norm, _aten.rsqrt.default).differentiates(*_again(normed))
rms_norm_offset = _Everywhere("rms_norm_offset", normed_offset, launch_offset, _aten.rsqrt.default).differentiates(*_again(normed_offset))
rms_norm.unfit = rms_norm_offset.unfit = norm_unfit


# ---- rotary positions ----------------------------------------------------------------------------------------------------


def rotated(cos: torch.Tensor, sin: torch.Tensor, x: torch.Tensor, half: int) -> torch.Tensor:
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def rotated_both(cos: torch.Tensor, sin: torch.Tensor, q: torch.Tensor, half: int, k: torch.Tensor, half_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rotated(cos, sin, q, half), rotated(cos, sin, k, half_k)


@functools.cache
def _rope(function):
    """The library's function over gradients of its own."""

    class Rope(function):
        @staticmethod
        def backward(ctx, dq, dk):
            return function.backward(ctx, dq.clone(), dk.clone())

    return Rope


def launch_ropes(cos, sin, q, half, k, half_k):
    if runs(q, k, cos, sin) and {half, half_k} == {q.shape[-1] / 2} and q.shape[-1] == k.shape[-1] and cos.shape == sin.shape and cos.shape in [(b, 1, *q.shape[2:]) for b in (1, len(q))]:
        return _rope(library().LigerRopeFunction).apply(q.clone(), k.clone(), cos, sin)
    return rotated_both(cos, sin, q, half, k, half_k)


def rope_unfit(occurrence):
    """Why the library's cos and sin are others, or None: followed to where they are put together, their columns are twice the same."""
    for name, node in zip(("cos", "sin"), occurrence.args):
        while node.op == "call_function" and node.target in BY_COLUMN:
            if node.target is _aten.mul.Tensor and isinstance(node.args[1], torch.fx.Node):
                break
            node = node.args[0]
        if node.target is not _aten.cat.default or len(node.args[0]) != 2 or node.args[0][0] is not node.args[0][1] or node.args[1:] not in ((-1,), (node.meta["val"].dim() - 1,)):
            return f"the two halves of its {name} are not seen to be the same: %{node.name}"
    return None


rope = _Everywhere("rope", rotated, rotated, _aten.neg.default).differentiates(*_again(rotated))
rope.unfit, rope.shared = rope_unfit, 2  # one alone stays the reference: the library takes two
ropes = _Everywhere("ropes", rotated_both, launch_ropes, _aten.neg.default).differentiates(*_again(rotated_both))


# ---- gates ---------------------------------------------------------------------------------------------------------------


def gated(e: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return F.silu(e) * g


def gated_by_gelu(e: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return F.gelu(e, approximate="tanh") * g


@functools.cache
def _gate(function):
    """The library's function, which tells autograd that its backward has written over what it kept."""

    class Gate(function):
        @staticmethod
        def backward(ctx, grad):
            found = function.backward(ctx, grad)
            for kept in ctx.saved_tensors:
                torch.autograd.graph.increment_version(kept)
            return found

    return Gate


def launch_swiglu(e, g):
    return _gate(library().LigerSiLUMulFunction).apply(e, g) if runs(e, g) and e.shape == g.shape else gated(e, g)


def launch_geglu(e, g):
    return _gate(library().LigerGELUMulFunction).apply(e, g) if runs(e, g) and e.shape == g.shape else gated_by_gelu(e, g)


def gate_unfit(occurrence):
    """Why e and g may not be written over, or None."""
    inside = {occurrence.root, *occurrence.inner}
    for node in occurrence.args:
        other = next((user for user in node.users if user not in inside), None)
        if other is not None:
            return f"%{node.name} is read by %{other.name} too, and the library's backward writes over it"
        while node.op == "call_function" and node.target in (_aten.view.default, _aten.reshape.default, _aten.transpose.int, _aten.slice.Tensor):
            node = node.args[0]
        if node.op in ("placeholder", "get_attr"):
            return f"%{node.name} is not made by an op, and the library's backward writes over it"
    return None


swiglu = _Everywhere("swiglu", gated, launch_swiglu, _aten.silu.default).differentiates(*_again(gated))
geglu = _Everywhere("geglu", gated_by_gelu, launch_geglu, _aten.gelu.default).differentiates(*_again(gated_by_gelu))
swiglu.unfit = geglu.unfit = gate_unfit
