"""The slope of a leaky ReLU reaches every op in C++ for CPUs, on load and on store, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from cpu_ops import (
    DTYPES,
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    expected_backward,
    expected_forward,
    first_output,
    ops,
    random_bn,
    random_grad_bn,
    weight_tolerance,
)

from mobilenet_ext.contract import NO_PADDING, Act

ONE, LEAKY = (1, 1, 1, 1), Act.LEAKY_RELU
pytestmark = pytest.mark.cover


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def problems(dtype: torch.dtype, slope: float) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls of every op but the products' backward, all arguments given and the slope last."""
    for c, k in ((40, 24), (7, 5)):
        u, bn, bn_k = activation(2, c, 9, 8, dtype=dtype), random_bn(c, dtype), random_bn(k, dtype)
        depthwise, five = torch.randn(c, 1, 3, 3).to(dtype), torch.randn(c, 1, 5, 5).to(dtype)
        pointwise, dense = torch.randn(k, c, 1, 1).to(dtype), torch.randn(k, c, 3, 3).to(dtype)
        pooled, gate = activation(2, c, 1, 1, dtype=dtype), torch.rand(2, c, 1, 1).to(dtype)
        statistics = (None, None, 1e-5, True)
        for weight, sides in ((depthwise, ONE), (five, (2, 2, 2, 2))):
            yield "depthwise_forward", (u, bn, LEAKY, weight, 1, sides, *statistics, None, slope)
            yield "depthwise_inference", (u, bn, LEAKY, weight, 1, sides, None, None, slope)
            dz, grad_bn = activation(2, c, 9, 8, dtype=dtype), random_grad_bn(c, dtype)
            yield "depthwise_backward", (dz, u, grad_bn, u, bn, LEAKY, True, weight, 1, sides, True, True, slope)
        yield "pointwise_forward", (u, bn, LEAKY, pointwise, 1, NO_PADDING, *statistics, None, slope)
        yield "pointwise_inference", (u, bn_k, LEAKY, pointwise, 1, NO_PADDING, None, None, slope)
        yield "gated_pointwise_forward", (u, bn, LEAKY, gate, pointwise, *statistics, None, slope)
        yield "gated_pointwise_inference", (u, gate, bn_k, LEAKY, pointwise, None, None, slope)
        yield "dense_inference", (u, bn_k, LEAKY, dense, 2, ONE, None, None, slope)
        for first, second in ((slope, 0.5), (0.5, slope)):
            args = (u, bn, LEAKY, depthwise, 1, ONE, bn_k, LEAKY, pointwise, None, None, first, second)
            yield "block_inference", args
        for pool, grad in ((False, u), (True, pooled)):
            yield "norm_act_forward", (u, bn, LEAKY, pool, None, slope)
            yield "norm_act_backward", (grad, u, bn, LEAKY, True, pool, None, True, slope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [0.1, 1.5, -0.5])
def test_every_op(dtype: torch.dtype, slope: float) -> None:
    for op, args in problems(dtype, slope):
        output = first_output(getattr(ops, op)(*args))
        assert_close(output, expected_forward(op, args), TOLERANCE[dtype], op)
        other = (*args[:-1], slope + 0.25)
        assert not torch.equal(output, first_output(getattr(oracle, op)(*other)).to(dtype)), "slope is not used"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [0.1, 1.5, -0.5])
def test_backward_of_a_product(dtype: torch.dtype, slope: float) -> None:
    u, bn = activation(2, 40, 9, 8, dtype=dtype), random_bn(40, dtype)
    dz, weight = activation(2, 24, 9, 8, dtype=dtype), torch.randn(24, 40, 1, 1).to(dtype)
    args = (dz, dz, random_grad_bn(24, dtype), u, bn, LEAKY, True, weight, 1, NO_PADDING, True, True, slope)
    dz_u, grad_weight, _ = ops.pointwise_backward(*args)
    expected, expected_weight = expected_backward(args)
    assert_close(dz_u, expected, TOLERANCE[dtype])
    assert_close(grad_weight, expected_weight, weight_tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.1, -0.5])
def test_corner_nan_and_infinity(dtype: torch.dtype, slope: float) -> None:
    z = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-30, -1e-30, 2.0, -2.0])
    z = z.to(dtype).view(-1, 1, 1, 1).expand(-1, 17, 1, 1).contiguous(memory_format=torch.channels_last)
    identity = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    identity = identity.view(5, 1).repeat(1, 17)
    leaf = z.clone().requires_grad_()
    expected = torch.nn.functional.leaky_relu(leaf, slope)
    a = ops.norm_act_forward(z, identity, LEAKY, False, None, slope)
    assert_same_specials(a, expected.double())
    torch.testing.assert_close(a, expected, equal_nan=True, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
    grad = torch.tensor([1.0, 2, 3, 4, 5, float("inf"), float("inf"), float("nan"), float("nan")]).to(dtype)
    grad = grad.view(-1, 1, 1, 1).expand_as(z).contiguous(memory_format=torch.channels_last)
    (expected,) = torch.autograd.grad(expected, leaf, grad)
    dz, _ = ops.norm_act_backward(grad, z, identity, LEAKY, False, False, None, True, slope)
    assert_same_specials(dz, expected.double())
    torch.testing.assert_close(dz, expected, equal_nan=True, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
