"""Pointwise convolution, forward and inference: a product of tall thin matrices, y[M, N] = a[M, K] W[N, K]^T + b[N].

``u`` is read raw, and normalised and activated between load and product; ``y`` is written once, and its statistics come
from the tile in registers. A program owns a block of output channels and walks over tiles of rows, so that there are
only a few rows of partial statistics per multiprocessor. Where one block holds all input channels the weight stays on
chip for the whole walk; otherwise it is read, like ``u``, block by block: from the L2, as the programs side by side
share both.

An operand that is normalised on load passes through registers, in every program that multiplies it. Where that costs
more than a pass over the data, the normalised activation is stored first (``STORED_A``), for the time of the product:
then both operands go from memory to shared memory, and from there to the tensor cores.

On Hopper ``hopper_forward.py`` has the same product.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobilenet_ext.contract import Act, Padding
from mobilenet_ext.triton import autotune, gpu, heuristics, hopper, hopper_forward, merge
from mobilenet_ext.triton.activation import compiled, load_norm, norm_act
from mobilenet_ext.triton.checks import check_input, check_pointwise
from mobilenet_ext.triton.formulas import (
    as_int64,
    dot,
    finite,
    fold_rows,
    gated,
    load_tile,
    move_squares,
    rounded,
    store_tile,
    tiles_of,
)
from mobilenet_ext.triton.merge import store_statistics
from mobilenet_ext.triton.norm_act import norm_act_forward
from mobilenet_ext.triton.rows import add_bias, load_bias


def pointwise_forward(
    u: Tensor, bn_u: Tensor | None, act_u: int, weight: Tensor, stride: int, padding: Padding, gamma: Tensor | None,
    beta: Tensor | None, eps: float, stats: bool, bias: Tensor | None = None, slope_u: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and with ``stats`` its normalisation, else an empty float32 tensor."""
    check_pointwise(stride, padding)
    return _forward(u, bn_u, act_u, slope_u, None, weight, gamma, beta, eps, stats, bias)


def gated_pointwise_forward(
    u: Tensor, bn_u: Tensor | None, act_u: int, gate: Tensor, weight: Tensor, gamma: Tensor | None,
    beta: Tensor | None, eps: float, stats: bool, bias: Tensor | None = None, slope_u: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with a factor ``gate`` of each image and channel of the input."""
    return _forward(u, bn_u, act_u, slope_u, gate, weight, gamma, beta, eps, stats, bias)


def _forward(
    u: Tensor, bn_u: Tensor | None, act_u: int, slope_u: float, gate: Tensor | None, weight: Tensor,
    gamma: Tensor | None, beta: Tensor | None, eps: float, stats: bool, bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_input(bn_u, act_u)
    y, partial = _run(u, bn_u, act_u, slope_u, gate, weight, bias, None, Act.LINEAR, 0.0, None, stats)
    bn_y = merge.statistics(partial, gamma, beta, eps) if stats else u.new_empty(0, dtype=torch.float32)
    return y, bn_y


def pointwise_inference(
    x: Tensor,
    bn_y: Tensor | None,
    act_y: int,
    weight: Tensor,
    stride: int,
    padding: Padding,
    packed: Tensor | None = None,
    residual: Tensor | None = None,
    slope_y: float = 0.0,
) -> Tensor:
    """The convolution's output, with ``bn_y`` normalised, activated, and with ``residual`` added to; the weight is
    taken as it is, not packed."""
    check_pointwise(stride, padding)
    return _run(x, None, Act.LINEAR, 0.0, None, weight, None, bn_y, act_y, slope_y, residual, False)[0]


def gated_pointwise_inference(
    x: Tensor, gate: Tensor, bn_y: Tensor | None, act_y: int, weight: Tensor, packed: Tensor | None = None,
    residual: Tensor | None = None, slope_y: float = 0.0,
) -> Tensor:  # fmt: skip
    """The same with a factor ``gate`` of each image and channel of the input."""
    return _run(x, None, Act.LINEAR, 0.0, gate, weight, None, bn_y, act_y, slope_y, residual, False)[0]


def _run(
    u: Tensor, bn_u: Tensor | None, act_u: int, slope_u: float, gate: Tensor | None, weight: Tensor,
    bias: Tensor | None, bn_y: Tensor | None, act_y: int, slope_y: float, residual: Tensor | None, stats: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    n, k, height, width = u.shape
    rows, outputs = n * height * width, weight.shape[0]
    precision = gpu.product_precision(u.dtype)
    candidates = heuristics.pointwise_forward(
        rows, k, outputs, u.element_size(), u.dtype == torch.float32 and precision == "ieee", bn_u is not None,
        gate is None and hopper.fits(weight, u), gpu.of(u),
    )  # fmt: skip
    if gate is not None:  # the pass that stores an operand knows of no gate
        candidates = tuple(config for config in candidates if not config["STORED_A"])
    acts = (compiled(act_u, slope_u), compiled(act_y, slope_y))

    def launch(config: heuristics.Config) -> tuple[Tensor, Tensor | None]:
        y = torch.empty((n, outputs, height, width), dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
        programs, kernel = config["PROGRAMS"], config["kernel"]
        partial = merge.empty_statistics(u, programs, outputs) if stats else None
        if rows:
            operand = (u, bn_u)
            if config["STORED_A"]:
                operand = (norm_act_forward(u, bn_u, act_u, False, None, slope_u), None)
            if config["TMA"]:
                hopper_forward.launch(*operand, weight, bias, bn_y, residual, acts, y, partial, programs, kernel)
            else:
                unit, out_unit = math.gcd(k, 8), math.gcd(outputs, 8)
                _kernel[(programs * heuristics.cdiv(outputs, kernel["BLOCK_N"]),)](
                    *operand, gate, weight, bias, bn_y, residual, y, partial, rows,
                    height * width if gate is not None else None, k // unit, outputs // out_unit,
                    UNIT=unit, OUT_UNIT=out_unit, ACT_U=acts[0], ACT_Y=acts[1], PRECISION=precision, **kernel,
                )  # fmt: skip
        return y, partial

    present = tuple(optional is not None for optional in (bn_u, gate, bias, bn_y, residual))
    problem = (rows, k, outputs, str(u.dtype), precision, *acts, *present, stats)
    return autotune.run("pointwise_forward", problem, candidates, launch)


@triton.jit(do_not_specialize=["rows", "pixels", "units", "out_units"])
def _kernel(
    u_ptr, bn_u_ptr, gate_ptr, weight_ptr, bias_ptr, bn_y_ptr, residual_ptr, y_ptr, partial_ptr,
    rows, pixels, units, out_units,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACT_U: tl.constexpr, ACT_Y: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """``pixels``: those of an image, with a gate."""
    NORM_U: tl.constexpr = bn_u_ptr is not None
    ON_LOAD: tl.constexpr = NORM_U or gate_ptr is not None
    STATS: tl.constexpr = partial_ptr is not None
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    channels = units * UNIT
    outputs = out_units * OUT_UNIT
    blocks = tl.cdiv(outputs, BLOCK_N)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    program = tl.program_id(0) // blocks
    programs = tl.num_programs(0) // blocks
    k = tl.arange(0, BLOCK_K)
    column_inside = n < outputs

    # Channels past the last one are 0 in u, weight and all rows of bn_u: they add 0 to the product.
    weight_ptrs = weight_ptr + n[None, :] * channels + k[:, None]
    if WHOLE_K:
        weight = tl.load(weight_ptrs, mask=(k < channels)[:, None] & column_inside[None, :], other=0.0)
        norm_u = load_norm(bn_u_ptr, channels, k, k < channels)
    norm_y = load_norm(bn_y_ptr, outputs, n, column_inside)
    count = 0.0
    # Statistics are sums of differences from the mean of the program's first tile: a large mean costs no precision.
    # FOLD: a thread adds up its own rows of all tiles before it meets the others.
    origin = tl.zeros([BLOCK_N], tl.float32)
    total = fold_rows(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), FOLD)
    squares = total

    tiles = tiles_of(rows, BLOCK_M)
    if WHOLE_K:
        next_u = load_tile(u_ptr, program, rows, channels, k, BLOCK_M)
    for tile in range(program, tiles, programs):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if WHOLE_K:
            a = next_u
            # The next tile is on its way while this one is worked on.
            next_u = load_tile(u_ptr, tile + programs, rows, channels, k, BLOCK_M)
            if ON_LOAD:
                a = norm_act(a, norm_u, NORM_U, ACT_U)
                a = rounded(gated(a, gate_ptr, tile, rows, pixels, channels, k, BLOCK_M), dtype)
            acc = dot(a, weight, acc, PRECISION)
        else:
            for k0 in range(0, channels, BLOCK_K):
                inside = k < channels - k0
                weight = tl.load(weight_ptrs + k0, mask=inside[:, None] & column_inside[None, :], other=0.0)
                a = load_tile(u_ptr, tile, rows, channels, k0 + k, BLOCK_M)
                if ON_LOAD:
                    norm_u = load_norm(bn_u_ptr, channels, k0 + k, inside)
                    a = norm_act(a, norm_u, NORM_U, ACT_U)
                    a = rounded(gated(a, gate_ptr, tile, rows, pixels, channels, k0 + k, BLOCK_M), dtype)
                acc = dot(a, weight, acc, PRECISION)

        # Loaded for each tile: the product needs the registers.
        acc = add_bias(acc, load_bias(bias_ptr, n, column_inside), bias_ptr is not None)
        acc = norm_act(acc, norm_y, bn_y_ptr is not None, ACT_Y)
        if residual_ptr is not None:
            acc += load_tile(residual_ptr, tile, rows, outputs, n, BLOCK_M).to(tl.float32)
        y = rounded(acc, dtype)
        store_tile(y_ptr, tile, rows, outputs, n, y, BLOCK_M)
        if STATS:
            left = tl.minimum(rows - as_int64(tile) * BLOCK_M, BLOCK_M).to(tl.int32)
            row_inside = (tl.arange(0, BLOCK_M) < left)[:, None]
            count += left.to(tl.float32)
            stored = y.to(tl.float32)
            if tile == program:
                origin = finite(tl.sum(tl.where(row_inside, stored, 0.0), 0) / left.to(tl.float32))
            difference = tl.where(row_inside, stored - origin[None, :], 0.0)
            total += fold_rows(difference, FOLD)
            squares += fold_rows(difference * difference, FOLD)
    if STATS:
        offset = tl.sum(tl.sum(total, 0), 0) / count
        m2 = move_squares(tl.sum(tl.sum(squares, 0), 0), -offset * offset * count)
        store_statistics(partial_ptr, program, outputs, n, column_inside, count, origin, offset, m2)
