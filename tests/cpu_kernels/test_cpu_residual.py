"""Residuals in C++ for CPUs: what is added to an output before it is stored, and gradients that meet there."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from cpu_ops import (
    ACC_TOLERANCE,
    DTYPES,
    TOLERANCE,
    activation,
    assert_close,
    cases,
    expected_forward,
    first_output,
    ops,
    random_bn,
    same_bits,
)

from mobilenet_ext.contract import NO_PADDING, Act

ONE = (1, 1, 1, 1)
IMAGES = cases([(2, 24, 9, 9), (1, 7, 5, 4)], (2, 33, 21, 18))
PAST_THE_CACHE = (1, 64, 200, 200)  # 8 MiB and more are written by other code


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def calls(shape: tuple[int, ...], dtype: torch.dtype, act: Act) -> list[tuple[str, tuple[Any, ...]]]:
    """Every op that adds a residual of its input's shape, with its arguments before the residual."""
    n, c, h, w = shape
    x, bn, bn_k = activation(*shape, dtype=dtype), random_bn(c, dtype), random_bn(c, dtype)
    depthwise, five = torch.randn(c, 1, 3, 3).to(dtype), torch.randn(c, 1, 5, 5).to(dtype)
    pointwise, dense = torch.randn(c, c, 1, 1).to(dtype), torch.randn(c, c, 3, 3).to(dtype)
    return [
        ("depthwise_inference", (x, bn, act, depthwise, 1, ONE, None)),
        ("depthwise_inference", (x, bn, act, five, 1, (2, 2, 2, 2), None)),
        ("pointwise_inference", (x, bn, act, pointwise, 1, NO_PADDING, None)),
        ("dense_inference", (x, bn, act, dense, 1, ONE, None)),
        ("block_inference", (x, bn, Act.RELU6, depthwise, 1, ONE, bn_k, act, pointwise, None)),
        ("norm_act_forward", (x, bn, act, False)),
    ]


@IMAGES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", [Act.LINEAR, Act.RELU, Act.SILU], ids=str)
def test_is_added_before_the_output_is_rounded(shape: tuple[int, ...], dtype: torch.dtype, act: Act) -> None:
    residual = activation(*shape, dtype=dtype)
    for name, args in calls(shape, dtype, act):
        op = getattr(ops, name)
        rounded_once = first_output(op(*args, residual))
        assert_close(rounded_once, expected_forward(name, args) + residual.double(), TOLERANCE[dtype], name)
        if dtype == torch.float64:
            assert same_bits(rounded_once, first_output(op(*args, None)) + residual), name


def test_outputs_too_large_for_the_cache() -> None:
    x, bn = activation(*PAST_THE_CACHE, dtype=torch.float32), random_bn(64, torch.float32)
    residual, pooled = torch.randn_like(x), activation(1, 64, 1, 1, dtype=torch.float32)
    depthwise, pointwise = torch.randn(64, 1, 3, 3), torch.randn(64, 64, 1, 1)
    for op, args in (
        ("depthwise_inference", (x, bn, Act.RELU, depthwise, 1, ONE, None, residual)),
        ("pointwise_inference", (x, bn, Act.RELU, pointwise, 1, NO_PADDING, None, residual)),
        ("norm_act_forward", (x, bn, Act.RELU, False, residual)),
        ("norm_act_backward", (residual, x, bn, Act.RELU, True, False, pooled)),
    ):
        ours, exact = getattr(ops, op)(*args), getattr(oracle, op)(*args)
        if op == "norm_act_backward":
            ours, exact = ours[0], exact[0]
        assert_close(ours, exact, 1e-6, op)


@IMAGES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", Act, ids=str)
def test_gradients_of_pixels_and_of_the_mean_meet(shape: tuple[int, ...], dtype: torch.dtype, act: Act) -> None:
    y, bn, grad = activation(*shape, dtype=dtype), random_bn(shape[1], dtype), activation(*shape, dtype=dtype)
    grad_pooled = activation(*shape[:2], 1, 1, dtype=dtype) * (shape[2] * shape[3])
    args = (grad, y, bn, act, True, False, grad_pooled, True, 0.3)
    dz, grad_bn = ops.norm_act_backward(*args)
    exact, _ = oracle.norm_act_backward(*args)
    assert_close(dz, exact, TOLERANCE[dtype])
    assert_close(grad_bn, oracle.grad_bn(dz, y, bn, True), ACC_TOLERANCE[dtype])


@IMAGES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sums_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of a linear unit dz is the gradient that comes in, and nothing is written."""
    y, bn, grad = activation(*shape, dtype=dtype), random_bn(shape[1], dtype), activation(*shape, dtype=dtype)
    whole = ops.norm_act_backward(grad, y, bn, Act.LINEAR, True, False)
    dz, grad_bn = ops.norm_act_backward(grad, y, bn, Act.LINEAR, True, False, None, False)
    assert same_bits(whole[0], grad) and dz.shape == (0,) and same_bits(grad_bn, whole[1])


@pytest.mark.cover
def test_what_does_not_fit_is_refused() -> None:
    x, bn = activation(2, 8, 4, 4, dtype=torch.float32), random_bn(8, torch.float32)
    residual, pooled = x[:1], activation(2, 8, 1, 1, dtype=torch.float32)
    for match, call in {
        "residual: expected shape": lambda: ops.norm_act_forward(x, bn, Act.RELU, False, residual),
        "residual: expected scalar type": lambda: ops.norm_act_forward(x, bn, Act.RELU, False, x.half()),
        "residual: expected none": lambda: ops.norm_act_forward(x, bn, Act.RELU, True, x),
        "residual: expected channels_last": lambda: ops.norm_act_forward(x, bn, Act.RELU, False, x.contiguous()),
        "grad_pooled: expected shape": lambda: ops.norm_act_backward(x, x, bn, Act.RELU, True, False, x),
        "grad_pooled: expected none": lambda: ops.norm_act_backward(pooled, x, bn, Act.RELU, True, True, pooled),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            call()
