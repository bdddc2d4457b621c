"""The end of a product: parts of the sum over columns are added up, then the row's power of two and the bias."""

import triton
import triton.language as tl

from .operand import scale_exponent_offset


@triton.jit
def finish(
    total,  # fp32 [ROWS, TOKENS]
    row,  # int32 [ROWS]: which row of the stacked layers each one is
    token,  # int32 [TOKENS]
    row_program,
    token_program,
    part,
    parts,  # Parts
    row_exponent_ptr,  # int8 [rows]
    stack,  # Stack
    tokens,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STACK: tl.constexpr,  # layers, 1 to 4
    SPLIT: tl.constexpr,
):
    """Write the outputs of stacked layers. Of SPLIT programs that share an output, the one that comes last adds all
    parts, in order, so the result does not depend on which that is."""
    ROWS: tl.constexpr = total.shape[0]
    TOKENS: tl.constexpr = total.shape[1]
    there = row < stack.rows
    if SPLIT > 1:
        output = token_program * tl.num_programs(0) + row_program
        within = tl.arange(0, TOKENS)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
        mine = parts.total + output.to(tl.int64) * (SPLIT * TOKENS * ROWS) + within
        tl.store(mine + part * (TOKENS * ROWS), total)
        tl.debug_barrier()  # every lane's part is stored before the count says so
        last = tl.atomic_add(parts.counter + output, 1, sem="acq_rel") == SPLIT - 1
        tl.debug_barrier()
        if last:
            total = tl.zeros((ROWS, TOKENS), tl.float32)
            for p in range(SPLIT):
                total += tl.load(mine + p * (TOKENS * ROWS), cache_modifier=".cg")
        there = there & last
    if KIND.fp8:
        exponent = tl.load(row_exponent_ptr + row, mask=there, other=0).to(tl.int32)
        power = (exponent + scale_exponent_offset(KIND) + 127) << 23
        total = total * power.to(tl.float32, bitcast=True)[:, None]
    starts = (0, stack.bounds[0], stack.bounds[1], stack.bounds[2], stack.rows)
    if HAS_BIAS:
        bias = _load_bias(stack.biases[0], row, starts[0], starts[1], there)
        for i in tl.static_range(1, STACK):
            bias += _load_bias(stack.biases[i], row, starts[i], starts[i + 1], there)
        total += bias[:, None]
    value = total.to(stack.outputs[0].dtype.element_ty)
    for i in tl.static_range(STACK):
        _write(stack.outputs[i], value, row, token, starts[i], starts[i + 1], tokens, there)


@triton.jit
def write_zeros(out_ptr, row, token, rows, tokens, there):
    """Write zeros instead, unless ``there`` is False: to the output [tokens, rows] of one layer."""
    value = tl.zeros((row.shape[0], token.shape[0]), out_ptr.dtype.element_ty)
    _write(out_ptr, value, row, token, 0, rows, tokens, there & (row < rows))


@triton.jit
def _load_bias(bias_ptr, row, start, stop, there):
    """The bias of the rows from start to stop, which are one layer's; 0 elsewhere."""
    inside = there & (row >= start) & (row < stop)
    return tl.load(bias_ptr + (row - start), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(out_ptr, value, row, token, start, stop, tokens, there):
    """The rows from start to stop."""
    inside = there & (row >= start) & (row < stop)
    at = out_ptr + token.to(tl.int64)[None, :] * (stop - start) + (row - start)[:, None]
    tl.store(at, value, mask=inside[:, None] & (token < tokens)[None, :])
