"""Pointwise convolution, backward: dy[M, N] is rebuilt on load from h and y, a[M, K] from u; then

    da = dy W    h_u = 0 where z <= 0 else da, with its sums    ``_input``
    dW = dy^T a                                                 ``_weight``, or ``_input`` in the same pass

One pass reads everything once; its accumulator is all of dW, which has to fit in a program's registers: the early
layers, which are the large ones. Otherwise the two are apart, each in blocks of its result, and ``_input`` leaves dy
behind for ``_weight``. dW is summed up over rows, so ``_weight`` splits them, a fixed number of programs to a block of
it; ``finish.gradients`` adds up what they leave.
"""

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
    dot,
    fold_rows,
    load_gradient_rows,
    load_normalisation,
    load_tile,
    normalise,
    output_gradient,
    rounded,
    store_sums,
    store_tile,
    tiles_of,
)


def pointwise_backward(
    h: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, bn_u: Tensor | None, batch_stats_u: bool,
    weight: Tensor, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if grad_bn_y is None:
        y = None  # dy is h
    n, k, height, width = u.shape
    rows, outputs = n * height * width, weight.shape[0]
    precision = gpu.product_precision(u.dtype)
    processors, shared_memory = gpu.of(u)
    candidates = heuristics.pointwise_backward(
        rows,
        k,
        outputs,
        u.element_size(),
        u.dtype == torch.float32 and precision == "ieee",
        need_input,
        need_weight,
        processors,
        shared_memory,
    )
    unit, out_unit = math.gcd(k, 8), math.gcd(outputs, 8)
    sizes = (rows, k // unit, outputs // out_unit)

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor, Tensor]:
        by_input, by_weight = config["input"], config["weight"]
        constants = {"UNIT": unit, "OUT_UNIT": out_unit, "PRECISION": precision}
        h_u = torch.empty_like(u, memory_format=torch.channels_last) if need_input else u.new_empty(0)
        grad_weight = torch.empty(weight.shape if need_weight else 0, dtype=torch.float32, device=u.device)
        sums = weight_partial = None
        gradient = (h, y, grad_bn_y)
        if by_input is not None:
            programs, kernel = by_input["PROGRAMS"], by_input["kernel"]
            if bn_u is not None:
                sums = grad_weight.new_empty(programs, 2, k)
            if by_weight is None and need_weight:
                weight_partial = grad_weight.new_empty(programs, outputs, k)
            dy = torch.empty_like(h) if by_weight is not None and y is not None else None
            if rows:
                _input[(programs * triton.cdiv(k, kernel["BLOCK_K"]),)](
                    *gradient, u, bn_u, weight, h_u, sums, dy, weight_partial, *sizes, **constants, **kernel
                )
            if dy is not None:
                gradient = (dy, None, None)
        if by_weight is not None:
            programs, kernel = by_weight["PROGRAMS"], by_weight["kernel"]
            weight_partial = grad_weight.new_empty(programs, outputs, k)
            blocks = triton.cdiv(outputs, kernel["BLOCK_N"]) * triton.cdiv(k, kernel["BLOCK_K"])
            if rows:
                _weight[(programs * blocks,)](*gradient, u, bn_u, weight_partial, *sizes, **constants, **kernel)
        grad_bn_u = finish.gradients(sums, bn_u, batch_stats_u, rows, weight_partial, grad_weight)
        return h_u, grad_weight, grad_bn_u

    flags = (y is None, grad_bn_y is None, bn_u is None, need_input, need_weight)
    problem = (rows, k, outputs, str(u.dtype), precision, *flags)
    return autotune.run("pointwise_backward", problem, candidates, launch)


@triton.jit
def _load_y(y_ptr, h, tile, rows, outputs, n, BLOCK_M: tl.constexpr):
    """The tile of y beside the tile ``h``; without y, ``h``, which stands in for a value that is not used."""
    if y_ptr is not None:
        return load_tile(y_ptr, tile, rows, outputs, n, BLOCK_M)
    else:
        return h


@triton.jit
def _row_inside(tile, rows, BLOCK_M: tl.constexpr):
    left = tl.minimum(rows - as_int64(tile) * BLOCK_M, BLOCK_M).to(tl.int32)
    return (tl.arange(0, BLOCK_M) < left)[:, None]


@triton.jit(do_not_specialize=["rows", "units", "out_units"])
def _input(
    h_ptr, y_ptr, grad_bn_ptr, u_ptr, bn_u_ptr, weight_ptr, h_u_ptr, sums_ptr, dy_ptr, weight_partial_ptr,
    rows, units, out_units, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_N: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """h_u with its sums. With ``dy_ptr``: also dy. With ``weight_partial_ptr`` (only if a block holds all of the
    weight): also dW, over the program's rows."""
    BATCH_STATS: tl.constexpr = y_ptr is not None
    WEIGHT: tl.constexpr = weight_partial_ptr is not None
    channels = units * UNIT
    outputs = out_units * OUT_UNIT
    blocks = tl.cdiv(channels, BLOCK_K)
    block = tl.program_id(0) % blocks
    program = tl.program_id(0) // blocks
    programs = tl.num_programs(0) // blocks
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = h_u_ptr.dtype.element_ty

    weight_ptrs = weight_ptr + n[:, None] * channels + k[None, :]
    mean, scale, shift = load_normalisation(bn_u_ptr, channels, k, k < channels)
    sum_h = fold_rows(tl.zeros([BLOCK_M, BLOCK_K], tl.float32), FOLD)
    sum_h_centred = sum_h
    if WHOLE_N:
        weight = tl.load(weight_ptrs, mask=(n < outputs)[:, None] & (k < channels)[None, :], other=0.0)
        p, q, mean_y, o = load_gradient_rows(grad_bn_ptr, outputs, n, n < outputs, BATCH_STATS)
    if WEIGHT:
        grad_weight = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)

    for tile in range(program, tiles_of(rows, BLOCK_M), programs):
        row_inside = _row_inside(tile, rows, BLOCK_M)
        if bn_u_ptr is not None or WEIGHT:
            u = load_tile(u_ptr, tile, rows, channels, k, BLOCK_M)
        da = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        if WHOLE_N:
            h = load_tile(h_ptr, tile, rows, outputs, n, BLOCK_M)
            y = _load_y(y_ptr, h, tile, rows, outputs, n, BLOCK_M)
            dy = rounded(output_gradient(h, y, p, q, mean_y, o, row_inside, BATCH_STATS), dtype)
            da = dot(dy, weight, da, PRECISION)
            if WEIGHT:
                a = rounded(activation(u, mean, scale, shift, row_inside, bn_u_ptr is not None), dtype)
                grad_weight = dot(tl.trans(dy), a, grad_weight, PRECISION)
        else:
            for n0 in range(0, outputs, BLOCK_N):
                inside = n < outputs - n0
                weight = tl.load(weight_ptrs + n0 * channels, mask=inside[:, None] & (k < channels)[None, :], other=0.0)
                p, q, mean_y, o = load_gradient_rows(grad_bn_ptr, outputs, n0 + n, inside, BATCH_STATS)
                h = load_tile(h_ptr, tile, rows, outputs, n0 + n, BLOCK_M)
                y = _load_y(y_ptr, h, tile, rows, outputs, n0 + n, BLOCK_M)
                dy = rounded(output_gradient(h, y, p, q, mean_y, o, row_inside, BATCH_STATS), dtype)
                if dy_ptr is not None:
                    store_tile(dy_ptr, tile, tl.where(block == 0, rows, 0), outputs, n0 + n, dy, BLOCK_M)
                da = dot(dy, weight, da, PRECISION)

        if bn_u_ptr is not None:
            da = tl.where(normalise(u, mean, scale, shift) <= 0, 0.0, da)
        h_u = rounded(da, dtype)
        store_tile(h_u_ptr, tile, rows, channels, k, h_u, BLOCK_M)
        if sums_ptr is not None:
            stored = tl.where(row_inside, h_u.to(tl.float32), 0.0)
            sum_h += fold_rows(stored, FOLD)
            sum_h_centred += fold_rows(stored * (u.to(tl.float32) - mean), FOLD)

    if sums_ptr is not None:
        row_sum = tl.sum(tl.sum(sum_h, 0), 0)
        row_sum_centred = tl.sum(tl.sum(sum_h_centred, 0), 0)
        store_sums(sums_ptr + program * 2 * channels, channels, k, k < channels, row_sum, row_sum_centred)
    if WEIGHT:
        store_tile(
            weight_partial_ptr + program.to(tl.int64) * outputs * channels, 0 * program, outputs, channels, k,
            grad_weight, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "units", "out_units"])
def _weight(
    h_ptr, y_ptr, grad_bn_ptr, u_ptr, bn_u_ptr, weight_partial_ptr,
    rows, units, out_units, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of dW over the program's share of the rows."""
    BATCH_STATS: tl.constexpr = y_ptr is not None
    channels = units * UNIT
    outputs = out_units * OUT_UNIT
    k_blocks = tl.cdiv(channels, BLOCK_K)
    blocks = tl.cdiv(outputs, BLOCK_N) * k_blocks
    block = tl.program_id(0) % blocks
    program = tl.program_id(0) // blocks
    programs = tl.num_programs(0) // blocks
    n = block // k_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = block % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    p, q, mean_y, o = load_gradient_rows(grad_bn_ptr, outputs, n, n < outputs, BATCH_STATS)
    mean, scale, shift = load_normalisation(bn_u_ptr, channels, k, k < channels)
    grad_weight = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for tile in range(program, tiles_of(rows, BLOCK_M), programs):
        row_inside = _row_inside(tile, rows, BLOCK_M)
        dy = load_tile(h_ptr, tile, rows, outputs, n, BLOCK_M)
        a = load_tile(u_ptr, tile, rows, channels, k, BLOCK_M)
        if grad_bn_ptr is not None:
            y = _load_y(y_ptr, dy, tile, rows, outputs, n, BLOCK_M)
            dy = rounded(output_gradient(dy, y, p, q, mean_y, o, row_inside, BATCH_STATS), dtype)
        if bn_u_ptr is not None:
            a = rounded(activation(a, mean, scale, shift, row_inside, True), dtype)
        grad_weight = dot(tl.trans(dy), a, grad_weight, PRECISION)
    weight_partial_ptr += program.to(tl.int64) * outputs * channels
    mask = (n < outputs)[:, None] & (k < channels)[None, :]
    tl.store(weight_partial_ptr + (n[:, None] * channels + k[None, :]), grad_weight, mask=mask)
