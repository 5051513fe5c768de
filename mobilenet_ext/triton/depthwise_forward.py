"""Depthwise convolution, 3x3 and 5x5, forward: for training (raw output and statistics) and for inference (normalised
output).

A tile is a row of lanes times a block of channels and walks down the image: each input row is loaded, normalised and
activated once and added to all output rows that see it, whose partial sums stay in registers. A lane owns an output
column, with stride 1 a pair of them, which at 3x3 see four input columns instead of six. (With stride 2 a pair saves
one of six and needs more registers than there are.) Lanes count through the columns of all images, so that tiles are
full whatever the width.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.contract import Act, Padding, conv_output_size
from mobilenet_ext.triton import autotune, gpu, heuristics, merge
from mobilenet_ext.triton.activation import CompiledAct, compiled, load_norm, norm_act, norm_act_inside
from mobilenet_ext.triton.checks import check_input
from mobilenet_ext.triton.depthwise import load_filter
from mobilenet_ext.triton.formulas import move_squares, rounded, where_also
from mobilenet_ext.triton.merge import store_statistics
from mobilenet_ext.triton.rows import add_bias, load_bias


def depthwise_forward(
    u: Tensor, bn_u: Tensor | None, act_u: int, weight: Tensor, stride: int, padding: Padding, gamma: Tensor | None,
    beta: Tensor | None, eps: float, stats: bool, bias: Tensor | None = None, slope_u: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and with ``stats`` its normalisation, else an empty float32 tensor."""
    check_input(bn_u, act_u)
    act_u, act_y = compiled(act_u, slope_u), int(Act.LINEAR)
    y, partial = _run("depthwise_forward", u, bn_u, act_u, weight, stride, padding, bias, None, act_y, None, stats)
    bn_y = merge.statistics(partial, gamma, beta, eps) if stats else u.new_empty(0, dtype=torch.float32)
    return y, bn_y


def depthwise_inference(
    x: Tensor,
    bn_y: Tensor | None,
    act_y: int,
    weight: Tensor,
    stride: int,
    padding: Padding,
    packed: Tensor | None = None,
    residual: Tensor | None = None,
    slope_y: float = 0.0,
) -> Tensor:
    """The convolution's output, with ``bn_y`` normalised, activated, and with ``residual`` added to; the weight is
    taken as it is, not packed."""
    act_u, act_y = int(Act.LINEAR), compiled(act_y, slope_y)
    return _run("depthwise_inference", x, None, act_u, weight, stride, padding, None, bn_y, act_y, residual, False)[0]


def _run(
    op: str, u: Tensor, bn_u: Tensor | None, act_u: CompiledAct, weight: Tensor, stride: int, padding: Padding,
    bias: Tensor | None, bn_y: Tensor | None, act_y: CompiledAct, residual: Tensor | None, stats: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    n, channels, height, width = u.shape
    size = weight.shape[2]
    out_h, out_w = conv_output_size(height, width, size, stride, padding)
    pad_left, _, pad_top, _ = padding
    y = torch.empty((n, channels, out_h, out_w), dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y, merge.empty_statistics(u, 0, channels) if stats else None
    unit = math.gcd(channels, 8)
    lanes = (out_w + 1) // 2 if stride == 1 else out_w
    multiprocessors = gpu.of(u).multiprocessors
    candidates = heuristics.depthwise_forward(channels, u.dtype.itemsize, size, stride, stats)

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor | None]:
        kernel = config["kernel"]
        tile = (kernel["BLOCK_P"], kernel["BLOCK_C"])
        rows, programs = heuristics.depthwise_grid(n, channels, out_h, lanes, multiprocessors, tile, config["waves"])
        partial = merge.empty_statistics(u, programs, channels) if stats else None
        _kernel[(heuristics.cdiv(channels, kernel["BLOCK_C"]), programs)](
            u, bn_u, weight, bias, y, partial, bn_y, residual,
            n, height, width, channels // unit, out_h, out_w, pad_left, pad_top, rows,
            UNIT=unit, KERNEL=size, STRIDE=stride, ACT_U=act_u, ACT_Y=act_y, **kernel,
        )  # fmt: skip
        return y, partial

    flags = (act_u, act_y, bn_u is not None, bias is not None, residual is not None, stats)
    problem = (n, channels, height, width, size, stride, *padding, str(u.dtype), *flags)
    return autotune.run(op, problem, candidates, launch)


@triton.jit
def _load_row(ptr, channels, column_inside, row_inside, COLUMNS: tl.constexpr):
    """The ``COLUMNS`` columns of an input row that a lane's outputs see."""
    u = ()
    for j in tl.static_range(COLUMNS):
        u = u + (tl.load(ptr + j * channels, mask=where_also(column_inside[j], row_inside), other=0.0),)
    return u


@triton.jit
def _activate_row(u, column_inside, row_inside, norm, NORM: tl.constexpr, ACT: tl.constexpr, COLUMNS: tl.constexpr):
    a = ()
    for j in tl.static_range(COLUMNS):
        a = a + (norm_act_inside(u[j], norm, where_also(column_inside[j], row_inside), NORM, ACT),)
    return a


@triton.jit
def _add_taps(sums, a, w, KERNEL: tl.constexpr, COLUMNS: tl.constexpr):
    """A row of the filter applied to a row of the input, added to a lane's outputs in a row."""
    added = ()
    for column in tl.static_range(COLUMNS):
        acc = sums[column]
        for tap in tl.static_range(KERNEL):
            acc = acc + a[column + tap] * w[tap]
        added = added + (acc,)
    return added


@triton.jit
def _add_row(sums, a, filter, ROW: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """A row of the input added to the output rows that see it: the first of them through row ``ROW`` of the filter,
    each next one through the row ``STRIDE`` above."""
    added = ()
    for i in tl.static_range((KERNEL - 1) // STRIDE + 1):
        row = sums[i]
        if ROW - i * STRIDE >= 0:
            row = _add_taps(row, a, filter[ROW - i * STRIDE], KERNEL, COLUMNS)
        added = added + (row,)
    return added


@triton.jit(
    do_not_specialize=["images", "height", "width", "C_units", "out_height", "out_width", "pad_left", "pad_top", "rows"]
)
def _kernel(
    u_ptr, bn_u_ptr, weight_ptr, bias_ptr, y_ptr, partial_ptr, bn_y_ptr, residual_ptr,
    images, height, width, C_units, out_height, out_width, pad_left, pad_top, rows,
    UNIT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, ACT_U: tl.constexpr, ACT_Y: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    NORM_U: tl.constexpr = bn_u_ptr is not None
    NORM_Y: tl.constexpr = bn_y_ptr is not None
    STATS: tl.constexpr = partial_ptr is not None
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels

    filter = load_filter(weight_ptr, c, channel_inside, KERNEL)
    norm_u = load_norm(bn_u_ptr, channels, c, channel_inside)
    norm_y = load_norm(bn_y_ptr, channels, c, channel_inside)
    bias = load_bias(bias_ptr, c, channel_inside)

    # Statistics of a lane and channel: sums of differences from an offset, which is the first value, and from then on
    # now and then the mean of the values so far: neither a large mean nor an outlier before them cancels in M2.
    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    offset = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_P, 1], tl.float32)

    COLUMNS: tl.constexpr = 2 if STRIDE == 1 else 1
    IN_COLUMNS: tl.constexpr = KERNEL + COLUMNS - 1
    zeros = (zero, zero) if COLUMNS == 2 else (zero,)
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

        first_row = row * STRIDE - pad_top
        last_row = row_end * STRIDE - pad_top + KERNEL - 1 - STRIDE
        last_row = tl.minimum(last_row, height - 1)  # the last to be loaded
        in_column = column * STRIDE - pad_left
        inside = first_inside[:, None] & channel_inside[None, :]
        column_inside = ()
        for j in tl.static_range(IN_COLUMNS):
            image_column = in_column + j
            image_inside = image_column < width
            if j < 2:  # no more than two columns of padding
                image_inside = (image_column >= 0) & image_inside
            column_inside = column_inside + (inside & image_inside[:, None],)
        in_ptr = u_ptr + (((image * height + first_row) * width + in_column) * channels)[:, None] + c[None, :]
        out_pixel = (((image * out_height + row) * out_width + column) * channels)[:, None]
        out_ptr = y_ptr + out_pixel + c[None, :]
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + out_pixel + c[None, :]
        second_inside = second_inside[:, None] & channel_inside[None, :]

        # Each row is loaded a step before its use. The rows before the loop are those that no output row above this
        # chunk's first one, but for the chunk before, would complete.
        in_row = first_row
        row_inside = in_row >= 0
        u = _load_row(in_ptr, channels, column_inside, row_inside, IN_COLUMNS)
        sums = ()  # of the output rows that see a row of the input, from the first that is not complete
        for _ in tl.static_range((KERNEL - 1) // STRIDE + 1):
            sums = sums + (zeros,)
        for i in tl.static_range(KERNEL - STRIDE):
            a = _activate_row(u, column_inside, row_inside, norm_u, NORM_U, ACT_U, IN_COLUMNS)
            sums = _add_row(sums, a, filter, i, KERNEL, STRIDE, COLUMNS)
            in_row += 1
            in_ptr += width * channels
            row_inside = (in_row >= 0) & (in_row <= last_row)
            u = _load_row(in_ptr, channels, column_inside, row_inside, IN_COLUMNS)
        sums = sums[:-1]  # the last has had nothing yet

        for step in range(row, row_end):
            sums = sums + (zeros,)
            for i in tl.static_range(STRIDE):
                a = _activate_row(u, column_inside, row_inside, norm_u, NORM_U, ACT_U, IN_COLUMNS)
                in_row += 1
                in_ptr += width * channels
                row_inside = in_row <= last_row
                if STRIDE == 1:
                    sums = _add_row(sums, a, filter, KERNEL - 1, KERNEL, STRIDE, COLUMNS)
                    # Loaded before the products, it would need more registers than there are.
                    u = _load_row(in_ptr, channels, column_inside, row_inside, IN_COLUMNS)
                else:
                    u = _load_row(in_ptr, channels, column_inside, row_inside, IN_COLUMNS)
                    sums = _add_row(sums, a, filter, KERNEL - 2 + i, KERNEL, STRIDE, COLUMNS)
            y0 = sums[0][0]
            y0 = add_bias(y0, bias, bias_ptr is not None)
            y0 = norm_act(y0, norm_y, NORM_Y, ACT_Y)
            if residual_ptr is not None:
                y0 += tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
            y0 = rounded(y0, y_ptr.dtype.element_ty)
            tl.store(out_ptr, y0, mask=inside)
            if STATS:
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
                y1 = add_bias(sums[0][1], bias, bias_ptr is not None)
                y1 = norm_act(y1, norm_y, NORM_Y, ACT_Y)
                if residual_ptr is not None:
                    y1 += tl.load(residual_ptrs + channels, mask=second_inside, other=0.0).to(tl.float32)
                y1 = rounded(y1, y_ptr.dtype.element_ty)
                tl.store(out_ptr + channels, y1, mask=second_inside)
                if STATS:
                    difference = tl.where(second_inside, y1.to(tl.float32) - offset, 0.0)
                    total += difference
                    squares += difference * difference
                    count += second_counts
            sums = sums[1:]
            out_ptr += out_width * channels
            if residual_ptr is not None:
                residual_ptrs += out_width * channels

    if STATS:
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
        program = tl.program_id(1)
        store_statistics(partial_ptr, program, channels, c, channel_inside, all_count, origin, tile_mean, tile_m2)
