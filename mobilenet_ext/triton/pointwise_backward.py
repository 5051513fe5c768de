"""Pointwise convolution, backward: dy[M, N] is rebuilt on load from dz and y, a[M, K] from u; then

    da = dy W      dz_u = da act'(z), with its sums    ``_input``
    dW = dy^T a                                        ``_weight``, or ``_input`` in the same pass

One pass reads everything once; its accumulator is all of dW, which has to fit in a program's registers: the early
layers, which are the large ones. Otherwise the two are apart, each in blocks of its result, and share a dy that is
stored: by ``_input``, or, where each of its programs would rebuild it at a higher price than that of a pass over the
data, before it (``STORED_DY``). ``_weight`` can have its a stored before it too (``STORED_A``). dW is summed up over
rows, so ``_weight`` splits them, a fixed number of programs to a block of it; ``merge.gradients`` adds up what they
leave.

On Hopper ``hopper_backward.py`` has the same three products, for activations whose derivative is 0 or 1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.contract import Padding
from mobilenet_ext.triton import autotune, gpu, heuristics, hopper, hopper_backward, merge
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
from mobilenet_ext.triton.checks import check_input, check_pointwise
from mobilenet_ext.triton.formulas import (
    as_int64,
    dot,
    fold_rows,
    gated,
    load_gradient_coefficients,
    load_tile,
    output_gradient,
    rounded,
    store_tile,
    tiles_of,
)
from mobilenet_ext.triton.merge import store_image_sums, store_sums
from mobilenet_ext.triton.norm_act import norm_act_forward


def pointwise_backward(
    dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, bn_u: Tensor | None, act_u: int,
    batch_stats_u: bool, weight: Tensor, stride: int, padding: Padding, need_input: bool, need_weight: bool,
    slope_u: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dz_u, grad_weight, grad_bn_u); those that are not wanted, and the last without ``bn_u``, are empty."""
    check_pointwise(stride, padding)
    return _run(dz, y, grad_bn_y, u, bn_u, act_u, slope_u, batch_stats_u, None, weight, need_input, need_weight)


def gated_pointwise_backward(
    dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, bn_u: Tensor | None, act_u: int, gate: Tensor,
    weight: Tensor, need_input: bool, need_weight: bool, slope_u: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(da, grad_weight, grad_gate); those that are not wanted are empty."""
    return _run(dz, y, grad_bn_y, u, bn_u, act_u, slope_u, False, gate, weight, need_input, need_weight)


def _run(
    dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, bn_u: Tensor | None, act_u: int, slope_u: float,
    batch_stats_u: bool, gate: Tensor | None, weight: Tensor, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_input(bn_u, act_u)
    if grad_bn_y is None:
        y = None  # dy is dz
    n, k, height, width = u.shape
    rows, outputs = n * height * width, weight.shape[0]
    precision = gpu.product_precision(u.dtype)
    candidates = heuristics.pointwise_backward(
        rows, k, outputs, u.element_size(), u.dtype == torch.float32 and precision == "ieee", need_input, need_weight,
        gate is None and gates(act_u) and hopper.fits(weight, u, dz), gpu.of(u),
    )  # fmt: skip
    if gate is not None:  # the pass that stores an operand knows of no gate
        candidates = tuple(config for config in candidates if not (config["weight"] and config["weight"]["STORED_A"]))
    act = compiled(act_u, slope_u)
    unit, out_unit = math.gcd(k, 8), math.gcd(outputs, 8)
    sizes = (rows, height * width if gate is not None else None, k // unit, outputs // out_unit)

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor, Tensor]:
        by_input, by_weight = config["input"], config["weight"]
        constants = {"UNIT": unit, "OUT_UNIT": out_unit, "ACT_U": act, "PRECISION": precision}
        dz_u = torch.empty_like(u, memory_format=torch.channels_last) if need_input else u.new_empty(0)
        grad_weight = torch.empty(weight.shape if need_weight else 0, dtype=torch.float32, device=u.device)
        sums = weight_partial = gate_partial = None
        gradient = (dz, y, grad_bn_y)
        if rows and config["STORED_DY"] and grad_bn_y is not None:
            gradient = (_stored_gradient(dz, y, grad_bn_y), None, None)
        if by_input is not None:
            programs, kernel = by_input["PROGRAMS"], by_input["kernel"]
            if gate is not None:
                tiles = heuristics.cdiv(rows, kernel["BLOCK_M"])
                gate_partial = merge.empty_image_sums(u, tiles, n, k)
            elif bn_u is not None:
                sums = merge.empty_sums(u, programs, k)
            if by_weight is None and need_weight:
                weight_partial = grad_weight.new_empty(programs, outputs, k)
            dy = torch.empty_like(dz) if by_weight is not None and gradient[1] is not None else None
            if rows and by_input["TMA"] and by_weight is None and need_weight:
                hopper_backward.launch_one_pass(
                    *gradient, u, bn_u, act, weight, dz_u, sums, weight_partial, programs, kernel
                )
            elif rows and by_input["TMA"]:
                hopper_backward.launch_input(gradient[0], u, bn_u, act, weight, dz_u, sums, programs, kernel)
            elif rows:
                _input[(programs * heuristics.cdiv(k, kernel["BLOCK_K"]),)](
                    *gradient, u, bn_u, gate, weight, dz_u, sums, gate_partial, dy, weight_partial, *sizes,
                    **constants, **kernel,
                )  # fmt: skip
            if dy is not None:
                gradient = (dy, None, None)
        if by_weight is not None:
            programs, kernel = by_weight["PROGRAMS"], by_weight["kernel"]
            weight_partial = grad_weight.new_empty(programs, outputs, k)
            blocks = heuristics.cdiv(outputs, kernel["BLOCK_N"]) * heuristics.cdiv(k, kernel["BLOCK_K"])
            if rows:
                operand = (u, bn_u)
                if by_weight["STORED_A"] and bn_u is not None:
                    operand = (norm_act_forward(u, bn_u, act_u, False, None, slope_u), None)
                if by_weight["TMA"]:
                    hopper_backward.launch_weight(gradient[0], *operand, act, weight_partial, programs, kernel)
                else:
                    _weight[(programs * blocks,)](
                        *gradient, *operand, gate, weight_partial, *sizes, **constants, **kernel
                    )
        of_input = merge.gradients(sums, bn_u, batch_stats_u, rows, weight_partial, grad_weight)
        if gate_partial is not None:
            of_input = merge.image_sums(gate_partial, n, height * width, by_input["kernel"]["BLOCK_M"])
        return dz_u, grad_weight, of_input

    flags = (y is None, grad_bn_y is None, bn_u is None, gate is None, need_input, need_weight)
    problem = (rows, k, outputs, str(u.dtype), precision, act, *flags)
    return autotune.run("pointwise_backward", problem, candidates, launch)


def _stored_gradient(dz: Tensor, y: Tensor | None, grad_bn_y: Tensor) -> Tensor:
    """dy as a tensor."""
    n, outputs, height, width = dz.shape
    rows, unit = n * height * width, math.gcd(outputs, 8)
    dy = torch.empty_like(dz)

    def launch(config: heuristics.Config) -> Tensor:
        kernel = config["kernel"]
        grid = (heuristics.cdiv(rows, kernel["BLOCK_M"]), heuristics.cdiv(outputs, kernel["BLOCK_C"]))
        _gradient[grid](dz, y, grad_bn_y, dy, rows, outputs // unit, UNIT=unit, **kernel)
        return dy

    problem = (rows, outputs, dz.element_size(), gpu.of(dz).multiprocessors)
    return autotune.run("output_gradient", (*problem, y is None), heuristics.norm_act(*problem), launch)


@triton.jit(do_not_specialize=["rows", "C_units"])
def _gradient(
    dz_ptr, y_ptr, grad_bn_ptr, dy_ptr, rows, C_units,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BATCH_STATS: tl.constexpr = y_ptr is not None
    outputs = C_units * UNIT
    tile = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    coefficients = load_gradient_coefficients(grad_bn_ptr, outputs, c, c < outputs, BATCH_STATS)
    dz = load_tile(dz_ptr, tile, rows, outputs, c, BLOCK_M)
    y = _load_y(y_ptr, dz, tile, rows, outputs, c, BLOCK_M)
    dy = output_gradient(dz, y, coefficients, _row_inside(tile, rows, BLOCK_M), BATCH_STATS)
    store_tile(dy_ptr, tile, rows, outputs, c, rounded(dy, dy_ptr.dtype.element_ty), BLOCK_M)


@triton.jit
def _load_y(y_ptr, dz, tile, rows, outputs, n, BLOCK_M: tl.constexpr):
    """The tile of y beside the tile ``dz``; without y, ``dz``, which stands in for a value that is not used."""
    if y_ptr is not None:
        return load_tile(y_ptr, tile, rows, outputs, n, BLOCK_M)
    else:
        return dz


@triton.jit
def _row_inside(tile, rows, BLOCK_M: tl.constexpr):
    left = tl.minimum(rows - as_int64(tile) * BLOCK_M, BLOCK_M).to(tl.int32)
    return (tl.arange(0, BLOCK_M) < left)[:, None]


@triton.jit(do_not_specialize=["rows", "pixels", "units", "out_units"])
def _input(
    dz_ptr, y_ptr, grad_bn_ptr, u_ptr, bn_u_ptr, gate_ptr, weight_ptr, dz_u_ptr, sums_ptr, gate_partial_ptr, dy_ptr,
    weight_partial_ptr, rows, pixels, units, out_units, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACT_U: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_N: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """dz_u with its sums; with a gate da, and what it adds to the gate's gradient. With ``dy_ptr``: also dy. With
    ``weight_partial_ptr`` (only if a block holds all of the weight): also dW, over the program's rows."""
    BATCH_STATS: tl.constexpr = y_ptr is not None
    NORM_U: tl.constexpr = bn_u_ptr is not None
    READS_U: tl.constexpr = NORM_U or gate_ptr is not None
    WEIGHT: tl.constexpr = weight_partial_ptr is not None
    channels = units * UNIT
    outputs = out_units * OUT_UNIT
    blocks = tl.cdiv(channels, BLOCK_K)
    block = tl.program_id(0) % blocks
    program = tl.program_id(0) // blocks
    programs = tl.num_programs(0) // blocks
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = dz_u_ptr.dtype.element_ty

    weight_ptrs = weight_ptr + n[:, None] * channels + k[None, :]
    norm_u = load_norm(bn_u_ptr, channels, k, k < channels)
    sum_dz = fold_rows(tl.zeros([BLOCK_M, BLOCK_K], tl.float32), FOLD)
    sum_dz_centred = sum_dz
    if WHOLE_N:
        weight = tl.load(weight_ptrs, mask=(n < outputs)[:, None] & (k < channels)[None, :], other=0.0)
        coefficients = load_gradient_coefficients(grad_bn_ptr, outputs, n, n < outputs, BATCH_STATS)
    if WEIGHT:
        grad_weight = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)

    for tile in range(program, tiles_of(rows, BLOCK_M), programs):
        row_inside = _row_inside(tile, rows, BLOCK_M)
        if WHOLE_N and (READS_U or WEIGHT):
            u = load_tile(u_ptr, tile, rows, channels, k, BLOCK_M)
        da = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        if WHOLE_N:
            dy = load_tile(dz_ptr, tile, rows, outputs, n, BLOCK_M)
            if grad_bn_ptr is not None:
                y = _load_y(y_ptr, dy, tile, rows, outputs, n, BLOCK_M)
                dy = rounded(output_gradient(dy, y, coefficients, row_inside, BATCH_STATS), dtype)
            da = dot(dy, weight, da, PRECISION)
            if WEIGHT:
                a = norm_act_inside(u, norm_u, row_inside, NORM_U, ACT_U)
                a = rounded(gated(a, gate_ptr, tile, rows, pixels, channels, k, BLOCK_M), dtype)
                grad_weight = dot(tl.trans(dy), a, grad_weight, PRECISION)
        else:
            for n0 in range(0, outputs, BLOCK_N):
                inside = n < outputs - n0
                weight = tl.load(weight_ptrs + n0 * channels, mask=inside[:, None] & (k < channels)[None, :], other=0.0)
                dy = load_tile(dz_ptr, tile, rows, outputs, n0 + n, BLOCK_M)
                if grad_bn_ptr is not None:
                    coefficients = load_gradient_coefficients(grad_bn_ptr, outputs, n0 + n, inside, BATCH_STATS)
                    y = _load_y(y_ptr, dy, tile, rows, outputs, n0 + n, BLOCK_M)
                    dy = rounded(output_gradient(dy, y, coefficients, row_inside, BATCH_STATS), dtype)
                if dy_ptr is not None:
                    store_tile(dy_ptr, tile, tl.where(block == 0, rows, 0), outputs, n0 + n, dy, BLOCK_M)
                da = dot(dy, weight, da, PRECISION)
            if READS_U:  # not before the products, which need the registers
                u = load_tile(u_ptr, tile, rows, channels, k, BLOCK_M)

        if gate_ptr is not None:
            products = da * norm_act(u, norm_u, NORM_U, ACT_U)
            store_image_sums(gate_partial_ptr, tile, rows, pixels, channels, k, k < channels, products, BLOCK_M)
            da = gated(da, gate_ptr, tile, rows, pixels, channels, k, BLOCK_M)
        elif NORM_U:
            da = activate_backward(normalise(u, norm_u), da, ACT_U)
        dz_u = rounded(da, dtype)
        store_tile(dz_u_ptr, tile, rows, channels, k, dz_u, BLOCK_M)
        if sums_ptr is not None:
            stored = tl.where(row_inside, dz_u.to(tl.float32), 0.0)
            sum_dz += fold_rows(stored, FOLD)
            sum_dz_centred += fold_rows(stored * centred(u, norm_u), FOLD)

    if sums_ptr is not None:
        row_sum = tl.sum(tl.sum(sum_dz, 0), 0)
        row_sum_centred = tl.sum(tl.sum(sum_dz_centred, 0), 0)
        store_sums(sums_ptr, program, channels, k, k < channels, row_sum, row_sum_centred)
    if WEIGHT:
        store_tile(
            weight_partial_ptr + program.to(tl.int64) * outputs * channels, 0 * program, outputs, channels, k,
            grad_weight, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "pixels", "units", "out_units"])
def _weight(
    dz_ptr, y_ptr, grad_bn_ptr, u_ptr, bn_u_ptr, gate_ptr, weight_partial_ptr,
    rows, pixels, units, out_units, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACT_U: tl.constexpr,
    PRECISION: tl.constexpr,
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
    coefficients = load_gradient_coefficients(grad_bn_ptr, outputs, n, n < outputs, BATCH_STATS)
    norm_u = load_norm(bn_u_ptr, channels, k, k < channels)
    grad_weight = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for tile in range(program, tiles_of(rows, BLOCK_M), programs):
        row_inside = _row_inside(tile, rows, BLOCK_M)
        dy = load_tile(dz_ptr, tile, rows, outputs, n, BLOCK_M)
        a = load_tile(u_ptr, tile, rows, channels, k, BLOCK_M)
        if grad_bn_ptr is not None:
            y = _load_y(y_ptr, dy, tile, rows, outputs, n, BLOCK_M)
            dy = rounded(output_gradient(dy, y, coefficients, row_inside, BATCH_STATS), dtype)
        if bn_u_ptr is not None or gate_ptr is not None:
            a = norm_act_inside(a, norm_u, row_inside, bn_u_ptr is not None, ACT_U)
            a = rounded(gated(a, gate_ptr, tile, rows, pixels, channels, k, BLOCK_M), dtype)
        grad_weight = dot(tl.trans(dy), a, grad_weight, PRECISION)
    weight_partial_ptr += program.to(tl.int64) * outputs * channels
    mask = (n < outputs)[:, None] & (k < channels)[None, :]
    tl.store(weight_partial_ptr + (n[:, None] * channels + k[None, :]), grad_weight, mask=mask)
