"""Rectangles of output pixels of a 3x3 convolution, and the patches of the input that a dense one multiplies.

A dense convolution is a matrix product [pixels, 9*C] x [9*C, N]. A column k of the left operand, the patches, is
(filter row, filter column, channel), so that three consecutive filter columns lie next to each other in a channels_last
image. A tile is a rectangle of output pixels of one image: where its pixels lie relative to the first of them is the
same for all tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mobilenet_ext.triton.formulas import as_int64


@triton.jit
def tile_origin(tile, out_height, out_width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image (int64), row and column of the first output pixel of a tile."""
    columns = tl.cdiv(out_width, BLOCK_W)
    rows = tl.cdiv(out_height, BLOCK_H)
    return as_int64(tile // columns // rows), tile // columns % rows * BLOCK_H, tile % columns * BLOCK_W


@triton.jit
def load_patches(
    u_ptr, image, row, column, output_inside, k, height, width, pad_left, pad_top,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The columns ``k`` of a tile's left operand, [BLOCK_H * BLOCK_W, len(k)].

    Rows of pixels not in ``output_inside`` are 0: they may lie on the image's values, but belong to no output.
    """
    m = tl.arange(0, BLOCK_H * BLOCK_W)[:, None]
    kernel_row = (k // (3 * CHANNELS))[None, :]
    element = (k % (3 * CHANNELS))[None, :]  # column of the filter and channel
    row = row * STRIDE - pad_top
    column = column * STRIDE - pad_left
    tile_row = m // BLOCK_W * STRIDE + kernel_row
    tile_element = m % BLOCK_W * (STRIDE * CHANNELS) + element
    inside = output_inside & (tile_row >= -row) & (tile_row < height - row) & (k < 9 * CHANNELS)[None, :]
    inside = inside & (tile_element >= -column * CHANNELS) & (tile_element < (width - column) * CHANNELS)
    base = u_ptr + ((image * height + row) * width + column) * CHANNELS
    return tl.load(base + tile_row * (width * CHANNELS) + tile_element, mask=inside, other=0.0)


@triton.jit
def weight_offsets(k, n, CHANNELS: tl.constexpr):
    """Where the right operand's elements lie in the weight [N, C, 3, 3]."""
    element = k % (3 * CHANNELS)
    taps = k // (3 * CHANNELS) * 3 + element // CHANNELS
    return n * (9 * CHANNELS) + element % CHANNELS * 9 + taps
