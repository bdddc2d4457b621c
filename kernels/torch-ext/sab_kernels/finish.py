"""The end of a product: parts of the sum over columns are added up, then the row's power of two and the bias."""

import triton
import triton.language as tl


@triton.jit
def finish(
    total,  # fp32 [ROWS, TOKENS]
    row,  # int32 [ROWS]: which row of the stacked layers each one is
    token,  # int32 [TOKENS]
    row_program,
    token_program,
    part,
    partial_ptr,  # fp32 [row programs · token programs, SPLIT, TOKENS, ROWS]
    counter_ptr,  # int32 [row programs · token programs], zero
    row_exponent_ptr,  # int8 [rows]
    bias0_ptr,  # float [rows of the first layer]
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    out0_ptr,  # float [tokens, rows of the first layer]
    out1_ptr,
    out2_ptr,
    out3_ptr,
    tokens,
    bound1,  # first row of the second layer; of a layer that is not there, the number of rows
    bound2,
    bound3,
    rows,
    exponent_offset,
    FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STACK: tl.constexpr,  # layers, 1 to 4
    SPLIT: tl.constexpr,
):
    """Write the outputs of stacked layers. Of SPLIT programs that share an output, the one that comes last adds all
    parts, in order, so the result does not depend on which that is."""
    ROWS: tl.constexpr = total.shape[0]
    TOKENS: tl.constexpr = total.shape[1]
    there = row < rows
    if SPLIT > 1:
        output = token_program * tl.num_programs(0) + row_program
        within = tl.arange(0, TOKENS)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
        mine = partial_ptr + output.to(tl.int64) * (SPLIT * TOKENS * ROWS) + within
        tl.store(mine + part * (TOKENS * ROWS), total)
        tl.debug_barrier()  # every lane's part is stored before the count says so
        last = tl.atomic_add(counter_ptr + output, 1, sem="acq_rel") == SPLIT - 1
        tl.debug_barrier()
        if last:
            total = tl.zeros((ROWS, TOKENS), tl.float32)
            for p in range(SPLIT):
                total += tl.load(mine + p * (TOKENS * ROWS), cache_modifier=".cg")
        there = there & last
    if FP8:
        exponent = tl.load(row_exponent_ptr + row, mask=there, other=0).to(tl.int32)
        total = total * ((exponent + exponent_offset + 127) << 23).to(tl.float32, bitcast=True)[:, None]
    if HAS_BIAS:
        bias = _load_bias(bias0_ptr, row, 0, bound1, there)
        if STACK > 1:
            bias += _load_bias(bias1_ptr, row, bound1, bound2, there)
        if STACK > 2:
            bias += _load_bias(bias2_ptr, row, bound2, bound3, there)
        if STACK > 3:
            bias += _load_bias(bias3_ptr, row, bound3, rows, there)
        total += bias[:, None]
    value = total.to(out0_ptr.dtype.element_ty)
    _write(out0_ptr, value, row, token, 0, bound1, tokens, there)
    if STACK > 1:
        _write(out1_ptr, value, row, token, bound1, bound2, tokens, there)
    if STACK > 2:
        _write(out2_ptr, value, row, token, bound2, bound3, tokens, there)
    if STACK > 3:
        _write(out3_ptr, value, row, token, bound3, rows, tokens, there)


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
