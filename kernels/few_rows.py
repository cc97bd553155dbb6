"""Few rows times a weight in codes: each code is read once, made into a number in registers, and never written.

    out[m, n] = sum over groups of scale[n, group] * (sum over k of x[m, k] * number(codes[n, k])) + b[n]

Shapes: x (M, K), codes of N × K entries, row by row, as the format's `dequant_*` has them, scales (N, groups) float32 by their bits (mxfp4: exponents), b (N) or None.
Bytes: those of the codes and scales, once, where making the weight first reads them, writes 2 a weight and reads these again. With so few rows memory
is all that counts; where tiles of N are fewer than the chip has room for, a tile's K is split into parts that a second launch adds up, in order.
Numbers of a group are multiplied as they are and scaled afterwards, in float32: codes of whole numbers, e4m3 and e2m1 are exact in bfloat16.
"""

import functools

import torch
import triton
import triton.language as tl

from rewrite.kernels import chips
from rewrite.kernels.dequant_mxfp4 import number as e2m1
from rewrite.kernels.dequant_mxfp4 import power
from rewrite.kernels.rounding import by_hand, rounded

#: with four stages, those of a table spill two registers on sm_90
CONFIG = {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
#: the most rows of x that a tile takes, and the most entries of K, which the groups that have a scale each bound too; more spill in float32
MOST = {2: (64, 128), 4: (16, 32)}  # by the bytes of an entry of x
PROGRAMS = 4  # for each multiprocessor before K is left whole


@triton.jit
def few_rows(
    X, CODES, SCALES, EXTRA, TABLE, LEVELS, BIAS, OUT, M, N, K, x_m, bytes_each, group, groups, steps,
    FORMAT: tl.constexpr, DOUBLE: tl.constexpr, TALL: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_BIAS: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """OUT (parts, M, N): part p has the steps p * steps … of BLOCK_K entries each. EXTRA: zeros (int4) or nested scales (table, where DOUBLE)."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    inside, known = column < N, row[:, None] < M
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(part * steps, tl.minimum((part + 1) * steps, tl.cdiv(K, BLOCK_K))):
        start = step * BLOCK_K
        at = column // TALL * groups + start // group
        scale = tl.load(SCALES + at, mask=inside, other=0)
        if FORMAT == "mxfp4":
            scale = power(scale.to(tl.int32))
        if DOUBLE:
            scale = tl.load(LEVELS + scale.to(tl.int32)) * tl.load(EXTRA + at // 256, mask=inside, other=0.0) + tl.load(EXTRA + (N * groups + 255) // 256)
        if FORMAT == "int8" or FORMAT == "fp8":
            k = start + tl.arange(0, BLOCK_K)
            code = tl.load(CODES + column[None, :] * bytes_each + k[:, None], mask=(k[:, None] < K) & inside[None, :], other=0)
            x = tl.load(X + row[:, None] * x_m + k[None, :], mask=known & (k[None, :] < K), other=0.0)
            if FORMAT == "int8":
                number = code.to(tl.float32)
            else:  # the exponent of half precision is eight more: its subnormal numbers are those of e4m3, shifted
                bits = code.to(tl.int32)
                number = ((bits & 127) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
                number = tl.where((bits & 127) == 127, float("nan"), number)
                number = tl.where(bits > 127, -number, number)
            if BY_HAND:  # the interpreter multiplies the bits of bfloat16
                x = x.to(tl.float32)
            found = tl.dot(x, number.to(x.dtype), input_precision="ieee")
        else:
            place = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
            code = tl.load(CODES + column[None, :] * bytes_each + place[:, None], mask=(2 * place[:, None] < K) & inside[None, :], other=0).to(tl.int32)
            first = tl.load(X + row[:, None] * x_m + 2 * place[None, :], mask=known & (2 * place[None, :] < K), other=0.0)
            second = tl.load(X + row[:, None] * x_m + 2 * place[None, :] + 1, mask=known & (2 * place[None, :] < K), other=0.0)
            if FORMAT == "int4":
                zero = tl.full((BLOCK_N,), 8, tl.int32)
                if HAS_EXTRA:
                    zero = tl.load(EXTRA + at, mask=inside, other=0).to(tl.int32)
                one, two = ((code & 15) - zero[None, :]).to(tl.float32), ((code >> 4) - zero[None, :]).to(tl.float32)
            elif FORMAT == "mxfp4":
                one, two = e2m1(code & 15), e2m1(code >> 4)
            else:
                one, two = tl.load(TABLE + (code >> 4)), tl.load(TABLE + (code & 15))
            if BY_HAND:
                first, second = first.to(tl.float32), second.to(tl.float32)
            found = tl.dot(first, one.to(first.dtype), input_precision="ieee")
            found = tl.dot(second, two.to(second.dtype), found, input_precision="ieee")
        total += found * scale[None, :]
    if HAS_BIAS:
        total += tl.load(BIAS + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + (part.to(tl.int64) * M + row[:, None]) * N + column[None, :], rounded(total, OUT.dtype.element_ty, BY_HAND), mask=known & inside[None, :])


@triton.jit
def sum_of_parts(PARTS, BIAS, OUT, size, N, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (M, N) = the sum of PARTS (COUNT, M, N) in order, and BIAS."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(COUNT):
        total += tl.load(PARTS + part * size + place, mask=place < size, other=0.0)
    if HAS_BIAS:
        total += tl.load(BIAS + place % N, mask=place < size, other=0.0).to(tl.float32)
    tl.store(OUT + place, rounded(total, OUT.dtype.element_ty, BY_HAND), mask=place < size)


def step_of(group, length, most=128):
    """Entries of a row that one step of the loop takes: all under one scale. None where no step fits."""
    return most if group == length else next((step for step in (128, 64, 32) if step <= most and group % step == 0), None)


def unsuited(x, group):
    """Why the body does not take this, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype} has no tile"
    return None if step_of(group, x.shape[-1]) else f"groups of {group} entries, of which no tile is a part"


def parts_of(tiles, steps, device):
    """Into how many parts K is split, so that the chip has work everywhere and each part has a few steps."""
    return max(1, min(PROGRAMS * _multiprocessors(device) // tiles, steps // 4, 64))


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def product(x, codes, scales, b, out_dim, format, extra=None, table=None, levels=None, tall=1, parts=None, config=None):
    """x @ numbers' + b by the Triton body. `tall`: rows of the weight that share their scales."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (m, length), groups = rows.shape, scales.numel() // triton.cdiv(out_dim, tall)
    out = torch.empty(*x.shape[:-1], out_dim, device=x.device, dtype=x.dtype)
    if not out.numel():
        return out
    config, double = config or chips.config("few_rows", x.device) or CONFIG, format == "table" and scales.dtype == torch.uint8
    group = length if groups == 1 else 128 if tall > 1 else length // groups
    tallest, widest = MOST[x.element_size()]
    step = step_of(group, length, widest)
    block_m, steps = min(tallest, max(16, triton.next_power_of_2(m))), triton.cdiv(length, step)
    grid = triton.cdiv(out_dim, config["BLOCK_N"]), triton.cdiv(m, block_m)
    parts = parts or parts_of(grid[0] * grid[1], steps, x.device)
    made = out if parts == 1 else torch.empty(parts, m, out_dim, device=x.device, dtype=torch.float32)
    numbers = lambda t: out if t is None else t.contiguous().view(torch.float32) if t.dtype == torch.int32 else t.contiguous()  # noqa: E731
    few_rows[grid[0], parts, grid[1]](
        rows, codes.contiguous(), numbers(scales), numbers(extra), numbers(table), numbers(levels), numbers(b), made, m, out_dim, length, rows.stride(0),
        length // 2 if format in ("int4", "table", "mxfp4") else length, group, groups, triton.cdiv(steps, parts), FORMAT=format, DOUBLE=double, TALL=tall, HAS_EXTRA=extra is not None, HAS_BIAS=b is not None and parts == 1, BY_HAND=by_hand(x.dtype),
        BLOCK_M=block_m, BLOCK_K=step, enable_fp_fusion=True, **config,
    )  # fmt: skip
    if parts > 1:
        grid = (triton.cdiv(out.numel(), 1024),)
        sum_of_parts[grid](made, numbers(b), out, out.numel(), out_dim, COUNT=parts, HAS_BIAS=b is not None, BY_HAND=by_hand(x.dtype), BLOCK=1024, enable_fp_fusion=True)
    return out
