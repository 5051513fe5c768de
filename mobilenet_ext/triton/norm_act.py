"""BatchNorm + ReLU of a stored convolution output, on its own: for the end of a layer or block that stands alone."""

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
    store_sums,
    tiles_of,
)


def bn_relu_forward(y: Tensor, bn_y: Tensor, relu: bool) -> Tensor:
    """``y`` normalised and, with ``relu``, rectified."""
    n, channels, h, w = y.shape
    out = torch.empty_like(y, memory_format=torch.channels_last)
    if y.numel() == 0:
        return out
    rows, unit = n * h * w, math.gcd(channels, 8)
    problem = (rows, channels, y.dtype.itemsize, gpu.of(y).multiprocessors)

    def launch(config: heuristics.Config) -> Tensor:
        kernel = config["kernel"]
        grid = (triton.cdiv(rows, kernel["BLOCK_M"]), triton.cdiv(channels, kernel["BLOCK_C"]))
        _forward[grid](y, bn_y, out, rows, channels // unit, UNIT=unit, RELU=relu, **kernel)
        return out

    return autotune.run("bn_relu_forward", problem, heuristics.bn_relu(*problem), launch)


def bn_relu_backward(grad: Tensor, y: Tensor, bn_y: Tensor, batch_stats: bool, relu: bool) -> tuple[Tensor, Tensor]:
    """h, the gradient at the normalisation's output, and what its backward needs, ``grad_bn`` [6, C]."""
    n, channels, height, width = y.shape
    h = torch.empty_like(y, memory_format=torch.channels_last)
    rows, unit = n * height * width, math.gcd(channels, 8)
    problem = (rows, channels, y.dtype.itemsize, gpu.of(y).multiprocessors)

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor]:
        kernel, programs = config["kernel"], config["PROGRAMS"] if y.numel() else 0
        sums = y.new_empty((programs, 2, channels), dtype=torch.float32)
        if programs:
            grid = (triton.cdiv(channels, kernel["BLOCK_C"]), programs)
            _backward[grid](grad, y, bn_y, h, sums, rows, channels // unit, UNIT=unit, RELU=relu, **kernel)
        return h, finish.gradients(sums, bn_y, batch_stats, rows, None, bn_y)

    return autotune.run("bn_relu_backward", problem, heuristics.bn_relu(*problem), launch)


@triton.jit(do_not_specialize=["rows", "C_units"])
def _forward(
    y_ptr, bn_ptr, out_ptr, rows, C_units,
    UNIT: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = C_units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = tl.arange(0, BLOCK_M)[:, None]
    mask = (m < rows - first_row) & channel_inside[None, :]
    base = first_row * channels
    offsets = m * channels + c[None, :]
    y = tl.load(y_ptr + base + offsets, mask=mask, other=0.0)
    mean, scale, shift = load_normalisation(bn_ptr, channels, c, channel_inside)
    z = normalise(y, mean, scale, shift)
    if RELU:
        z = formulas.relu(z)
    tl.store(out_ptr + base + offsets, rounded(z, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "C_units"])
def _backward(
    grad_ptr, y_ptr, bn_ptr, h_ptr, sums_ptr, rows, C_units,
    UNIT: tl.constexpr, RELU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    mean, scale, shift = load_normalisation(bn_ptr, channels, c, channel_inside)
    m = tl.arange(0, BLOCK_M)[:, None]
    offsets = m * channels + c[None, :]
    sum_h = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_h_centred = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(1), tiles_of(rows, BLOCK_M), tl.num_programs(1)):
        first_row = as_int64(tile) * BLOCK_M
        mask = (m < rows - first_row) & channel_inside[None, :]
        base = first_row * channels
        grad = tl.load(grad_ptr + base + offsets, mask=mask, other=0.0)
        y = tl.load(y_ptr + base + offsets, mask=mask, other=0.0)
        if RELU:
            grad = tl.where(normalise(y, mean, scale, shift) <= 0, 0.0, grad)
        tl.store(h_ptr + base + offsets, grad, mask=mask)
        h = grad.to(tl.float32)  # 0 outside the mask
        sum_h += h
        sum_h_centred += h * (y.to(tl.float32) - mean)
    row = sums_ptr + tl.program_id(1).to(tl.int64) * 2 * channels
    store_sums(row, channels, c, channel_inside, tl.sum(sum_h, 0), tl.sum(sum_h_centred, 0))
