"""Device functions that several kernels share: the formulas of ``csrc/ops.h``, and statistics of tiles.

All arithmetic is in float32. Per-channel vectors come as ``[1, C]`` tiles, activations as ``[rows, C]`` tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Rows of `bn` and `grad_bn` (BnRow and GradBnRow in csrc/ops.h).
BN_MEAN, BN_SCALE, BN_SHIFT, BN_RSTD, BN_VAR = (tl.constexpr(row) for row in range(5))
GRAD_DZ_COEFFICIENT, GRAD_Y_COEFFICIENT, GRAD_MEAN, GRAD_CONSTANT, GRAD_GAMMA, GRAD_BETA = (
    tl.constexpr(row) for row in range(6)
)

_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def load_row(ptr, row, channels, offsets, mask):
    """Row ``row`` of a float32 ``[rows, channels]`` array at the channels ``offsets``, as ``[1, len(offsets)]``."""
    return tl.load(ptr + row * channels + offsets, mask=mask, other=0.0)[None, :]


@triton.jit
def load_normalisation(bn_ptr, channels, offsets, mask):
    """Mean, scale and shift of a ``bn`` at the channels ``offsets``, each ``[1, len(offsets)]``; 0 without ``bn``."""
    if bn_ptr is None:
        mean = tl.zeros([1, offsets.shape[0]], tl.float32)
        return mean, mean, mean
    else:
        mean = load_row(bn_ptr, BN_MEAN, channels, offsets, mask)
        scale = load_row(bn_ptr, BN_SCALE, channels, offsets, mask)
        shift = load_row(bn_ptr, BN_SHIFT, channels, offsets, mask)
        return mean, scale, shift


@triton.jit
def load_gradient_rows(grad_bn_ptr, channels, offsets, mask, BATCH_STATS: tl.constexpr):
    """The rows P, Q, MEAN and O of a ``grad_bn``, each ``[1, len(offsets)]``, for ``output_gradient``.

    Without ``BATCH_STATS`` only P is used; without ``grad_bn`` it is 1.
    """
    p = tl.full([1, offsets.shape[0]], 1.0, tl.float32)
    q = tl.zeros([1, offsets.shape[0]], tl.float32)
    mean = q
    o = q
    if grad_bn_ptr is not None:
        p = load_row(grad_bn_ptr, GRAD_DZ_COEFFICIENT, channels, offsets, mask)
    if BATCH_STATS:
        q = load_row(grad_bn_ptr, GRAD_Y_COEFFICIENT, channels, offsets, mask)
        mean = load_row(grad_bn_ptr, GRAD_MEAN, channels, offsets, mask)
        o = load_row(grad_bn_ptr, GRAD_CONSTANT, channels, offsets, mask)
    return p, q, mean, o


@triton.jit
def relu(z):
    """0 where z <= 0, else z. NaN stays NaN: a plain maximum, and a select on z > 0, compile to one that loses it."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def as_int64(x):
    """A scalar in 64 bits. The interpreter's loop variables are Python integers, which have no ``to``."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def normalise(u, mean, scale, shift):
    """BatchNorm's output for its input ``u``. Centred first: a large mean would cancel in u*scale + constant."""
    return (u.to(tl.float32) - mean) * scale + shift


@triton.jit
def activation(u, mean, scale, shift, mask, NORMALISE: tl.constexpr):
    """What a convolution sees of its stored input ``u``: normalised and rectified, 0 where ``mask`` is not set.

    Without ``NORMALISE``, ``u`` as it is (loaded as 0 outside the mask).
    """
    if NORMALISE:
        return tl.where(mask, relu(normalise(u, mean, scale, shift)), 0.0)
    else:
        return u.to(tl.float32)


@triton.jit
def output_gradient(h, y, p, q, mean, o, mask, BATCH_STATS: tl.constexpr):
    """dy, the gradient of a convolution's output, from the masked gradient at its BatchNorm's output; 0 outside."""
    if BATCH_STATS:
        return tl.where(mask, h.to(tl.float32) * p + ((y.to(tl.float32) - mean) * q + o), 0.0)
    else:
        return h.to(tl.float32) * p


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

    In 16 bits two values an instruction, which Triton itself does not do for a result that is used twice.
    """
    if _INTERPRETED and dtype == tl.bfloat16:  # its own conversion truncates
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(dtype, bitcast=True)
    elif _INTERPRETED or dtype == tl.float32:
        return x.to(dtype)
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, True, 2)


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


@triton.jit
def store_statistics(ptr, channels, offsets, mask, count, mean, mean_rest, m2):
    """One program's row ``[4, channels]`` of the partial statistics that ``finish.statistics`` merges.

    The mean is ``mean + mean_rest``: in one float32 a large mean would round off what the variance needs.
    """
    tl.store(ptr + offsets, tl.zeros_like(m2) + count, mask=mask)
    tl.store(ptr + channels + offsets, mean, mask=mask)
    tl.store(ptr + 2 * channels + offsets, tl.zeros_like(m2) + mean_rest, mask=mask)
    tl.store(ptr + 3 * channels + offsets, m2, mask=mask)


@triton.jit
def store_sums(ptr, channels, offsets, mask, sum_h, sum_h_centred):
    """One program's row ``[2, channels]`` of the partial sums that ``finish.gradients`` merges."""
    tl.store(ptr + offsets, sum_h, mask=mask)
    tl.store(ptr + channels + offsets, sum_h_centred, mask=mask)
