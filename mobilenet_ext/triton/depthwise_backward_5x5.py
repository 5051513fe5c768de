"""Depthwise 5x5 convolution, backward: the gradients of input and weight in one pass over the data.

The kernel is that of ``depthwise_backward.py``, written for a filter of any size: a lane owns input pixels in two
neighbouring columns and walks down the image. Twenty-five taps and as many sums of the weight's gradient leave
registers for two channels per thread.

A lane's input rows count in groups, of which each row of dy begins one: with stride 1 it is a row, with stride 2 an
even and an odd row of the padded image. A row of dy meets its own group and REACH more, row f of group i of them
through the filter's row i*STRIDE + f. In columns it is the same, seen from a lane: column j of the DY columns of dy
that it needs, the rightmost first, meets the left input (f = 0) and the right one (f = 1) through tap
j*STRIDE + f + STRIDE - 2, if the filter has such a tap.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mobilenet_ext.triton.activation import load_norm, norm_act_inside
from mobilenet_ext.triton.depthwise import gradient, load_filter, load_outputs, store_dz, store_filter
from mobilenet_ext.triton.formulas import load_gradient_coefficients, where_also
from mobilenet_ext.triton.merge import store_sums


@triton.jit
def _zero_groups(GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Zeros for the inputs of some groups, each of its own: of names that start as one tensor and hand values on,
    Triton's compiler loses some."""
    groups = ()
    for _ in tl.static_range(GROUPS):
        rows = ()
        for _ in tl.static_range(ROWS):
            left = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            right = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
            rows = rows + ((left, right),)
        groups = groups + (rows,)
    return groups


@triton.jit
def _rows_inside(group, first, end, in_row, height, STRIDE: tl.constexpr):
    """Which rows of a group lie in the image and in this chunk of groups."""
    inside = ()
    for f in tl.static_range(STRIDE):
        inside = inside + ((group >= first) & (group < end) & (in_row + f >= 0) & (in_row + f < height),)
    return inside


@triton.jit
def _rows_seen(inside, group, out_height, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Which of them some output sees: with stride 2 the last odd one may be seen by none."""
    seen = (inside[0],)
    if STRIDE == 2:
        seen = seen + (inside[1] & (group - (KERNEL - 3) // 2 < out_height),)
    return seen


@triton.jit
def _load_group(ptr, row_step, channels, columns, rows, STRIDE: tl.constexpr):
    """A group's inputs, as they are stored."""
    group = ()
    for f in tl.static_range(STRIDE):
        left = tl.load(ptr + f * row_step, mask=where_also(columns[0], rows[f]), other=0.0)
        right = tl.load(ptr + f * row_step + channels, mask=where_also(columns[1], rows[f]), other=0.0)
        group = group + ((left, right),)
    return group


@triton.jit
def _activate_group(u, norm, columns, rows, NORM: tl.constexpr, ACT: tl.constexpr, STRIDE: tl.constexpr):
    group = ()
    for f in tl.static_range(STRIDE):
        left = norm_act_inside(u[f][0], norm, where_also(columns[0], rows[f]), NORM, ACT)
        right = norm_act_inside(u[f][1], norm, where_also(columns[1], rows[f]), NORM, ACT)
        group = group + ((left, right),)
    return group


@triton.jit
def _add_dy(groups, dy, filter, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DY: tl.constexpr):
    """The gradients of the groups that a row of dy meets, with what it adds."""
    added = ()
    for i in tl.static_range((KERNEL - 1) // STRIDE + 1):
        rows = ()
        for f in tl.static_range(STRIDE):
            row = groups[i][f]
            if i * STRIDE + f < KERNEL:
                row = _add_dy_row(row, dy, filter[i * STRIDE + f], KERNEL, STRIDE, DY)
            rows = rows + (row,)
        added = added + (rows,)
    return added


@triton.jit
def _add_dy_row(row, dy, w, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DY: tl.constexpr):
    added = ()
    for f in tl.static_range(2):
        da = row[f]
        for j in tl.static_range(DY):
            if (j * STRIDE + f + STRIDE - 2 >= 0) and (j * STRIDE + f + STRIDE - 2 < KERNEL):
                da = da + dy[j] * w[j * STRIDE + f + STRIDE - 2]
        added = added + (da,)
    return added


@triton.jit
def _add_products(sums, groups, dy, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """The weight's gradient, with the products of a row of dy and the inputs that it meets."""
    added = ()
    for i in tl.static_range(KERNEL):
        a = groups[i // STRIDE][i % STRIDE]
        row = ()
        for tap in tl.static_range(KERNEL):
            acc = sums[i][tap]
            for f in tl.static_range(2):
                if (tap - f + 2 - STRIDE) % STRIDE == 0:
                    acc = acc + a[f] * dy[(tap - f + 2 - STRIDE) // STRIDE]
            row = row + (acc,)
        added = added + (row,)
    return added


@triton.jit(
    do_not_specialize=["images", "height", "width", "C_units", "out_height", "out_width", "pad_left", "pad_top", "rows"]
)
def kernel(
    dz_ptr, y_ptr, grad_bn_ptr, u_ptr, bn_u_ptr, weight_ptr, dz_u_ptr, sums_ptr, partial_ptr,
    images, height, width, C_units, out_height, out_width, pad_left, pad_top, rows,
    UNIT: tl.constexpr, STRIDE: tl.constexpr, ACT_U: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    KERNEL: tl.constexpr = 5
    REACH: tl.constexpr = (KERNEL - 1) // STRIDE
    DY: tl.constexpr = REACH + 3 - STRIDE
    BATCH_STATS: tl.constexpr = y_ptr is not None
    NORM_U: tl.constexpr = bn_u_ptr is not None
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    filter = load_filter(weight_ptr, c, channel_inside, KERNEL)
    coefficients = load_gradient_coefficients(grad_bn_ptr, channels, c, channel_inside, BATCH_STATS)
    norm_u = load_norm(bn_u_ptr, channels, c, channel_inside)

    grad_weight = ()
    for _ in tl.static_range(KERNEL):
        row = ()
        for _ in tl.static_range(KERNEL):
            row = row + (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
        grad_weight = grad_weight + (row,)
    sum_dz = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_dz_centred = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)

    # Of the padded image with stride 2, of the image itself with stride 1, where padding has no inputs to offer.
    lead_left = pad_left if STRIDE == 2 else 0
    lead_top = pad_top if STRIDE == 2 else 0
    pairs = (width - 1 + lead_left) // 2 + 1
    groups = (height - 1 + lead_top) // STRIDE + 1
    chunks = tl.cdiv(groups, rows)
    tasks = tl.cdiv(images * pairs, BLOCK_P) * chunks
    for task in range(tl.program_id(1), tasks, tl.num_programs(1)):
        lane = task // chunks * BLOCK_P + tl.arange(0, BLOCK_P)
        image = (lane // pairs).to(tl.int64)
        column = lane % pairs * 2 - lead_left
        first = task % chunks * rows
        end = tl.minimum(first + rows, groups)

        inside = (lane < images * pairs)[:, None] & channel_inside[None, :]
        columns_inside = (
            inside & (column >= 0)[:, None],
            inside & ((column + 1 >= 0) & (column + 1 < width))[:, None],
        )
        columns_seen = columns_inside
        # The rightmost column of dy that sees one of a lane's inputs.
        if STRIDE == 2:
            out_column = lane % pairs
            right_seen = (out_column - (KERNEL - 3) // 2 < out_width)[:, None]
            columns_seen = (columns_inside[0], columns_inside[1] & right_seen)
        else:
            out_column = column + pad_left + 1
        dy_inside = ()
        for j in tl.static_range(DY):
            dy_inside = dy_inside + (inside & ((out_column >= j) & (out_column - j < out_width))[:, None],)

        # dy of the first rows lies above that of this chunk's groups: what it completes is not this chunk's.
        out_row = first - REACH + pad_top - lead_top
        in_row = first * STRIDE - lead_top  # of the group that meets this row of dy through the filter's last rows
        out_offset = (((image * out_height + out_row) * out_width + out_column) * channels)[:, None] + c[None, :]
        in_offset = (((image * height + in_row) * width + column) * channels)[:, None] + c[None, :]
        row_step = width * channels
        a = _zero_groups(REACH, STRIDE, BLOCK_P, BLOCK_C)
        da = _zero_groups(REACH, STRIDE, BLOCK_P, BLOCK_C)
        # The first row; in the loop it is the next one.
        row_inside = (out_row >= 0) & (out_row < out_height)
        outputs = load_outputs(dz_ptr, y_ptr, out_offset, channels, dy_inside, row_inside, BATCH_STATS, DY)
        rows_inside = _rows_inside(first, first, end, in_row, height, STRIDE)
        rows_seen = _rows_seen(rows_inside, first, out_height, KERNEL, STRIDE)
        u = _load_group(u_ptr + in_offset, row_step, channels, columns_seen, rows_seen, STRIDE)
        for group in range(first - REACH, end):
            dy = ()
            for j in tl.static_range(DY):
                dy = dy + (gradient(outputs[j], coefficients, dy_inside[j], row_inside, BATCH_STATS),)
            a = a + (_activate_group(u, norm_u, columns_seen, rows_seen, NORM_U, ACT_U, STRIDE),)
            out_row += 1
            in_row += STRIDE
            out_offset += out_width * channels
            in_offset += STRIDE * row_step
            row_inside = (out_row >= 0) & (out_row < out_height) & (group + 1 < end)
            outputs = load_outputs(dz_ptr, y_ptr, out_offset, channels, dy_inside, row_inside, BATCH_STATS, DY)
            rows_inside = _rows_inside(group + REACH + 1, first, end, in_row, height, STRIDE)
            rows_seen = _rows_seen(rows_inside, group + REACH + 1, out_height, KERNEL, STRIDE)
            u = _load_group(u_ptr + in_offset, row_step, channels, columns_seen, rows_seen, STRIDE)
            if partial_ptr is not None:
                grad_weight = _add_products(grad_weight, a, dy, KERNEL, STRIDE)
            if dz_u_ptr is not None:
                da = _add_dy(da + _zero_groups(1, STRIDE, BLOCK_P, BLOCK_C), dy, filter, KERNEL, STRIDE, DY)
                complete_row = in_row - (REACH + 1) * STRIDE
                complete_inside = _rows_inside(group, first, end, complete_row, height, STRIDE)
                for f in tl.static_range(STRIDE):
                    for side in tl.static_range(2):
                        # u again, from the cache: kept for so many rows it would need more registers than there are.
                        offset = in_offset - ((REACH + 1) * STRIDE - f) * row_step + side * channels
                        mask = where_also(columns_inside[side], complete_inside[f])
                        u_again = tl.load(u_ptr + offset, mask=mask, other=0.0)
                        sums = store_dz(
                            dz_u_ptr + offset, u_again, da[0][f][side], a[0][f][side], norm_u, mask, NORM_U, ACT_U
                        )
                        sum_dz += sums[0]
                        sum_dz_centred += sums[1]
                da = da[1:]
            a = a[1:]

    if sums_ptr is not None:
        program = tl.program_id(1)
        store_sums(sums_ptr, program, channels, c, channel_inside, tl.sum(sum_dz, 0), tl.sum(sum_dz_centred, 0))
    if partial_ptr is not None:
        store_filter(partial_ptr, channels, c, channel_inside, grad_weight, KERNEL)
