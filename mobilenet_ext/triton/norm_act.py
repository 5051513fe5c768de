"""The end of a chain: a stored convolution output normalised and activated, or pooled over each image as well."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.triton import autotune, gpu, heuristics, merge
from mobilenet_ext.triton.activation import (
    activate_backward,
    centred,
    compiled,
    gates,
    load_norm,
    norm_act,
    norm_act_inside,
    normalise,
)
from mobilenet_ext.triton.formulas import as_int64, rounded, tiles_of
from mobilenet_ext.triton.merge import store_sums


def norm_act_forward(
    y: Tensor, bn_y: Tensor, act: int, pool: bool, residual: Tensor | None = None, slope: float = 0.0
) -> Tensor:
    """act(norm(y)) + residual, or with ``pool`` the mean of act(norm(y)) over each image."""
    if pool and residual is not None:
        raise ValueError("residual: expected None where the output is pooled")
    act = compiled(act, slope)
    n, channels, height, width = y.shape
    pixels, unit, multiprocessors = height * width, math.gcd(channels, 8), gpu.of(y).multiprocessors
    size = (n, channels, 1, 1) if pool else y.shape
    out = torch.empty(size, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    constants = {"UNIT": unit, "ACT": act}

    def launch(config: heuristics.Config) -> Tensor:
        kernel = config["kernel"]
        grid = (heuristics.cdiv(n * pixels, kernel["BLOCK_M"]), heuristics.cdiv(channels, kernel["BLOCK_C"]))
        _forward[grid](y, bn_y, residual, out, n * pixels, channels // unit, **constants, **kernel)
        return out

    def launch_pool(config: heuristics.Config) -> Tensor:
        kernel = config["kernel"]
        grid = (n, heuristics.cdiv(channels, kernel["BLOCK_C"]))
        _pool_forward[grid](y, bn_y, out, pixels, channels // unit, **constants, **kernel)
        return out

    if pool:
        problem = (n, pixels, channels, y.dtype.itemsize, multiprocessors)
        candidates = heuristics.norm_act_pool(*problem)
        return autotune.run("norm_act_pool_forward", (*problem, act), candidates, launch_pool)
    problem = (n * pixels, channels, y.dtype.itemsize, multiprocessors)
    flags = (act, residual is None)
    return autotune.run("norm_act_forward", (*problem, *flags), heuristics.norm_act(*problem), launch)


def norm_act_backward(
    grad: Tensor, y: Tensor, bn_y: Tensor, act: int, batch_stats: bool, pool: bool, grad_pooled: Tensor | None = None,
    need_dz: bool = True, slope: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dz, grad_bn_y) from the gradient of ``norm_act_forward``, or from those of both its outputs, whole and pooled;
    a dz that is not wanted is empty."""
    if pool and grad_pooled is not None:
        raise ValueError("grad_pooled: expected None where grad is that of the pooled output")
    act = compiled(act, slope)
    n, channels, height, width = y.shape
    pixels, unit, multiprocessors = height * width, math.gcd(channels, 8), gpu.of(y).multiprocessors
    dz = torch.empty_like(y, memory_format=torch.channels_last) if need_dz else y.new_empty(0)
    of_pooled = pool or grad_pooled is not None
    if of_pooled:
        backward, sizes = _pool_backward, (n, pixels, channels // unit)
        gradients = (None, grad) if pool else (grad, grad_pooled)
    else:
        backward, sizes, gradients = _backward, (n * pixels, channels // unit), (grad,)

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor]:
        kernel, programs = config["kernel"], config["PROGRAMS"] if y.numel() else 0
        sums = merge.empty_sums(y, programs, channels)
        if programs:
            grid = (heuristics.cdiv(channels, kernel["BLOCK_C"]), programs)
            backward[grid](*gradients, y, bn_y, dz if need_dz else None, sums, *sizes, UNIT=unit, ACT=act, **kernel)
        return dz, merge.gradients(sums, bn_y, batch_stats, n * pixels, None, bn_y)

    if of_pooled:
        problem = (n, pixels, channels, y.dtype.itemsize, multiprocessors)
        op, candidates = "norm_act_pool_backward", heuristics.norm_act_pool(*problem)
    else:
        problem = (n * pixels, channels, y.dtype.itemsize, multiprocessors)
        op, candidates = "norm_act_backward", heuristics.norm_act(*problem)
    return autotune.run(op, (*problem, act, pool, need_dz), candidates, launch)


@triton.jit(do_not_specialize=["rows", "C_units"])
def _forward(
    y_ptr, bn_ptr, residual_ptr, out_ptr, rows, C_units,
    UNIT: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
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
    out = norm_act(y, load_norm(bn_ptr, channels, c, channel_inside), True, ACT)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + base + offsets, rounded(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "C_units"])
def _backward(
    grad_ptr, y_ptr, bn_ptr, dz_ptr, sums_ptr, rows, C_units,
    UNIT: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    norm = load_norm(bn_ptr, channels, c, channel_inside)
    m = tl.arange(0, BLOCK_M)[:, None]
    offsets = m * channels + c[None, :]
    sum_dz = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_dz_centred = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(1), tiles_of(rows, BLOCK_M), tl.num_programs(1)):
        first_row = as_int64(tile) * BLOCK_M
        mask = (m < rows - first_row) & channel_inside[None, :]
        base = first_row * channels
        grad = tl.load(grad_ptr + base + offsets, mask=mask, other=0.0)
        y = tl.load(y_ptr + base + offsets, mask=mask, other=0.0)
        dz = rounded(activate_backward(normalise(y, norm), grad, ACT), y_ptr.dtype.element_ty)
        if dz_ptr is not None:
            tl.store(dz_ptr + base + offsets, dz, mask=mask)
        dz = dz.to(tl.float32)
        if not gates(ACT):  # else it is 0 outside the mask, as grad is
            dz = tl.where(mask, dz, 0.0)
        sum_dz += dz
        sum_dz_centred += dz * centred(y, norm)
    program = tl.program_id(1).to(tl.int64)
    store_sums(sums_ptr, program, channels, c, channel_inside, tl.sum(sum_dz, 0), tl.sum(sum_dz_centred, 0))


@triton.jit(do_not_specialize=["pixels", "C_units"])
def _pool_forward(
    y_ptr, bn_ptr, out_ptr, pixels, C_units,
    UNIT: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channels = C_units * UNIT
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    norm = load_norm(bn_ptr, channels, c, channel_inside)
    m = tl.arange(0, BLOCK_M)[:, None]
    offsets = m * channels + c[None, :]
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(0, pixels, BLOCK_M):
        mask = (m < pixels - first) & channel_inside[None, :]
        y = tl.load(y_ptr + (image * pixels + first) * channels + offsets, mask=mask, other=0.0)
        total += norm_act_inside(y, norm, mask, True, ACT)
    out = rounded(tl.sum(total, 0) / pixels, out_ptr.dtype.element_ty)
    tl.store(out_ptr + image * channels + c, out, mask=channel_inside)


@triton.jit(do_not_specialize=["images", "pixels", "C_units"])
def _pool_backward(
    grad_ptr, grad_pooled_ptr, y_ptr, bn_ptr, dz_ptr, sums_ptr, images, pixels, C_units,
    UNIT: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the gradient at the mean over each image, and with ``grad_ptr`` also that at each pixel."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    # A gradient that passes as it is, is rounded before it is spread over the pixels.
    EARLY: tl.constexpr = gates(ACT) and grad_ptr is None
    channels = C_units * UNIT
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_inside = c < channels
    norm = load_norm(bn_ptr, channels, c, channel_inside)
    m = tl.arange(0, BLOCK_M)[:, None]
    offsets = m * channels + c[None, :]
    sum_dz = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_dz_centred = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    chunks = tl.cdiv(pixels, BLOCK_M)
    for tile in range(tl.program_id(1), images * chunks, tl.num_programs(1)):
        image = as_int64(tile // chunks)
        first = tile % chunks * BLOCK_M
        mask = (m < pixels - first) & channel_inside[None, :]
        base = (image * pixels + first) * channels
        da = tl.load(grad_pooled_ptr + image * channels + c, mask=channel_inside, other=0.0).to(tl.float32) / pixels
        if EARLY:
            da = rounded(da, dtype).to(tl.float32)
        da = da[None, :]
        if grad_ptr is not None:
            da += tl.load(grad_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + base + offsets, mask=mask, other=0.0)
        dz = tl.where(mask, activate_backward(normalise(y, norm), da, ACT), 0.0)
        stored = rounded(dz, dtype)
        if dz_ptr is not None:
            tl.store(dz_ptr + base + offsets, stored, mask=mask)
        if not EARLY:
            dz = stored.to(tl.float32)
        sum_dz += dz
        sum_dz_centred += dz * centred(y, norm)
    program = tl.program_id(1).to(tl.int64)
    store_sums(sums_ptr, program, channels, c, channel_inside, tl.sum(sum_dz, 0), tl.sum(sum_dz_centred, 0))
