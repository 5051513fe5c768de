"""Dense 3x3 convolution, backward: the weight's gradient, and the input's where it is wanted.

The gradient of the output, dy, is rebuilt from dz and y as each tile is loaded. The weight's gradient is the product
patches^T [9*C, pixels] x dy [pixels, N]; each program adds up its tiles in registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.contract import Padding
from mobilenet_ext.triton import autotune, formulas, gpu, heuristics, merge
from mobilenet_ext.triton.checks import check_plain_input
from mobilenet_ext.triton.formulas import load_gradient_coefficients, output_gradient, rounded
from mobilenet_ext.triton.patches import load_patches, tile_origin, weight_offsets


def dense_backward(
    dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, bn_u: Tensor | None, act_u: int,
    batch_stats_u: bool, weight: Tensor, stride: int, padding: Padding, need_input: bool, need_weight: bool,
    slope_u: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dz_u, grad_weight, an empty tensor); empty are also those not needed. ``bn_u`` must be None."""
    check_plain_input(bn_u, act_u)
    if grad_bn_y is None:
        y = None  # dy = dz
    dz_u = _input_gradient(dz, y, grad_bn_y, u, weight, stride, padding) if need_input else u.new_empty(0)
    if need_weight:
        grad_weight = _weight_gradient(dz, y, grad_bn_y, u, weight, stride, padding)
    else:
        grad_weight = u.new_empty(0, dtype=torch.float32)
    return dz_u, grad_weight, u.new_empty(0, dtype=torch.float32)


def _weight_gradient(
    dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, weight: Tensor, stride: int, padding: Padding
) -> Tensor:
    n, channels, height, width = u.shape
    _, filters, out_h, out_w = dz.shape
    pad_left, _, pad_top, _ = padding
    grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=u.device)
    unit = math.gcd(filters, 8)
    problem = (n, out_h, out_w, channels, filters, u.dtype.itemsize, gpu.of(u))

    def launch(config: heuristics.Config) -> Tensor:
        kernel, programs = config["kernel"], config["PROGRAMS"] if dz.numel() else 0
        partial = u.new_empty((programs, *weight.shape), dtype=torch.float32)
        if programs:
            grid = (
                heuristics.cdiv(9 * channels, kernel["BLOCK_K"]),
                heuristics.cdiv(filters, kernel["BLOCK_N"]),
                programs,
            )
            _weight_kernel[grid](
                dz, y, grad_bn_y, u, partial, n, height, width, out_h, out_w, filters // unit, pad_left, pad_top,
                CHANNELS=channels, UNIT=unit, STRIDE=stride, PRECISION=gpu.product_precision(u.dtype), **kernel,
            )  # fmt: skip
        merge.gradients(None, None, False, 0, partial, grad_weight)
        return grad_weight

    return autotune.run("dense_backward", problem, heuristics.dense_weight_gradient(*problem), launch)


def _input_gradient(
    dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, weight: Tensor, stride: int, padding: Padding
) -> Tensor:
    n, channels, height, width = u.shape
    _, filters, out_h, out_w = dz.shape
    pad_left, _, pad_top, _ = padding
    dz_u = torch.empty_like(u, memory_format=torch.channels_last)
    if u.numel():
        kernel = heuristics.dense_input_gradient(height, width, channels, filters, u.dtype.itemsize)
        unit = math.gcd(filters, 8)
        tiles = n * heuristics.cdiv(height, kernel["BLOCK_H"]) * heuristics.cdiv(width, kernel["BLOCK_W"])
        _input_kernel[(tiles, heuristics.cdiv(channels, kernel["BLOCK_C"]))](
            dz, y, grad_bn_y, weight, dz_u, height, width, out_h, out_w, channels, filters // unit, pad_left, pad_top,
            UNIT=unit, STRIDE=stride, PRECISION=gpu.product_precision(u.dtype), **kernel,
        )  # fmt: skip
    return dz_u


@triton.jit
def _load_dy(dz_ptr, y_ptr, base, offsets, mask, coefficients, NORMALISED: tl.constexpr, BATCH_STATS: tl.constexpr):
    """dy in the activations' dtype, as a product's operand; 0 outside the mask."""
    dy = tl.load(dz_ptr + base + offsets, mask=mask, other=0.0)
    if NORMALISED:
        y = dy
        if BATCH_STATS:
            y = tl.load(y_ptr + base + offsets, mask=mask, other=0.0)
        dy = rounded(output_gradient(dy, y, coefficients, mask, BATCH_STATS), dz_ptr.dtype.element_ty)
    return dy


@triton.jit(
    do_not_specialize=["images", "height", "width", "out_height", "out_width", "N_units", "pad_left", "pad_top"]
)
def _weight_kernel(
    dz_ptr, y_ptr, grad_bn_ptr, u_ptr, partial_ptr,
    images, height, width, out_height, out_width, N_units, pad_left, pad_top,
    CHANNELS: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    NORMALISED: tl.constexpr = grad_bn_ptr is not None
    BATCH_STATS: tl.constexpr = y_ptr is not None
    filters = N_units * UNIT
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < filters
    m = tl.arange(0, BLOCK_H * BLOCK_W)[:, None]
    coefficients = load_gradient_coefficients(grad_bn_ptr, filters, n, n_inside, BATCH_STATS)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    tiles = images * tl.cdiv(out_height, BLOCK_H) * tl.cdiv(out_width, BLOCK_W)
    for tile in range(tl.program_id(2), tiles, tl.num_programs(2)):
        image, row, column = tile_origin(tile, out_height, out_width, BLOCK_H, BLOCK_W)
        inside = (m // BLOCK_W < out_height - row) & (m % BLOCK_W < out_width - column)
        patches = load_patches(
            u_ptr, image, row, column, inside, k, height, width, pad_left, pad_top, CHANNELS, STRIDE, BLOCK_H, BLOCK_W
        )
        base = ((image * out_height + row) * out_width + column) * filters
        offsets = (m // BLOCK_W * out_width + m % BLOCK_W) * filters + n[None, :]
        mask = inside & n_inside[None, :]
        dy = _load_dy(dz_ptr, y_ptr, base, offsets, mask, coefficients, NORMALISED, BATCH_STATS)
        acc = formulas.dot(tl.trans(patches), dy, acc, PRECISION)
    partial = partial_ptr + tl.program_id(2).to(tl.int64) * filters * (9 * CHANNELS)
    offsets = weight_offsets(k[:, None], n[None, :], CHANNELS)
    tl.store(partial + offsets, acc, mask=(k < 9 * CHANNELS)[:, None] & n_inside[None, :])


@triton.jit(
    do_not_specialize=["height", "width", "out_height", "out_width", "channels", "N_units", "pad_left", "pad_top"]
)
def _input_kernel(
    dz_ptr, y_ptr, grad_bn_ptr, weight_ptr, dz_u_ptr,
    height, width, out_height, out_width, channels, N_units, pad_left, pad_top,
    UNIT: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    NORMALISED: tl.constexpr = grad_bn_ptr is not None
    BATCH_STATS: tl.constexpr = y_ptr is not None
    filters = N_units * UNIT
    image, row, column = tile_origin(tl.program_id(0), height, width, BLOCK_H, BLOCK_W)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = c < channels
    m = tl.arange(0, BLOCK_H * BLOCK_W)[:, None]
    tile_row = row + m // BLOCK_W
    tile_column = column + m % BLOCK_W
    base = image * out_height * out_width * filters
    acc = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
    for start in range(0, filters, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_inside = n < filters
        coefficients = load_gradient_coefficients(grad_bn_ptr, filters, n, n_inside, BATCH_STATS)
        for tap in range(9):
            # The output pixel that sees this input pixel through the filter's tap, if there is one.
            out_row = tile_row + (pad_top - tap // 3)
            out_column = tile_column + (pad_left - tap % 3)
            inside = (out_row >= 0) & (out_column >= 0)
            if STRIDE == 2:
                inside = inside & (out_row % 2 == 0) & (out_column % 2 == 0)
                out_row = out_row // 2
                out_column = out_column // 2
            inside = inside & (out_row < out_height) & (out_column < out_width)
            offsets = (out_row * out_width + out_column).to(tl.int64) * filters + n[None, :]
            mask = inside & n_inside[None, :]
            dy = _load_dy(dz_ptr, y_ptr, base, offsets, mask, coefficients, NORMALISED, BATCH_STATS)
            w_offsets = (n[:, None] * channels + c[None, :]) * 9 + tap
            weight = tl.load(weight_ptr + w_offsets, mask=n_inside[:, None] & c_inside[None, :], other=0.0)
            acc = formulas.dot(dy, weight, acc, PRECISION)
    mask = (tile_row < height) & (tile_column < width) & c_inside[None, :]
    offsets = (tile_row * width + tile_column).to(tl.int64) * channels + c[None, :]
    tl.store(dz_u_ptr + image * height * width * channels + offsets, rounded(acc, dz_u_ptr.dtype.element_ty), mask=mask)
