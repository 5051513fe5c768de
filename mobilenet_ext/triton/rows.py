"""The rows of ``bn`` and ``grad_bn`` (``contract.py``) as compile-time constants of the kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from mobilenet_ext import contract

BN_MEAN = tl.constexpr(contract.BN_MEAN)
BN_SCALE = tl.constexpr(contract.BN_SCALE)
BN_SHIFT = tl.constexpr(contract.BN_SHIFT)
BN_RSTD = tl.constexpr(contract.BN_RSTD)
BN_VAR = tl.constexpr(contract.BN_VAR)

GRAD_DZ_COEFFICIENT = tl.constexpr(contract.GRAD_DZ_COEFFICIENT)
GRAD_Y_COEFFICIENT = tl.constexpr(contract.GRAD_Y_COEFFICIENT)
GRAD_MEAN = tl.constexpr(contract.GRAD_MEAN)
GRAD_CONSTANT = tl.constexpr(contract.GRAD_CONSTANT)
GRAD_GAMMA = tl.constexpr(contract.GRAD_GAMMA)
GRAD_BETA = tl.constexpr(contract.GRAD_BETA)


@triton.jit
def load_row(ptr, row, channels, offsets, mask):
    """Row ``row`` of a float32 ``[rows, channels]`` array at the channels ``offsets``, as ``[1, len(offsets)]``."""
    return tl.load(ptr + row * channels + offsets, mask=mask, other=0.0)[None, :]


@triton.jit
def load_bias(bias_ptr, offsets, mask):
    """A convolution's bias at the channels ``offsets``, ``[1, C]``; 0 outside the mask, and without one."""
    if bias_ptr is None:
        return tl.zeros([1, offsets.shape[0]], tl.float32)
    else:
        return tl.load(bias_ptr + offsets, mask=mask, other=0.0)[None, :]


@triton.jit
def add_bias(y, bias, BIAS: tl.constexpr):
    """``y + bias``, or without ``BIAS`` y itself."""
    if BIAS:
        return y + bias
    else:
        return y
