"""What the tests of the CUDA convolutions share: each op against the oracle."""

from __future__ import annotations

from itertools import product

import oracle
import pytest
import torch
from conv_inputs import ALL_SIDES
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    assert_close,
    assert_grad_bn,
    assert_statistics,
    is_channels_last_dense,
    same_bits,
)
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.contract import NO_PADDING, Act

EPS = 1e-5
# Left, right, top and bottom. The third is TensorFlow's "same" of an even size at stride 2.
PADDINGS = [NO_PADDING, ALL_SIDES, (0, 1, 0, 1), (2, 0, 1, 2)]
# Of depthwise convolutions: kernel, stride and padding.
GEOMETRIES = [
    *product([3], [1, 2], PADDINGS),
    *product([5], [1, 2], [NO_PADDING, (2, 2, 2, 2), (1, 2, 1, 2), (2, 0, 1, 2)]),
]
# How the weight's gradient may differ: operands next to the middle of two values that can be stored go to either.
PRODUCT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-4, torch.float16: 1e-4}

for_each_kernel = pytest.mark.parametrize("kernel", [3, 5])
for_each_act = pytest.mark.parametrize("act", Act, ids=lambda act: act.name.lower())


def affine(channels: int) -> tuple[Tensor, Tensor]:
    return torch.rand(channels) + 0.5, torch.randn(channels)


def check_forward(
    op: str, u, bn_u, act_u, weight, stride=1, padding=NO_PADDING, *, with_affine=True, allowed=0.0
) -> None:
    """y, its statistics, and y alone, of a convolution's forward; ``with_affine`` with a bias too."""
    args = (u, bn_u, act_u, weight, stride, padding)
    gamma, beta = affine(weight.shape[0]) if with_affine else (None, None)
    bias = beta.flip(0) if with_affine else None
    y, bn_y = getattr(ops, op)(*args, gamma, beta, EPS, True, bias)
    assert y.dtype == u.dtype and is_channels_last_dense(y) and bn_y.dtype == torch.float32
    assert_close(y, expected_forward(op, *args, bias), allowed or TOLERANCE[u.dtype], "y")
    if y.numel() > y.shape[1]:  # the statistics of single values are rounding errors
        assert_statistics(bn_y, y, gamma, beta, EPS)
    alone, none = getattr(ops, op)(*args, gamma, beta, EPS, False, bias)
    assert same_bits(alone, y) and none.shape == (0,) and none.dtype == torch.float32


def expected_forward(op: str, u, bn_u, act_u, weight, stride, padding, bias=None) -> Tensor:
    """y, of operands as the op rounds them."""
    a = oracle.norm_act(u, bn_u, act_u)
    a = a.to(u.dtype) if op == "pointwise_forward" else a
    return oracle.conv_forward(a, None, Act.LINEAR, weight, stride, padding, None, None, EPS, False, bias)[0]


def check_inference(op: str, *args) -> None:
    """x, bn_y, act_y, weight, stride, padding."""
    x = args[0]
    out = getattr(ops, op)(*args)
    assert out.dtype == x.dtype and is_channels_last_dense(out)
    assert_close(out, oracle.conv_inference(*args), TOLERANCE[x.dtype])


def check_backward(op: str, *args, allowed: float = 0.0) -> None:
    """Both gradients of a convolution, and each of them alone; ``args`` up to the padding."""
    u, bn_u, _, batch_stats_u = args[3:7]
    backward = getattr(ops, op)
    dz_u, grad_weight, grad_bn_u = backward(*args, True, True)
    expected_dz, expected_weight = expected_backward(op, *args)
    assert dz_u.dtype == u.dtype and is_channels_last_dense(dz_u)
    assert grad_weight.dtype == torch.float32 and grad_weight.is_contiguous()
    assert_close(dz_u, expected_dz, allowed or TOLERANCE[u.dtype], "dz_u")
    tolerance = ACC_TOLERANCE if op == "depthwise_backward" else PRODUCT_TOLERANCE
    assert_close(grad_weight, expected_weight, allowed or tolerance[u.dtype], "grad_weight")
    if bn_u is None:
        assert grad_bn_u.shape == (0,)
    else:
        assert_grad_bn(grad_bn_u, dz_u, u, bn_u, batch_stats_u)

    only_weight = backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[0].dtype == u.dtype and only_weight[2].shape == (0,)
    assert same_bits(only_weight[1], grad_weight)
    only_input = backward(*args, True, False)
    assert same_bits(only_input[0], dz_u) and only_input[1].shape == (0,) and same_bits(only_input[2], grad_bn_u)


def expected_backward(op: str, *args) -> tuple[Tensor, Tensor]:
    """dz_u and the weight's gradient, of operands as the op rounds them."""
    if op == "pointwise_backward":
        return oracle.product_backward(*args)
    dz_u, grad_weight, _ = oracle.conv_backward(*args)
    if op == "dense_backward":  # only the weight's gradient is a product on tensor cores
        _, grad_weight = oracle.product_backward(*args)
    return dz_u, grad_weight
