"""Residuals in CUDA C++: what is added to an output before it is stored, and gradients that meet there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from conv_inputs import ALL_SIDES, DTYPES
from convolutions import for_each_act
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    assert_grad_bn,
    assert_same_specials,
    is_channels_last_dense,
    misaligned,
    random_bn,
    relative_error,
    same_bits,
)
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.contract import GRAD_BETA, NO_PADDING, Act

pytestmark = pytest.mark.usefixtures("emulated")

# (n, c, h, w). Whole packs of channels in every dtype or single ones; the last two have several tiles, and wide ones.
SHAPES = [(2, 24, 9, 9), (1, 7, 5, 4), (3, 13, 11, 12), (2, 72, 13, 15)]
# What is between a block's convolutions is an operand, rounded.
BLOCK_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def inference_ops(
    shape: tuple[int, ...], dtype: torch.dtype, act: Act | None
) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Calls of every op that adds a residual of its input's shape, but for the residual; without an ``act``, those that
    may be without a normalisation too."""
    c = shape[1]
    x, bn = activation(*shape, dtype=dtype), random_bn(c, dtype)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5).to(dtype)

    norm_act = (None, Act.LINEAR) if act is None else (bn, act)
    calls = {
        "depthwise 3x3": ("depthwise_inference", (x, *norm_act, weight(c, 1, 3, 3), 1, ALL_SIDES, None)),
        "depthwise 5x5": ("depthwise_inference", (x, *norm_act, weight(c, 1, 5, 5), 1, (2, 2, 2, 2), None)),
        "pointwise": ("pointwise_inference", (x, *norm_act, weight(c, c, 1, 1), 1, NO_PADDING, None)),
        "dense": ("dense_inference", (x, *norm_act, weight(c, c, 3, 3), 1, ALL_SIDES, None)),
    }
    if act is not None:
        block = (x, bn, Act.RELU6, weight(c, 1, 3, 3), 1, ALL_SIDES, random_bn(c, dtype), act, weight(c, c, 1, 1), None)
        calls["block"] = ("block_inference", block)
        calls["norm_act"] = ("norm_act_forward", (x, bn, act, False))
    return calls


def check(shape: tuple[int, ...], dtype: torch.dtype, act: Act | None) -> None:
    for name, (op, args) in inference_ops(shape, dtype, act).items():
        without = getattr(oracle, op)(*args)
        residual = activation(*shape, dtype=dtype)
        y = getattr(ops, op)(*args, residual)
        assert y.dtype == dtype and is_channels_last_dense(y)
        tolerance = (BLOCK_TOLERANCE if name == "block" else TOLERANCE)[dtype]
        assert_close(y, without + residual.double(), tolerance, name)


@for_each_act
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_is_added_after_the_activation(shape: tuple[int, ...], dtype: torch.dtype, act: Act) -> None:
    check(shape, dtype, act)


@pytest.mark.parametrize("act", [None, Act.RELU], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_normalisation_and_in_several_tiles(
    shape: tuple[int, ...], dtype: torch.dtype, act: Act | None
) -> None:
    check(shape, dtype, act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 5, 5), (1, 392, 5, 4)], ids=str)
def test_block_as_two_kernels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A block with many outputs, or inputs."""
    outputs = 264 if shape[1] < 264 else 8
    _, args = inference_ops(shape, dtype, Act.RELU)["block"]
    pointwise = (torch.randn(outputs, shape[1], 1, 1) / shape[1] ** 0.5).to(dtype)
    args = (*args[:6], random_bn(outputs, dtype), Act.LINEAR, pointwise, None)
    residual = activation(shape[0], outputs, *shape[2:], dtype=dtype)
    expected = oracle.block_inference(*args, residual)
    assert_close(ops.block_inference(*args, residual), expected, BLOCK_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_nothing_is_rounded_before_it(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The rounded output taken away from the output leaves its rounding errors."""
    for name, (op, args) in inference_ops(shape, dtype, Act.LINEAR).items():
        if name == "block":
            continue  # its operands' rounding is as large
        exact = getattr(oracle, op)(*args)
        rounded = getattr(ops, op)(*args)
        left = getattr(ops, op)(*args, -rounded)
        assert relative_error(left, exact - rounded.double()) <= 0.02, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    shape = (2, 16, 9, 8)
    for act in (None, Act.RELU):
        for name, (op, args) in inference_ops(shape, dtype, act).items():
            residual = activation(*shape, dtype=dtype)
            kernel = getattr(ops, op)
            assert_close(kernel(*args, misaligned(residual)), kernel(*args, residual).double(), TOLERANCE[dtype], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf(dtype: torch.dtype) -> None:
    for channels in (16, 13):
        shape = (1, channels, 5, 4)
        residual = activation(*shape, dtype=dtype)
        residual[0, 1, 0, 0], residual[0, 2, 4, 3], residual[0, 3, 2, 2] = float("nan"), float("inf"), -float("inf")
        for op, args in inference_ops(shape, dtype, Act.RELU6).values():
            assert_same_specials(getattr(ops, op)(*args, residual), residual.double())


def gradients(shape: tuple[int, ...], dtype: torch.dtype, place: Callable[[Tensor], Tensor] = lambda x: x) -> tuple:
    """grad, y, bn_y, and grad_pooled, as large as the gradients of the pixels that it is spread over."""
    grad, y = (place(activation(*shape, dtype=dtype)) for _ in range(2))
    pooled = place(activation(*shape[:2], 1, 1, dtype=dtype) * (shape[2] * shape[3]))
    return grad, y, random_bn(shape[1], dtype), pooled


def check_gradients(grad, y, bn, pooled, act: Act, batch_stats: bool = True) -> None:
    args = (grad, y, bn, act, batch_stats, False, pooled, True, 0.3)
    dz, grad_bn = ops.norm_act_backward(*args)
    expected, _ = oracle.norm_act_backward(*args)
    assert dz.dtype == y.dtype and is_channels_last_dense(dz)
    assert_close(dz, expected, TOLERANCE[y.dtype])
    assert_grad_bn(grad_bn, dz, y, bn, batch_stats)
    sums = ops.norm_act_backward(grad, y, bn, act, batch_stats, False, pooled, False, 0.3)
    assert sums[0].shape == (0,) and sums[0].dtype == y.dtype and same_bits(sums[1], grad_bn)


@for_each_act
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 8, 1, 1), (3, 72, 40, 41)], ids=str)
def test_gradients_of_pixels_and_of_the_mean_meet(shape: tuple[int, ...], dtype: torch.dtype, act: Act) -> None:
    check_gradients(*gradients(shape, dtype), act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_gradients(dtype: torch.dtype) -> None:
    check_gradients(*gradients((2, 16, 5, 5), dtype, misaligned), Act.SILU, batch_stats=False)
    grad, y, bn, pooled = gradients((2, 16, 5, 5), dtype)
    check_gradients(grad, y, bn, misaligned(pooled), Act.SILU)


@for_each_act
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [False, True])
def test_the_sums_alone(dtype: torch.dtype, pool: bool, act: Act) -> None:
    grad, y, bn, pooled = gradients((2, 24, 9, 9), dtype)
    args = (pooled if pool else grad, y, bn, act, True, pool, None)
    whole, sums = ops.norm_act_backward(*args, True, 0.3), ops.norm_act_backward(*args, False, 0.3)
    assert sums[0].shape == (0,) and sums[0].dtype == dtype and same_bits(sums[1], whole[1])
    assert_close(whole[1][GRAD_BETA], whole[0].double().sum((0, 2, 3)), ACC_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mean_that_is_not_finite(dtype: torch.dtype) -> None:
    """It reaches the pixels of its image and channel, where the activation lets it pass."""
    for channels in (16, 13):
        grad, y, bn, pooled = gradients((3, channels, 4, 5), dtype)
        pooled[1, 2], pooled[2, 4] = float("nan"), float("inf")
        args = (grad, y, bn, Act.RELU, True, False, pooled)
        ours, theirs = ops.norm_act_backward(*args), oracle.norm_act_backward(*args)
        for mine, expected in zip(ours, theirs, strict=True):
            assert_same_specials(mine, expected)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    grad, y, bn, pooled = gradients(shape, torch.float32)
    assert ops.norm_act_forward(y, bn, Act.RELU, False, grad).shape == shape
    dz, grad_bn = ops.norm_act_backward(grad, y, bn, Act.RELU, True, False, pooled)
    assert dz.shape == shape and not grad_bn[-2:].any()
