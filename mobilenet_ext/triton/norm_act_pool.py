"""BatchNorm + ReLU + global average pooling, the end of the network's convolutions, forward and backward."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.triton import autotune, finish, gpu, heuristics
from mobilenet_ext.triton.formulas import (
    activation,
    as_int64,
    load_normalisation,
    normalise,
    rounded,
    store_sums,
)


def bn_relu_pool_forward(y: Tensor, bn_y: Tensor) -> Tensor:
    """The mean over each image of ``y`` normalised and rectified, [N, C, 1, 1]."""
    n, channels, height, width = y.shape
    out = torch.empty((n, channels, 1, 1), dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    pixels, unit = height * width, math.gcd(channels, 8)
    problem = (n, pixels, channels, y.dtype.itemsize, gpu.of(y).multiprocessors)

    def launch(config: heuristics.Config) -> Tensor:
        kernel = config["kernel"]
        grid = (n, triton.cdiv(channels, kernel["BLOCK_C"]))
        _forward[grid](y, bn_y, out, pixels, channels // unit, UNIT=unit, **kernel)
        return out

    return autotune.run("bn_relu_pool_forward", problem, heuristics.bn_relu_pool(*problem), launch)


def bn_relu_pool_backward(grad: Tensor, y: Tensor, bn_y: Tensor, batch_stats: bool) -> tuple[Tensor, Tensor]:
    """h, the gradient at the normalisation's output, and what its backward needs, ``grad_bn`` [6, C]."""
    n, channels, height, width = y.shape
    h = torch.empty_like(y, memory_format=torch.channels_last)
    pixels, unit = height * width, math.gcd(channels, 8)
    problem = (n, pixels, channels, y.dtype.itemsize, gpu.of(y).multiprocessors)

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor]:
        kernel, programs = config["kernel"], config["PROGRAMS"] if y.numel() else 0
        sums = y.new_empty((programs, 2, channels), dtype=torch.float32)
        if programs:
            grid = (triton.cdiv(channels, kernel["BLOCK_C"]), programs)
            _backward[grid](grad, y, bn_y, h, sums, n, pixels, channels // unit, UNIT=unit, **kernel)
        return h, finish.gradients(sums, bn_y, batch_stats, n * pixels, None, bn_y)

    return autotune.run("bn_relu_pool_backward", problem, heuristics.bn_relu_pool(*problem), launch)


@triton.jit(do_not_specialize=["pixels", "C_units"])
def _forward(
    y_ptr, bn_ptr, out_ptr, pixels, C_units, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    channels = C_units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    mean, scale, shift = load_normalisation(bn_ptr, channels, c, channel_inside)
    m = tl.arange(0, BLOCK_M)[:, None]
    offsets = m * channels + c[None, :]
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, pixels, BLOCK_M):
        mask = (m < pixels - first) & channel_inside[None, :]
        y = tl.load(y_ptr + (image * pixels + first) * channels + offsets, mask=mask, other=0.0)
        total += activation(y, mean, scale, shift, mask, True)
    out = rounded(tl.sum(total, 0) / pixels, out_ptr.dtype.element_ty)
    tl.store(out_ptr + image * channels + c, out, mask=channel_inside)


@triton.jit(do_not_specialize=["images", "pixels", "C_units"])
def _backward(
    grad_ptr, y_ptr, bn_ptr, h_ptr, sums_ptr, images, pixels, C_units,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    mean, scale, shift = load_normalisation(bn_ptr, channels, c, channel_inside)
    m = tl.arange(0, BLOCK_M)[:, None]
    offsets = m * channels + c[None, :]
    sum_h = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_h_centred = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    chunks = tl.cdiv(pixels, BLOCK_M)
    for tile in range(tl.program_id(1), images * chunks, tl.num_programs(1)):
        image = as_int64(tile // chunks)
        first = tile % chunks * BLOCK_M
        mask = (m < pixels - first) & channel_inside[None, :]
        base = (image * pixels + first) * channels
        grad = tl.load(grad_ptr + image * channels + c, mask=channel_inside, other=0.0).to(tl.float32) / pixels
        grad = rounded(grad, h_ptr.dtype.element_ty).to(tl.float32)  # rounded before it is spread over the pixels
        y = tl.load(y_ptr + base + offsets, mask=mask, other=0.0)
        h = tl.where(mask & ~(normalise(y, mean, scale, shift) <= 0), grad[None, :], 0.0)
        tl.store(h_ptr + base + offsets, rounded(h, h_ptr.dtype.element_ty), mask=mask)
        sum_h += h
        sum_h_centred += h * (y.to(tl.float32) - mean)
    row = sums_ptr + tl.program_id(1).to(tl.int64) * 2 * channels
    store_sums(row, channels, c, channel_inside, tl.sum(sum_h, 0), tl.sum(sum_h_centred, 0))
