"""Reshaping, expanding and writing into slices, with sizes by expression: what several translators share."""

from ..graph import expression
from .sizes import INT64, LAST


def sizes_of(value):
    """The shape of a fake value as ints and expressions."""
    return tuple(expression(size) for size in value.shape)


def reshape(writer, x, before, after):
    """`x`, whose fake value is `before`, in the shape of the fake value `after`.

    An unchanged size is written 0 and one unknown size -1, so that most targets are constants.
    """
    source, target = sizes_of(before), sizes_of(after)
    if source == target:
        return x
    sizes = [0 if not isinstance(size, int) and i < len(source) and source[i] == size else size for i, size in enumerate(target)]
    unknown = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
    if len(unknown) == 1 and 0 not in target and not any(_may_be_zero(size) for size in source):
        sizes[unknown[0]] = -1
    if 0 in target:  # an empty tensor: 0 would copy a size
        sizes = list(target)
        return writer.op("Reshape", x, writer.sizes.vector(sizes), allowzero=1, dtype=x.dtype)
    return writer.op("Reshape", x, writer.sizes.vector(sizes), dtype=x.dtype)


def _may_be_zero(size):
    return not isinstance(size, int) and not size.is_positive


def expand(writer, x, before, after):
    """`x` broadcast to the shape of the fake value `after`."""
    if sizes_of(before) == sizes_of(after):
        return x
    return writer.op("Expand", x, writer.sizes.vector(sizes_of(after)), dtype=x.dtype)


def expand_to(writer, x, before, sizes):
    """`x` broadcast to sizes (ints and expressions)."""
    if sizes_of(before) == tuple(sizes):
        return x
    return writer.op("Expand", x, writer.sizes.vector(sizes), dtype=x.dtype)


def broadcast(*shapes):
    """The common shape of several, as ints and expressions."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded))


def index(writer, given):
    """A start or stop of a slice as an INT64 tensor of shape (1,)."""
    given = LAST if given is None else given
    return writer.op("Reshape", given, [-1], dtype=INT64) if hasattr(given, "producer") else writer.sizes.one(given)


def scatter_slice(writer, x, value, like, axis, start, stop, step):
    """`x` (fake value `like`) with `x[..., start:stop:step, ...]` along an axis replaced by `value`."""
    size = sizes_of(like)[axis]
    every = writer.op("Range", 0, writer.value(size), 1, dtype=INT64)
    rows = writer.op("Slice", every, index(writer, start), index(writer, stop), [0], [step], dtype=INT64)
    rank = len(sizes_of(like))
    if axis:  # ScatterND writes along the first dimensions
        order = [axis, *(i for i in range(rank) if i != axis)]
        x, value = (writer.op("Transpose", t, perm=order, dtype=t.dtype) for t in (x, value))
    rows = writer.op("Unsqueeze", rows, [1], dtype=INT64)
    out = writer.op("ScatterND", x, rows, value, dtype=x.dtype)
    return writer.op("Transpose", out, perm=[order.index(i) for i in range(rank)], dtype=out.dtype) if axis else out
