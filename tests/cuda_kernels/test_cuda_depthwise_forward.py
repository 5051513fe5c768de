"""Depthwise convolution in CUDA C++, forward and inference, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    check_overflowed,
    copying_weight,
    in_float64,
    is_channels_last_dense,
    misaligned,
    overflowing,
    random_bn,
    same_bits,
)

from mobilenet_ext import ops
from mobilenet_ext.backends import reference

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(1, (1, 9, 3)), (3, (2, 5, 7)), (8, (5, 1, 1)), (24, (3, 4, 4)), (40, (2, 13, 26))]  # channels, N, H and W
GEOMETRIES = list(product([1, 2], [0, 1]))
DEPTHWISE_ROWS = ["MEAN", "SCALE", "SHIFT", "RSTD", "VAR"]


def fits(size: tuple[int, int, int], padding: int) -> bool:
    return min(size[1:]) + 2 * padding >= 3


def identity(channels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.zeros(channels, 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1.0
    return weight


def check(dtype, channels, size, stride, padding, *, normalise=True, affine=True, place=lambda x: x) -> None:
    n, h, w = size
    u = place(activation(n, channels, h, w, dtype=dtype))
    bn = random_bn(channels, dtype) if normalise else None
    weight = torch.randn(channels, 1, 3, 3).to(dtype)
    gamma, beta = (torch.rand(channels) + 0.5, torch.randn(channels)) if affine else (None, None)
    args = (u, bn, weight, stride, padding, gamma, beta, 1e-5, True)
    y, bn_y = ops.depthwise_forward(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, in_float64(reference.depthwise_forward, args)[0], TOLERANCE[dtype], "y")
    of_stored = reference._batch_bn(y.double(), *(v if v is None else v.double() for v in (gamma, beta)), 1e-5)
    if y.numel() > channels:  # the statistics of single values are rounding errors
        for row, name in enumerate(DEPTHWISE_ROWS):
            assert_close(bn_y[row], of_stored[row], ACC_TOLERANCE[dtype], name)
    again, without = ops.depthwise_forward(*args[:-1], False)
    assert torch.equal(again, y) and without.shape == (0,) and without.dtype == torch.float32


@pytest.mark.parametrize(("stride", "padding"), GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype: torch.dtype, stride: int, padding: int) -> None:
    for channels, size in CASES:
        if fits(size, padding):
            check(dtype, channels, size, stride, padding)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles_a_program(dtype: torch.dtype, stride: int) -> None:
    check(dtype, 72, (9, 34, 31), stride, 1)


def test_without_optional_arguments() -> None:
    check(torch.float32, 8, (2, 5, 5), 1, 1, normalise=False, affine=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    check(dtype, 16, (2, 7, 6), 1, 1, place=misaligned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference(dtype: torch.dtype) -> None:
    for channels, (stride, padding), relu, with_bn in product([3, 24], GEOMETRIES, [False, True], [False, True]):
        x = activation(2, channels, 5, 6, dtype=dtype)
        bn = random_bn(channels, dtype) if with_bn else None
        args = (x, bn, torch.randn(channels, 1, 3, 3).to(dtype), stride, padding, relu)
        out = ops.depthwise_inference(*args)
        assert out.dtype == dtype and is_channels_last_dense(out)
        assert_close(out, in_float64(reference.depthwise_inference, args)[0], TOLERANCE[dtype])


@pytest.mark.parametrize("outlier", [False, True])
def test_statistics_survive(outlier: bool) -> None:
    """A large mean, and a first value unlike all others."""
    u = activation(1, 8, 300, 2, dtype=torch.float32)
    if outlier:
        u[:, :, 0] = 1e4
    else:
        u += 1e4
    y, bn = ops.depthwise_forward(u, None, identity(8), 1, 1, None, None, 1e-5, True)
    assert torch.equal(y, u)
    assert_close(bn[reference.BN_VAR], u.double().var((0, 2, 3), correction=0), 1e-5 if not outlier else 1e-6)


def test_a_column_outside_the_image_may_overflow() -> None:
    u = torch.full((2, 8, 3, 1), 300.0).half().contiguous(memory_format=torch.channels_last)
    weight = identity(8, torch.float16)
    weight[:, :, 1, 0] = 300.0
    args = (u, None, weight, 1, 1, None, None, 1e-5, True)
    y, bn = ops.depthwise_forward(*args)
    assert torch.equal(y.double(), in_float64(reference.depthwise_forward, args)[0])
    assert not bn[reference.BN_VAR].any() and torch.equal(bn[reference.BN_MEAN], torch.full((8,), 300.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_specials_go_where_the_reference_sends_them(dtype: torch.dtype, stride: int) -> None:
    u = activation(2, 8, 9, 9, dtype=dtype)
    u[0, 1, 4, 4], u[0, 2, 4, 4], u[1, 3, 0, 0] = float("nan"), float("inf"), -float("inf")
    args = (u, random_bn(8, dtype), torch.rand(8, 1, 3, 3).to(dtype) + 0.5, stride, 1, None, None, 1e-5, True)
    y, _ = ops.depthwise_forward(*args)
    assert_same_specials(y, in_float64(reference.depthwise_forward, args)[0])
    assert y.isnan().any() and y.isinf().any()


def test_an_empty_batch() -> None:
    u = torch.empty(0, 8, 5, 5).to(memory_format=torch.channels_last)
    args = (u, None, torch.ones(8, 1, 3, 3), 1, 1, None, None, 1e-5, True)
    y, bn = ops.depthwise_forward(*args)
    assert y.shape == (0, 8, 5, 5)
    torch.testing.assert_close(bn, reference.depthwise_forward(*args)[1])


def test_the_same_bits_whatever_the_order_of_the_threads(device: Callable[..., None]) -> None:
    u = activation(3, 24, 17, 19, dtype=torch.bfloat16)
    args = (u, random_bn(24, u.dtype), torch.randn(24, 1, 3, 3).bfloat16(), 1, 1, None, None, 1e-5, True)
    first = ops.depthwise_forward(*args)
    device(order=-1)
    assert all(map(same_bits, first, ops.depthwise_forward(*args)))


def test_squares_that_overflow() -> None:
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("depthwise", 8, torch.float32)
    y, bn = ops.depthwise_forward(u, None, weight, 1, 1, None, None, 1e-5, True)
    check_overflowed(bn, y)
