"""A depthwise-separable block for inference in one kernel: its intermediate activation is never stored.

Each program computes a rectangle of output pixels. It walks through the channels: the depthwise convolution of a block
of them is computed in registers, normalised, activated, and is an operand of the product that adds it to the outputs.
Programs for other outputs of the same pixels compute it again, so blocks with many outputs run as two kernels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.contract import NO_PADDING, Padding, conv_output_size
from mobilenet_ext.triton import autotune, formulas, gpu, heuristics
from mobilenet_ext.triton.activation import compiled, load_norm, norm_act
from mobilenet_ext.triton.depthwise_forward import depthwise_inference
from mobilenet_ext.triton.formulas import rounded
from mobilenet_ext.triton.patches import tile_origin
from mobilenet_ext.triton.pointwise_forward import pointwise_inference


def block_inference(
    x: Tensor, depthwise_bn: Tensor, depthwise_act: int, depthwise_weight: Tensor, stride: int,
    padding: Padding, pointwise_bn: Tensor, pointwise_act: int, pointwise_weight: Tensor, packed: Tensor | None = None,
    residual: Tensor | None = None, depthwise_slope: float = 0.0, pointwise_slope: float = 0.0,
) -> Tensor:  # fmt: skip
    """A depthwise 3x3 (padding 0 or 1) and a pointwise ``_inference``; the weights are taken as they are."""
    n, channels, height, width = x.shape
    filters = pointwise_weight.shape[0]
    out_h, out_w = conv_output_size(height, width, 3, stride, padding)
    pad_left, _, pad_top, _ = padding
    acts = (compiled(depthwise_act, depthwise_slope), compiled(pointwise_act, pointwise_slope))
    problem = (n, out_h, out_w, channels, filters, stride, x.dtype.itemsize, gpu.of(x))

    def launch(config: heuristics.Config) -> Tensor:
        if config == heuristics.TWO_KERNELS:
            a = depthwise_inference(
                x, depthwise_bn, depthwise_act, depthwise_weight, stride, padding, slope_y=depthwise_slope
            )
            return pointwise_inference(
                a, pointwise_bn, pointwise_act, pointwise_weight, 1, NO_PADDING, None, residual, pointwise_slope
            )
        y = torch.empty((n, filters, out_h, out_w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        if y.numel() == 0:
            return y
        unit, filter_unit = math.gcd(channels, 8), math.gcd(filters, 8)
        tiles = n * heuristics.cdiv(out_h, config["BLOCK_H"]) * heuristics.cdiv(out_w, config["BLOCK_W"])
        _kernel[(heuristics.cdiv(filters, config["BLOCK_N"]) * tiles,)](
            x, depthwise_bn, depthwise_weight, pointwise_bn, pointwise_weight, y, residual,
            height, width, out_h, out_w, channels // unit, filters // filter_unit, pad_left, pad_top,
            UNIT=unit, N_UNIT=filter_unit, STRIDE=stride, DEPTHWISE_ACT=acts[0], POINTWISE_ACT=acts[1],
            PRECISION=gpu.product_precision(x.dtype), **config,
        )  # fmt: skip
        return y

    flags = (*acts, residual is None)
    return autotune.run("block_inference", (*problem, *flags), heuristics.block_inference(*problem), launch)


@triton.jit(
    do_not_specialize=["height", "width", "out_height", "out_width", "C_units", "N_units", "pad_left", "pad_top"]
)
def _kernel(
    x_ptr, depthwise_bn_ptr, depthwise_weight_ptr, pointwise_bn_ptr, pointwise_weight_ptr, y_ptr, residual_ptr,
    height, width, out_height, out_width, C_units, N_units, pad_left, pad_top,
    UNIT: tl.constexpr, N_UNIT: tl.constexpr, STRIDE: tl.constexpr, DEPTHWISE_ACT: tl.constexpr,
    POINTWISE_ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = C_units * UNIT
    filters = N_units * N_UNIT
    # Programs for the same pixels lie side by side, and find them in the cache.
    blocks = tl.cdiv(filters, BLOCK_N)
    image, row, column = tile_origin(tl.program_id(0) // blocks, out_height, out_width, BLOCK_H, BLOCK_W)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    n_inside = n < filters
    m = tl.arange(0, BLOCK_H * BLOCK_W)[:, None]
    inside = (m // BLOCK_W < out_height - row) & (m % BLOCK_W < out_width - column)

    in_row = row * STRIDE - pad_top + m // BLOCK_W * STRIDE
    in_column = column * STRIDE - pad_left + m % BLOCK_W * STRIDE
    x_base = x_ptr + ((image * height + (row * STRIDE - pad_top)) * width + (column * STRIDE - pad_left)) * channels
    x_offsets = (m // BLOCK_W * STRIDE * width + m % BLOCK_W * STRIDE) * channels
    column_inside = (in_column >= 0, in_column + 1 < width, in_column + 2 < width)

    # The outputs are the product's rows: so the depthwise result, its right operand, goes through shared memory once.
    # As the left one the compiler would take it from registers, and reorder each of its nine inputs for that.
    y = tl.zeros([BLOCK_N, BLOCK_H * BLOCK_W], tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        c_inside = c < channels
        weight_offsets = n[:, None] * channels + c[None, :]
        weight = tl.load(pointwise_weight_ptr + weight_offsets, mask=n_inside[:, None] & c_inside[None, :], other=0.0)
        a = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
        for kernel_row in range(3):
            row_inside = inside & (in_row + kernel_row >= 0) & (in_row + kernel_row < height)
            for kernel_column in tl.static_range(3):
                mask = row_inside & column_inside[kernel_column] & c_inside[None, :]
                pixel = x_base + (kernel_row * width + kernel_column) * channels
                x = tl.load(pixel + (x_offsets + c[None, :]), mask=mask, other=0.0)
                tap = tl.load(depthwise_weight_ptr + c * 9 + (kernel_row * 3 + kernel_column), mask=c_inside, other=0.0)
                a += x.to(tl.float32) * tap.to(tl.float32)[None, :]
        norm = load_norm(depthwise_bn_ptr, channels, c, c_inside)
        a = rounded(norm_act(a, norm, True, DEPTHWISE_ACT), x_ptr.dtype.element_ty)
        y = formulas.dot(weight, tl.trans(a), y, PRECISION)
    norm = load_norm(pointwise_bn_ptr, filters, n, n_inside)
    y = norm_act(tl.trans(y), norm, True, POINTWISE_ACT)
    first_pixel = ((image * out_height + row) * out_width + column) * filters
    y_offsets = (m // BLOCK_W * out_width + m % BLOCK_W) * filters + n[None, :]
    y_inside = inside & n_inside[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + first_pixel + y_offsets, mask=y_inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + first_pixel + y_offsets, rounded(y, y_ptr.dtype.element_ty), mask=y_inside)
