"""The stem, a dense 3x3 convolution: for training (raw output and statistics) and for inference (finished output).

An implicit matrix product [pixels, 9*C] x [9*C, N]. A column k of the left operand is (filter row, filter column,
channel), so that three consecutive filter columns lie next to each other in a channels_last image. A tile is a
rectangle of output pixels of one image: where its pixels lie relative to the first of them is the same for all tiles.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.triton import autotune, finish, formulas, gpu, heuristics
from mobilenet_ext.triton.formulas import (
    as_int64,
    load_normalisation,
    normalise,
    rounded,
    store_statistics,
)


def stem_forward(
    x: Tensor, weight: Tensor, stride: int, padding: int, gamma: Tensor | None, beta: Tensor | None, eps: float,
    stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The raw output, and with ``stats`` its normalisation ``bn`` [5, N], else an empty float32 tensor."""
    y, partial = _run("stem_forward", x, weight, stride, padding, None, False, stats)
    bn = finish.statistics(partial, gamma, beta, eps) if stats else x.new_empty(0, dtype=torch.float32)
    return y, bn


def stem_inference(x: Tensor, bn_y: Tensor | None, weight: Tensor, stride: int, padding: int, relu: bool) -> Tensor:
    """The convolution's output, with ``bn_y`` normalised, with ``relu`` rectified."""
    return _run("stem_inference", x, weight, stride, padding, bn_y, relu, False)[0]


def _run(
    op: str, x: Tensor, weight: Tensor, stride: int, padding: int, bn_y: Tensor | None, relu: bool, stats: bool
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    n, channels, height, width = x.shape
    filters = weight.shape[0]
    out_h, out_w = (height + 2 * padding - 3) // stride + 1, (width + 2 * padding - 3) // stride + 1
    y = torch.empty((n, filters, out_h, out_w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if y.numel() == 0:
        return y, x.new_empty((0, 4, filters), dtype=torch.float32) if stats else None
    unit = math.gcd(filters, 8)
    problem = (n, out_h, out_w, channels, filters, x.dtype.itemsize, gpu.of(x).multiprocessors)

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor | None]:
        kernel, programs = config["kernel"], config["PROGRAMS"]
        partial = x.new_empty((programs, 4, filters), dtype=torch.float32) if stats else None
        _kernel[(triton.cdiv(filters, kernel["BLOCK_N"]), programs)](
            x, weight, y, partial, bn_y, n, height, width, out_h, out_w, filters // unit, padding,
            CHANNELS=channels, UNIT=unit, STRIDE=stride, RELU=relu, PRECISION=gpu.product_precision(x.dtype), **kernel,
        )  # fmt: skip
        return y, partial

    return autotune.run(op, problem, heuristics.stem(*problem), launch)


@triton.jit
def tile_origin(tile, out_height, out_width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image (int64), row and column of the first output pixel of a tile."""
    columns = tl.cdiv(out_width, BLOCK_W)
    rows = tl.cdiv(out_height, BLOCK_H)
    return as_int64(tile // columns // rows), tile // columns % rows * BLOCK_H, tile % columns * BLOCK_W


@triton.jit
def load_patches(
    x_ptr, image, row, column, output_inside, k, height, width, padding,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The columns ``k`` of a tile's left operand, [BLOCK_H * BLOCK_W, len(k)].

    Rows of pixels not in ``output_inside`` are 0: they may lie on the image's values, but belong to no output.
    """
    m = tl.arange(0, BLOCK_H * BLOCK_W)[:, None]
    kernel_row = (k // (3 * CHANNELS))[None, :]
    element = (k % (3 * CHANNELS))[None, :]  # column of the filter and channel
    row = row * STRIDE - padding
    column = column * STRIDE - padding
    tile_row = m // BLOCK_W * STRIDE + kernel_row
    tile_element = m % BLOCK_W * (STRIDE * CHANNELS) + element
    inside = output_inside & (tile_row >= -row) & (tile_row < height - row) & (k < 9 * CHANNELS)[None, :]
    inside = inside & (tile_element >= -column * CHANNELS) & (tile_element < (width - column) * CHANNELS)
    base = x_ptr + ((image * height + row) * width + column) * CHANNELS
    return tl.load(base + tile_row * (width * CHANNELS) + tile_element, mask=inside, other=0.0)


@triton.jit
def weight_offsets(k, n, CHANNELS: tl.constexpr):
    """Where the right operand's elements lie in the weight [N, C, 3, 3]."""
    element = k % (3 * CHANNELS)
    taps = k // (3 * CHANNELS) * 3 + element // CHANNELS
    return n * (9 * CHANNELS) + element % CHANNELS * 9 + taps


@triton.jit
def _load_weight(weight_ptr, k, n, n_inside, CHANNELS: tl.constexpr):
    mask = (k < 9 * CHANNELS)[:, None] & n_inside[None, :]
    return tl.load(weight_ptr + weight_offsets(k[:, None], n[None, :], CHANNELS), mask=mask, other=0.0)


@triton.jit(do_not_specialize=["images", "height", "width", "out_height", "out_width", "N_units", "padding"])
def _kernel(
    x_ptr, weight_ptr, y_ptr, partial_ptr, bn_y_ptr,
    images, height, width, out_height, out_width, N_units, padding,
    CHANNELS: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
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
    if bn_y_ptr is not None:
        mean_y, scale_y, shift_y = load_normalisation(bn_y_ptr, filters, n, n_inside)

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
                x_ptr, image, row, column, inside, start + first_k, height, width, padding,
                CHANNELS, STRIDE, BLOCK_H, BLOCK_W,
            )  # fmt: skip
            y = formulas.dot(patches, weight, y, PRECISION)
        if bn_y_ptr is not None:
            y = normalise(y, mean_y, scale_y, shift_y)
        if RELU:
            y = formulas.relu(y)
        stored = rounded(y, y_ptr.dtype.element_ty)
        base = y_ptr + ((image * out_height + row) * out_width + column) * filters
        offsets = (m // BLOCK_W * out_width + m % BLOCK_W) * filters
        tl.store(base + offsets + n[None, :], stored, mask=inside & n_inside[None, :])
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
        partial_row = partial_ptr + tl.program_id(1).to(tl.int64) * 4 * filters
        store_statistics(partial_row, filters, n, n_inside, pixels, tl.sum(origin, 0), offset, m2)
