"""What every layer of the project agrees on: the rows of packed vectors, activations, dtypes, output sizes, limits.

``csrc/ops.h`` says the same to C++, and has the conventions and the alphabet of the ops; a test compares the two.
"""

from __future__ import annotations

from enum import IntEnum

import torch


class Act(IntEnum):
    """An activation. Each maps 0 to 0, which padding relies on, and NaN to NaN.

    An op that is called thousands of times is given the ``value``: PyTorch takes a microsecond longer for the member.
    """

    LINEAR = 0
    RELU = 1
    RELU6 = 2  # min(max(z, 0), 6)
    HARDSWISH = 3  # z * min(max(z + 3, 0), 6) / 6 (arXiv:1905.02244, section 5.2)
    SILU = 4  # z * sigmoid(z) (arXiv:1606.08415; swish: arXiv:1710.05941)
    LEAKY_RELU = 5  # z where z > 0, else slope*z


# Rows of `bn`, acc [5, C]: z = (y - MEAN)*SCALE + SHIFT.
BN_MEAN, BN_SCALE, BN_SHIFT, BN_RSTD, BN_VAR = range(5)
BN_ROWS = 5
# Rows of `grad_bn`, acc [6, C]: dy = DZ_COEFFICIENT*dz + Y_COEFFICIENT*(y - MEAN) + CONSTANT.
GRAD_DZ_COEFFICIENT, GRAD_Y_COEFFICIENT, GRAD_MEAN, GRAD_CONSTANT, GRAD_GAMMA, GRAD_BETA = range(6)
GRAD_ROWS = 6

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of activations; float64 not on a GPU

# What the kernels support beside dilation 1 and padding with zeros; a pointwise convolution has stride 1, padding 0.
KERNEL_SIZES = {"depthwise": (3, 5), "dense": (3,), "pointwise": (1,)}
STRIDES = (1, 2)
PADDINGS = (0, 1, 2)  # on each side

# Zeros on the left, right, top and bottom of an image: the order of torch.nn.functional.pad.
Padding = tuple[int, int, int, int]
NO_PADDING: Padding = (0, 0, 0, 0)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activations of ``dtype`` are accumulated, and of all per-channel vectors beside them."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def conv_output_size(h: int, w: int, kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    """The rows and columns that a convolution makes of ``h`` rows and ``w`` columns."""
    left, right, top, bottom = padding
    return (h + top + bottom - kernel) // stride + 1, (w + left + right - kernel) // stride + 1
