"""Pointwise convolution on Hopper, backward (see ``hopper.py`` and ``pointwise_backward.py``)."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mobilenet_ext.triton import heuristics, hopper
from mobilenet_ext.triton.activation import CompiledAct, activate_backward, centred, load_norm, normalise
from mobilenet_ext.triton.formulas import load_gradient_coefficients, output_gradient, rounded
from mobilenet_ext.triton.hopper import (
    accumulator,
    barriers,
    by_rows,
    copy_step,
    norm_act_tile,
    sum_of_lanes,
    tile_norm,
)
from mobilenet_ext.triton.merge import store_sums


def launch_input(
    dy: Tensor, u: Tensor, bn_u: Tensor | None, act_u: CompiledAct, weight: Tensor, dz_u: Tensor, sums: Tensor | None,
    programs: int, kernel: heuristics.Config,
) -> None:  # fmt: skip
    """Writes dz_u, and with ``sums`` the sums of each program's rows."""
    n, k, height, width = u.shape
    rows, outputs = n * height * width, weight.shape[0]
    block_m, block_n, block_k = kernel["BLOCK_M"], kernel["BLOCK_N"], kernel["BLOCK_K"]
    _input[(programs * heuristics.cdiv(k, block_k),)](
        hopper.tiles_of(dy, rows, outputs, (block_m, block_n)), hopper.tiles_of(weight, outputs, k, (block_n, block_k)),
        u, bn_u, dz_u, sums, rows, k // 8, outputs // 8, ACT_U=act_u, **kernel,
    )  # fmt: skip


def launch_weight(
    dy: Tensor, u: Tensor, bn_u: Tensor | None, act_u: CompiledAct, weight_partial: Tensor, programs: int,
    kernel: heuristics.Config,
) -> None:  # fmt: skip
    """Writes the dW of each program's rows."""
    n, k, height, width = u.shape
    rows, outputs = n * height * width, dy.shape[1]
    block_m, block_n, block_k = kernel["BLOCK_M"], kernel["BLOCK_N"], kernel["BLOCK_K"]
    blocks = heuristics.cdiv(outputs, block_n) * heuristics.cdiv(k, block_k)
    _weight[(programs * blocks,)](
        hopper.tiles_of(dy, rows, outputs, (block_m, block_n)), hopper.tiles_of(u, rows, k, (block_m, block_k)), bn_u,
        weight_partial, rows, k // 8, outputs // 8, ACT_U=act_u, **kernel,
    )  # fmt: skip


def launch_one_pass(
    dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, bn_u: Tensor | None, act_u: CompiledAct,
    weight: Tensor, dz_u: Tensor, sums: Tensor | None, weight_partial: Tensor, programs: int, kernel: heuristics.Config,
) -> None:  # fmt: skip
    """Writes dz_u, with ``sums`` the sums of each program's rows, and their dW; a block is all of the weight."""
    n, k, height, width = u.shape
    rows, outputs = n * height * width, weight.shape[0]
    block_m, block_n, block_k = kernel["BLOCK_M"], kernel["BLOCK_N"], kernel["BLOCK_K"]
    _one_pass[(programs,)](
        hopper.tiles_of(dz, rows, outputs, (block_m, block_n)),
        None if y is None else hopper.tiles_of(y, rows, outputs, (block_m, block_n)), grad_bn_y,
        hopper.tiles_of(u, rows, k, (block_m, block_k)), bn_u, hopper.tiles_of(weight, outputs, k, (block_n, block_k)),
        dz_u, sums, weight_partial, rows, k // 8, outputs // 8, ACT_U=act_u, **kernel,
    )  # fmt: skip


@gluon.jit
def _gradient_in_place(dz_tile, y_tile, coefficients, left, BATCH_STATS: gl.constexpr, layout: gl.constexpr):
    """Replaces the tile dz in shared memory by dy, and 0 after ``left`` rows."""
    inside = (gl.arange(0, dz_tile.shape[0], layout=gl.SliceLayout(1, layout)) < left)[:, None]
    dy = output_gradient(dz_tile.load(layout), y_tile.load(layout), coefficients, inside, BATCH_STATS)
    dz_tile.store(rounded(dy, dz_tile.dtype))
    fence_async_shared()


@gluon.jit
def _input_gradient(
    da_tile, u_ptr, u_tile, norm, NORM: gl.constexpr, dz_u_ptr, channels, k, row0, left, total, total_centred,
    ACT_U: gl.constexpr, LANES: gl.constexpr, PART: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Stores dz_u for the tile da in shared memory, and adds to its sums. u is in ``u_tile``, or read at ``u_ptr``.

    da is rounded already, which changes nothing where the derivative is 0 or 1.
    """
    m = gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    dtype: gl.constexpr = da_tile.dtype
    for part in gl.static_range(da_tile.shape[0] // PART):
        dz_u = da_tile.slice(part * PART, PART).load(layout)
        inside = (part * PART + m < left)[:, None] & (k < channels)[None, :]
        offsets = (part * PART + m)[:, None] * channels + k[None, :]
        if NORM:
            if u_ptr is not None:
                u = gl.load(u_ptr + row0.to(gl.int64) * channels + offsets, mask=inside, other=0.0)
            else:
                u = u_tile.slice(part * PART, PART).load(layout)
            dz_u = rounded(activate_backward(normalise(u, norm), dz_u.to(gl.float32), ACT_U), dtype)
        gl.store(dz_u_ptr + row0.to(gl.int64) * channels + offsets, dz_u, mask=inside)
        if NORM:
            stored = gl.where(inside, dz_u.to(gl.float32), 0.0)
            total += sum_of_lanes(stored, LANES)
            total_centred += sum_of_lanes(stored * centred(u, norm), LANES)
    return total, total_centred


@gluon.jit(do_not_specialize=["rows", "units", "out_units"])
def _input(
    dy_desc, weight_desc, u_ptr, bn_u_ptr, dz_u_ptr, sums_ptr, rows, units, out_units,
    ACT_U: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A program owns a block of input channels and walks over tiles of rows, in ``steps`` blocks of output channels."""
    num_warps: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = dy_desc.dtype
    NORM_U: gl.constexpr = bn_u_ptr is not None
    channels = units * 8
    outputs = out_units * 8
    blocks = gl.cdiv(channels, BLOCK_K)
    k0 = gl.program_id(0) % blocks * BLOCK_K
    program = gl.program_id(0) // blocks
    programs = gl.num_programs(0) // blocks
    tiles = (rows - 1) // BLOCK_M + 1
    own_tiles = (tiles - program + programs - 1) // programs
    steps = gl.cdiv(outputs, BLOCK_N)
    all_steps = own_tiles * steps

    dy_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_N], dy_desc.layout)
    weight_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    da_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], dtype)
    da_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_K], da_layout)
    bars = barriers(STAGES)
    for step in gl.static_range(STAGES - 1):
        row0 = (program + step // steps * programs) * BLOCK_M
        n0 = step % steps * BLOCK_N
        copy_step(
            (dy_desc, dy_tiles, [row0, n0]), (None,), (weight_desc, weight_tiles, [n0, k0]), bars, step,
            step < all_steps,
        )  # fmt: skip

    layout: gl.constexpr = by_rows(BLOCK_M, BLOCK_K, num_warps)
    LANES: gl.constexpr = num_warps * layout.threads_per_warp[0]
    PART: gl.constexpr = min(BLOCK_M, 4 * LANES)
    k = k0 + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    norm = None
    if NORM_U:
        norm = load_norm(bn_u_ptr, channels, k, k < channels)
    total = sum_of_lanes(gl.zeros([PART, BLOCK_K], gl.float32, layout=layout), LANES)
    total_centred = total
    step = 0
    for own in range(own_tiles):
        row0 = (program + own * programs) * BLOCK_M
        da = gl.zeros([BLOCK_M, BLOCK_K], gl.float32, layout=accumulator(BLOCK_M, BLOCK_K, num_warps))
        for _ in range(steps):
            slot = step % STAGES
            mbarrier.wait(bars.index(slot), step // STAGES & 1)
            da = warpgroup_mma(dy_tiles.index(slot), weight_tiles.index(slot), da, is_async=True)
            # The product before this one has ended; what it has read takes the copies of a later step.
            da = warpgroup_mma_wait(1, deps=(da,))
            later = step + STAGES - 1
            later_row0 = (program + later // steps * programs) * BLOCK_M
            n0 = later % steps * BLOCK_N
            copy_step(
                (dy_desc, dy_tiles, [later_row0, n0]), (None,), (weight_desc, weight_tiles, [n0, k0]), bars, later,
                later < all_steps,
            )  # fmt: skip
            step += 1
        da = warpgroup_mma_wait(0, deps=(da,))
        da_tile.store(rounded(da, dtype))
        total, total_centred = _input_gradient(
            da_tile, u_ptr, None, norm, NORM_U, dz_u_ptr, channels, k, row0, rows - row0, total, total_centred,
            ACT_U, LANES, PART, layout,
        )  # fmt: skip
    if sums_ptr is not None:
        _store_sums(sums_ptr, program, channels, k, total, total_centred, layout)


@gluon.jit(do_not_specialize=["rows", "units", "out_units"])
def _weight(
    dy_desc, u_desc, bn_u_ptr, weight_partial_ptr, rows, units, out_units,
    ACT_U: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A block of dW over the program's share of the rows."""
    num_warps: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = dy_desc.dtype
    NORM_U: gl.constexpr = bn_u_ptr is not None
    channels = units * 8
    outputs = out_units * 8
    k_blocks = gl.cdiv(channels, BLOCK_K)
    blocks = gl.cdiv(outputs, BLOCK_N) * k_blocks
    block = gl.program_id(0) % blocks
    program = gl.program_id(0) // blocks
    programs = gl.num_programs(0) // blocks
    n0 = block // k_blocks * BLOCK_N
    k0 = block % k_blocks * BLOCK_K
    tiles = (rows - 1) // BLOCK_M + 1
    own_tiles = (tiles - program + programs - 1) // programs

    dy_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_N], dy_desc.layout)
    u_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], u_desc.layout)
    bars = barriers(STAGES)
    for own in gl.static_range(STAGES - 1):
        row0 = (program + own * programs) * BLOCK_M
        copy_step((dy_desc, dy_tiles, [row0, n0]), (None,), (u_desc, u_tiles, [row0, k0]), bars, own, own < own_tiles)
    rows_layout: gl.constexpr = by_rows(BLOCK_M, BLOCK_K, num_warps)
    if NORM_U:
        norm = tile_norm(bn_u_ptr, channels, k0, BLOCK_K, rows_layout)
        mbarrier.wait(bars.index(0), 0)
        norm_act_tile(u_tiles.index(0), u_tiles.index(0), norm, rows - program * BLOCK_M, ACT_U, rows_layout)
    layout: gl.constexpr = accumulator(BLOCK_N, BLOCK_K, num_warps)
    grad_weight = gl.zeros([BLOCK_N, BLOCK_K], gl.float32, layout=layout)
    for own in range(own_tiles):
        slot = own % STAGES
        if not NORM_U:
            mbarrier.wait(bars.index(slot), own // STAGES & 1)
        grad_weight = warpgroup_mma(
            dy_tiles.index(slot).permute((1, 0)), u_tiles.index(slot), grad_weight, is_async=True
        )
        # The product before this one has ended; what it has read takes the copies of a later tile.
        grad_weight = warpgroup_mma_wait(1, deps=(grad_weight,))
        later = own + STAGES - 1
        row0 = (program + later * programs) * BLOCK_M
        copy_step(
            (dy_desc, dy_tiles, [row0, n0]), (None,), (u_desc, u_tiles, [row0, k0]), bars, later, later < own_tiles
        )
        if NORM_U:  # the next operand is built while this product runs
            following = own + 1
            slot = following % STAGES
            mbarrier.wait(bars.index(slot), following // STAGES & 1, pred=following < own_tiles)
            left = rows - (program + following * programs) * BLOCK_M
            norm_act_tile(u_tiles.index(slot), u_tiles.index(slot), norm, left, ACT_U, rows_layout)
    grad_weight = warpgroup_mma_wait(0, deps=(grad_weight,))
    _store_weight(weight_partial_ptr, program, grad_weight, outputs, channels, n0, k0, layout)


@gluon.jit(do_not_specialize=["rows", "units", "out_units"])
def _one_pass(
    dz_desc, y_desc, grad_bn_ptr, u_desc, bn_u_ptr, weight_desc, dz_u_ptr, sums_ptr, weight_partial_ptr,
    rows, units, out_units,
    ACT_U: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both gradients; a program holds all of the weight, in shared memory, and of its gradient, in registers."""
    num_warps: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = dz_desc.dtype
    BATCH_STATS: gl.constexpr = y_desc is not None
    NORM_U: gl.constexpr = bn_u_ptr is not None
    channels = units * 8
    outputs = out_units * 8
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    tiles = (rows - 1) // BLOCK_M + 1
    own_tiles = (tiles - program + programs - 1) // programs

    dz_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_N], dz_desc.layout)
    y_tiles = dz_tiles
    if BATCH_STATS:
        y_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_N], dz_desc.layout)
    u_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], u_desc.layout)
    a_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_K], u_desc.layout)
    da_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_K], u_desc.layout)
    weight_tile = gl.allocate_shared_memory(dtype, [BLOCK_N, BLOCK_K], weight_desc.layout)
    bars = barriers(STAGES + 1)
    weight_bar = bars.index(STAGES)
    mbarrier.expect(weight_bar, weight_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(weight_desc, [0, 0], weight_bar, weight_tile)
    for own in gl.static_range(STAGES):
        row0 = (program + own * programs) * BLOCK_M
        copy_step(
            (dz_desc, dz_tiles, [row0, 0]), (y_desc, y_tiles, [row0, 0]), (u_desc, u_tiles, [row0, 0]), bars, own,
            own < own_tiles,
        )  # fmt: skip

    dz_layout: gl.constexpr = by_rows(BLOCK_M, BLOCK_N, num_warps)
    if grad_bn_ptr is not None:
        n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, dz_layout))
        coefficients = load_gradient_coefficients(grad_bn_ptr, outputs, n, n < outputs, BATCH_STATS)
    layout: gl.constexpr = by_rows(BLOCK_M, BLOCK_K, num_warps)
    LANES: gl.constexpr = num_warps * layout.threads_per_warp[0]
    PART: gl.constexpr = min(BLOCK_M, 4 * LANES)
    k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    norm = None
    if NORM_U:
        norm = load_norm(bn_u_ptr, channels, k, k < channels)
    total = sum_of_lanes(gl.zeros([PART, BLOCK_K], gl.float32, layout=layout), LANES)
    total_centred = total
    weight_layout: gl.constexpr = accumulator(BLOCK_N, BLOCK_K, num_warps)
    grad_weight = gl.zeros([BLOCK_N, BLOCK_K], gl.float32, layout=weight_layout)
    mbarrier.wait(weight_bar, 0)
    for own in range(own_tiles):
        slot = own % STAGES
        row0 = (program + own * programs) * BLOCK_M
        left = rows - row0
        mbarrier.wait(bars.index(slot), own // STAGES & 1)
        dz_tile = dz_tiles.index(slot)
        u_tile = u_tiles.index(slot)
        if grad_bn_ptr is not None:
            _gradient_in_place(dz_tile, y_tiles.index(slot), coefficients, left, BATCH_STATS, dz_layout)
        da = gl.zeros([BLOCK_M, BLOCK_K], gl.float32, layout=accumulator(BLOCK_M, BLOCK_K, num_warps))
        da = warpgroup_mma(dz_tile, weight_tile, da, is_async=True)
        if NORM_U:
            norm_act_tile(u_tile, a_tile, norm, left, ACT_U, layout)
            grad_weight = warpgroup_mma(dz_tile.permute((1, 0)), a_tile, grad_weight, is_async=True)
        else:
            grad_weight = warpgroup_mma(dz_tile.permute((1, 0)), u_tile, grad_weight, is_async=True)
        da = warpgroup_mma_wait(1, deps=(da,))
        da_tile.store(rounded(da, dtype))
        total, total_centred = _input_gradient(
            da_tile, None, u_tile, norm, NORM_U, dz_u_ptr, channels, k, row0, left, total, total_centred,
            ACT_U, LANES, PART, layout,
        )  # fmt: skip
        grad_weight = warpgroup_mma_wait(0, deps=(grad_weight,))
        fence_async_shared()  # between these threads' accesses to the slot and the copies into it
        later = own + STAGES
        row0 = (program + later * programs) * BLOCK_M
        copy_step(
            (dz_desc, dz_tiles, [row0, 0]), (y_desc, y_tiles, [row0, 0]), (u_desc, u_tiles, [row0, 0]), bars, later,
            later < own_tiles,
        )  # fmt: skip
    if sums_ptr is not None:
        _store_sums(sums_ptr, program, channels, k, total, total_centred, layout)
    _store_weight(weight_partial_ptr, program, grad_weight, outputs, channels, 0, 0, weight_layout)


@gluon.jit
def _store_sums(sums_ptr, program, channels, k, total, total_centred, layout: gl.constexpr):
    total = gl.convert_layout(gl.sum(total, axis=0), gl.SliceLayout(0, layout))
    total_centred = gl.convert_layout(gl.sum(total_centred, axis=0), gl.SliceLayout(0, layout))
    store_sums(sums_ptr, program, channels, k, k < channels, total, total_centred)


@gluon.jit
def _store_weight(partial_ptr, program, grad_weight, outputs, channels, n0, k0, layout: gl.constexpr):
    """A block of a program's dW."""
    n = n0 + gl.arange(0, grad_weight.shape[0], layout=gl.SliceLayout(1, layout))
    k = k0 + gl.arange(0, grad_weight.shape[1], layout=gl.SliceLayout(0, layout))
    mask = (n < outputs)[:, None] & (k < channels)[None, :]
    partial_ptr += program.to(gl.int64) * outputs * channels
    gl.store(partial_ptr + (n[:, None] * channels + k[None, :]), grad_weight, mask=mask)
