"""Partial results: the rows that the programs of a large kernel leave, and the small kernels that merge them, in a
fixed order, into per-channel vectors.

A program leaves one row. Merging is a kernel of its own because the programs of a launch cannot wait for each other;
the order of the rows, and so every bit of the result, is that of the program ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.contract import BN_ROWS, GRAD_ROWS
from mobilenet_ext.triton import heuristics
from mobilenet_ext.triton.formulas import as_int64, images_of, where_also
from mobilenet_ext.triton.rows import (
    BN_MEAN,
    BN_RSTD,
    BN_SCALE,
    BN_SHIFT,
    BN_VAR,
    GRAD_BETA,
    GRAD_CONSTANT,
    GRAD_DZ_COEFFICIENT,
    GRAD_GAMMA,
    GRAD_MEAN,
    GRAD_Y_COEFFICIENT,
)

# Rows of a program's partial statistics. The mean is MEAN + MEAN_REST: in one float32 a large mean would round off what
# the variance needs.
STATISTICS_COUNT, STATISTICS_MEAN, STATISTICS_MEAN_REST, STATISTICS_M2 = (tl.constexpr(row) for row in range(4))
STATISTICS_ROWS = tl.constexpr(4)
# Rows of a program's partial sums: of dz, and of dz*(u - mean).
SUM_DZ, SUM_DZ_CENTRED = tl.constexpr(0), tl.constexpr(1)
SUM_ROWS = tl.constexpr(2)


def empty_statistics(like: Tensor, programs: int, channels: int) -> Tensor:
    """Where ``programs`` programs leave their statistics of ``channels`` channels, on the device of ``like``."""
    return like.new_empty((programs, STATISTICS_ROWS.value, channels), dtype=torch.float32)


def empty_sums(like: Tensor, programs: int, channels: int) -> Tensor:
    """Where ``programs`` programs leave their sums of ``channels`` channels, on the device of ``like``."""
    return like.new_empty((programs, SUM_ROWS.value, channels), dtype=torch.float32)


def statistics(partial: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """``bn`` of the statistics that the programs left with ``store_statistics``; no program: mean 0, variance 0."""
    programs, _, channels = partial.shape
    bn = partial.new_empty(BN_ROWS, channels)
    config = heuristics.merge(channels, programs)
    _statistics[(heuristics.cdiv(channels, config["BLOCK_C"]),)](
        partial, gamma, beta, bn, programs, channels, eps, **config
    )  # fmt: skip
    return bn


def bn_from_running(
    running_mean: Tensor, running_var: Tensor, gamma: Tensor | None, beta: Tensor | None, conv_bias: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """``bn`` from running statistics; the kernels leave the convolution's bias out, so it comes off the mean."""
    channels = running_mean.shape[0]
    bn = running_mean.new_empty((BN_ROWS, channels), dtype=torch.float32)
    _from_running[(heuristics.cdiv(channels, 256),)](
        running_mean, running_var, gamma, beta, conv_bias, bn, channels, eps, BLOCK_C=256, num_warps=4
    )
    return bn


def gradients(
    sums: Tensor | None, bn: Tensor | None, batch_stats: bool, count: int, weight_partial: Tensor | None,
    grad_weight: Tensor,
) -> Tensor:  # fmt: skip
    """``grad_bn`` of the sums that the programs left with ``store_sums``, and the sum over the programs of
    ``grad_weight``, in one launch.

    Args:
        sums: None: no ``grad_bn`` is wanted.
        bn: that BatchNorm's ``bn``, with ``sums``.
        batch_stats: whether it normalised by the batch's statistics, over ``count`` values per channel.
        weight_partial: float32 [programs, ...] of the elements of ``grad_weight`` in order; None: nothing to sum.
        grad_weight: float32, written.

    Returns:
        ``grad_bn``, or an empty tensor.
    """
    programs, channels = (sums.shape[0], sums.shape[2]) if sums is not None else (0, 0)
    grad_bn = grad_weight.new_empty((GRAD_ROWS, channels) if sums is not None else 0)
    weight_programs, elements = (weight_partial.shape[0], grad_weight.numel()) if weight_partial is not None else (0, 0)
    config = heuristics.merge(max(channels, elements), max(programs, weight_programs))
    blocks = [heuristics.cdiv(size, config["BLOCK_C"]) for size in (channels, elements)]
    if sum(blocks):
        _gradients[(sum(blocks),)](
            sums, bn, grad_bn, programs, channels, 1.0 / max(count, 1) if batch_stats else 0.0,
            weight_partial, grad_weight, weight_programs, elements, blocks[0], **config,
        )  # fmt: skip
    return grad_bn


def empty_image_sums(like: Tensor, tiles: int, images: int, channels: int) -> Tensor:
    """Where tiles of rows leave the sums of each image's rows, with ``store_image_sums``."""
    return like.new_empty((tiles + images, channels), dtype=torch.float32)


def image_sums(partial: Tensor, images: int, pixels: int, block_m: int) -> Tensor:
    """The sums over each image, float32 [images, channels, 1, 1], of what the tiles of ``block_m`` rows left."""
    channels = partial.shape[1]
    if images * pixels == 0:
        return partial.new_zeros(images, channels, 1, 1)
    sums = partial.new_empty(images, channels, 1, 1)
    config = heuristics.merge(channels, heuristics.cdiv(pixels, block_m))
    grid = (images, heuristics.cdiv(channels, config["BLOCK_C"]))
    _image_sums[grid](partial, sums, pixels, channels, BLOCK_M=block_m, **config)
    return sums


@triton.jit
def store_statistics(ptr, program, channels, offsets, mask, count, mean, mean_rest, m2):
    """Leaves a program's statistics of the channels ``offsets``."""
    ptr += program * STATISTICS_ROWS * channels
    tl.store(ptr + STATISTICS_COUNT * channels + offsets, count, mask=mask)
    tl.store(ptr + STATISTICS_MEAN * channels + offsets, mean, mask=mask)
    tl.store(ptr + STATISTICS_MEAN_REST * channels + offsets, mean_rest, mask=mask)
    tl.store(ptr + STATISTICS_M2 * channels + offsets, m2, mask=mask)


@triton.jit
def store_sums(ptr, program, channels, offsets, mask, sum_dz, sum_dz_centred):
    """Leaves a program's sums of the channels ``offsets``."""
    ptr += program * SUM_ROWS * channels
    tl.store(ptr + SUM_DZ * channels + offsets, sum_dz, mask=mask)
    tl.store(ptr + SUM_DZ_CENTRED * channels + offsets, sum_dz_centred, mask=mask)


@triton.jit
def store_image_sums(ptr, tile, rows, pixels, channels, offsets, mask, x, BLOCK_M: tl.constexpr):
    """Leaves the sums over a tile's rows of ``x``, [BLOCK_M, len(offsets)], for each image that has some of them.

    An image goes on into the next tile, or the next image begins in this one, or both: so the tile's number and the
    image's added up are a place that no other such pair has, and the places of an image lie side by side.
    """
    image, later = images_of(tile, pixels, BLOCK_M)
    last = (tl.minimum(rows, (as_int64(tile) + 1) * BLOCK_M) - 1) // pixels
    ptr += (tile + image) * channels
    for i in range(0, (last - image + 1).to(tl.int32)):
        tl.store(ptr + i * channels + offsets, tl.sum(tl.where((later == i)[:, None], x, 0.0), 0), mask=mask)


@triton.jit
def _store_bn(bn_ptr, gamma_ptr, beta_ptr, channels, c, mask, mean, var, eps):
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    scale = rstd
    if gamma_ptr is not None:
        scale = rstd * tl.load(gamma_ptr + c, mask=mask, other=0.0).to(tl.float32)
    shift = tl.zeros_like(mean)
    if beta_ptr is not None:
        shift = tl.load(beta_ptr + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(bn_ptr + BN_MEAN * channels + c, mean, mask=mask)
    tl.store(bn_ptr + BN_SCALE * channels + c, scale, mask=mask)
    tl.store(bn_ptr + BN_SHIFT * channels + c, shift, mask=mask)
    tl.store(bn_ptr + BN_RSTD * channels + c, rstd, mask=mask)
    tl.store(bn_ptr + BN_VAR * channels + c, var, mask=mask)


@triton.jit
def _mean_from(row_ptr, channels, origin, mask):
    """The programs' means, as differences from ``origin``."""
    mean = tl.load(row_ptr + STATISTICS_MEAN * channels, mask=mask, other=0.0) - origin[None, :]
    return mean + tl.load(row_ptr + STATISTICS_MEAN_REST * channels, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["programs", "channels"])
def _statistics(
    partial_ptr, gamma_ptr, beta_ptr, bn_ptr, programs, channels, eps, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    # Means are added up as differences from the first one: a large mean costs no precision.
    origin = tl.load(partial_ptr + STATISTICS_MEAN * channels + c, mask=where_also(mask, programs > 0), other=0.0)
    count = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, programs, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (rows < programs) & mask[None, :]
        row_ptr = partial_ptr + rows * (STATISTICS_ROWS * channels) + c[None, :]
        n = tl.load(row_ptr + STATISTICS_COUNT * channels, mask=inside, other=0.0)
        count += n
        total += tl.where(inside, n * _mean_from(row_ptr, channels, origin, inside), 0.0)
    counts = tl.sum(count, 0)
    counts = tl.where(counts > 0, counts, 1.0)
    offset = tl.sum(total, 0) / counts
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, programs, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (rows < programs) & mask[None, :]
        row_ptr = partial_ptr + rows * (STATISTICS_ROWS * channels) + c[None, :]
        n = tl.load(row_ptr + STATISTICS_COUNT * channels, mask=inside, other=0.0)
        difference = _mean_from(row_ptr, channels, origin, inside) - offset[None, :]
        own_m2 = tl.load(row_ptr + STATISTICS_M2 * channels, mask=inside, other=0.0)
        m2 += tl.where(inside, own_m2 + n * difference * difference, 0)
    var = tl.sum(m2, 0) / counts
    var = tl.where(var < 0, 0.0, var)  # by rounding, where all values are the same
    _store_bn(bn_ptr, gamma_ptr, beta_ptr, channels, c, mask, origin + offset, var, eps)


@triton.jit(do_not_specialize=["channels"])
def _from_running(
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, conv_bias_ptr, bn_ptr, channels, eps, BLOCK_C: tl.constexpr
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    mean = tl.load(mean_ptr + c, mask=mask, other=0.0).to(tl.float32)
    if conv_bias_ptr is not None:  # an inference op leaves it out, so it comes off the mean here
        mean -= tl.load(conv_bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=mask, other=1.0).to(tl.float32)
    _store_bn(bn_ptr, gamma_ptr, beta_ptr, channels, c, mask, mean, var, eps)


@triton.jit
def _sum_rows(ptr, programs, stride, offsets, mask, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, programs, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)[:, None]
        row_ptr = ptr + rows.to(tl.int64) * stride + offsets[None, :]
        acc += tl.load(row_ptr, mask=(rows < programs) & mask[None, :], other=0.0)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["pixels", "channels"])
def _image_sums(
    partial_ptr, sums_ptr, pixels, channels, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    first = image * pixels // BLOCK_M
    tiles = ((image + 1) * pixels - 1) // BLOCK_M - first + 1
    partial_ptr += (image + first) * channels
    total = _sum_rows(partial_ptr, tiles.to(tl.int32), channels, c, mask, BLOCK_P, BLOCK_C)
    tl.store(sums_ptr + image * channels + c, total, mask=mask)


@triton.jit(do_not_specialize=["programs", "channels", "weight_programs", "elements", "channel_blocks"])
def _gradients(
    sums_ptr, bn_ptr, grad_bn_ptr, programs, channels, inverse_count,
    weight_ptr, grad_weight_ptr, weight_programs, elements, channel_blocks,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    if block < channel_blocks:
        if sums_ptr is not None:
            c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask = c < channels
            scale = tl.load(bn_ptr + BN_SCALE * channels + c, mask=mask, other=0.0)
            rstd = tl.load(bn_ptr + BN_RSTD * channels + c, mask=mask, other=0.0)
            stride = SUM_ROWS * channels
            grad_beta = _sum_rows(sums_ptr + SUM_DZ * channels, programs, stride, c, mask, BLOCK_P, BLOCK_C)
            centred = _sum_rows(sums_ptr + SUM_DZ_CENTRED * channels, programs, stride, c, mask, BLOCK_P, BLOCK_C)
            grad_gamma = rstd * centred
            tl.store(grad_bn_ptr + GRAD_DZ_COEFFICIENT * channels + c, scale, mask=mask)
            # Without batch statistics both are 0 even where the sums are not finite.
            y_coefficient = tl.where(inverse_count > 0, -scale * rstd * grad_gamma * inverse_count, 0.0)
            constant = tl.where(inverse_count > 0, -scale * grad_beta * inverse_count, 0.0)
            tl.store(grad_bn_ptr + GRAD_Y_COEFFICIENT * channels + c, y_coefficient, mask=mask)
            mean = tl.load(bn_ptr + BN_MEAN * channels + c, mask=mask, other=0.0)
            tl.store(grad_bn_ptr + GRAD_MEAN * channels + c, mean, mask=mask)
            tl.store(grad_bn_ptr + GRAD_CONSTANT * channels + c, constant, mask=mask)
            tl.store(grad_bn_ptr + GRAD_GAMMA * channels + c, grad_gamma, mask=mask)
            tl.store(grad_bn_ptr + GRAD_BETA * channels + c, grad_beta, mask=mask)
    else:
        if weight_ptr is not None:
            e = (block - channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
            mask = e < elements
            total = _sum_rows(weight_ptr, weight_programs, elements, e, mask, BLOCK_P, BLOCK_C)
            tl.store(grad_weight_ptr + e, total, mask=mask)
