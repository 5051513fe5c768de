"""Device functions that several kernels share: the gradient dy, numbers and products, tiles of a matrix.

All arithmetic is in float32. Per-channel vectors come as ``[1, C]`` tiles, activations as ``[rows, C]`` tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from mobilenet_ext.triton.rows import (
    GRAD_CONSTANT,
    GRAD_DZ_COEFFICIENT,
    GRAD_MEAN,
    GRAD_Y_COEFFICIENT,
    load_row,
)

_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def load_gradient_coefficients(grad_bn_ptr, channels, offsets, mask, BATCH_STATS: tl.constexpr):
    """What ``output_gradient`` takes of a ``grad_bn``: DZ_COEFFICIENT, Y_COEFFICIENT, MEAN and CONSTANT, each
    ``[1, len(offsets)]``.

    Without ``BATCH_STATS`` only the first is used, and stands in for the others; without ``grad_bn`` it is 1.
    """
    if grad_bn_ptr is None:
        one = tl.full([1, offsets.shape[0]], 1.0, tl.float32)
        return one, one, one, one
    else:
        dz_coefficient = load_row(grad_bn_ptr, GRAD_DZ_COEFFICIENT, channels, offsets, mask)
        if BATCH_STATS:
            y_coefficient = load_row(grad_bn_ptr, GRAD_Y_COEFFICIENT, channels, offsets, mask)
            mean = load_row(grad_bn_ptr, GRAD_MEAN, channels, offsets, mask)
            constant = load_row(grad_bn_ptr, GRAD_CONSTANT, channels, offsets, mask)
            return dz_coefficient, y_coefficient, mean, constant
        else:
            return dz_coefficient, dz_coefficient, dz_coefficient, dz_coefficient


@triton.jit
def output_gradient(dz, y, coefficients, mask, BATCH_STATS: tl.constexpr):
    """dy, the gradient at a convolution's output, in float32; 0 outside the mask, where ``dz`` is 0."""
    if BATCH_STATS:
        dy = dz.to(tl.float32) * coefficients[0] + (
            (y.to(tl.float32) - coefficients[2]) * coefficients[1] + coefficients[3]
        )
        return tl.where(mask, dy, 0.0)
    else:
        return dz.to(tl.float32) * coefficients[0]


@triton.jit
def as_int64(x):
    """A scalar in 64 bits. The interpreter's loop variables are Python integers, which have no ``to``."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def where_also(mask, condition):
    """``mask & condition``, of a block and a scalar."""
    if _INTERPRETED:  # in Triton 3.9 the interpreter's result is an integer
        return (mask & condition) == 1
    else:
        return mask & condition


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` in ``dtype``, rounded to nearest, as activations are stored.

    In 16 bits two values per instruction, which Triton itself does not do for a result that is used twice.
    """
    if x.dtype == dtype:
        return x
    elif _INTERPRETED and dtype == tl.bfloat16:  # its own conversion truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(dtype, bitcast=True)
    elif _INTERPRETED:
        return x.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, True, 2)


@triton.jit
def handed_on(x):
    """``x``, to be kept for the step after the next: Triton does not load ahead in a loop that hands on what it was
    handed, and the compiler after it drops the copy."""
    if _INTERPRETED:
        return x
    elif x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, True, 2)
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, True, 1)


@triton.jit
def reciprocal(x):
    """1/x in float32 to one unit in the last place; 0 where that is below 2^-126. Triton's division is five
    instructions, with an exact scaling of what is too large or too small for this one."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, with float32 accumulation."""
    if _INTERPRETED:  # it would multiply the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tiles_of(rows, BLOCK_M: tl.constexpr):
    """rows / BLOCK_M, rounded up, for rows > 0; ``tl.cdiv`` overflows just below 2^31 rows."""
    return (rows - 1) // BLOCK_M + 1


@triton.jit
def load_tile(ptr, tile, rows, channels, c, BLOCK_M: tl.constexpr):
    """Tile ``tile`` of a [rows, channels] matrix at the channels ``c``, [BLOCK_M, len(c)]; 0 outside."""
    row0 = as_int64(tile) * BLOCK_M
    left = tl.minimum(rows - row0, BLOCK_M).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    mask = (m < left)[:, None] & (c < channels)[None, :]
    return tl.load(ptr + row0 * channels + (m[:, None] * channels + c[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, channels, c, value, BLOCK_M: tl.constexpr):
    """Writes what ``load_tile`` reads."""
    row0 = as_int64(tile) * BLOCK_M
    left = tl.minimum(rows - row0, BLOCK_M).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    mask = (m < left)[:, None] & (c < channels)[None, :]
    tl.store(ptr + row0 * channels + (m[:, None] * channels + c[None, :]), value, mask=mask)


@triton.jit
def images_of(tile, pixels, BLOCK_M: tl.constexpr):
    """The image of a tile's first row (int64), and how many images after it that of each row is, [BLOCK_M]."""
    row0 = as_int64(tile) * BLOCK_M
    image = row0 // pixels
    return image, ((row0 - image * pixels).to(tl.int32) + tl.arange(0, BLOCK_M)) // pixels


@triton.jit
def gated(a, gate_ptr, tile, rows, pixels, channels, c, BLOCK_M: tl.constexpr):
    """A tile ``a`` of a [rows, channels] matrix, of images of so many pixels, times a [images, channels] gate; 0
    outside. Without a gate ``a`` itself."""
    if gate_ptr is None:
        return a
    else:
        image, later = images_of(tile, pixels, BLOCK_M)
        left = tl.minimum(rows - as_int64(tile) * BLOCK_M, BLOCK_M).to(tl.int32)
        mask = (tl.arange(0, BLOCK_M) < left)[:, None] & (c < channels)[None, :]
        ptr = gate_ptr + image * channels + (later[:, None] * channels + c[None, :])
        return a * tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def fold_rows(x, IN_REGISTERS: tl.constexpr):
    """A tile's rows added up, all of them: ``[1, 1, C]``.

    ``IN_REGISTERS``: only rows that one thread holds after a product on tensor cores, to ``[g, 8, C]``. That is for
    sums over many tiles: it takes more registers, and threads meet only once, at the end.
    """
    rows: tl.constexpr = x.shape[0]
    channels: tl.constexpr = x.shape[1]
    if IN_REGISTERS:
        warps: tl.constexpr = 4 if rows >= 64 else rows // 16
        return tl.sum(tl.sum(tl.reshape(x, [rows // (16 * warps), warps, 2, 8, channels]), 2), 0)
    else:
        return tl.sum(x, 0)[None, None, :]


@triton.jit
def finite(x):
    """0 where x is NaN or infinite, else x."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def move_squares(squares, change):
    """Sums of squares about another point: ``squares + change``, where they did not overflow.

    The change is as large as they are: Inf - Inf would be a NaN, or with a fused multiply-add Inf.
    """
    return tl.where(squares < float("inf"), squares + change, squares)
