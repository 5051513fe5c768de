"""Depthwise 3x3 convolution, backward: the gradients of input and weight in one pass over the data.

As in the forward kernel a tile is a row of lanes times a block of channels and walks down the image. What a lane owns
are input pixels: it rebuilds the gradient dy of the outputs that see them, and each dy meets each of its inputs once,
in a product for either gradient. A thread keeps nine taps of the filter, nine sums of the weight's gradient and seven
vectors per channel in registers, so it has four channels, in 16 bits half a 128-bit access: with eight, ptxas spills
592 bytes per thread with stride 1 and 544 with stride 2 (sm_90, bfloat16, Triton 3.6).

Rows of dz, y and u are copied into shared memory some steps before their turn, as in the forward kernel.

At the image's border a lane also multiplies its inputs by the dy of outputs that do not exist, which is 0: there a NaN
or an infinity makes more of its channel's taps NaN than those that see it (PyTorch's: only those).

Rows and columns are counted in the padded image, where input row i' = i + pad_top is seen by output row
(i' - k)/stride through tap k = 0, 1, 2. Stride 1: a lane owns the inputs left and right, in columns j' and j' + 1. Taps
between them and dy:

    column of dy    j' - 2        j' - 1        j'          j' + 1
                    dy[3]         dy[2]         dy[1]       dy[0]
    left                2             1             0
    right                             2             1           0

Row i' of dy meets the input rows i', i' + 1 and i' + 2 through the top, middle and bottom taps. Stride 2: a lane owns
the inputs in rows 2r (even) and 2r + 1 (odd), columns 2s (left) and 2s + 1 (right). Taps between them and dy:

    row, column     r - 1, s - 1  r - 1, s      r, s - 1    r, s
                    above_left    above_right   dy_left     dy_right
    even left       bottom[2]     bottom[0]     top[2]      top[0]
    even right                    bottom[1]                 top[1]
    odd left                                    middle[2]   middle[0]
    odd right                                               middle[1]
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.contract import Padding
from mobilenet_ext.triton import autotune, depthwise_backward_5x5, gpu, heuristics, merge
from mobilenet_ext.triton.activation import compiled, load_norm, norm_act, norm_act_inside
from mobilenet_ext.triton.checks import check_input
from mobilenet_ext.triton.depthwise import gradient, load_filter, load_outputs, store_dz, store_filter
from mobilenet_ext.triton.formulas import handed_on, load_gradient_coefficients, where_also
from mobilenet_ext.triton.merge import store_sums


def depthwise_backward(
    dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, bn_u: Tensor | None, act_u: int,
    batch_stats_u: bool, weight: Tensor, stride: int, padding: Padding, need_input: bool, need_weight: bool,
    slope_u: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dz_u, grad_weight, grad_bn_u); those that are not wanted, and the last without ``bn_u``, are empty."""
    check_input(bn_u, act_u)
    act_u = compiled(act_u, slope_u)
    n, channels, height, width = u.shape
    pad_left, _, pad_top, _ = padding
    grad_weight = u.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)
    dz_u = torch.empty_like(u, memory_format=torch.channels_last) if need_input else u.new_empty(0)
    if stride == 1:
        lanes, rows = (width + 1) // 2, height
    else:
        lanes, rows = (width - 1 + pad_left) // 2 + 1, (height - 1 + pad_top) // 2 + 1
    multiprocessors, unit = gpu.of(u).multiprocessors, math.gcd(channels, 8)
    size = weight.shape[2]
    if size == 3:
        # Whether the image is as wide and high as the outputs, times the stride, and every lane and row of it is full.
        exact = tuple(padding) == (1, 1, 1, 1) and width % 2 == height % stride == 0
        kernel, constants = (_stride_1 if stride == 1 else _stride_2), {"EXACT": exact}
    else:
        kernel, constants = depthwise_backward_5x5.kernel, {"STRIDE": stride}
    want_sums = need_input and bn_u is not None

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor, Tensor]:
        sizes, waves = config["kernel"], config["waves"]
        tile = (sizes["BLOCK_P"], sizes["BLOCK_C"])
        rows_at_once, programs = heuristics.depthwise_grid(n, channels, rows, lanes, multiprocessors, tile, waves)
        sums = merge.empty_sums(u, programs, channels) if want_sums else None
        partial = u.new_empty((programs, channels, size * size), dtype=torch.float32) if need_weight else None
        if programs:
            kernel[(heuristics.cdiv(channels, sizes["BLOCK_C"]), programs)](
                dz, y if grad_bn_y is not None else None, grad_bn_y, u, bn_u, weight, dz_u if need_input else None,
                sums, partial, n, height, width, channels // unit, *dz.shape[2:], pad_left, pad_top, rows_at_once,
                UNIT=unit, ACT_U=act_u, **constants, **sizes,
            )  # fmt: skip
        count = n * height * width
        return dz_u, grad_weight, merge.gradients(sums, bn_u, batch_stats_u, count, partial, grad_weight)

    flags = (y is not None, want_sums, need_weight)
    problem = (n, channels, height, width, size, stride, *padding, str(u.dtype), act_u, *flags)
    candidates = heuristics.depthwise_backward(channels, u.dtype.itemsize, size)
    return autotune.run("depthwise_backward", problem, candidates, launch)


@triton.jit
def _load_inputs(u_ptr, offset, channels, left_inside, right_inside, row_inside):
    """A lane's left and right input in a row, as they are stored."""
    left = tl.load(u_ptr + offset, mask=where_also(left_inside, row_inside), other=0.0)
    right = tl.load(u_ptr + offset + channels, mask=where_also(right_inside, row_inside), other=0.0)
    return left, right


@triton.jit
def _add_row(da_left, da_right, dy, w):
    """A row of the filter applied to a row of dy, added to the gradients of a lane's two inputs."""
    da_left = da_left + dy[1] * w[0] + dy[2] * w[1] + dy[3] * w[2]
    da_right = da_right + dy[0] * w[0] + dy[1] * w[1] + dy[2] * w[2]
    return da_left, da_right


@triton.jit
def _add_products(acc, left, right, dy):
    """A row of the weight's gradient, with the products of a lane's two inputs and the dys that see them added."""
    return (
        acc[0] + left * dy[1] + right * dy[0],
        acc[1] + left * dy[2] + right * dy[1],
        acc[2] + left * dy[3] + right * dy[2],
    )


@triton.jit(
    do_not_specialize=["images", "height", "width", "C_units", "out_height", "out_width", "pad_left", "pad_top", "rows"]
)
def _stride_1(
    dz_ptr, y_ptr, grad_bn_ptr, u_ptr, bn_u_ptr, weight_ptr, dz_u_ptr, sums_ptr, partial_ptr,
    images, height, width, C_units, out_height, out_width, pad_left, pad_top, rows,
    UNIT: tl.constexpr, ACT_U: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A lane owns two neighbouring input columns, left and right, which are seen by four output columns."""
    BATCH_STATS: tl.constexpr = y_ptr is not None
    NORM_U: tl.constexpr = bn_u_ptr is not None
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    top, middle, bottom = load_filter(weight_ptr, c, channel_inside, 3)
    coefficients = load_gradient_coefficients(grad_bn_ptr, channels, c, channel_inside, BATCH_STATS)
    norm_u = load_norm(bn_u_ptr, channels, c, channel_inside)

    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    grad_top = (zero, zero, zero)
    grad_middle = (zero, zero, zero)
    grad_bottom = (zero, zero, zero)
    sum_dz = zero
    sum_dz_centred = zero

    pairs = (width + 1) // 2
    chunks = tl.cdiv(height, rows)
    tasks = tl.cdiv(images * pairs, BLOCK_P) * chunks
    for task in range(tl.program_id(1), tasks, tl.num_programs(1)):
        lane = task // chunks * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (lane // pairs).to(tl.int64)
        column = lane % pairs * 2
        first_row = task % chunks * rows
        row_end = tl.minimum(first_row + rows, height)

        out_column = column + pad_left  # j'
        left_inside = (lane < images * pairs)[:, None] & channel_inside[None, :]
        right_inside = left_inside if EXACT else left_inside & (column + 1 < width)[:, None]
        dy_inside = (
            left_inside & (out_column + 1 < out_width)[:, None],
            left_inside if EXACT else left_inside & (out_column < out_width)[:, None],
            left_inside if EXACT else left_inside & ((out_column >= 1) & (out_column - 1 < out_width))[:, None],
            left_inside & ((out_column >= 2) if EXACT else (out_column >= 2) & (out_column - 2 < out_width))[:, None],
        )
        out_row = first_row + pad_top - 2
        out_offset = (((image * out_height + out_row) * out_width + out_column + 1) * channels)[:, None] + c[None, :]
        in_offset = (((image * height + first_row) * width + column) * channels)[:, None] + c[None, :]

        # Inputs, and their gradients, in the rows that meet this row of dy through the top, middle and bottom taps. The
        # first two rows of dy lie above those of this chunk's inputs: what they complete is not this chunk's.
        # (Zeros of their own: of names that start as one tensor and hand values on, Triton's compiler loses some.)
        left_top = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        left_middle = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        right_top = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        right_middle = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        da_left_top, da_right_top = zero, zero
        da_left_middle, da_right_middle = zero, zero
        u_top = (
            tl.zeros([BLOCK_P, BLOCK_C], u_ptr.dtype.element_ty),
            tl.zeros([BLOCK_P, BLOCK_C], u_ptr.dtype.element_ty),
        )
        u_middle = (
            tl.zeros([BLOCK_P, BLOCK_C], u_ptr.dtype.element_ty),
            tl.zeros([BLOCK_P, BLOCK_C], u_ptr.dtype.element_ty),
        )
        for row in tl.range(first_row - 2, row_end, num_stages=STAGES):
            row_inside = (out_row >= 0) & (out_row < out_height)
            outputs = load_outputs(dz_ptr, y_ptr, out_offset, channels, dy_inside, row_inside, BATCH_STATS, 4)
            left, right = _load_inputs(u_ptr, in_offset, channels, left_inside, right_inside, row + 2 < row_end)
            dy = (
                gradient(outputs[0], coefficients, dy_inside[0], row_inside, BATCH_STATS),
                gradient(outputs[1], coefficients, dy_inside[1], row_inside, BATCH_STATS),
                gradient(outputs[2], coefficients, dy_inside[2], row_inside, BATCH_STATS),
                gradient(outputs[3], coefficients, dy_inside[3], row_inside, BATCH_STATS),
            )
            left_bottom = norm_act_inside(left, norm_u, where_also(left_inside, row + 2 < row_end), NORM_U, ACT_U)
            right_bottom = norm_act_inside(right, norm_u, where_also(right_inside, row + 2 < row_end), NORM_U, ACT_U)
            if partial_ptr is not None:
                grad_top = _add_products(grad_top, left_top, right_top, dy)
                grad_middle = _add_products(grad_middle, left_middle, right_middle, dy)
                grad_bottom = _add_products(grad_bottom, left_bottom, right_bottom, dy)
            if dz_u_ptr is not None:
                da_left, da_right = _add_row(da_left_top, da_right_top, dy, top)
                left_mask = where_also(left_inside, row >= first_row)
                right_mask = where_also(right_inside, row >= first_row)
                offset = in_offset - 2 * width * channels
                left_sums = store_dz(dz_u_ptr + offset, u_top[0], da_left, left_top, norm_u, left_mask, NORM_U, ACT_U)
                offset += channels
                right_sums = store_dz(
                    dz_u_ptr + offset, u_top[1], da_right, right_top, norm_u, right_mask, NORM_U, ACT_U
                )
                sum_dz += left_sums[0] + right_sums[0]
                sum_dz_centred += left_sums[1] + right_sums[1]
                da_left_top, da_right_top = _add_row(da_left_middle, da_right_middle, dy, middle)
                da_left_middle, da_right_middle = _add_row(zero, zero, dy, bottom)
            left_top, right_top = handed_on(left_middle), handed_on(right_middle)
            left_middle, right_middle = left_bottom, right_bottom
            u_top = (handed_on(u_middle[0]), handed_on(u_middle[1]))
            u_middle = (left, right)
            out_row += 1
            out_offset += out_width * channels
            in_offset += width * channels

    if sums_ptr is not None:
        program = tl.program_id(1)
        store_sums(sums_ptr, program, channels, c, channel_inside, tl.sum(sum_dz, 0), tl.sum(sum_dz_centred, 0))
    if partial_ptr is not None:
        store_filter(partial_ptr, channels, c, channel_inside, (grad_top, grad_middle, grad_bottom), 3)


@triton.jit(
    do_not_specialize=["images", "height", "width", "C_units", "out_height", "out_width", "pad_left", "pad_top", "rows"]
)
def _stride_2(
    dz_ptr, y_ptr, grad_bn_ptr, u_ptr, bn_u_ptr, weight_ptr, dz_u_ptr, sums_ptr, partial_ptr,
    images, height, width, C_units, out_height, out_width, pad_left, pad_top, rows,
    UNIT: tl.constexpr, ACT_U: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A lane owns four inputs, in an even and an odd row and in a left and a right column, which four outputs see."""
    BATCH_STATS: tl.constexpr = y_ptr is not None
    NORM_U: tl.constexpr = bn_u_ptr is not None
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    top, middle, bottom = load_filter(weight_ptr, c, channel_inside, 3)
    coefficients = load_gradient_coefficients(grad_bn_ptr, channels, c, channel_inside, BATCH_STATS)
    norm_u = load_norm(bn_u_ptr, channels, c, channel_inside)

    zero = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    grad_top = (zero, zero, zero)
    grad_middle = (zero, zero, zero)
    grad_bottom = (zero, zero, zero)
    sum_dz = zero
    sum_dz_centred = zero

    column_pairs = (width - 1 + pad_left) // 2 + 1
    row_pairs = (height - 1 + pad_top) // 2 + 1
    chunks = tl.cdiv(row_pairs, rows)
    tasks = tl.cdiv(images * column_pairs, BLOCK_P) * chunks
    for task in range(tl.program_id(1), tasks, tl.num_programs(1)):
        lane = task // chunks * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (lane // column_pairs).to(tl.int64)
        out_column = lane % column_pairs
        column = out_column * 2 - pad_left
        first_row = task % chunks * rows

        inside = (lane < images * column_pairs)[:, None] & channel_inside[None, :]
        left_inside = inside & (column >= 0)[:, None]
        right_inside = inside & ((column + 1 >= 0) & (column + 1 < width))[:, None]
        if EXACT:
            out_right_inside = right_inside
            out_left_inside = left_inside
        else:
            out_right_inside = inside & (out_column < out_width)[:, None]
            out_left_inside = inside & ((out_column >= 1) & (out_column - 1 < out_width))[:, None]
        dy_inside = (out_right_inside, out_left_inside)
        out_offset = (((image * out_height + first_row) * out_width + out_column) * channels)[:, None] + c[None, :]
        in_offset = (((image * height + 2 * first_row - pad_top) * width + column) * channels)[:, None] + c[None, :]

        in_row = first_row * 2 - pad_top
        # dy of the outputs in the row above.
        above_right = zero
        above_left = zero
        if first_row > 0:
            above_inside = first_row - 1 < out_height
            above_offset = out_offset - out_width * channels
            above = load_outputs(dz_ptr, y_ptr, above_offset, channels, dy_inside, above_inside, BATCH_STATS, 2)
            above_right = gradient(above[0], coefficients, out_right_inside, above_inside, BATCH_STATS)
            above_left = gradient(above[1], coefficients, out_left_inside, above_inside, BATCH_STATS)

        row_end = tl.minimum(first_row + rows, row_pairs)
        for row in tl.range(first_row, row_end, num_stages=STAGES):
            row_inside = row < out_height
            even_inside = in_row >= 0
            odd_inside = row_inside if EXACT else (in_row + 1 >= 0) & (in_row + 1 < height)
            odd_offset = in_offset + width * channels
            outputs = load_outputs(dz_ptr, y_ptr, out_offset, channels, dy_inside, row_inside, BATCH_STATS, 2)
            even = _load_inputs(u_ptr, in_offset, channels, left_inside, right_inside, even_inside)
            odd = _load_inputs(u_ptr, odd_offset, channels, left_inside, right_inside, odd_inside)
            dy_right = gradient(outputs[0], coefficients, out_right_inside, row_inside, BATCH_STATS)
            dy_left = gradient(outputs[1], coefficients, out_left_inside, row_inside, BATCH_STATS)
            even_left_inside = where_also(left_inside, even_inside)
            even_right_inside = where_also(right_inside, even_inside)
            odd_left_inside = where_also(left_inside, odd_inside)
            odd_right_inside = where_also(right_inside, odd_inside)
            # The last odd row and column may be seen by no output: then what is there must not reach the weight.
            even_right_seen = even_right_inside & out_right_inside
            odd_left_seen = where_also(odd_left_inside, row_inside)
            odd_right_seen = where_also(odd_right_inside & out_right_inside, row_inside)
            even_left = tl.where(even_left_inside, norm_act(even[0], norm_u, NORM_U, ACT_U), 0.0)
            even_right = tl.where(even_right_seen, norm_act(even[1], norm_u, NORM_U, ACT_U), 0.0)
            odd_left = tl.where(odd_left_seen, norm_act(odd[0], norm_u, NORM_U, ACT_U), 0.0)
            odd_right = tl.where(odd_right_seen, norm_act(odd[1], norm_u, NORM_U, ACT_U), 0.0)
            if partial_ptr is not None:
                grad_top = (
                    grad_top[0] + even_left * dy_right,
                    grad_top[1] + even_right * dy_right,
                    grad_top[2] + even_left * dy_left,
                )
                grad_middle = (
                    grad_middle[0] + odd_left * dy_right,
                    grad_middle[1] + odd_right * dy_right,
                    grad_middle[2] + odd_left * dy_left,
                )
                grad_bottom = (
                    grad_bottom[0] + even_left * above_right,
                    grad_bottom[1] + even_right * above_right,
                    grad_bottom[2] + even_left * above_left,
                )
            if dz_u_ptr is not None:
                da_even_left = dy_right * top[0] + dy_left * top[2] + above_right * bottom[0] + above_left * bottom[2]
                da_even_right = dy_right * top[1] + above_right * bottom[1]
                da_odd_left = dy_right * middle[0] + dy_left * middle[2]
                da_odd_right = dy_right * middle[1]
                even_ptr = dz_u_ptr + in_offset
                odd_ptr = even_ptr + width * channels
                sums0 = store_dz(even_ptr, even[0], da_even_left, even_left, norm_u, even_left_inside, NORM_U, ACT_U)
                even_ptr += channels
                sums1 = store_dz(even_ptr, even[1], da_even_right, even_right, norm_u, even_right_inside, NORM_U, ACT_U)
                sums2 = store_dz(odd_ptr, odd[0], da_odd_left, odd_left, norm_u, odd_left_inside, NORM_U, ACT_U)
                odd_ptr += channels
                sums3 = store_dz(odd_ptr, odd[1], da_odd_right, odd_right, norm_u, odd_right_inside, NORM_U, ACT_U)
                sum_dz += sums0[0] + sums1[0] + sums2[0] + sums3[0]
                sum_dz_centred += sums0[1] + sums1[1] + sums2[1] + sums3[1]
            above_right = dy_right
            above_left = dy_left
            out_offset += out_width * channels
            in_offset += 2 * width * channels
            in_row += 2

    if sums_ptr is not None:
        program = tl.program_id(1)
        store_sums(sums_ptr, program, channels, c, channel_inside, tl.sum(sum_dz, 0), tl.sum(sum_dz_centred, 0))
    if partial_ptr is not None:
        store_filter(partial_ptr, channels, c, channel_inside, (grad_top, grad_middle, grad_bottom), 3)
