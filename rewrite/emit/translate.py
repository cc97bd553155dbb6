"""The own table, first half: shapes, indexing, layers and attention. The second half is arithmetic.py.

A translator takes (writer, fx node, *arguments of the op, **keyword arguments), arguments being ONNX values, size expressions or plain
Python, and returns the value(s); NotImplemented sends the node on to torchlib.
"""

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from ..graph import expression
from . import shapes
from .building import onnx_dtype
from .mutation import permutation, short_name
from .shapes import sizes_of
from .sizes import INT64
from .writer import Untranslatable, fake, own

BOOL = ir.DataType.BOOL


def of(node, position, name):
    """An argument of a node as the graph has it, whether it was given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


# the same values, another shape


@own("alias", "clone", "contiguous", "detach", "lift", "lift_fresh", "lift_fresh_copy", "positive", "resolve_conj", "resolve_neg")
def same(w, node, x, *args, **kwargs):
    return x


@own("dropout", "feature_dropout", "alpha_dropout", "native_dropout")
def dropout(w, node, x, p, train):
    if train and p:
        raise Untranslatable("dropout that is always on draws random numbers")
    return x if isinstance(fake(node), torch.Tensor) else NotImplemented


@own("to", "_to_copy", "type_as", "_autocast_to_reduced_precision", "_autocast_to_full_precision")
def to(w, node, x, *args, **kwargs):
    return w.cast(x, onnx_dtype(fake(node).dtype))


@own("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "squeeze")
def view(w, node, x, *args):
    if args and isinstance(args[0], torch.dtype):
        return NotImplemented
    return shapes.reshape(w, x, fake(node.args[0]), fake(node))


@own("unsqueeze")
def unsqueeze(w, node, x, dim):
    return w.op("Unsqueeze", x, [dim % fake(node).ndim], dtype=x.dtype)


@own("expand", "expand_as", "broadcast_to")
def expand(w, node, x, *args, **kwargs):
    return shapes.expand(w, x, fake(node.args[0]), fake(node))


@own("transpose", "permute", "t", "numpy_T", "swapaxes", "mT")
def transpose(w, node, x, *args):
    if short_name(node.target).rstrip("_") not in ("transpose", "permute", "t", "numpy_T", "swapaxes", "mT"):
        return NotImplemented
    order = permutation(node)
    return x if order == list(range(len(order))) else w.op("Transpose", x, perm=order, dtype=x.dtype)


@own("repeat")
def repeat(w, node, x, repeats):
    rank = fake(node.args[0]).ndim
    if len(repeats) > rank:
        x = w.op("Unsqueeze", x, list(range(len(repeats) - rank)), dtype=x.dtype)
    return w.op("Tile", x, w.sizes.vector(repeats), dtype=x.dtype)


@own("cat", "concat", "concatenate")
def cat(w, node, xs, dim=0):
    parts = [w.cast(x, onnx_dtype(fake(node).dtype)) for x, given in zip(xs, node.args[0]) if tuple(fake(given).shape) != (0,)]
    return parts[0] if len(parts) == 1 else w.op("Concat", *parts, axis=dim % fake(node).ndim, dtype=parts[0].dtype)


@own("stack")
def stack(w, node, xs, dim=0):
    dim, dtype = dim % fake(node).ndim, onnx_dtype(fake(node).dtype)
    return w.op("Concat", *(w.op("Unsqueeze", w.cast(x, dtype), [dim], dtype=dtype) for x in xs), axis=dim, dtype=dtype)


@own("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split")
def split(w, node, x, sizes, dim=0):
    parts, dim = fake(node), dim % fake(node)[0].ndim
    if len(parts) == 1:
        return [x]
    return w.op("Split", x, w.sizes.vector([expression(part.shape[dim]) for part in parts]), n=len(parts), axis=dim, dtype=x.dtype)


@own("unbind")
def unbind(w, node, x, dim=0):
    dim = dim % (fake(node)[0].ndim + 1)
    return [w.op("Gather", x, i, axis=dim, dtype=x.dtype) for i in range(len(fake(node)))]


# parts of a tensor


@own("slice")
def slice_(w, node, x, dim=0, start=None, end=None, step=1):
    if sizes_of(fake(node)) == sizes_of(fake(node.args[0])) and step == 1:
        return x
    return w.op("Slice", x, shapes.index(w, 0 if start is None else start), shapes.index(w, end), [dim % fake(node).ndim], [step], dtype=x.dtype)


@own("narrow")
def narrow(w, node, x, dim, start, length):
    if isinstance(start, ir.Value):
        return NotImplemented
    return w.op("Slice", x, w.sizes.one(start), w.sizes.one(start + length), [dim % fake(node).ndim], [1], dtype=x.dtype)


@own("select")
def select(w, node, x, dim, index):
    return w.op("Gather", x, index, axis=dim % fake(node.args[0]).ndim, dtype=x.dtype)


@own("slice_scatter")
def slice_scatter(w, node, x, source, dim=0, start=None, end=None, step=1):
    return shapes.scatter_slice(w, x, source, fake(node), dim % fake(node).ndim, 0 if start is None else start, end, step)


@own("select_scatter")
def select_scatter(w, node, x, source, dim, index):
    dim = dim % fake(node).ndim
    source = w.op("Unsqueeze", source, [dim], dtype=source.dtype)
    return shapes.scatter_slice(w, x, source, fake(node), dim, index, index + 1 if index != -1 else None, 1)


@own("copy")
def copy(w, node, x, source, *args):
    return shapes.expand(w, w.cast(source, x.dtype), fake(node.args[1]), fake(node))


@own("embedding")
def embedding(w, node, weight, ids, *args, **kwargs):
    return w.op("Gather", weight, ids, dtype=weight.dtype)


@own("index_select")
def index_select(w, node, x, dim, index):
    return w.op("Gather", x, index, axis=dim % fake(node).ndim, dtype=x.dtype)


@own("gather")
def gather(w, node, x, dim, index, *args, **kwargs):
    return w.op("GatherElements", x, index, axis=dim % fake(node).ndim, dtype=x.dtype)


@own("scatter", "scatter_add")
def scatter(w, node, x, dim, index, source, **kwargs):
    if kwargs:
        return NotImplemented
    if not isinstance(source, ir.Value):
        source = shapes.expand_to(w, w.value(source, x.dtype), torch.empty(()), sizes_of(fake(node.args[2])))
    elif sizes_of(fake(node.args[3])) != sizes_of(fake(node.args[2])):
        return NotImplemented
    reduction = "add" if short_name(node.target).startswith("scatter_add") else None
    return w.op("ScatterElements", x, index, w.cast(source, x.dtype), axis=dim % fake(node).ndim, reduction=reduction, dtype=x.dtype)


def _positions(w, given, indices):
    """Index tensors (fx nodes and values) broadcast together and stacked: INT64, (…, number of indices); and their common shape."""
    common = shapes.broadcast(*(sizes_of(fake(node)) for node in given))
    parts = [shapes.expand_to(w, w.cast(value, INT64), fake(node), common) for node, value in zip(given, indices)]
    return w.op("Concat", *(w.op("Unsqueeze", part, [-1], dtype=INT64) for part in parts), axis=-1, dtype=INT64), common


@own("index", "_unsafe_index")
def index(w, node, x, indices):
    given = [(i, item) for i, item in enumerate(node.args[1]) if item is not None]
    if any(fake(item).dtype in (torch.bool, torch.uint8) for _, item in given):
        return NotImplemented
    axes, rank = [i for i, _ in given], fake(node.args[0]).ndim
    if len(axes) == 1:
        return w.op("Gather", x, indices[axes[0]], axis=axes[0], dtype=x.dtype)
    if axes != list(range(len(axes))):
        if axes != list(range(axes[0], axes[0] + len(axes))):
            return NotImplemented
        x = w.op("Transpose", x, perm=[*axes, *(i for i in range(rank) if i not in axes)], dtype=x.dtype)
    where, common = _positions(w, [item for _, item in given], [indices[i] for i in axes])
    out = w.op("GatherND", x, where, dtype=x.dtype)
    if axes[0] == 0:
        return out
    k = len(common)  # (indexed, before, after) -> (before, indexed, after)
    return w.op("Transpose", out, perm=[*range(k, k + axes[0]), *range(k), *range(k + axes[0], fake(node).ndim)], dtype=x.dtype)


@own("index_put", "_unsafe_index_put")
def index_put(w, node, x, indices, values, accumulate=False):
    given = list(node.args[1])
    if any(item is None or fake(item).dtype in (torch.bool, torch.uint8) for item in given):
        return NotImplemented
    where, common = _positions(w, given, indices)
    values = shapes.expand_to(w, w.cast(values, x.dtype), fake(node.args[2]), (*common, *sizes_of(fake(node))[len(given) :]))
    return w.op("ScatterND", x, where, values, reduction="add" if accumulate else None, dtype=x.dtype)


# layers


@own("linear")
def linear(w, node, x, weight, bias=None):
    if fake(node.args[1]).ndim != 2:
        return NotImplemented
    y = w.op("MatMul", x, w.transposed(weight), dtype=x.dtype)
    return y if bias is None else w.op("Add", y, bias, dtype=x.dtype)


@own("addmm")
def addmm(w, node, bias, x, weight, beta=1, alpha=1):
    return w.op("Gemm", x, weight, bias, alpha=float(alpha), beta=float(beta), dtype=x.dtype)


@own("matmul", "bmm", "mm", "mv")
def matmul(w, node, x, y):
    return w.op("MatMul", x, y, dtype=x.dtype)


@own("baddbmm")
def baddbmm(w, node, x, a, b, beta=1, alpha=1):
    product = w.op("MatMul", a, b, dtype=x.dtype)
    if alpha != 1:
        product = w.op("Mul", product, w.value(float(alpha), x.dtype), dtype=x.dtype)
    if beta == 0:
        return product
    x = x if beta == 1 else w.op("Mul", x, w.value(float(beta), x.dtype), dtype=x.dtype)
    return w.op("Add", x, product, dtype=x.dtype)


@own("conv1d", "conv2d", "conv3d")
def conv(w, node, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    rank = fake(node.args[1]).ndim - 2
    if fake(node.args[0]).ndim != rank + 2:
        return NotImplemented
    many = lambda given: list(given) * (rank // len(given)) if isinstance(given, (list, tuple)) else [given] * rank
    dilation, kernel = many(dilation), sizes_of(fake(node.args[1]))[2:]
    if isinstance(padding, str):
        total = [0 if padding == "valid" else d * (k - 1) for d, k in zip(dilation, kernel)]
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = after = many(padding)
    options = dict(strides=many(stride), pads=[*before, *after], dilations=dilation, group=groups, kernel_shape=list(kernel))
    return w.op("Conv", x, weight, bias, **options, dtype=x.dtype)


def _ones(w, sizes, dtype):
    name = f"ones_{'x'.join(map(str, sizes))}_{onnx_dtype(dtype).name.lower()}"
    return w.initializer(name, tensor_adapters.TorchTensor(torch.ones(sizes, dtype=dtype)))


@own("layer_norm")
def layer_norm(w, node, x, sizes, weight=None, bias=None, eps=1e-5, *args):
    weight = _ones(w, sizes, fake(node).dtype) if weight is None else weight
    return w.op("LayerNormalization", x, weight, bias, axis=-len(sizes), epsilon=eps, dtype=x.dtype)


@own("rms_norm")
def rms_norm(w, node, x, sizes, weight=None, eps=None):
    weight = _ones(w, sizes, fake(node).dtype) if weight is None else weight
    eps = torch.finfo(fake(node).dtype).eps if eps is None else eps
    return w.op("RMSNormalization", x, weight, axis=-len(sizes), epsilon=eps, dtype=x.dtype)


@own("batch_norm")
def batch_norm(w, node, x, weight, bias, mean, var, training, momentum, eps, *args):
    if training:
        return NotImplemented
    channels = [sizes_of(fake(node))[1]]
    weight = _ones(w, channels, fake(node).dtype) if weight is None else weight
    bias = w.op("Sub", weight, weight, dtype=x.dtype) if bias is None else bias
    return w.op("BatchNormalization", x, weight, bias, mean, var, epsilon=eps, dtype=x.dtype)


@own("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def adaptive_avg_pool(w, node, x, size):
    return w.op("GlobalAveragePool", x, dtype=x.dtype) if set(size) == {1} else NotImplemented


@own("scaled_dot_product_attention")
def attention(w, node, q, k, v, mask=None, p=0.0, causal=False, scale=None, enable_gqa=False):
    if p:
        raise Untranslatable("attention with dropout that is always on draws random numbers")
    if fake(node).ndim != 4:
        return NotImplemented
    if mask is not None:
        mask = _mask(w, node, mask, q.dtype)
    return w.op("Attention", q, k, v, mask, is_causal=int(causal), scale=scale, dtype=q.dtype)


def _mask(w, node, mask, dtype):
    """The mask as ONNX Runtime reads it.

    Its Attention broadcasts batch and heads alone, so the last two dimensions are expanded. It takes the most negative number for
    -inf, where torch averages a row that has nothing else (a padded one): half of that number means the same in both.
    """
    given = fake(of(node, 3, "attn_mask"))
    wanted = tuple(expression(fake(node.args[i]).shape[-2]) for i in (0, 1))
    if mask.dtype != BOOL:
        mask = w.cast(mask, dtype)
        lowest = torch.finfo(fake(node.args[0]).dtype).min
        is_lowest = w.op("Equal", mask, w.value(lowest, dtype), dtype=BOOL)
        mask = w.op("Where", is_lowest, w.value(lowest / 2, dtype), mask, dtype=dtype)
    if sizes_of(given)[-2:] != wanted:
        mask = w.op("Expand", mask, w.sizes.vector([1] * (given.ndim - 2) + list(wanted)), dtype=mask.dtype)
    return mask


@own("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_mm(w, node, x, weight, offsets=None, *args, **kwargs):
    """Rows sorted by expert against a stack of weights, (S, in) × (E, in, out): one slice of rows and one product per expert."""
    if fake(node.args[0]).ndim != 2 or fake(node.args[1]).ndim != 3 or offsets is None or any(item is not None for item in args):
        return NotImplemented
    experts = sizes_of(fake(node.args[1]))[0]
    offsets, start, parts = w.cast(offsets, INT64), w.value([0]), []
    ends = w.op("Split", offsets, n=experts, axis=0, num_outputs=experts, dtype=INT64) if experts > 1 else [offsets]
    for i, end in enumerate(ends):
        rows = w.op("Slice", x, start, end, [0], [1], dtype=x.dtype)
        parts.append(w.op("MatMul", rows, w.op("Gather", weight, i, axis=0, dtype=x.dtype), dtype=x.dtype))
        start = end
    return w.op("Concat", *parts, axis=0, dtype=x.dtype)
