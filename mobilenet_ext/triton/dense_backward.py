"""Backward of the stem, a dense 3x3 convolution: the weight's gradient, and the input's where it is wanted.

The gradient of the output, dy, is rebuilt from h and y as each tile is loaded. The weight's gradient is the product
patches^T [9*C, pixels] x dy [pixels, N]; each program adds up its tiles in registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.triton import autotune, finish, formulas, gpu, heuristics
from mobilenet_ext.triton.formulas import load_gradient_rows, output_gradient, rounded
from mobilenet_ext.triton.stem_forward import load_patches, tile_origin, weight_offsets


def stem_backward(
    h: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, x: Tensor, weight: Tensor, stride: int, padding: int,
    need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of the input and of the weight (float32); empty tensors for those not needed."""
    if grad_bn_y is None:
        y = None  # dy = h
    grad_x = _input_gradient(h, y, grad_bn_y, x, weight, stride, padding) if need_input else x.new_empty(0)
    if need_weight:
        grad_weight = _weight_gradient(h, y, grad_bn_y, x, weight, stride, padding)
    else:
        grad_weight = x.new_empty(0, dtype=torch.float32)
    return grad_x, grad_weight


def _weight_gradient(
    h: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, x: Tensor, weight: Tensor, stride: int, padding: int
) -> Tensor:
    n, channels, height, width = x.shape
    _, filters, out_h, out_w = h.shape
    grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    unit = math.gcd(filters, 8)
    problem = (n, out_h, out_w, channels, filters, x.dtype.itemsize, gpu.of(x).multiprocessors)

    def launch(config: heuristics.Config) -> Tensor:
        kernel, programs = config["kernel"], config["PROGRAMS"] if h.numel() else 0
        partial = x.new_empty((programs, *weight.shape), dtype=torch.float32)
        if programs:
            grid = (triton.cdiv(9 * channels, kernel["BLOCK_K"]), triton.cdiv(filters, kernel["BLOCK_N"]), programs)
            _weight_kernel[grid](
                h, y, grad_bn_y, x, partial, n, height, width, out_h, out_w, filters // unit, padding,
                CHANNELS=channels, UNIT=unit, STRIDE=stride, PRECISION=gpu.product_precision(x.dtype), **kernel,
            )  # fmt: skip
        finish.gradients(None, None, False, 0, partial, grad_weight)
        return grad_weight

    return autotune.run("stem_backward", problem, heuristics.stem_weight_gradient(*problem), launch)


def _input_gradient(
    h: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, x: Tensor, weight: Tensor, stride: int, padding: int
) -> Tensor:
    n, channels, height, width = x.shape
    _, filters, out_h, out_w = h.shape
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel():
        kernel = heuristics.stem_input_gradient(height, width, channels, filters, x.dtype.itemsize)
        unit = math.gcd(filters, 8)
        tiles = n * triton.cdiv(height, kernel["BLOCK_H"]) * triton.cdiv(width, kernel["BLOCK_W"])
        _input_kernel[(tiles, triton.cdiv(channels, kernel["BLOCK_C"]))](
            h, y, grad_bn_y, weight, grad_x, height, width, out_h, out_w, channels, filters // unit, padding,
            UNIT=unit, STRIDE=stride, PRECISION=gpu.product_precision(x.dtype), **kernel,
        )  # fmt: skip
    return grad_x


@triton.jit
def _load_dy(h_ptr, y_ptr, base, offsets, mask, p, q, mean, o, NORMALISED: tl.constexpr, BATCH_STATS: tl.constexpr):
    """dy in the activations' dtype, as a product's operand; 0 outside the mask."""
    dy = tl.load(h_ptr + base + offsets, mask=mask, other=0.0)
    if NORMALISED:
        y = dy
        if BATCH_STATS:
            y = tl.load(y_ptr + base + offsets, mask=mask, other=0.0)
        dy = rounded(output_gradient(dy, y, p, q, mean, o, mask, BATCH_STATS), h_ptr.dtype.element_ty)
    return dy


@triton.jit(do_not_specialize=["images", "height", "width", "out_height", "out_width", "N_units", "padding"])
def _weight_kernel(
    h_ptr, y_ptr, grad_bn_ptr, x_ptr, partial_ptr, images, height, width, out_height, out_width, N_units, padding,
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
    p, q, mean, o = load_gradient_rows(grad_bn_ptr, filters, n, n_inside, BATCH_STATS)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    tiles = images * tl.cdiv(out_height, BLOCK_H) * tl.cdiv(out_width, BLOCK_W)
    for tile in range(tl.program_id(2), tiles, tl.num_programs(2)):
        image, row, column = tile_origin(tile, out_height, out_width, BLOCK_H, BLOCK_W)
        inside = (m // BLOCK_W < out_height - row) & (m % BLOCK_W < out_width - column)
        patches = load_patches(
            x_ptr, image, row, column, inside, k, height, width, padding, CHANNELS, STRIDE, BLOCK_H, BLOCK_W
        )
        base = ((image * out_height + row) * out_width + column) * filters
        offsets = (m // BLOCK_W * out_width + m % BLOCK_W) * filters + n[None, :]
        mask = inside & n_inside[None, :]
        dy = _load_dy(h_ptr, y_ptr, base, offsets, mask, p, q, mean, o, NORMALISED, BATCH_STATS)
        acc = formulas.dot(tl.trans(patches), dy, acc, PRECISION)
    partial = partial_ptr + tl.program_id(2).to(tl.int64) * filters * (9 * CHANNELS)
    offsets = weight_offsets(k[:, None], n[None, :], CHANNELS)
    tl.store(partial + offsets, acc, mask=(k < 9 * CHANNELS)[:, None] & n_inside[None, :])


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "channels", "N_units", "padding"])
def _input_kernel(
    h_ptr, y_ptr, grad_bn_ptr, weight_ptr, grad_x_ptr,
    height, width, out_height, out_width, channels, N_units, padding,
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
        p, q, mean, o = load_gradient_rows(grad_bn_ptr, filters, n, n_inside, BATCH_STATS)
        for tap in range(9):
            # The output pixel that sees this input pixel through the filter's tap, if there is one.
            out_row = tile_row + (padding - tap // 3)
            out_column = tile_column + (padding - tap % 3)
            inside = (out_row >= 0) & (out_column >= 0)
            if STRIDE == 2:
                inside = inside & (out_row % 2 == 0) & (out_column % 2 == 0)
                out_row = out_row // 2
                out_column = out_column // 2
            inside = inside & (out_row < out_height) & (out_column < out_width)
            offsets = (out_row * out_width + out_column).to(tl.int64) * filters + n[None, :]
            mask = inside & n_inside[None, :]
            dy = _load_dy(h_ptr, y_ptr, base, offsets, mask, p, q, mean, o, NORMALISED, BATCH_STATS)
            w_offsets = (n[:, None] * channels + c[None, :]) * 9 + tap
            weight = tl.load(weight_ptr + w_offsets, mask=n_inside[:, None] & c_inside[None, :], other=0.0)
            acc = formulas.dot(dy, weight, acc, PRECISION)
    mask = (tile_row < height) & (tile_column < width) & c_inside[None, :]
    offsets = (tile_row * width + tile_column).to(tl.int64) * channels + c[None, :]
    tl.store(
        grad_x_ptr + image * height * width * channels + offsets, rounded(acc, grad_x_ptr.dtype.element_ty), mask=mask
    )
