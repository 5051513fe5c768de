"""Depthwise convolution, 3x3 and 5x5, forward: for training (raw output and statistics) and for inference (normalised
output).

A tile is a row of lanes times a block of channels and walks down the image: each input row is loaded, normalised and
activated once and added to all output rows that see it, whose partial sums stay in registers. A lane owns neighbouring
output columns: four of them see six input columns at 3x3, where two see four, so that each input is normalised 1.5
times and not twice. Lanes count through the columns of all images, so that tiles are full whatever the width.

Rows are copied into shared memory some steps before their turn (Triton's pipelining of the loop): with the few threads
that so many registers leave room for, a row in flight for each is less than the memory needs to be busy. Where the
image is as wide as its outputs and every lane is full (``EXACT``), only a lane's first and last columns can be padding;
masks of all columns are a tenth of the instructions.
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
    multiprocessors = gpu.of(u).multiprocessors
    candidates = heuristics.depthwise_forward(channels, width, out_w, pad_left, u.dtype.itemsize, size, stride, stats)

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor | None]:
        kernel = config["kernel"]
        tile = (kernel["BLOCK_P"], kernel["BLOCK_C"])
        lanes = heuristics.cdiv(out_w, kernel["COLUMNS"])
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
def _activate_row(
    u, column_inside, row_inside, norm, NORM: tl.constexpr, ACT: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, INNER_END: tl.constexpr,
):  # fmt: skip
    """The columns from ``INNER`` to ``INNER_END`` are inside, of every lane that counts."""
    if NORM:  # a row outside is 0, and so becomes z: fewer instructions than a mask for each column
        norm = (tl.where(row_inside, norm[0], 0), tl.where(row_inside, norm[1], 0), tl.where(row_inside, norm[2], 0))
    a = ()
    for j in tl.static_range(COLUMNS):
        if INNER <= j and j < INNER_END:
            a = a + (norm_act(u[j], norm, NORM, ACT),)
        else:
            a = a + (norm_act_inside(u[j], norm, column_inside[j], NORM, ACT),)
    return a


@triton.jit
def _add_taps(sums, a, w, KERNEL: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """A row of the filter applied to a row of the input, added to a lane's outputs in a row."""
    added = ()
    for column in tl.static_range(COLUMNS):
        acc = sums[column]
        for tap in tl.static_range(KERNEL):
            acc = acc + a[column * STRIDE + tap] * w[tap]
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
            row = _add_taps(row, a, filter[ROW - i * STRIDE], KERNEL, STRIDE, COLUMNS)
        added = added + (row,)
    return added


@triton.jit(
    do_not_specialize=["images", "height", "width", "C_units", "out_height", "out_width", "pad_left", "pad_top", "rows"]
)
def _kernel(
    u_ptr, bn_u_ptr, weight_ptr, bias_ptr, y_ptr, partial_ptr, bn_y_ptr, residual_ptr,
    images, height, width, C_units, out_height, out_width, pad_left, pad_top, rows,
    UNIT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, ACT_U: tl.constexpr, ACT_Y: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
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

    IN_COLUMNS: tl.constexpr = KERNEL + (COLUMNS - 1) * STRIDE
    # Where every lane is full, these are the columns of its input that are padding for none.
    INNER: tl.constexpr = KERNEL // 2 if EXACT else IN_COLUMNS
    INNER_END: tl.constexpr = KERNEL // 2 + COLUMNS * STRIDE if EXACT else IN_COLUMNS
    zeros = ()
    for _ in tl.static_range(COLUMNS):
        zeros = zeros + (zero,)
    lanes = (out_width + COLUMNS - 1) // COLUMNS
    chunks = tl.cdiv(out_height, rows)
    tasks = tl.cdiv(images * lanes, BLOCK_P) * chunks
    for task in range(tl.program_id(1), tasks, tl.num_programs(1)):
        lane = task // chunks * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (lane // lanes).to(tl.int64)
        column = lane % lanes * COLUMNS
        row = task % chunks * rows
        row_end = tl.minimum(row + rows, out_height)
        lane_inside = lane < images * lanes

        first_row = row * STRIDE - pad_top
        last_row = row_end * STRIDE - pad_top + KERNEL - 1 - STRIDE
        last_row = tl.minimum(last_row, height - 1)  # the last to be loaded
        in_column = column * STRIDE - pad_left
        inside = lane_inside[:, None] & channel_inside[None, :]
        out_inside = ()
        counts = tl.zeros([BLOCK_P, 1], tl.float32)  # the outputs of a lane in a row
        for j in tl.static_range(COLUMNS):
            if EXACT:
                out_inside = out_inside + (inside,)
                counts += tl.where(lane_inside, 1.0, 0.0)[:, None]
            else:
                out_column_inside = lane_inside & (column + j < out_width)
                out_inside = out_inside + (out_column_inside[:, None] & channel_inside[None, :],)
                counts += tl.where(out_column_inside, 1.0, 0.0)[:, None]
        column_inside = ()
        for j in tl.static_range(IN_COLUMNS):
            if INNER <= j and j < INNER_END:
                column_inside = column_inside + (inside,)
            else:
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

        # The rows before the loop are those that no output row above this chunk's first one, but for the chunk before,
        # would complete.
        in_row = first_row
        sums = ()  # of the output rows that see a row of the input, from the first that is not complete
        for _ in tl.static_range((KERNEL - 1) // STRIDE + 1):
            sums = sums + (zeros,)
        for i in tl.static_range(KERNEL - STRIDE):
            row_inside = (in_row >= 0) & (in_row <= last_row)
            u = _load_row(in_ptr, channels, column_inside, row_inside, IN_COLUMNS)
            a = _activate_row(u, column_inside, row_inside, norm_u, NORM_U, ACT_U, IN_COLUMNS, INNER, INNER_END)
            sums = _add_row(sums, a, filter, i, KERNEL, STRIDE, COLUMNS)
            in_row += 1
            in_ptr += width * channels
        sums = sums[:-1]  # the last has had nothing yet

        for step in tl.range(row, row_end, num_stages=STAGES):
            sums = sums + (zeros,)
            for i in tl.static_range(STRIDE):
                row_inside = in_row + i <= last_row
                if STRIDE == 2 and i == 0:  # at 3x3 a second row of padding
                    row_inside = row_inside & (in_row >= 0)
                u = _load_row(in_ptr + i * width * channels, channels, column_inside, row_inside, IN_COLUMNS)
                a = _activate_row(u, column_inside, row_inside, norm_u, NORM_U, ACT_U, IN_COLUMNS, INNER, INNER_END)
                sums = _add_row(sums, a, filter, KERNEL - STRIDE + i, KERNEL, STRIDE, COLUMNS)
            in_row += STRIDE
            in_ptr += STRIDE * width * channels
            for j in tl.static_range(COLUMNS):
                y = add_bias(sums[0][j], bias, bias_ptr is not None)
                y = norm_act(y, norm_y, NORM_Y, ACT_Y)
                if residual_ptr is not None:
                    y += tl.load(residual_ptrs + j * channels, mask=out_inside[j], other=0.0).to(tl.float32)
                y = rounded(y, y_ptr.dtype.element_ty)
                tl.store(out_ptr + j * channels, y, mask=out_inside[j])
                if STATS:
                    if j == 0:
                        if ((step - row) & (step - row - 1)) == 0:
                            mean = offset + total / tl.where(count > 0, count, 1.0)
                            nearer = tl.where(count > 0, mean, y.to(tl.float32))
                            moved = nearer - offset  # not total/count, but what rounding left of it
                            squares = move_squares(squares, moved * (count * moved - 2 * total))
                            total -= count * moved
                            offset = nearer
                    difference = tl.where(out_inside[j], y.to(tl.float32) - offset, 0.0)
                    total += difference
                    squares += difference * difference
            count += counts
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
