"""The pointwise kernels in C++ for CPUs, forward, backward and inference, against the oracle."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from combinations import combinations
from cpu_ops import (
    DTYPES,
    GRADIENTS,
    INPUTS,
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    assert_statistics,
    cases,
    check_conv_backward,
    check_threads,
    is_channels_last_dense,
    norm_act_of,
    ops,
    random_bn,
    random_grad_bn,
    relative_error,
    rounds_operands,
    same_bits,
    shapes,
)
from torch import Tensor

from mobilenet_ext.contract import NO_PADDING, Act

# (n, c_in, h, w, c_out). Channel counts of 1, 3, 17 and 33 end in one lane of a vector, 40 and 72 in half a vector;
# 49 rows are one tile, 196 two that are built together, 4608 several; weights of 330 x 410 and above send the backward
# pass through stretches of rows, and the 2 x 40 x 41 rows here are several stretches.
SHAPES = shapes(
    [(3, 33, 9, 11, 17), (1, 40, 7, 7, 72), (1, 24, 14, 14, 520)],
    (2, 1, 5, 7, 1),
    (2, 64, 48, 48, 32),
    (9, 3, 1, 1, 5),
    (1, 520, 7, 7, 300),
    (2, 330, 40, 41, 410),
    (0, 16, 7, 7, 24),
    (0, 400, 7, 7, 400),
)


def pointwise_inputs(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, bn_u, weight, and for the backward dz, y, grad_bn_y."""
    n, c_in, h, w, c_out = shape
    weight = torch.randn(c_out, c_in, 1, 1, dtype=torch.float64) / c_in**0.5
    gradients = [activation(n, c_out, h, w, dtype=dtype) for _ in range(2)]
    bn_u, grad_bn_y = random_bn(c_in, dtype), random_grad_bn(c_out, dtype)
    return activation(n, c_in, h, w, dtype=dtype), bn_u, weight.to(dtype), *gradients, grad_bn_y


@combinations("shape, dtype, act_u", SHAPES, DTYPES, INPUTS)
def test_pointwise_forward(shape: tuple[int, ...], dtype: torch.dtype, act_u: Act | None) -> None:
    u, bn_u, weight, _, _, grad_bn_y = pointwise_inputs(shape, dtype)
    gamma, beta, bias = grad_bn_y[:3] if act_u is not None else (None, None, None)
    args = (u, *norm_act_of(bn_u, act_u), weight, 1, NO_PADDING, gamma, beta, 1e-5)
    y, bn_y = ops.pointwise_forward(*args, True, bias)
    assert y.dtype == dtype and is_channels_last_dense(y)
    exact = (*args, True, bias)
    if rounds_operands(dtype):
        a = oracle.norm_act(u, args[1], args[2]).to(dtype)
        exact = (a, None, Act.LINEAR, *args[3:], True, bias)
    assert_close(y, oracle.pointwise_forward(*exact)[0], TOLERANCE[dtype], "y")
    assert_statistics(bn_y, y, gamma, beta, 1e-5)
    plain, empty = ops.pointwise_forward(*args, False, bias)
    assert same_bits(y, plain) and empty.shape == (0,) and empty.dtype == bn_y.dtype


@combinations("shape, dtype, gradient", SHAPES, DTYPES, GRADIENTS)
def test_pointwise_backward(
    shape: tuple[int, ...], dtype: torch.dtype, gradient: tuple[Act | None, bool, bool, bool]
) -> None:
    act_u, with_grad_bn, with_y, batch_stats = gradient
    u, bn_u, weight, dz, y, grad_bn_y = pointwise_inputs(shape, dtype)
    output = (dz, y if with_y else None, grad_bn_y if with_grad_bn else None)
    source = (u, *norm_act_of(bn_u, act_u), batch_stats, weight, 1, NO_PADDING)
    check_conv_backward("pointwise_backward", output, source)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", range(1, 30))
def test_every_number_of_rows_and_columns_that_ends_a_tile(count: int, dtype: torch.dtype) -> None:
    u, bn_u, weight, dz, y, grad_bn_y = pointwise_inputs((1, 5, 1, count, count), dtype)
    args = (u, None, Act.LINEAR, weight, 1, NO_PADDING, None, None, 1e-5, False)
    assert_close(ops.pointwise_forward(*args)[0], oracle.pointwise_forward(*args)[0], TOLERANCE[dtype], "y")
    check_conv_backward("pointwise_backward", (dz, y, grad_bn_y), (u, bn_u, Act.RELU, True, weight, 1, NO_PADDING))


@combinations("shape, dtype, with_bn, act", SHAPES, DTYPES, [True, False], Act)
def test_pointwise_inference(shape: tuple[int, ...], dtype: torch.dtype, with_bn: bool, act: Act) -> None:
    x, _, weight, *_ = pointwise_inputs(shape, dtype)
    args = (x, random_bn(shape[4], dtype) if with_bn else None, act, weight, 1, NO_PADDING)
    y = ops.pointwise_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, oracle.pointwise_inference(*args), TOLERANCE[dtype])


@pytest.mark.cover
@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_statistics_survive_a_large_mean(mean: float) -> None:
    # The identity as weight copies the input, so the statistics are those of the input.
    u = activation(4, 40, 56, 60, dtype=torch.float32, mean=mean)
    y, bn_y = ops.pointwise_forward(
        u, None, Act.LINEAR, torch.eye(40).view(40, 40, 1, 1), 1, NO_PADDING, None, None, 1e-5, True
    )
    assert torch.equal(y, u)
    exact = u.double().var((0, 2, 3), correction=0)
    module = torch.nn.BatchNorm2d(40, momentum=1.0)
    module(u)
    theirs = relative_error(module.running_var * (1 - 1 / (u.numel() // 40)), exact)
    assert relative_error(bn_y[4], exact) <= max(theirs, 1e-6)


@pytest.mark.cover
@combinations(
    "where, act_u, value, dtype",
    ["u", "dz", "y", "weight", "bn_u"],
    Act,
    [float("nan"), float("inf"), -float("inf")],
    [torch.float32, torch.bfloat16],
)
def test_nan_and_inf(dtype: torch.dtype, where: str, value: float, act_u: Act) -> None:
    u, bn_u, weight, dz, y, grad_bn_y = pointwise_inputs((2, 33, 7, 9, 40), dtype)
    {"u": u[1, 3, 2], "dz": dz[0, 5, 6], "y": y[1, 39, 0], "weight": weight[7, 32], "bn_u": bn_u[1]}[where][0] = value
    args = (u, bn_u, act_u, weight, 1, NO_PADDING, None, None, 1e-5, True)
    ours, bn_y = ops.pointwise_forward(*args)
    theirs, their_bn = oracle.pointwise_forward(*args)
    assert_same_specials(ours, theirs.double())
    assert torch.equal(torch.isfinite(bn_y), torch.isfinite(their_bn))
    args = (dz, y, grad_bn_y, u, bn_u, act_u, True, weight, 1, NO_PADDING, True, True)
    for actual, expected in zip(ops.pointwise_backward(*args), oracle.pointwise_backward(*args), strict=True):
        assert_same_specials(actual, expected.double())


def test_more_channels_than_fit_on_a_stack() -> None:
    x, bn_u, weight, *_ = pointwise_inputs((1, 20_000, 1, 2, 3), torch.float32)
    args = (x, bn_u, Act.RELU, weight, 1, NO_PADDING, None, None, 1e-5, False)
    assert_close(ops.pointwise_forward(*args)[0], oracle.pointwise_forward(*args)[0], 1e-5)
    x, bn_u, weight, dz, y, grad_bn_y = pointwise_inputs((1, 3, 1, 2, 20_000), torch.float32)
    args = (dz, y, grad_bn_y, x, bn_u, Act.RELU, True, weight, 1, NO_PADDING, True, True)
    for actual, expected in zip(ops.pointwise_backward(*args), oracle.pointwise_backward(*args), strict=True):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [64, 96])
def test_outputs_past_the_cache(dtype, channels):
    """From 8 MiB on, outputs are written past the cache: the same bits as of each image alone."""
    images = 12 if dtype is torch.float32 else 24
    u = torch.randn(images, 32, 96, 96).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 32, 1, 1).to(dtype)
    dz = torch.randn(images, channels, 96, 96).to(dtype).contiguous(memory_format=torch.channels_last)
    assert dz.numel() * dz.element_size() >= 16 << 20
    y = ops.pointwise_inference(u, None, Act.LINEAR, weight, 1, NO_PADDING)
    back = weight.transpose(0, 1).contiguous()  # [32, channels]: its input gradient is the large one
    dz_u = ops.pointwise_backward(u, None, None, dz, None, Act.LINEAR, False, back, 1, NO_PADDING, True, False)[0]
    for i in range(images):
        one = slice(i, i + 1)
        assert torch.equal(y[one], ops.pointwise_inference(u[one], None, Act.LINEAR, weight, 1, NO_PADDING))
        alone = ops.pointwise_backward(
            u[one], None, None, dz[one], None, Act.LINEAR, False, back, 1, NO_PADDING, True, False
        )[0]
        assert torch.equal(dz_u[one], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases([(1, 300, 7, 7, 520)], (3, 40, 57, 60, 72), (2, 330, 20, 41, 410))
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    u, bn_u, weight, dz, y, grad_bn_y = pointwise_inputs(shape, dtype)
    check_threads(ops.pointwise_forward, (u, bn_u, Act.RELU, weight, 1, NO_PADDING, None, None, 1e-5, True))
    check_threads(
        ops.pointwise_backward, (dz, y, grad_bn_y, u, bn_u, Act.RELU, True, weight, 1, NO_PADDING, True, True)
    )


def bad_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    u, bn_u, weight, *_ = pointwise_inputs((2, 16, 8, 8, 24), torch.float32)
    tail = (None, None, 1e-5, True)
    return {
        "stride: expected 1, got": (ops.pointwise_forward, (u, bn_u, Act.RELU, weight, 2, 0, *tail)),
        "padding: expected 0, got": (ops.pointwise_forward, (u, bn_u, Act.RELU, weight, 1, 1, *tail)),
        "packed: expected": (ops.pointwise_inference, (u, None, Act.RELU, weight, 1, NO_PADDING, u)),
    }


@pytest.mark.parametrize("message", list(bad_calls()))
def test_bad_tensors_are_refused(message: str) -> None:
    op, args = bad_calls()[message]
    with pytest.raises(RuntimeError, match=message):
        op(*args)
