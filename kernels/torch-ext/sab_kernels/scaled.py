"""What every product does to its activations first: multiply by the column scales and gather the salient columns. What
their order is then: prepare.py, prepare_floats.py. Layers that share an input and its scales share this."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .geometry import ceil_div


@triton.jit
def load_half(ptr, mask):
    """fp16 values whose bits are stored as int16, as fp32; 0 outside the mask."""
    return tl.load(ptr, mask=mask, other=0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def zero_counters(counter_ptr, program, counters, EACH: tl.constexpr):
    mine = program * EACH + tl.arange(0, EACH)
    tl.store(counter_ptr + mine, tl.zeros((EACH,), tl.int32), mask=mine < counters)


@triton.jit
def dense_rows(inputs, first, COUNT: tl.constexpr):
    """The row of x that each token has, from the token ``first`` on; −1 where there is none."""
    token = first + tl.arange(0, COUNT)
    return tl.where(token < inputs.tokens, token, -1)


@triton.jit
def load_scaled(inputs, column, row):
    """x c [tokens, columns] in fp32; 0 where the column or the row of x is negative."""
    inside = column >= 0
    x = tl.load(
        inputs.x + row.to(tl.int64)[:, None] * inputs.stride + column[None, :],
        mask=(row >= 0)[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    return x * load_half(inputs.col_scale + column, inside)[None, :]


def zeroing(counter: Tensor, programs: int) -> dict[str, Any]:
    """What a kernel of so many programs takes to zero the counters on its way."""
    counters = counter.numel()
    each = triton.next_power_of_2(max(1, ceil_div(counters, programs)))
    return {"counter_ptr": counter, "counters": counters, "COUNTERS_EACH": each}
