"""What the depthwise kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from mobilenet_ext.triton.activation import activate_backward_by_output, centred
from mobilenet_ext.triton.formulas import output_gradient, rounded, where_also


@triton.jit
def load_filter(weight_ptr, channels, mask, KERNEL: tl.constexpr):
    """The rows of a ``[C, 1, KERNEL, KERNEL]`` weight at ``channels``: of taps, each ``[1, len(channels)]``."""
    rows = ()
    for i in tl.static_range(KERNEL):
        row = ()
        for j in tl.static_range(KERNEL):
            tap = tl.load(weight_ptr + channels * (KERNEL * KERNEL) + (i * KERNEL + j), mask=mask, other=0.0)
            row = row + (tap.to(tl.float32)[None, :],)
        rows = rows + (row,)
    return rows


@triton.jit
def _load_output(dz_ptr, y_ptr, mask, BATCH_STATS: tl.constexpr):
    dz = tl.load(dz_ptr, mask=mask, other=0.0)
    y = dz
    if BATCH_STATS:
        y = tl.load(y_ptr, mask=mask, other=0.0)
    return dz, y


@triton.jit
def load_outputs(
    dz_ptr, y_ptr, offset, channels, column_inside, row_inside, BATCH_STATS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dz and y, as they are stored, of the outputs in a row that see a lane's inputs, the rightmost first.

    Without statistics y is not needed.
    """
    dz_ptr += offset
    if BATCH_STATS:
        y_ptr += offset
    else:
        y_ptr = dz_ptr
    outputs = ()
    for i in tl.static_range(COLUMNS):
        mask = where_also(column_inside[i], row_inside)
        outputs = outputs + (_load_output(dz_ptr - i * channels, y_ptr - i * channels, mask, BATCH_STATS),)
    return outputs


@triton.jit
def gradient(output, coefficients, column_inside, row_inside, BATCH_STATS: tl.constexpr):
    """dy of an output per lane, from what ``load_outputs`` gave."""
    return output_gradient(output[0], output[1], coefficients, where_also(column_inside, row_inside), BATCH_STATS)


@triton.jit
def store_dz(ptr, u, da, a, norm, mask, NORM: tl.constexpr, ACT: tl.constexpr):
    """Stores dz_u and returns what it adds to both sums of the BatchNorm before.

    The activation's derivative comes from ``a``, which is in registers, where that tells it: z would cost a
    multiply-add per value, up to 2 % of the loop's instructions.
    """
    if NORM:
        stored = rounded(activate_backward_by_output(a, u, norm, da, ACT), ptr.dtype.element_ty)
        tl.store(ptr, stored, mask=mask)
        dz_u = tl.where(mask, stored.to(tl.float32), 0.0)
        return dz_u, dz_u * centred(u, norm)
    else:
        tl.store(ptr, rounded(da, ptr.dtype.element_ty), mask=mask)
        return 0.0, 0.0


@triton.jit
def store_filter(partial_ptr, channels, c, mask, sums, KERNEL: tl.constexpr):
    """The program's part of the weight's gradient: the lanes of each tap's sums added up."""
    partial_ptr += tl.program_id(1) * (KERNEL * KERNEL) * channels
    for i in tl.static_range(KERNEL):
        for j in tl.static_range(KERNEL):
            tap_ptr = partial_ptr + c * (KERNEL * KERNEL) + (i * KERNEL + j)
            tl.store(tap_ptr, tl.sum(sums[i][j], 0), mask=mask)
