"""Pointwise products on Hopper: what their kernels share.

The other Triton kernels leave to the compiler how operands reach the tensor cores. Here it is said, in Gluon (Triton's
language of explicit layouts): the tensor memory accelerator (TMA) copies tiles into shared memory, some steps ahead,
also from the next tile of rows while this one is stored; the tensor cores (``wgmma``) read them there, and run while
the next step's operand is normalised. Outputs go through shared memory too: from the layout of the accumulators to one
in which a thread holds eight neighbouring channels of some rows, for 128-bit accesses and for sums over rows that stay
in a thread. Summed in the accumulators' layout, the statistics of a tile cost 3,000 of its 8,000 cycles in shuffles.

For 16-bit types and channels that 8 divides: rows begin at multiples of 16 bytes, as TMA wants them. Neither Triton's
interpreter nor another GPU can run this; there, and for other problems, the kernels beside it do. Numbers of rows, and
of some tiles more, fit 32 bits: no Hopper GPU has the memory for as many rows of the channels that these kernels take.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mobilenet_ext.triton import gpu
from mobilenet_ext.triton.activation import load_norm, norm_act_inside
from mobilenet_ext.triton.formulas import rounded

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def fits(weight: Tensor, *activations: Tensor) -> bool:
    """Whether these kernels take a pointwise weight and activations, on this GPU."""
    tensors = (weight, *activations)
    return (
        gpu.of(weight).is_hopper
        and not knobs.runtime.interpret
        and weight.shape[0] % 8 == weight.shape[1] % 8 == 0
        and all(t.dtype in _DTYPES and t.data_ptr() % 16 == 0 for t in tensors)
    )


def tiles_of(matrix: Tensor, rows: int, columns: int, block: tuple[int, int]) -> TensorDescriptor:
    """TMA's description of the memory of ``matrix`` as [rows, columns], copied in blocks, in which 0 stands for what
    lies outside."""
    layout = gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[matrix.dtype])
    return TensorDescriptor(matrix, [rows, columns], [columns, 1], list(block), layout)


@gluon.constexpr_function
def by_rows(rows, columns, num_warps):
    """The layout of a [rows, columns] tile with 8 neighbouring columns of a row in a thread, or of several rows."""
    threads = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // threads, threads], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def accumulator(rows, columns, num_warps):
    """The layout of a [rows, columns] product on the tensor cores: four warps side by side hold 64 rows."""
    row_warps = min(num_warps, rows // 16)
    column_warps = num_warps // row_warps
    shape = [16, min(columns // column_warps, 256), 16]
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[row_warps, column_warps], instr_shape=shape)


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """``COUNT`` barriers that each wait for one copy."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def copy_step(first, second, third, bars, step, wanted):
    """Starts the copies of a step into its slot, unless not ``wanted``; they end at the slot's barrier.

    Each operand is (its description, its tiles in shared memory, a tile for each slot, where the copied one begins);
    without a description (None) it is not there.
    """
    slot = step % first[1].shape[0]
    bar = bars.index(slot)
    size: gl.constexpr = first[0].block_type.nbytes + third[0].block_type.nbytes
    if second[0] is not None:
        mbarrier.expect(bar, size + second[0].block_type.nbytes, pred=wanted)
        tma.async_copy_global_to_shared(second[0], second[2], bar, second[1].index(slot), wanted)
    else:
        mbarrier.expect(bar, size, pred=wanted)
    tma.async_copy_global_to_shared(first[0], first[2], bar, first[1].index(slot), wanted)
    tma.async_copy_global_to_shared(third[0], third[2], bar, third[1].index(slot), wanted)


@gluon.jit
def tile_norm(bn_ptr, channels, c0, columns: gl.constexpr, layout: gl.constexpr):
    """The ``norm`` of the channels from ``c0`` on, for a tile of that layout."""
    c = c0 + gl.arange(0, columns, layout=gl.SliceLayout(0, layout))
    return load_norm(bn_ptr, channels, c, c < channels)


@gluon.jit
def norm_act_tile(u_tile, a_tile, norm, left, ACT: gl.constexpr, layout: gl.constexpr):
    """Writes act(norm(u)) of a tile in shared memory, and 0 after ``left`` rows, to another or in its place."""
    inside = (gl.arange(0, u_tile.shape[0], layout=gl.SliceLayout(1, layout)) < left)[:, None]
    a_tile.store(rounded(norm_act_inside(u_tile.load(layout), norm, inside, True, ACT), a_tile.dtype))
    fence_async_shared()


@gluon.jit
def sum_of_lanes(x, LANES: gl.constexpr):
    """The rows of a tile that one thread holds added up: a row for each of the ``LANES`` rows that threads share."""
    return gl.sum(gl.reshape(x, [x.shape[0] // LANES, LANES, x.shape[1]]), axis=0)
