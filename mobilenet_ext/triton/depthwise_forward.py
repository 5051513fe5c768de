"""Depthwise 3x3 convolution, forward: for training (raw output and statistics) and for inference (finished output).

A tile is a row of lanes times a block of channels and walks down the image: each input row is loaded, normalised and
rectified once and added to all output rows that see it, whose partial sums stay in registers. A lane owns an output
column, with stride 1 a pair of them, which see four input columns instead of six. (With stride 2 a pair saves one of
six and needs more registers than there are.) Lanes count through the columns of all images, so that tiles are full
whatever the width.
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
    load_normalisation,
    move_squares,
    normalise,
    relu,
    rounded,
    store_statistics,
    where_also,
)


def depthwise_forward(
    u: Tensor, bn_u: Tensor | None, weight: Tensor, stride: int, padding: int, gamma: Tensor | None,
    beta: Tensor | None, eps: float, stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The raw output, and with ``stats`` its normalisation ``bn`` [5, C], else an empty float32 tensor."""
    y, partial = _run("depthwise_forward", u, bn_u, weight, stride, padding, None, False, stats)
    bn = finish.statistics(partial, gamma, beta, eps) if stats else u.new_empty(0, dtype=torch.float32)
    return y, bn


def depthwise_inference(
    x: Tensor, bn_y: Tensor | None, weight: Tensor, stride: int, padding: int, relu: bool
) -> Tensor:
    """The convolution's output, with ``bn_y`` normalised, with ``relu`` rectified."""
    return _run("depthwise_inference", x, None, weight, stride, padding, bn_y, relu, False)[0]


def _run(
    op: str, u: Tensor, bn_u: Tensor | None, weight: Tensor, stride: int, padding: int, bn_y: Tensor | None,
    relu: bool, stats: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    n, channels, h, w = u.shape
    out_h, out_w = (h + 2 * padding - 3) // stride + 1, (w + 2 * padding - 3) // stride + 1
    y = torch.empty((n, channels, out_h, out_w), dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y, u.new_empty((0, 4, channels), dtype=torch.float32) if stats else None
    unit = math.gcd(channels, 8)
    lanes = (out_w + 1) // 2 if stride == 1 else out_w
    multiprocessors = gpu.of(u).multiprocessors
    candidates = heuristics.depthwise_forward(channels, u.dtype.itemsize)

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor | None]:
        tile = (config["BLOCK_P"], config["BLOCK_C"])
        rows, programs = heuristics.depthwise_grid(n, channels, out_h, lanes, multiprocessors, tile, stats)
        partial = u.new_empty((programs, 4, channels), dtype=torch.float32) if stats else None
        _kernel[(triton.cdiv(channels, config["BLOCK_C"]), programs)](
            u, bn_u, weight, y, partial, bn_y, n, h, w, channels // unit, out_h, out_w, padding, rows,
            UNIT=unit, STRIDE=stride, RELU=relu, **config,
        )  # fmt: skip
        return y, partial

    problem = (n, channels, h, w, stride, padding, str(u.dtype), bn_u is not None, stats)
    return autotune.run(op, problem, candidates, launch)


@triton.jit
def _load_row(ptr, channels, m0, m1, m2, m3, row_inside, STRIDE: tl.constexpr):
    """The columns of an input row that a lane's outputs see: four of them with stride 1, three with stride 2."""
    x0 = tl.load(ptr, mask=where_also(m0, row_inside), other=0.0)
    x1 = tl.load(ptr + channels, mask=where_also(m1, row_inside), other=0.0)
    x2 = tl.load(ptr + 2 * channels, mask=where_also(m2, row_inside), other=0.0)
    x3 = x2
    if STRIDE == 1:
        x3 = tl.load(ptr + 3 * channels, mask=where_also(m3, row_inside), other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _activate_row(x, m0, m1, m2, m3, row_inside, mean, scale, shift, NORMALISE: tl.constexpr):
    a0 = activation(x[0], mean, scale, shift, where_also(m0, row_inside), NORMALISE)
    a1 = activation(x[1], mean, scale, shift, where_also(m1, row_inside), NORMALISE)
    a2 = activation(x[2], mean, scale, shift, where_also(m2, row_inside), NORMALISE)
    a3 = activation(x[3], mean, scale, shift, where_also(m3, row_inside), NORMALISE)
    return a0, a1, a2, a3


@triton.jit
def _add_row(acc0, acc1, a, w, STRIDE: tl.constexpr):
    """A row of the filter applied to a row of the input, added to a lane's outputs (with stride 2 only the first)."""
    acc0 = acc0 + a[0] * w[0] + a[1] * w[1] + a[2] * w[2]
    if STRIDE == 1:
        acc1 = acc1 + a[1] * w[0] + a[2] * w[1] + a[3] * w[2]
    return acc0, acc1


@triton.jit
def _finish_output(y, mean, scale, shift, NORMALISE: tl.constexpr, RELU: tl.constexpr, DTYPE: tl.constexpr):
    if NORMALISE:
        y = normalise(y, mean, scale, shift)
    if RELU:
        y = relu(y)
    return rounded(y, DTYPE)


@triton.jit(do_not_specialize=["images", "height", "width", "C_units", "out_height", "out_width", "padding", "rows"])
def _kernel(
    u_ptr, bn_u_ptr, weight_ptr, y_ptr, partial_ptr, bn_y_ptr,
    images, height, width, C_units, out_height, out_width, padding, rows,
    UNIT: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    NORMALISE: tl.constexpr = bn_u_ptr is not None
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels

    top, middle, bottom = load_filter(weight_ptr, c, channel_inside)
    mean, scale, shift = load_normalisation(bn_u_ptr, channels, c, channel_inside)
    mean_y, scale_y, shift_y = load_normalisation(bn_y_ptr, channels, c, channel_inside)

    # Statistics of a lane and channel: sums of differences from an offset, which is the first value, and from then on
    # now and then the mean of the values so far: neither a large mean nor an outlier in front cancels in M2.
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    offset = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_P, 1], tl.float32)

    COLUMNS: tl.constexpr = 2 if STRIDE == 1 else 1
    lanes = (out_width + COLUMNS - 1) // COLUMNS
    chunks = tl.cdiv(out_height, rows)
    tasks = tl.cdiv(images * lanes, BLOCK_P) * chunks
    for task in range(tl.program_id(1), tasks, tl.num_programs(1)):
        lane = task // chunks * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (lane // lanes).to(tl.int64)
        column = lane % lanes * COLUMNS
        row = task % chunks * rows
        row_end = tl.minimum(row + rows, out_height)
        first_inside = lane < images * lanes
        second_inside = first_inside & (column + 1 < out_width)
        first_counts = tl.where(first_inside, 1.0, 0.0)[:, None]
        second_counts = tl.where(second_inside, 1.0, 0.0)[:, None]

        first_row = row * STRIDE - padding
        last_row = tl.minimum(row_end * STRIDE - padding + 2 - STRIDE, height - 1)  # the last to be loaded
        in_column = column * STRIDE - padding
        inside = first_inside[:, None] & channel_inside[None, :]
        m0 = inside & ((in_column >= 0) & (in_column < width))[:, None]
        m1 = inside & ((in_column + 1 >= 0) & (in_column + 1 < width))[:, None]
        m2 = inside & (in_column + 2 < width)[:, None]
        m3 = inside & (in_column + 3 < width)[:, None]
        in_ptr = u_ptr + (((image * height + first_row) * width + in_column) * channels)[:, None] + c[None, :]
        out_ptr = y_ptr + (((image * out_height + row) * out_width + column) * channels)[:, None] + c[None, :]
        second_inside = second_inside[:, None] & channel_inside[None, :]

        # Each row is loaded a step before its use. The rows in front of the loop are those that only the first output
        # row (stride 2), or the first two (stride 1), and no row above them in this chunk see.
        in_row = first_row
        row_inside = in_row >= 0
        x = _load_row(in_ptr, channels, m0, m1, m2, m3, row_inside, STRIDE)
        a = _activate_row(x, m0, m1, m2, m3, row_inside, mean, scale, shift, NORMALISE)
        this0, this1 = _add_row(zero, zero, a, top, STRIDE)
        in_row += 1
        in_ptr += width * channels
        row_inside = in_row <= last_row
        x = _load_row(in_ptr, channels, m0, m1, m2, m3, row_inside, STRIDE)
        next0, next1 = zero, zero
        if STRIDE == 1:
            a = _activate_row(x, m0, m1, m2, m3, row_inside, mean, scale, shift, NORMALISE)
            this0, this1 = _add_row(this0, this1, a, middle, STRIDE)
            next0, next1 = _add_row(zero, zero, a, top, STRIDE)
            in_row += 1
            in_ptr += width * channels
            row_inside = in_row <= last_row
            x = _load_row(in_ptr, channels, m0, m1, m2, m3, row_inside, STRIDE)

        for step in range(row, row_end):
            a = _activate_row(x, m0, m1, m2, m3, row_inside, mean, scale, shift, NORMALISE)
            in_row += 1
            in_ptr += width * channels
            row_inside = in_row <= last_row
            if STRIDE == 1:
                y0, y1 = _add_row(this0, this1, a, bottom, STRIDE)
                this0, this1 = _add_row(next0, next1, a, middle, STRIDE)
                next0, next1 = _add_row(zero, zero, a, top, STRIDE)
                # Loaded before the products, it would need more registers than there are.
                x = _load_row(in_ptr, channels, m0, m1, m2, m3, row_inside, STRIDE)
            else:
                x = _load_row(in_ptr, channels, m0, m1, m2, m3, row_inside, STRIDE)
                this0, this1 = _add_row(this0, this1, a, middle, STRIDE)
                a = _activate_row(x, m0, m1, m2, m3, row_inside, mean, scale, shift, NORMALISE)
                in_row += 1
                in_ptr += width * channels
                row_inside = in_row <= last_row
                x = _load_row(in_ptr, channels, m0, m1, m2, m3, row_inside, STRIDE)
                y0, y1 = _add_row(this0, this1, a, bottom, STRIDE)
                this0, this1 = _add_row(zero, zero, a, top, STRIDE)
            y0 = _finish_output(y0, mean_y, scale_y, shift_y, bn_y_ptr is not None, RELU, y_ptr.dtype.element_ty)
            tl.store(out_ptr, y0, mask=inside)
            if partial_ptr is not None:
                if ((step - row) & (step - row - 1)) == 0:
                    nearer = tl.where(count > 0, offset + total / tl.where(count > 0, count, 1.0), y0.to(tl.float32))
                    moved = nearer - offset  # not total/count, but what rounding left of it
                    squares = move_squares(squares, moved * (count * moved - 2 * total))
                    total -= count * moved
                    offset = nearer
                difference = tl.where(inside, y0.to(tl.float32) - offset, 0.0)
                total += difference
                squares += difference * difference
                count += first_counts
            if COLUMNS == 2:
                y1 = _finish_output(y1, mean_y, scale_y, shift_y, bn_y_ptr is not None, RELU, y_ptr.dtype.element_ty)
                tl.store(out_ptr + channels, y1, mask=second_inside)
                if partial_ptr is not None:
                    difference = tl.where(second_inside, y1.to(tl.float32) - offset, 0.0)
                    total += difference
                    squares += difference * difference
                    count += second_counts
            out_ptr += out_width * channels

    if partial_ptr is not None:
        # Lanes are merged by their means and M2s; one without a value counts nothing. Means are differences from the
        # first lane's offset: rounded at the size of a large mean, they would cost the variance its last digits.
        origin = tl.sum(tl.where(tl.arange(0, BLOCK_P)[:, None] == 0, offset, 0.0), 0)
        lane_mean = total / tl.where(count > 0, count, 1.0)
        m2 = move_squares(squares, -total * lane_mean)
        lane_mean = tl.where(count > 0, offset - origin[None, :] + lane_mean, 0.0)
        all_count = tl.sum(count, 0)
        tile_mean = tl.sum(count * lane_mean, 0) / all_count
        difference = lane_mean - tile_mean[None, :]
        tile_m2 = tl.sum(m2 + count * difference * difference, 0)
        partial_ptr += tl.program_id(1) * 4 * channels
        store_statistics(partial_ptr, channels, c, channel_inside, all_count, origin, tile_mean, tile_m2)
