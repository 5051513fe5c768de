"""Dense 3x3 convolution, forward: for training (raw output and statistics) and for inference (normalised output).

An implicit product of patches of the input (``patches.py``) with the weight. The input is read as it is stored: that of
a network's first unit has no normalisation before it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.contract import Act, Padding, conv_output_size
from mobilenet_ext.triton import autotune, formulas, gpu, heuristics, merge
from mobilenet_ext.triton.activation import CompiledAct, compiled, load_norm, norm_act
from mobilenet_ext.triton.checks import check_plain_input
from mobilenet_ext.triton.formulas import rounded
from mobilenet_ext.triton.merge import store_statistics
from mobilenet_ext.triton.patches import load_patches, tile_origin, weight_offsets
from mobilenet_ext.triton.rows import add_bias, load_bias


def dense_forward(
    u: Tensor, bn_u: Tensor | None, act_u: int, weight: Tensor, stride: int, padding: Padding, gamma: Tensor | None,
    beta: Tensor | None, eps: float, stats: bool, bias: Tensor | None = None, slope_u: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and with ``stats`` its normalisation, else an empty float32 tensor; ``bn_u`` must be None."""
    check_plain_input(bn_u, act_u)
    y, partial = _run("dense_forward", u, weight, stride, padding, bias, None, int(Act.LINEAR), None, stats)
    bn_y = merge.statistics(partial, gamma, beta, eps) if stats else u.new_empty(0, dtype=torch.float32)
    return y, bn_y


def dense_inference(
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
    act_y = compiled(act_y, slope_y)
    return _run("dense_inference", x, weight, stride, padding, None, bn_y, act_y, residual, False)[0]


def _run(
    op: str, u: Tensor, weight: Tensor, stride: int, padding: Padding, bias: Tensor | None, bn_y: Tensor | None,
    act_y: CompiledAct, residual: Tensor | None, stats: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    n, channels, height, width = u.shape
    filters = weight.shape[0]
    out_h, out_w = conv_output_size(height, width, 3, stride, padding)
    pad_left, _, pad_top, _ = padding
    y = torch.empty((n, filters, out_h, out_w), dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y, merge.empty_statistics(u, 0, filters) if stats else None
    unit = math.gcd(filters, 8)
    problem = (n, out_h, out_w, channels, filters, u.dtype.itemsize, gpu.of(u))

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor | None]:
        kernel, programs = config["kernel"], config["PROGRAMS"]
        partial = merge.empty_statistics(u, programs, filters) if stats else None
        _kernel[(heuristics.cdiv(filters, kernel["BLOCK_N"]), programs)](
            u, weight, bias, y, partial, bn_y, residual,
            n, height, width, out_h, out_w, filters // unit, pad_left, pad_top,
            CHANNELS=channels, UNIT=unit, STRIDE=stride, ACT_Y=act_y, PRECISION=gpu.product_precision(u.dtype),
            **kernel,
        )  # fmt: skip
        return y, partial

    flags = (act_y, bias is None, residual is None)
    return autotune.run(op, (*problem, *flags), heuristics.dense_forward(*problem), launch)


@triton.jit
def _load_weight(weight_ptr, k, n, n_inside, CHANNELS: tl.constexpr):
    mask = (k < 9 * CHANNELS)[:, None] & n_inside[None, :]
    return tl.load(weight_ptr + weight_offsets(k[:, None], n[None, :], CHANNELS), mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=["images", "height", "width", "out_height", "out_width", "N_units", "pad_left", "pad_top"]
)
def _kernel(
    u_ptr, weight_ptr, bias_ptr, y_ptr, partial_ptr, bn_y_ptr, residual_ptr,
    images, height, width, out_height, out_width, N_units, pad_left, pad_top,
    CHANNELS: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr, ACT_Y: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    STATS: tl.constexpr = partial_ptr is not None
    filters = N_units * UNIT
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < filters
    m = tl.arange(0, BLOCK_M)[:, None]
    first_k = tl.arange(0, BLOCK_K)
    first_weight = _load_weight(weight_ptr, first_k, n, n_inside, CHANNELS)
    norm_y = load_norm(bn_y_ptr, filters, n, n_inside)

    # Statistics are sums of differences from the mean of the program's first tile. Being the mean of some of the
    # values, it is near enough to that of all for the difference of the sums below not to cancel.
    origin = tl.zeros([1, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_M, 1], tl.float32)
    tiles = images * tl.cdiv(out_height, BLOCK_H) * tl.cdiv(out_width, BLOCK_W)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        image, row, column = tile_origin(tile, out_height, out_width, BLOCK_H, BLOCK_W)
        inside = (m // BLOCK_W < out_height - row) & (m % BLOCK_W < out_width - column)
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.static_range(0, 9 * CHANNELS, BLOCK_K):
            weight = first_weight
            if start > 0:
                weight = _load_weight(weight_ptr, start + first_k, n, n_inside, CHANNELS)
            patches = load_patches(
                u_ptr, image, row, column, inside, start + first_k, height, width, pad_left, pad_top,
                CHANNELS, STRIDE, BLOCK_H, BLOCK_W,
            )  # fmt: skip
            y = formulas.dot(patches, weight, y, PRECISION)
        # Loaded for each tile: the product needs the registers.
        y = add_bias(y, load_bias(bias_ptr, n, n_inside), bias_ptr is not None)
        y = norm_act(y, norm_y, bn_y_ptr is not None, ACT_Y)
        first_pixel = ((image * out_height + row) * out_width + column) * filters
        offsets = (m // BLOCK_W * out_width + m % BLOCK_W) * filters
        mask = inside & n_inside[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + first_pixel + offsets + n[None, :], mask=mask, other=0.0).to(tl.float32)
        stored = rounded(y, y_ptr.dtype.element_ty)
        tl.store(y_ptr + first_pixel + offsets + n[None, :], stored, mask=mask)
        if STATS:
            count += tl.where(inside, 1.0, 0.0)
            value = stored.to(tl.float32)
            if tile == tl.program_id(1):
                origin = (tl.sum(tl.where(inside, value, 0.0), 0) / tl.sum(tl.sum(count, 1), 0))[None, :]
            difference = tl.where(inside, value - origin, 0.0)
            total += difference
            squares += difference * difference
    if STATS:
        pixels = tl.sum(tl.sum(count, 1), 0)
        offset = tl.sum(total, 0) / pixels
        m2 = formulas.move_squares(tl.sum(squares, 0), -offset * offset * pixels)
        program = tl.program_id(1).to(tl.int64)
        store_statistics(partial_ptr, program, filters, n, n_inside, pixels, tl.sum(origin, 0), offset, m2)
