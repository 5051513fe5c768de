"""The slope of a leaky ReLU reaches every op in CUDA C++, on load and on store, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from conv_inputs import ALL_SIDES, DTYPES
from convolutions import EPS, PRODUCT_TOLERANCE
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    random_bn,
    random_grad_bn,
)

from mobilenet_ext import ops
from mobilenet_ext.contract import NO_PADDING, Act

pytestmark = pytest.mark.usefixtures("emulated")

LEAKY = Act.LEAKY_RELU
SLOPES = [0.1, 1.5, -0.5]
for_each_slope = pytest.mark.parametrize("slope", SLOPES)


def calls(dtype: torch.dtype, slope: float) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every op that takes a slope but the products' backward."""
    for c, k in ((40, 24), (7, 5)):
        u, bn, bn_k = activation(2, c, 9, 8, dtype=dtype), random_bn(c, dtype), random_bn(k, dtype)
        pointwise, dense = torch.randn(k, c, 1, 1).to(dtype), torch.randn(k, c, 3, 3).to(dtype)
        three, five = torch.randn(c, 1, 3, 3).to(dtype), torch.randn(c, 1, 5, 5).to(dtype)
        pooled, gate = activation(2, c, 1, 1, dtype=dtype), torch.rand(2, c, 1, 1).to(dtype)
        statistics = (None, None, EPS, True)
        for stride in (1, 2):
            for weight, sides in ((three, ALL_SIDES), (five, (2, 2, 2, 2))):
                yield "depthwise_forward", (u, bn, LEAKY, weight, stride, sides, *statistics, None, slope)
                yield "depthwise_inference", (u, bn, LEAKY, weight, stride, sides, None, None, slope)
                dz, y = (activation(2, c, (9 - 1) // stride + 1, 8 // stride, dtype=dtype) for _ in range(2))
                output = (dz, y, random_grad_bn(c, dtype))
                yield "depthwise_backward", (*output, u, bn, LEAKY, True, weight, stride, sides, True, True, slope)
        yield "pointwise_forward", (u, bn, LEAKY, pointwise, 1, NO_PADDING, *statistics, None, slope)
        yield "pointwise_inference", (u, bn_k, LEAKY, pointwise, 1, NO_PADDING, None, None, slope)
        yield "gated_pointwise_forward", (u, bn, LEAKY, gate, pointwise, *statistics, None, slope)
        yield "gated_pointwise_inference", (u, gate, bn_k, LEAKY, pointwise, None, None, slope)
        yield "dense_inference", (u, bn_k, LEAKY, dense, 2, ALL_SIDES, None, None, slope)
        for first, second in ((slope, 0.25), (0.25, slope)):
            args = (u, bn, LEAKY, three, 1, ALL_SIDES, bn_k, LEAKY, pointwise, None, None, first, second)
            yield "block_inference", args
        for pool, grad in ((False, u), (True, pooled)):
            yield "norm_act_forward", (u, bn, LEAKY, pool, None, slope)
            yield "norm_act_backward", (grad, u, bn, LEAKY, True, pool, None, True, slope)


def outputs_of(module: Any, op: str, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    outputs = getattr(module, op)(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@for_each_slope
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op(dtype: torch.dtype, slope: float) -> None:
    for op, args in calls(dtype, slope):
        tolerance = TOLERANCE[dtype]
        if "pointwise" in op or "block" in op:
            tolerance *= 2  # the operand is rounded too
        outputs, expected = outputs_of(ops, op, args), outputs_of(oracle, op, args)
        assert_close(outputs[0], expected[0], tolerance, op)
        if op == "depthwise_backward":
            assert_close(outputs[1], expected[1], ACC_TOLERANCE[dtype], op)


@for_each_slope
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "outputs"), [(40, 24), (13, 7)])
def test_backward_of_a_product(channels: int, outputs: int, dtype: torch.dtype, slope: float) -> None:
    u, bn = activation(2, channels, 9, 8, dtype=dtype), random_bn(channels, dtype)
    dz, weight = activation(2, outputs, 9, 8, dtype=dtype), torch.randn(outputs, channels, 1, 1).to(dtype)
    args = (dz, None, None, u, bn, LEAKY, True, weight, 1, NO_PADDING, True, True, slope)
    dz_u, grad_weight, _ = ops.pointwise_backward(*args)
    assert_close(dz_u, oracle.pointwise_backward(*args)[0], TOLERANCE[dtype])
    a = oracle.norm_act(u, bn, LEAKY, slope).to(dtype)
    plain = (dz, None, None, a, None, Act.LINEAR, True, weight, 1, NO_PADDING, False, True)
    assert_close(grad_weight, oracle.pointwise_backward(*plain)[1], PRODUCT_TOLERANCE[dtype])
    gate = activation(2, channels, 1, 1, dtype=dtype)
    args = (dz, None, None, u, bn, LEAKY, gate, weight, True, False, slope)
    *_, grad_gate = ops.gated_pointwise_backward(*args)
    assert_close(grad_gate, oracle.gated_pointwise_backward(*args)[2], ACC_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [0.0, *SLOPES])
def test_corner_nan_and_infinity(dtype: torch.dtype, slope: float) -> None:
    """As PyTorch has them: of slope 0, -Inf becomes NaN."""
    nan, inf = float("nan"), float("inf")
    for channels in (16, 13):
        z = torch.tensor([0.0, -0.0, nan, inf, -inf, 1e-30, -1e-30, 2.0, -2.0]).to(dtype).view(-1, 1, 1, 1)
        z = z.expand(-1, channels, 1, 1).contiguous(memory_format=torch.channels_last)
        bn = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]).view(5, 1).repeat(1, channels)
        leaf = z.clone().requires_grad_()
        expected = torch.nn.functional.leaky_relu(leaf, slope)
        a = ops.norm_act_forward(z, bn, LEAKY, False, None, slope)
        assert_same_specials(a, expected.double())
        tolerance = 1e-2 if dtype.itemsize == 2 else 1e-6
        torch.testing.assert_close(a, expected, equal_nan=True, rtol=tolerance, atol=0)
        grad = torch.tensor([1.0, 2, 3, 4, 5, inf, inf, nan, nan]).to(dtype).view(-1, 1, 1, 1)
        grad = grad.expand_as(z).contiguous(memory_format=torch.channels_last)
        (expected,) = torch.autograd.grad(expected, leaf, grad)
        dz, _ = ops.norm_act_backward(grad, z, bn, LEAKY, False, False, None, True, slope)
        assert_same_specials(dz, expected.double())
        torch.testing.assert_close(dz, expected, equal_nan=True, rtol=tolerance, atol=0)
