"""For the tests of GPU kernels: the shapes that every backend's convolutions meet, and random arguments of the ops."""

from __future__ import annotations

import torch
from cpu_ops import activation, norm_act_of, random_bn, random_grad_bn
from torch import Tensor

from mobilenet_ext.contract import NO_PADDING, Act, Padding, conv_output_size

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32_AND_16_BITS = (DTYPES[0], DTYPES[1:])  # which differ in no more than the conversions
ALL_SIDES = (1, 1, 1, 1)
Size = tuple[int, int, int, int]  # N, C, H and W

# (channels, (n, h, w)) of depthwise convolutions
DEPTHWISE = [(1, (1, 9, 3)), (3, (2, 5, 7)), (8, (5, 1, 1)), (24, (3, 4, 4)), (40, (1, 5, 6))]
# (n, channels, filters, h, w, stride, padding) of dense ones
Dense = tuple[int, int, int, int, int, int, Padding]
DENSE: list[Dense] = [
    (2, 3, 32, 9, 11, 2, ALL_SIDES),
    (1, 3, 8, 9, 7, 1, NO_PADDING),
    (2, 1, 24, 6, 8, 1, ALL_SIDES),
    (1, 4, 3, 10, 8, 2, NO_PADDING),
    (1, 8, 40, 4, 5, 1, ALL_SIDES),
    (3, 3, 16, 1, 1, 2, ALL_SIDES),
    (1, 2, 1, 3, 3, 1, NO_PADDING),
    (1, 3, 8, 6, 8, 2, (0, 1, 0, 1)),  # TensorFlow's "same"
    (1, 3, 4, 2, 5, 1, (2, 0, 1, 2)),
    (1, 3, 4, 5, 2, 2, (1, 2, 2, 0)),
]
# (n, channels, filters, h, w, stride) of blocks
Block = tuple[int, int, int, int, int, int]
BLOCKS: list[Block] = [
    (1, 8, 16, 9, 7, 1),
    (2, 32, 24, 8, 10, 2),
    (1, 3, 1, 7, 7, 2),
    (2, 24, 40, 5, 6, 1),
    (3, 1, 3, 4, 4, 1),
    (2, 40, 8, 1, 1, 2),
    (1, 16, 72, 2, 11, 1),
    (1, 72, 136, 4, 4, 1),
]


def random_weight(*shape: int, dtype: torch.dtype) -> Tensor:
    """Outputs have the scale of the inputs."""
    weight = torch.randn(shape, dtype=torch.float64)
    return (weight / weight[0].numel() ** 0.5).to(dtype)


def pointwise_weight(channels: int, outputs: int, dtype: torch.dtype) -> Tensor:
    return random_weight(outputs, channels, 1, 1, dtype=dtype)


def forward_inputs(
    size: Size,
    weight_shape: Size,
    dtype: torch.dtype,
    stride: int = 1,
    padding: Padding = NO_PADDING,
    act: Act | None = Act.RELU,
) -> tuple:
    """u, bn_u, act_u, weight, stride, padding; an ``act`` of None: of an input that is not normalised."""
    n, channels, h, w = size
    source = (activation(*size, dtype=dtype), *norm_act_of(random_bn(channels, dtype), act))
    return *source, random_weight(*weight_shape, dtype=dtype), stride, padding


def backward_inputs(
    size: Size,
    weight_shape: Size,
    dtype: torch.dtype,
    stride: int = 1,
    padding: Padding = NO_PADDING,
    act: Act | None = Act.RELU,
    output: str = "statistics",
    batch_stats: bool = True,
) -> tuple:
    """dz, y, grad_bn_y, u, bn_u, act_u, batch_stats_u, weight, stride, padding.

    ``output``: normalised with batch "statistics", with "running" ones, or not ("plain").
    """
    filters, _, kernel, _ = weight_shape
    out = (size[0], filters, *conv_output_size(*size[2:], kernel, stride, padding))
    dz, y = (activation(*out, dtype=dtype) for _ in range(2))
    grad_bn_y = random_grad_bn(filters, dtype)
    of_y = {"statistics": (dz, y, grad_bn_y), "running": (dz, None, grad_bn_y), "plain": (dz, None, None)}[output]
    *source, weight, stride, padding = forward_inputs(size, weight_shape, dtype, stride, padding, act)
    return *of_y, *source, batch_stats, weight, stride, padding


def dense_inputs(shape: Dense, dtype: torch.dtype) -> tuple:
    """As ``forward_inputs``; a dense convolution takes its input as it is."""
    n, channels, filters, h, w, *geometry = shape
    return forward_inputs((n, channels, h, w), (filters, channels, 3, 3), dtype, *geometry, act=None)


def dense_backward_inputs(shape: Dense, dtype: torch.dtype, output: str = "statistics") -> tuple:
    """As ``backward_inputs``."""
    n, channels, filters, h, w, *geometry = shape
    weight = (filters, channels, 3, 3)
    return backward_inputs((n, channels, h, w), weight, dtype, *geometry, None, output, batch_stats=False)


def block_inputs(
    shape: Block,
    dtype: torch.dtype,
    depthwise_act: Act = Act.RELU,
    pointwise_act: Act = Act.RELU,
    padding: Padding = ALL_SIDES,
) -> tuple:
    """The arguments of ``block_inference``."""
    n, channels, filters, h, w, stride = shape
    depthwise = (random_bn(channels, dtype), depthwise_act, random_weight(channels, 1, 3, 3, dtype=dtype))
    pointwise = (random_bn(filters, dtype), pointwise_act, random_weight(filters, channels, 1, 1, dtype=dtype))
    return activation(n, channels, h, w, dtype=dtype), *depthwise, stride, padding, *pointwise
