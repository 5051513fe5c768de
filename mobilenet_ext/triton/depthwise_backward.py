"""Depthwise 3x3 convolution, backward: the gradients of input and weight in one pass over the data.

As in the forward kernel a tile is a row of lanes times a block of channels and walks down the image. What a lane owns
are input pixels: it rebuilds the gradient dy of the outputs that see them, and each dy meets each of its inputs once,
in a product for either gradient. A thread keeps nine taps of the filter, nine sums of the weight's gradient and seven
vectors a channel in registers, so it has four channels, in 16 bits half a 128-bit access: with eight, ptxas spills 432
bytes a thread with stride 1 and 264 with stride 2 (sm_90, bfloat16, Triton 3.6).

At the image's border a lane also multiplies its inputs by the dy of outputs that do not exist, which is 0: there a NaN
or an infinity makes more of its channel's taps NaN than those that see it (PyTorch's: only those).

Rows and columns are counted in the padded image (marked ``'`` in comments), where input row i' = i + padding is seen by
the output rows (i' - k)/stride, k = 0, 1, 2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.triton import autotune, finish, gpu, heuristics
from mobilenet_ext.triton.depthwise import load_filter
from mobilenet_ext.triton.formulas import (
    activation,
    load_gradient_rows,
    load_normalisation,
    output_gradient,
    rounded,
    store_sums,
    where_also,
)


def depthwise_backward(
    h: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, bn_u: Tensor | None, batch_stats_u: bool,
    weight: Tensor, stride: int, padding: int, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(h_u, grad_weight, grad_bn_u); those that are not wanted, or without ``bn_u`` not there, are empty."""
    n, channels, height, width = u.shape
    grad_weight = u.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)
    h_u = torch.empty_like(u, memory_format=torch.channels_last) if need_input else u.new_empty(0)
    if stride == 1:
        lanes, rows = (width + 1) // 2, height
    else:
        lanes, rows = ((size - 1 + padding) // 2 + 1 for size in (width, height))
    multiprocessors, unit = gpu.of(u).multiprocessors, math.gcd(channels, 8)
    kernel = _stride_1 if stride == 1 else _stride_2
    want_sums = need_input and bn_u is not None

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor, Tensor]:
        tile = (config["BLOCK_P"], config["BLOCK_C"])
        rows_at_once, programs = heuristics.depthwise_grid(n, channels, rows, lanes, multiprocessors, tile, True)
        sums = u.new_empty((programs, 2, channels), dtype=torch.float32) if want_sums else None
        partial = u.new_empty((programs, channels, 9), dtype=torch.float32) if need_weight else None
        if programs:
            kernel[(triton.cdiv(channels, config["BLOCK_C"]), programs)](
                h, y if grad_bn_y is not None else None, grad_bn_y, u, bn_u, weight, h_u if need_input else None,
                sums, partial, n, height, width, channels // unit, *h.shape[2:], padding, rows_at_once,
                UNIT=unit, **config,
            )  # fmt: skip
        count = n * height * width
        return h_u, grad_weight, finish.gradients(sums, bn_u, batch_stats_u, count, partial, grad_weight)

    problem = (n, channels, height, width, stride, padding, str(u.dtype), y is not None, want_sums, need_weight)
    candidates = heuristics.depthwise_backward(channels, u.dtype.itemsize)
    return autotune.run("depthwise_backward", problem, candidates, launch)


@triton.jit
def _load_gradient(h_ptr, y_ptr, p, q, mean, o, mask, BATCH_STATS: tl.constexpr):
    """dy of an output pixel a lane; without statistics y is not needed."""
    h = tl.load(h_ptr, mask=mask, other=0.0)
    y = h
    if BATCH_STATS:
        y = tl.load(y_ptr, mask=mask, other=0.0)
    return output_gradient(h, y, p, q, mean, o, mask, BATCH_STATS)


@triton.jit
def _store_gradient(h_u_ptr, u_ptr, da, a, mean, mask, NORMALISE: tl.constexpr):
    """Stores h_u and returns what it adds to both sums of the BatchNorm in front.

    h_u is 0 where the ReLU gave 0; a NaN is not 0 and passes the gradient, as PyTorch's ReLU lets it.
    """
    if NORMALISE:
        stored = rounded(tl.where(a == 0, 0.0, da), h_u_ptr.dtype.element_ty)
        tl.store(h_u_ptr, stored, mask=mask)
        h_u = tl.where(mask, stored.to(tl.float32), 0.0)
        return h_u, h_u * (tl.load(u_ptr, mask=mask, other=0.0).to(tl.float32) - mean)
    else:
        tl.store(h_u_ptr, rounded(da, h_u_ptr.dtype.element_ty), mask=mask)
        return 0.0, 0.0


@triton.jit
def _store_tap(partial_ptr, tap, c, mask, lanes):
    tl.store(partial_ptr + c * 9 + tap, tl.sum(lanes, 0), mask=mask)


@triton.jit
def _store_partial(partial_ptr, channels, c, mask, top, middle, bottom):
    """The program's part of the weight's gradient: its lanes added up."""
    partial_ptr += tl.program_id(1) * 9 * channels
    _store_tap(partial_ptr, 0, c, mask, top[0])
    _store_tap(partial_ptr, 1, c, mask, top[1])
    _store_tap(partial_ptr, 2, c, mask, top[2])
    _store_tap(partial_ptr, 3, c, mask, middle[0])
    _store_tap(partial_ptr, 4, c, mask, middle[1])
    _store_tap(partial_ptr, 5, c, mask, middle[2])
    _store_tap(partial_ptr, 6, c, mask, bottom[0])
    _store_tap(partial_ptr, 7, c, mask, bottom[1])
    _store_tap(partial_ptr, 8, c, mask, bottom[2])


@triton.jit
def _add_row(da, db, dy, w):
    """A row of the filter applied to a row of dy, added to the gradients of a lane's two inputs."""
    da = da + dy[1] * w[0] + dy[2] * w[1] + dy[3] * w[2]
    db = db + dy[0] * w[0] + dy[1] * w[1] + dy[2] * w[2]
    return da, db


@triton.jit
def _add_products(acc, a, b, dy):
    """A row of the weight's gradient, with the products of a lane's two inputs and the dys that see them added."""
    return (
        acc[0] + a * dy[1] + b * dy[0],
        acc[1] + a * dy[2] + b * dy[1],
        acc[2] + a * dy[3] + b * dy[2],
    )


@triton.jit(do_not_specialize=["images", "height", "width", "C_units", "out_height", "out_width", "padding", "rows"])
def _stride_1(
    h_ptr, y_ptr, grad_bn_ptr, u_ptr, bn_ptr, weight_ptr, h_u_ptr, sums_ptr, partial_ptr,
    images, height, width, C_units, out_height, out_width, padding, rows,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A lane owns two neighbouring input columns, a and b, which are seen by four output columns."""
    BATCH_STATS: tl.constexpr = y_ptr is not None
    NORMALISE: tl.constexpr = bn_ptr is not None
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    top, middle, bottom = load_filter(weight_ptr, c, channel_inside)
    p, q, mean_y, o = load_gradient_rows(grad_bn_ptr, channels, c, channel_inside, BATCH_STATS)
    mean, scale, shift = load_normalisation(bn_ptr, channels, c, channel_inside)

    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    grad_top = (zero, zero, zero)
    grad_middle = (zero, zero, zero)
    grad_bottom = (zero, zero, zero)
    sum_h = zero
    sum_h_centred = zero

    pairs = (width + 1) // 2
    chunks = tl.cdiv(height, rows)
    tasks = tl.cdiv(images * pairs, BLOCK_P) * chunks
    for task in range(tl.program_id(1), tasks, tl.num_programs(1)):
        lane = task // chunks * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (lane // pairs).to(tl.int64)
        column = lane % pairs * 2
        first_row = task % chunks * rows
        row_end = tl.minimum(first_row + rows, height)

        out_column = column + padding  # of the first tap of a; those of a and b are this, one more and two less
        a_inside = (lane < images * pairs)[:, None] & channel_inside[None, :]
        b_inside = a_inside & (column + 1 < width)[:, None]
        m0 = a_inside & (out_column + 1 < out_width)[:, None]
        m1 = a_inside & (out_column < out_width)[:, None]
        m2 = a_inside & ((out_column >= 1) & (out_column - 1 < out_width))[:, None]
        m3 = a_inside & ((out_column >= 2) & (out_column - 2 < out_width))[:, None]
        out_row = first_row + padding - 2
        out_offset = (((image * out_height + out_row) * out_width + out_column - 2) * channels)[:, None] + c[None, :]
        in_offset = (((image * height + first_row) * width + column) * channels)[:, None] + c[None, :]

        # Rows i', i' + 1 and i' + 2 of the input and of its gradient, where i' is the row of dy. The first two rows of
        # dy lie above those of this chunk's inputs: what they complete is not this chunk's.
        # (Zeros of their own: of names that start as one tensor and hand values on, Triton's compiler loses some.)
        a0 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        a1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        b0 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        b1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        da0, db0 = zero, zero
        da1, db1 = zero, zero
        for row in range(first_row - 2, row_end):
            row_inside = (out_row >= 0) & (out_row < out_height)
            n0 = where_also(m0, row_inside)
            n1 = where_also(m1, row_inside)
            n2 = where_also(m2, row_inside)
            n3 = where_also(m3, row_inside)
            h_row = h_ptr + out_offset
            y_row = h_row
            if BATCH_STATS:
                y_row = y_ptr + out_offset
            u_row = u_ptr + in_offset
            dy = (
                _load_gradient(h_row + 3 * channels, y_row + 3 * channels, p, q, mean_y, o, n0, BATCH_STATS),
                _load_gradient(h_row + 2 * channels, y_row + 2 * channels, p, q, mean_y, o, n1, BATCH_STATS),
                _load_gradient(h_row + channels, y_row + channels, p, q, mean_y, o, n2, BATCH_STATS),
                _load_gradient(h_row, y_row, p, q, mean_y, o, n3, BATCH_STATS),
            )
            a_mask = where_also(a_inside, row + 2 < row_end)
            b_mask = where_also(b_inside, row + 2 < row_end)
            a2 = activation(tl.load(u_row, mask=a_mask, other=0.0), mean, scale, shift, a_mask, NORMALISE)
            b2 = activation(tl.load(u_row + channels, mask=b_mask, other=0.0), mean, scale, shift, b_mask, NORMALISE)
            if partial_ptr is not None:
                grad_top = _add_products(grad_top, a0, b0, dy)
                grad_middle = _add_products(grad_middle, a1, b1, dy)
                grad_bottom = _add_products(grad_bottom, a2, b2, dy)
            if h_u_ptr is not None:
                da0, db0 = _add_row(da0, db0, dy, top)
                a_mask = where_also(a_inside, row >= first_row)
                b_mask = where_also(b_inside, row >= first_row)
                h_u_row = h_u_ptr + in_offset - 2 * width * channels
                u_row -= 2 * width * channels
                a_sums = _store_gradient(h_u_row, u_row, da0, a0, mean, a_mask, NORMALISE)
                b_sums = _store_gradient(h_u_row + channels, u_row + channels, db0, b0, mean, b_mask, NORMALISE)
                sum_h += a_sums[0] + b_sums[0]
                sum_h_centred += a_sums[1] + b_sums[1]
                da0, db0 = _add_row(da1, db1, dy, middle)
                da1, db1 = _add_row(zero, zero, dy, bottom)
            a0, b0 = a1, b1
            a1, b1 = a2, b2
            out_row += 1
            out_offset += out_width * channels
            in_offset += width * channels

    if sums_ptr is not None:
        sums_ptr += tl.program_id(1) * 2 * channels
        store_sums(sums_ptr, channels, c, channel_inside, tl.sum(sum_h, 0), tl.sum(sum_h_centred, 0))
    if partial_ptr is not None:
        _store_partial(partial_ptr, channels, c, channel_inside, grad_top, grad_middle, grad_bottom)


@triton.jit(do_not_specialize=["images", "height", "width", "C_units", "out_height", "out_width", "padding", "rows"])
def _stride_2(
    h_ptr, y_ptr, grad_bn_ptr, u_ptr, bn_ptr, weight_ptr, h_u_ptr, sums_ptr, partial_ptr,
    images, height, width, C_units, out_height, out_width, padding, rows,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A lane owns the four inputs i' = 2r, 2r + 1, j' = 2s, 2s + 1, which the outputs r - 1, r and s - 1, s see."""
    BATCH_STATS: tl.constexpr = y_ptr is not None
    NORMALISE: tl.constexpr = bn_ptr is not None
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    top, middle, bottom = load_filter(weight_ptr, c, channel_inside)
    p, q, mean_y, o = load_gradient_rows(grad_bn_ptr, channels, c, channel_inside, BATCH_STATS)
    mean, scale, shift = load_normalisation(bn_ptr, channels, c, channel_inside)

    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    grad_top = (zero, zero, zero)
    grad_middle = (zero, zero, zero)
    grad_bottom = (zero, zero, zero)
    sum_h = zero
    sum_h_centred = zero

    quads = (width - 1 + padding) // 2 + 1
    quad_rows = (height - 1 + padding) // 2 + 1
    chunks = tl.cdiv(quad_rows, rows)
    tasks = tl.cdiv(images * quads, BLOCK_P) * chunks
    for task in range(tl.program_id(1), tasks, tl.num_programs(1)):
        lane = task // chunks * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (lane // quads).to(tl.int64)
        out_column = lane % quads
        column = out_column * 2 - padding
        first_row = task % chunks * rows

        inside = (lane < images * quads)[:, None] & channel_inside[None, :]
        left_inside = inside & (column >= 0)[:, None]
        right_inside = inside & (column + 1 < width)[:, None]
        m0 = inside & (out_column < out_width)[:, None]
        m1 = inside & ((out_column >= 1) & (out_column - 1 < out_width))[:, None]
        out_offset = (((image * out_height + first_row) * out_width + out_column) * channels)[:, None] + c[None, :]
        in_offset = (((image * height + 2 * first_row - padding) * width + column) * channels)[:, None] + c[None, :]

        # The outputs of the row above, at the column and the one before.
        above0 = zero
        above1 = zero
        if first_row > 0:
            n0 = where_also(m0, first_row - 1 < out_height)
            n1 = where_also(m1, first_row - 1 < out_height)
            h_row = h_ptr + out_offset - out_width * channels
            y_row = h_row
            if BATCH_STATS:
                y_row = y_ptr + out_offset - out_width * channels
            above0 = _load_gradient(h_row, y_row, p, q, mean_y, o, n0, BATCH_STATS)
            above1 = _load_gradient(h_row - channels, y_row - channels, p, q, mean_y, o, n1, BATCH_STATS)

        for row in range(first_row, tl.minimum(first_row + rows, quad_rows)):
            n0 = where_also(m0, row < out_height)
            n1 = where_also(m1, row < out_height)
            h_row = h_ptr + out_offset
            y_row = h_row
            if BATCH_STATS:
                y_row = y_ptr + out_offset
            dy0 = _load_gradient(h_row, y_row, p, q, mean_y, o, n0, BATCH_STATS)
            dy1 = _load_gradient(h_row - channels, y_row - channels, p, q, mean_y, o, n1, BATCH_STATS)
            even_inside = row * 2 - padding >= 0
            odd_inside = row * 2 - padding + 1 < height
            even_left = where_also(left_inside, even_inside)
            even_right = where_also(right_inside, even_inside)
            odd_left = where_also(left_inside, odd_inside)
            odd_right = where_also(right_inside, odd_inside)
            even_row = u_ptr + in_offset
            odd_row = even_row + width * channels
            # The last odd row and column may be seen by no output: then what is there must not reach the weight.
            right_seen = even_right & m0
            left_seen = where_also(odd_left, row < out_height)
            both_seen = where_also(odd_right & m0, row < out_height)
            a = activation(tl.load(even_row, mask=even_left, other=0.0), mean, scale, shift, even_left, NORMALISE)
            b = activation(
                tl.load(even_row + channels, mask=right_seen, other=0.0), mean, scale, shift, right_seen, NORMALISE
            )
            d = activation(tl.load(odd_row, mask=left_seen, other=0.0), mean, scale, shift, left_seen, NORMALISE)
            e = activation(
                tl.load(odd_row + channels, mask=both_seen, other=0.0), mean, scale, shift, both_seen, NORMALISE
            )
            if partial_ptr is not None:
                grad_top = (grad_top[0] + a * dy0, grad_top[1] + b * dy0, grad_top[2] + a * dy1)
                grad_middle = (grad_middle[0] + d * dy0, grad_middle[1] + e * dy0, grad_middle[2] + d * dy1)
                grad_bottom = (grad_bottom[0] + a * above0, grad_bottom[1] + b * above0, grad_bottom[2] + a * above1)
            if h_u_ptr is not None:
                da = dy0 * top[0] + dy1 * top[2] + above0 * bottom[0] + above1 * bottom[2]
                db = dy0 * top[1] + above0 * bottom[1]
                dd = dy0 * middle[0] + dy1 * middle[2]
                de = dy0 * middle[1]
                h_u_row = h_u_ptr + in_offset
                a_sums = _store_gradient(h_u_row, even_row, da, a, mean, even_left, NORMALISE)
                b_sums = _store_gradient(h_u_row + channels, even_row + channels, db, b, mean, even_right, NORMALISE)
                h_u_row += width * channels
                d_sums = _store_gradient(h_u_row, odd_row, dd, d, mean, odd_left, NORMALISE)
                e_sums = _store_gradient(h_u_row + channels, odd_row + channels, de, e, mean, odd_right, NORMALISE)
                sum_h += a_sums[0] + b_sums[0] + d_sums[0] + e_sums[0]
                sum_h_centred += a_sums[1] + b_sums[1] + d_sums[1] + e_sums[1]
            above0 = dy0
            above1 = dy1
            out_offset += out_width * channels
            in_offset += 2 * width * channels

    if sums_ptr is not None:
        sums_ptr += tl.program_id(1) * 2 * channels
        store_sums(sums_ptr, channels, c, channel_inside, tl.sum(sum_h, 0), tl.sum(sum_h_centred, 0))
    if partial_ptr is not None:
        _store_partial(partial_ptr, channels, c, channel_inside, grad_top, grad_middle, grad_bottom)
