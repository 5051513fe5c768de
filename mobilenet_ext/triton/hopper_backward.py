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
from mobilenet_ext.triton.activation import activate_backward, centred, load_norm, normalise
from mobilenet_ext.triton.formulas import load_gradient_coefficients, output_gradient, rounded
from mobilenet_ext.triton.hopper import accumulator, barriers, by_rows, norm_act_tile, sum_of_lanes
from mobilenet_ext.triton.merge import store_sums


def launch_input(
    dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, bn_u: Tensor | None, act_u: int, weight: Tensor,
    dz_u: Tensor, sums: Tensor | None, dy: Tensor | None, programs: int, kernel: heuristics.Config,
) -> None:  # fmt: skip
    """Writes dz_u, with ``sums`` the sums of each program's rows, with ``dy`` also dy."""
    n, k, height, width = u.shape
    rows, outputs = n * height * width, weight.shape[0]
    block_m, block_n, block_k = kernel["BLOCK_M"], kernel["BLOCK_N"], kernel["BLOCK_K"]
    _input[(programs * heuristics.cdiv(k, block_k),)](
        hopper.tiles_of(dz, rows, outputs, (block_m, block_n)),
        None if y is None else hopper.tiles_of(y, rows, outputs, (block_m, block_n)), grad_bn_y,
        hopper.tiles_of(weight, outputs, k, (block_n, block_k)), u, bn_u, dz_u, sums, dy,
        rows, k // 8, outputs // 8, ACT_U=act_u, **kernel,
    )  # fmt: skip


def launch_weight(
    dy: Tensor, u: Tensor, bn_u: Tensor | None, act_u: int, weight_partial: Tensor, programs: int,
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
    dz: Tensor, y: Tensor | None, grad_bn_y: Tensor | None, u: Tensor, bn_u: Tensor | None, act_u: int, weight: Tensor,
    dz_u: Tensor, sums: Tensor | None, weight_partial: Tensor, programs: int, kernel: heuristics.Config,
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
def _gradient_in_place(
    dz_tile, y_tile, grad_bn_ptr, outputs, n0, left, dy_ptr, row0, stores, BATCH_STATS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Replaces the tile dz in shared memory, of the channels from ``n0`` on, by dy, and 0 after ``left`` rows.

    ``dy_ptr``: where dy is stored as well, if ``stores``, as that of the rows from ``row0`` on; None: nowhere.
    """
    layout: gl.constexpr = by_rows(dz_tile.shape[0], dz_tile.shape[1], num_warps)
    n = n0 + gl.arange(0, dz_tile.shape[1], layout=gl.SliceLayout(0, layout))
    m = gl.arange(0, dz_tile.shape[0], layout=gl.SliceLayout(1, layout))
    coefficients = load_gradient_coefficients(grad_bn_ptr, outputs, n, n < outputs, BATCH_STATS)
    inside = (m < left)[:, None]
    dz = dz_tile.load(layout)
    y = y_tile.load(layout)
    dy = rounded(output_gradient(dz, y, coefficients, inside, BATCH_STATS), dz_tile.dtype)
    dz_tile.store(dy)
    fence_async_shared()
    if dy_ptr is not None:
        offsets = m[:, None] * outputs + n[None, :]
        gl.store(dy_ptr + row0.to(gl.int64) * outputs + offsets, dy, mask=inside & (n < outputs)[None, :] & stores)


@gluon.jit
def _copy(first_desc, second_desc, third_desc, first, second, third, bars, step, at, second_at, third_at, wanted):
    """Starts the copies of a step into its slot; they end at its barrier. Without ``second_desc`` there are two."""
    slot = step % first.shape[0]
    bar = bars.index(slot)
    size: gl.constexpr = first_desc.block_type.nbytes + third_desc.block_type.nbytes
    if second_desc is not None:
        mbarrier.expect(bar, size + second_desc.block_type.nbytes, pred=wanted)
        tma.async_copy_global_to_shared(second_desc, second_at, bar, second.index(slot), wanted)
    else:
        mbarrier.expect(bar, size, pred=wanted)
    tma.async_copy_global_to_shared(first_desc, at, bar, first.index(slot), wanted)
    tma.async_copy_global_to_shared(third_desc, third_at, bar, third.index(slot), wanted)


@gluon.jit
def _input_gradient(
    da_tile, u_ptr, u_tile, bn_u_ptr, dz_u_ptr, channels, k, row0, left, total, total_centred,
    ACT_U: gl.constexpr, LANES: gl.constexpr, PART: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Stores dz_u for the tile da in shared memory, and adds to its sums. u is in ``u_tile``, or read at ``u_ptr``.

    da is rounded already, which changes nothing where the derivative is 0 or 1.
    """
    m = gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    dtype: gl.constexpr = da_tile.dtype
    if bn_u_ptr is not None:
        norm = load_norm(bn_u_ptr, channels, k, k < channels)
    for part in gl.static_range(da_tile.shape[0] // PART):
        dz_u = da_tile.slice(part * PART, PART).load(layout)
        inside = (part * PART + m < left)[:, None] & (k < channels)[None, :]
        offsets = (part * PART + m)[:, None] * channels + k[None, :]
        if bn_u_ptr is not None:
            if u_ptr is not None:
                u = gl.load(u_ptr + row0.to(gl.int64) * channels + offsets, mask=inside, other=0.0)
            else:
                u = u_tile.slice(part * PART, PART).load(layout)
            dz_u = rounded(activate_backward(normalise(u, norm), dz_u.to(gl.float32), ACT_U), dtype)
        gl.store(dz_u_ptr + row0.to(gl.int64) * channels + offsets, dz_u, mask=inside)
        if bn_u_ptr is not None:
            stored = gl.where(inside, dz_u.to(gl.float32), 0.0)
            total += sum_of_lanes(stored, LANES)
            total_centred += sum_of_lanes(stored * centred(u, norm), LANES)
    return total, total_centred


@gluon.jit(do_not_specialize=["rows", "units", "out_units"])
def _input(
    dz_desc, y_desc, grad_bn_ptr, weight_desc, u_ptr, bn_u_ptr, dz_u_ptr, sums_ptr, dy_ptr, rows, units, out_units,
    ACT_U: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """A program owns a block of input channels and walks over tiles of rows, ``steps`` blocks of output channels each."""
    dtype: gl.constexpr = dz_desc.dtype
    BUILD: gl.constexpr = grad_bn_ptr is not None
    BATCH_STATS: gl.constexpr = y_desc is not None
    channels = units * 8
    outputs = out_units * 8
    blocks = gl.cdiv(channels, BLOCK_K)
    block = gl.program_id(0) % blocks
    k0 = block * BLOCK_K
    program = gl.program_id(0) // blocks
    programs = gl.num_programs(0) // blocks
    tiles = (rows - 1) // BLOCK_M + 1
    own_tiles = gl.maximum((tiles - program + programs - 1) // programs, 0)
    steps = gl.cdiv(outputs, BLOCK_N)
    all_steps = own_tiles * steps

    dz_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_N], dz_desc.layout)
    y_tiles = dz_tiles
    if BATCH_STATS:
        y_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_N], dz_desc.layout)
    weight_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    da_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], dtype)
    da_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_K], da_layout)
    bars = barriers(STAGES)
    for step in gl.static_range(STAGES - 1):
        row0 = (program + step // steps * programs) * BLOCK_M
        n0 = step % steps * BLOCK_N
        _copy(
            dz_desc, y_desc, weight_desc, dz_tiles, y_tiles, weight_tiles, bars, step,
            [row0, n0], [row0, n0], [n0, k0], step < all_steps,
        )  # fmt: skip

    layout: gl.constexpr = by_rows(BLOCK_M, BLOCK_K, num_warps)
    LANES: gl.constexpr = num_warps * layout.threads_per_warp[0]
    PART: gl.constexpr = min(BLOCK_M, 4 * LANES)
    k = k0 + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    total = sum_of_lanes(gl.zeros([PART, BLOCK_K], gl.float32, layout=layout), LANES)
    total_centred = total

    if BUILD:
        mbarrier.wait(bars.index(0), 0, pred=all_steps > 0)
        row0 = program * BLOCK_M
        left = gl.where(all_steps > 0, rows - row0, 0)
        _gradient_in_place(
            dz_tiles.index(0), y_tiles.index(0), grad_bn_ptr, outputs, 0, left,
            dy_ptr, row0, block == 0, BATCH_STATS, num_warps,
        )  # fmt: skip
    step = 0
    for own in range(own_tiles):
        row0 = (program + own * programs) * BLOCK_M
        da = gl.zeros([BLOCK_M, BLOCK_K], gl.float32, layout=accumulator(BLOCK_M, BLOCK_K, num_warps))
        for _ in range(steps):
            slot = step % STAGES
            if not BUILD:
                mbarrier.wait(bars.index(slot), step // STAGES & 1)
            da = warpgroup_mma(dz_tiles.index(slot), weight_tiles.index(slot), da, is_async=True)
            # The product before this one has ended; what it has read takes the copies of a later step.
            da = warpgroup_mma_wait(1, deps=(da,))
            later = step + STAGES - 1
            later_row0 = (program + later // steps * programs) * BLOCK_M
            n0 = later % steps * BLOCK_N
            _copy(
                dz_desc, y_desc, weight_desc, dz_tiles, y_tiles, weight_tiles, bars, later,
                [later_row0, n0], [later_row0, n0], [n0, k0], later < all_steps,
            )  # fmt: skip
            step += 1
            if BUILD:  # the next operand is built while this product runs
                slot = step % STAGES
                mbarrier.wait(bars.index(slot), step // STAGES & 1, pred=step < all_steps)
                next_row0 = (program + step // steps * programs) * BLOCK_M
                _gradient_in_place(
                    dz_tiles.index(slot), y_tiles.index(slot), grad_bn_ptr, outputs, step % steps * BLOCK_N,
                    rows - next_row0, dy_ptr, next_row0, block == 0, BATCH_STATS, num_warps,
                )  # fmt: skip
        da = warpgroup_mma_wait(0, deps=(da,))
        da_tile.store(rounded(da, dtype))
        total, total_centred = _input_gradient(
            da_tile, u_ptr, None, bn_u_ptr, dz_u_ptr, channels, k, row0, rows - row0, total, total_centred,
            ACT_U, LANES, PART, layout,
        )  # fmt: skip
    if sums_ptr is not None:
        total = gl.convert_layout(gl.sum(total, axis=0), gl.SliceLayout(0, layout))
        total_centred = gl.convert_layout(gl.sum(total_centred, axis=0), gl.SliceLayout(0, layout))
        store_sums(sums_ptr, program, channels, k, k < channels, total, total_centred)


@gluon.jit(do_not_specialize=["rows", "units", "out_units"])
def _weight(
    dy_desc, u_desc, bn_u_ptr, weight_partial_ptr, rows, units, out_units,
    ACT_U: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """A block of dW over the program's share of the rows."""
    dtype: gl.constexpr = dy_desc.dtype
    BUILD: gl.constexpr = bn_u_ptr is not None
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
    own_tiles = gl.maximum((tiles - program + programs - 1) // programs, 0)

    dy_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_N], dy_desc.layout)
    u_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], u_desc.layout)
    bars = barriers(STAGES)
    for own in gl.static_range(STAGES - 1):
        row0 = (program + own * programs) * BLOCK_M
        _copy(dy_desc, None, u_desc, dy_tiles, dy_tiles, u_tiles, bars, own, [row0, n0], [row0, n0], [row0, k0], own < own_tiles)
    if BUILD:
        mbarrier.wait(bars.index(0), 0, pred=own_tiles > 0)
        norm_act_tile(u_tiles.index(0), u_tiles.index(0), bn_u_ptr, channels, k0, rows - program * BLOCK_M, ACT_U, num_warps)
    layout: gl.constexpr = accumulator(BLOCK_N, BLOCK_K, num_warps)
    grad_weight = gl.zeros([BLOCK_N, BLOCK_K], gl.float32, layout=layout)
    for own in range(own_tiles):
        slot = own % STAGES
        if not BUILD:
            mbarrier.wait(bars.index(slot), own // STAGES & 1)
        grad_weight = warpgroup_mma(
            dy_tiles.index(slot).permute((1, 0)), u_tiles.index(slot), grad_weight, is_async=True
        )
        # The product before this one has ended; what it has read takes the copies of a later tile.
        grad_weight = warpgroup_mma_wait(1, deps=(grad_weight,))
        later = own + STAGES - 1
        row0 = (program + later * programs) * BLOCK_M
        _copy(
            dy_desc, None, u_desc, dy_tiles, dy_tiles, u_tiles, bars, later, [row0, n0], [row0, n0], [row0, k0],
            later < own_tiles,
        )  # fmt: skip
        if BUILD:  # the next operand is built while this product runs
            following = own + 1
            slot = following % STAGES
            mbarrier.wait(bars.index(slot), following // STAGES & 1, pred=following < own_tiles)
            left = rows - (program + following * programs) * BLOCK_M
            norm_act_tile(u_tiles.index(slot), u_tiles.index(slot), bn_u_ptr, channels, k0, left, ACT_U, num_warps)
    grad_weight = warpgroup_mma_wait(0, deps=(grad_weight,))
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    k = k0 + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    mask = (n < outputs)[:, None] & (k < channels)[None, :]
    weight_partial_ptr += program.to(gl.int64) * outputs * channels
    gl.store(weight_partial_ptr + (n[:, None] * channels + k[None, :]), grad_weight, mask=mask)


@gluon.jit(do_not_specialize=["rows", "units", "out_units"])
def _one_pass(
    dz_desc, y_desc, grad_bn_ptr, u_desc, bn_u_ptr, weight_desc, dz_u_ptr, sums_ptr, weight_partial_ptr,
    rows, units, out_units,
    ACT_U: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Both gradients; a program holds all of the weight, in shared memory, and of its gradient, in registers."""
    dtype: gl.constexpr = dz_desc.dtype
    BATCH_STATS: gl.constexpr = y_desc is not None
    NORM_U: gl.constexpr = bn_u_ptr is not None
    channels = units * 8
    outputs = out_units * 8
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    tiles = (rows - 1) // BLOCK_M + 1
    own_tiles = gl.maximum((tiles - program + programs - 1) // programs, 0)

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
        _copy(dz_desc, y_desc, u_desc, dz_tiles, y_tiles, u_tiles, bars, own, [row0, 0], [row0, 0], [row0, 0], own < own_tiles)

    layout: gl.constexpr = by_rows(BLOCK_M, BLOCK_K, num_warps)
    LANES: gl.constexpr = num_warps * layout.threads_per_warp[0]
    PART: gl.constexpr = min(BLOCK_M, 4 * LANES)
    k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
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
            _gradient_in_place(
                dz_tile, y_tiles.index(slot), grad_bn_ptr, outputs, 0, left, None, row0, False, BATCH_STATS, num_warps
            )
        da = gl.zeros([BLOCK_M, BLOCK_K], gl.float32, layout=accumulator(BLOCK_M, BLOCK_K, num_warps))
        da = warpgroup_mma(dz_tile, weight_tile, da, is_async=True)
        if NORM_U:
            norm_act_tile(u_tile, a_tile, bn_u_ptr, channels, 0, left, ACT_U, num_warps)
            grad_weight = warpgroup_mma(dz_tile.permute((1, 0)), a_tile, grad_weight, is_async=True)
        else:
            grad_weight = warpgroup_mma(dz_tile.permute((1, 0)), u_tile, grad_weight, is_async=True)
        da = warpgroup_mma_wait(1, deps=(da,))
        da_tile.store(rounded(da, dtype))
        total, total_centred = _input_gradient(
            da_tile, None, u_tile, bn_u_ptr, dz_u_ptr, channels, k, row0, left, total, total_centred,
            ACT_U, LANES, PART, layout,
        )  # fmt: skip
        grad_weight = warpgroup_mma_wait(0, deps=(grad_weight,))
        fence_async_shared()  # between these threads' accesses to the slot and the copies into it
        later = own + STAGES
        row0 = (program + later * programs) * BLOCK_M
        _copy(dz_desc, y_desc, u_desc, dz_tiles, y_tiles, u_tiles, bars, later, [row0, 0], [row0, 0], [row0, 0], later < own_tiles)
    if sums_ptr is not None:
        total = gl.convert_layout(gl.sum(total, axis=0), gl.SliceLayout(0, layout))
        total_centred = gl.convert_layout(gl.sum(total_centred, axis=0), gl.SliceLayout(0, layout))
        store_sums(sums_ptr, program, channels, k, k < channels, total, total_centred)
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, weight_layout))
    k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, weight_layout))
    mask = (n < outputs)[:, None] & (k < channels)[None, :]
    weight_partial_ptr += program.to(gl.int64) * outputs * channels
    gl.store(weight_partial_ptr + (n[:, None] * channels + k[None, :]), grad_weight, mask=mask)
