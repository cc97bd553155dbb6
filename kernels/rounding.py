"""How a Triton body stores float32: rounded once to what the result is stored in, to the nearest and to even.

Triton's interpreter cuts bfloat16 off where a chip rounds; there the bits are rounded by hand, so that it says what a chip says.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def rounded(values, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    if BY_HAND:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values.to(dtype)


def by_hand(dtype):
    """Is this a type that the interpreter cuts off, under the interpreter?"""
    return dtype == torch.bfloat16 and triton.knobs.runtime.interpret
