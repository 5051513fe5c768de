"""What the tests of the CUDA convolutions share: each op against the reference in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    as_double,
    assert_close,
    in_float64,
    is_channels_last_dense,
    random_bn,
    random_grad_bn,
    same_bits,
)
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.backends import reference
from mobilenet_ext.contract import NO_PADDING, Act

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
ALL_SIDES = (1, 1, 1, 1)
# Left, right, top and bottom. The third is TensorFlow's "same" of an even size at stride 2.
PADDINGS = [NO_PADDING, ALL_SIDES, (0, 1, 0, 1), (2, 0, 1, 2)]
# Of depthwise convolutions: kernel, stride and padding.
GEOMETRIES = [
    *product([3], [1, 2], PADDINGS),
    *product([5], [1, 2], [NO_PADDING, (2, 2, 2, 2), (1, 2, 1, 2), (2, 0, 1, 2)]),
]
ACTS = [act.name.lower() for act in Act]
INPUTS = [*ACTS, "plain"]  # a convolution's input on load: act(norm(u)), or u
# How the weight's gradient may differ: operands next to the middle of two values that can be stored go to either.
PRODUCT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-4, torch.float16: 1e-4}

for_each_kernel = pytest.mark.parametrize("kernel", [3, 5])
for_each_act = pytest.mark.parametrize("act", Act, ids=ACTS)


def norm_act(kind: str, channels: int, dtype: torch.dtype) -> tuple[Tensor | None, Act]:
    """bn_u and act_u of an input of this kind."""
    return (None, Act.LINEAR) if kind == "plain" else (random_bn(channels, dtype), Act[kind.upper()])


def affine(channels: int) -> tuple[Tensor, Tensor]:
    return torch.rand(channels) + 0.5, torch.randn(channels)


def output_inputs(
    n: int, channels: int, height: int, width: int, dtype: torch.dtype, kind: str = "statistics"
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz, y and grad_bn_y of an output: with batch "statistics", with "running" ones, or not normalised ("plain")."""
    dz, y = (activation(n, channels, height, width, dtype=dtype) for _ in range(2))
    grad_bn_y = random_grad_bn(channels, dtype)
    return {"statistics": (dz, y, grad_bn_y), "running": (dz, None, grad_bn_y), "plain": (dz, None, None)}[kind]


def check_statistics(bn_y: Tensor, y: Tensor, gamma: Tensor | None, beta: Tensor | None) -> None:
    """bn_y is the normalisation by the statistics of y as stored."""
    of_stored = reference._batch_bn(y.double(), as_double(gamma), as_double(beta), EPS)
    for row, name in enumerate(["mean", "scale", "shift", "rstd", "var"]):
        assert_close(bn_y[row], of_stored[row], ACC_TOLERANCE[y.dtype], name)


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
        check_statistics(bn_y, y, gamma, beta)
    alone, none = getattr(ops, op)(*args, gamma, beta, EPS, False, bias)
    assert same_bits(alone, y) and none.shape == (0,) and none.dtype == torch.float32


def expected_forward(op: str, u, bn_u, act_u, weight, stride, padding, bias=None) -> Tensor:
    """y, of operands as the op rounds them."""
    a = reference._norm_act(u.double(), as_double(bn_u), act_u, 0.0)
    if op == "pointwise_forward":
        a = a.to(u.dtype)
    args = (a, None, Act.LINEAR, weight, stride, padding, None, None, EPS, False, bias)
    return in_float64(getattr(reference, op), args)[0]


def check_inference(op: str, *args) -> None:
    """x, bn_y, act_y, weight, stride, padding."""
    x = args[0]
    out = getattr(ops, op)(*args)
    assert out.dtype == x.dtype and is_channels_last_dense(out)
    assert_close(out, *in_float64(getattr(reference, op), args), TOLERANCE[x.dtype])


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
        of_stored = reference._make_grad_bn(dz_u.double(), u.double(), bn_u.double(), batch_stats_u)
        for row, name in enumerate(["dz coefficient", "y coefficient", "mean", "constant", "gamma", "beta"]):
            assert_close(grad_bn_u[row], of_stored[row], ACC_TOLERANCE[u.dtype], name)

    only_weight = backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[0].dtype == u.dtype and only_weight[2].shape == (0,)
    assert same_bits(only_weight[1], grad_weight)
    only_input = backward(*args, True, False)
    assert same_bits(only_input[0], dz_u) and only_input[1].shape == (0,) and same_bits(only_input[2], grad_bn_u)


def expected_backward(op: str, *args) -> tuple[Tensor, Tensor]:
    """dz_u and the weight's gradient, of operands as the op rounds them."""
    exact = in_float64(getattr(reference, op), (*args, True, True))[:2]
    if op == "depthwise_backward":
        return exact
    dz, y, grad_bn_y, u, bn_u, act_u, _, *rest = map(as_double, args)
    dtype = args[0].dtype
    dy = reference._conv_output_grad(dz, y, grad_bn_y).to(dtype).double()
    a = reference._norm_act(u, bn_u, act_u, 0.0).to(dtype).double()
    plain = (dy, None, None, a, None, Act.LINEAR, False, *rest, True, True)
    da, grad_weight, _ = getattr(reference, op)(*plain)
    if op == "dense_backward":  # only the weight's gradient is a product on tensor cores
        return exact[0], grad_weight
    if bn_u is not None:
        da = reference._ACTIVATE_BACKWARD[act_u](reference._normalise(u, bn_u), da, 0.0)
    return da, grad_weight
