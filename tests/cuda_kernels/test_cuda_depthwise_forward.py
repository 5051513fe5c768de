"""Depthwise convolution in CUDA C++, forward and inference, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import ALL_SIDES, DEPTHWISE, DTYPES, FLOAT32_AND_16_BITS, forward_inputs
from convolutions import EPS, GEOMETRIES, check_forward, check_inference, for_each_act, for_each_kernel
from cpu_ops import (
    INPUTS,
    activation,
    assert_close,
    assert_same_specials,
    check_overflowed,
    copying_weight,
    misaligned,
    overflowing,
    random_bn,
    same_bits,
)

from mobilenet_ext import ops
from mobilenet_ext.contract import BN_MEAN, BN_VAR, Act, Padding, conv_output_size

pytestmark = pytest.mark.usefixtures("emulated")

CASES = [*DEPTHWISE, (40, (2, 13, 26))]
NO_STATISTICS, STATISTICS = (None, None, EPS, False), (None, None, EPS, True)


def check(
    dtype, channels, size, kernel, stride, padding, *, act: Act | None = Act.RELU, with_affine=True, place=lambda x: x
) -> None:
    n, h, w = size
    u, *rest = forward_inputs((n, channels, h, w), (channels, 1, kernel, kernel), dtype, stride, padding, act)
    check_forward("depthwise_forward", place(u), *rest, with_affine=with_affine)


@in_turn("geometry, dtype", GEOMETRIES, *FLOAT32_AND_16_BITS)
def test_forward(geometry: tuple[int, int, Padding], dtype: torch.dtype) -> None:
    kernel, stride, padding = geometry
    for channels, size in CASES:
        if min(conv_output_size(*size[1:], kernel, stride, padding)) > 0:
            check(dtype, channels, size, kernel, stride, padding)


@for_each_kernel
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles_per_program(dtype: torch.dtype, stride: int, kernel: int) -> None:
    check(dtype, 72, (9, 34, 31), kernel, stride, ALL_SIDES)


@pytest.mark.parametrize("act", INPUTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [8, 3])
@for_each_kernel
def test_inputs(kernel: int, channels: int, stride: int, act: Act | None) -> None:
    check(torch.float32, channels, (2, 6, 5), kernel, stride, ALL_SIDES, act=act, with_affine=act == Act.LINEAR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@for_each_kernel
def test_misaligned(kernel: int, dtype: torch.dtype) -> None:
    check(dtype, 16, (2, 7, 6), kernel, 1, ALL_SIDES, place=misaligned)


@combinations("geometry, act, dtype, channels, with_bn", GEOMETRIES, Act, DTYPES, [3, 24], [False, True])
def test_inference(
    geometry: tuple[int, int, Padding], act: Act, dtype: torch.dtype, channels: int, with_bn: bool
) -> None:
    kernel, stride, padding = geometry
    x = activation(2, channels, 7, 8, dtype=dtype)
    bn = random_bn(channels, dtype) if with_bn else None
    weight = torch.randn(channels, 1, kernel, kernel).to(dtype)
    check_inference("depthwise_inference", x, bn, act, weight, stride, padding)


@pytest.mark.parametrize("outlier", [False, True])
def test_statistics_survive(outlier: bool) -> None:
    """A large mean, and a first value unlike all others."""
    u = activation(1, 8, 300, 2, dtype=torch.float32)
    if outlier:
        u[:, :, 0] = 1e4
    else:
        u += 1e4
    weight = copying_weight("depthwise", 8, torch.float32)
    y, bn = ops.depthwise_forward(u, None, Act.LINEAR, weight, 1, ALL_SIDES, *STATISTICS)
    assert torch.equal(y, u)
    assert_close(bn[BN_VAR], u.double().var((0, 2, 3), correction=0), 1e-5 if not outlier else 1e-6)


def test_a_column_outside_the_image_may_overflow() -> None:
    u = torch.full((2, 8, 3, 1), 300.0).half().contiguous(memory_format=torch.channels_last)
    weight = copying_weight("depthwise", 8, torch.float16)
    weight[:, :, 1, 0] = 300.0
    args = (u, None, Act.LINEAR, weight, 1, ALL_SIDES, *STATISTICS)
    y, bn = ops.depthwise_forward(*args)
    assert torch.equal(y.double(), oracle.depthwise_forward(*args)[0])
    assert not bn[BN_VAR].any() and torch.equal(bn[BN_MEAN], torch.full((8,), 300.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@for_each_act
@for_each_kernel
def test_specials_go_where_pytorch_sends_them(kernel: int, dtype: torch.dtype, stride: int, act: Act) -> None:
    u = activation(2, 8, 9, 9, dtype=dtype)
    u[0, 1, 4, 4], u[0, 2, 4, 4], u[1, 3, 0, 0] = float("nan"), float("inf"), -float("inf")
    weight = torch.rand(8, 1, kernel, kernel).to(dtype) + 0.5
    args = (u, random_bn(8, dtype), act, weight, stride, (2, 0, 1, 2), *NO_STATISTICS)
    y, _ = ops.depthwise_forward(*args)
    assert_same_specials(y, oracle.depthwise_forward(*args)[0])
    assert y.isnan().any() and (y.isinf().any() or act == Act.RELU6)


def test_an_empty_batch() -> None:
    u = torch.empty(0, 8, 5, 5).to(memory_format=torch.channels_last)
    args = (u, None, Act.LINEAR, torch.ones(8, 1, 3, 3), 1, ALL_SIDES, *STATISTICS)
    y, bn = ops.depthwise_forward(*args)
    assert y.shape == (0, 8, 5, 5)
    torch.testing.assert_close(bn.double(), oracle.depthwise_forward(*args)[1])


@for_each_kernel
def test_the_same_bits_whatever_the_order_of_the_threads(device: Callable[..., None], kernel: int) -> None:
    u = activation(3, 24, 17, 19, dtype=torch.bfloat16)
    weight = torch.randn(24, 1, kernel, kernel).bfloat16()
    args = (u, random_bn(24, u.dtype), Act.RELU, weight, 1, ALL_SIDES, *STATISTICS)
    first = ops.depthwise_forward(*args)
    device(order=-1)
    assert all(map(same_bits, first, ops.depthwise_forward(*args)))


def test_squares_that_overflow() -> None:
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("depthwise", 8, torch.float32)
    y, bn = ops.depthwise_forward(u, None, Act.LINEAR, weight, 1, ALL_SIDES, *STATISTICS)
    check_overflowed(bn, y)


def test_an_image_of_padding_alone() -> None:
    u = torch.empty(2, 8, 0, 5).to(memory_format=torch.channels_last)
    bias = torch.randn(8)
    y, bn = ops.depthwise_forward(u, None, Act.LINEAR, torch.ones(8, 1, 3, 3), 1, (1, 1, 2, 2), *STATISTICS, bias)
    assert torch.equal(y, bias.view(8, 1, 1).expand(2, 8, 2, 5)) and torch.equal(bn[BN_MEAN], bias)
