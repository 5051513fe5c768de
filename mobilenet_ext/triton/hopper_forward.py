"""Pointwise convolution on Hopper, forward and inference (see ``hopper.py``)."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mobilenet_ext.triton import heuristics, hopper
from mobilenet_ext.triton.activation import CompiledAct, norm_act
from mobilenet_ext.triton.formulas import finite, move_squares, rounded
from mobilenet_ext.triton.hopper import accumulator, barriers, by_rows, copy_step, sum_of_lanes, tile_norm
from mobilenet_ext.triton.merge import store_statistics
from mobilenet_ext.triton.rows import load_bias


def launch(
    u: Tensor, bn_u: Tensor | None, weight: Tensor, bias: Tensor | None, bn_y: Tensor | None, residual: Tensor | None,
    acts: tuple[CompiledAct, CompiledAct], y: Tensor, partial: Tensor | None, programs: int, kernel: heuristics.Config,
) -> None:  # fmt: skip
    """Writes y, and with ``partial`` the statistics of each program's rows."""
    n, k, height, width = u.shape
    rows, outputs = n * height * width, weight.shape[0]
    block_m, block_n, block_k = kernel["BLOCK_M"], kernel["BLOCK_N"], kernel["BLOCK_K"]
    _kernel[(programs * heuristics.cdiv(outputs, block_n),)](
        hopper.tiles_of(u, rows, k, (block_m, block_k)), bn_u, hopper.tiles_of(weight, outputs, k, (block_n, block_k)),
        bias, bn_y, residual, y, partial, rows, k // 8, outputs // 8, ACT_U=acts[0], ACT_Y=acts[1], **kernel,
    )  # fmt: skip


@gluon.jit
def _norm_act(u_tile, bn_ptr, channels, c0, ACT: gl.constexpr, layout: gl.constexpr):
    """act(norm(u)) of a tile in shared memory, of the channels from ``c0`` on, in registers."""
    norm = tile_norm(bn_ptr, channels, c0, u_tile.shape[1], layout)
    return rounded(norm_act(u_tile.load(layout), norm, True, ACT), u_tile.dtype)


@gluon.jit(do_not_specialize=["rows", "units", "out_units"])
def _kernel(
    u_desc, bn_u_ptr, weight_desc, bias_ptr, bn_y_ptr, residual_ptr, y_ptr, partial_ptr, rows, units, out_units,
    ACT_U: gl.constexpr, ACT_Y: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A program owns a block of output channels and walks over tiles of rows, ``steps`` blocks of input channels each.

    A step's copies are in flight for ``STAGES - 1`` steps, across the borders of tiles.
    """
    num_warps: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = u_desc.dtype
    NORM_U: gl.constexpr = bn_u_ptr is not None
    STATS: gl.constexpr = partial_ptr is not None
    channels = units * 8
    outputs = out_units * 8
    blocks = gl.cdiv(outputs, BLOCK_N)
    n0 = gl.program_id(0) % blocks * BLOCK_N
    program = gl.program_id(0) // blocks
    programs = gl.num_programs(0) // blocks
    tiles = (rows - 1) // BLOCK_M + 1
    own_tiles = gl.maximum((tiles - program + programs - 1) // programs, 0)
    steps = gl.cdiv(channels, BLOCK_K)
    all_steps = own_tiles * steps

    u_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], u_desc.layout)
    weight_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    y_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_N], dtype)
    y_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], y_layout)
    bars = barriers(STAGES)
    for step in gl.static_range(STAGES - 1):
        row0 = (program + step // steps * programs) * BLOCK_M
        k0 = step % steps * BLOCK_K
        copy_step(
            (u_desc, u_tiles, [row0, k0]), (None,), (weight_desc, weight_tiles, [n0, k0]), bars, step, step < all_steps
        )

    layout: gl.constexpr = by_rows(BLOCK_M, BLOCK_N, num_warps)
    LANES: gl.constexpr = num_warps * layout.threads_per_warp[0]
    PART: gl.constexpr = 4 * LANES  # rows of the output that are in registers at a time
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    m = gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    column_inside = n < outputs
    mma: gl.constexpr = accumulator(BLOCK_M, BLOCK_N, num_warps)
    n_mma = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, mma))
    # Statistics are sums of differences from the mean of the program's first tile: a large mean costs no precision.
    count = 0.0
    origin = gl.zeros([BLOCK_N], gl.float32, layout=gl.SliceLayout(0, layout))
    total = sum_of_lanes(gl.zeros([PART, BLOCK_N], gl.float32, layout=layout), LANES)
    squares = total

    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    if NORM_U:
        mbarrier.wait(bars.index(0), 0, pred=all_steps > 0)
        a = _norm_act(u_tiles.index(0), bn_u_ptr, channels, 0, ACT_U, operand)
        last_a = a
    step = 0
    for own in range(own_tiles):
        tile = program + own * programs
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=mma)
        for _ in range(steps):
            slot = step % STAGES
            # The product before this one has ended when one is left; what it has read takes the copies of a later step.
            if NORM_U:
                acc = warpgroup_mma(a, weight_tiles.index(slot).permute((1, 0)), acc, is_async=True)
                acc, last_a = warpgroup_mma_wait(1, deps=(acc, last_a))
            else:
                mbarrier.wait(bars.index(slot), step // STAGES & 1)
                acc = warpgroup_mma(u_tiles.index(slot), weight_tiles.index(slot).permute((1, 0)), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
            later = step + STAGES - 1
            later_row0 = (program + later // steps * programs) * BLOCK_M
            k0 = later % steps * BLOCK_K
            copy_step(
                (u_desc, u_tiles, [later_row0, k0]), (None,), (weight_desc, weight_tiles, [n0, k0]), bars, later,
                later < all_steps,
            )  # fmt: skip
            step += 1
            if NORM_U:  # the next operand is built while this product runs
                slot = step % STAGES
                mbarrier.wait(bars.index(slot), step // STAGES & 1, pred=step < all_steps)
                last_a = a
                a = _norm_act(u_tiles.index(slot), bn_u_ptr, channels, step % steps * BLOCK_K, ACT_U, operand)
        if NORM_U:
            acc, last_a = warpgroup_mma_wait(0, deps=(acc, last_a))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))

        if bias_ptr is not None:
            acc = acc + load_bias(bias_ptr, n_mma, n_mma < outputs)
        if bn_y_ptr is not None:
            acc = norm_act(acc, tile_norm(bn_y_ptr, outputs, n0, BLOCK_N, mma), True, ACT_Y)
        # The way that the output goes, the other way round; a row of a thread at a time: the product has the registers.
        if residual_ptr is not None:
            lane = gl.arange(0, LANES, layout=gl.SliceLayout(1, layout))
            for part in gl.static_range(BLOCK_M // LANES):
                row_inside = (part * LANES + lane < rows - tile * BLOCK_M)[:, None]
                offsets = (part * LANES + lane)[:, None] * outputs + n[None, :]
                residual = gl.load(
                    residual_ptr + tile.to(gl.int64) * BLOCK_M * outputs + offsets,
                    mask=row_inside & column_inside[None, :], other=0.0,
                )  # fmt: skip
                y_tile.slice(part * LANES, LANES).store(residual)
            acc = acc + y_tile.load(mma).to(gl.float32)
        y_tile.store(rounded(acc, dtype))
        left = gl.minimum(rows - tile * BLOCK_M, BLOCK_M)
        if STATS:
            count += left.to(gl.float32)
            if own == 0:
                first = gl.zeros_like(total)
                for part in gl.static_range(BLOCK_M // PART):
                    y = y_tile.slice(part * PART, PART).load(layout).to(gl.float32)
                    first += sum_of_lanes(gl.where((part * PART + m < left)[:, None], y, 0.0), LANES)
                origin = finite(
                    gl.convert_layout(gl.sum(first, axis=0), gl.SliceLayout(0, layout)) / left.to(gl.float32)
                )
        for part in gl.static_range(BLOCK_M // PART):
            y = y_tile.slice(part * PART, PART).load(layout)
            row_inside = (part * PART + m < left)[:, None]
            offsets = (part * PART + m)[:, None] * outputs + n[None, :]
            gl.store(
                y_ptr + tile.to(gl.int64) * BLOCK_M * outputs + offsets, y, mask=row_inside & column_inside[None, :]
            )
            if STATS:
                difference = gl.where(row_inside, y.to(gl.float32) - origin[None, :], 0.0)
                total += sum_of_lanes(difference, LANES)
                squares += sum_of_lanes(difference * difference, LANES)
    if STATS:
        offset = gl.convert_layout(gl.sum(total, axis=0), gl.SliceLayout(0, layout)) / count
        m2 = gl.convert_layout(gl.sum(squares, axis=0), gl.SliceLayout(0, layout))
        m2 = move_squares(m2, -offset * offset * count)
        store_statistics(partial_ptr, program, outputs, n, column_inside, count, origin, offset, m2)
