"""The CUDA pointwise kernels, forward and inference, on the emulated device, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    relative_error,
    same_bits,
)
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.backends import reference

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (n, channels, outputs, h, w)
SHAPES = [
    (1, 8, 16, 9, 7),
    (2, 3, 1, 5, 3),
    (1, 1, 3, 1, 1),
    (2, 24, 40, 8, 17),
    (1, 40, 136, 3, 43),
    (3, 72, 8, 11, 13),
    (1, 20, 66, 3, 50),
    (1, 32, 64, 1, 128),
]
# Several tiles for each program, the last one a tail; channels in and out of one block.
TILED = [(1, 40, 72, 25, 37), (1, 13, 70, 25, 37), (3, 48, 264, 16, 19)]
EPS = 1e-5


def inputs(shape: tuple[int, ...], dtype: torch.dtype, plain: bool = False) -> tuple[Any, ...]:
    n, channels, outputs, h, w = shape
    return (
        activation(n, channels, h, w, dtype=dtype),
        None if plain else random_bn(channels, dtype),
        (torch.randn(outputs, channels, 1, 1, dtype=torch.float64) / channels**0.5).to(dtype),
    )


def affine(outputs: int) -> tuple[Tensor, Tensor]:
    return torch.rand(outputs) + 0.5, torch.randn(outputs)


def check_bn(bn: Tensor, y: Tensor, gamma: Tensor | None, beta: Tensor | None) -> None:
    """The normalisation is that of the values as stored."""
    expected = reference._batch_bn(y.double(), *[v if v is None else v.double() for v in (gamma, beta)], EPS)
    for row, name in enumerate(["mean", "scale", "shift", "rstd", "var"]):
        assert_close(bn[row], expected[row], ACC_TOLERANCE[y.dtype], name)


def check(args: tuple[Any, ...], tolerance: float | None = None) -> None:
    u, bn_u, weight = args
    gamma, beta = affine(weight.shape[0])
    y, bn = ops.pointwise_forward(*args, gamma, beta, EPS, True)
    # a is rounded on its way to the tensor cores, where the reference keeps it in float32.
    a = reference._activation(u.double(), None if bn_u is None else bn_u.double()).to(u.dtype)
    expected, _ = in_float64(reference.pointwise_forward, (a, None, weight, None, None, EPS, False))
    assert y.dtype == u.dtype and is_channels_last_dense(y)
    assert_close(y, expected, tolerance or TOLERANCE[u.dtype], "y")
    check_bn(bn, y, gamma, beta)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, plain: bool) -> None:
    check(inputs(shape, dtype, plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TILED, ids=str)
def test_several_tiles(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], TILED[0]], ids=str)
def test_before_sm_80(device: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device(capability=75)
    check(inputs(shape, dtype))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], TILED[0]], ids=str)
def test_tf32(shape: tuple[int, ...]) -> None:
    args = inputs(shape, torch.float32)
    check(args, 5e-4)
    args = (*args, None, None, EPS, False)
    expected, _ = in_float64(reference.pointwise_forward, args)
    assert relative_error(ops.pointwise_forward(*args)[0], expected) > 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_statistics(dtype: torch.dtype) -> None:
    args = inputs((2, 24, 40, 8, 17), dtype)
    y, bn = ops.pointwise_forward(*args, None, None, EPS, False)
    assert bn.shape == (0,)
    assert same_bits(y, ops.pointwise_forward(*args, None, None, EPS, True)[0])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 1, 5, 3), (1, 40, 136, 3, 43), (1, 24, 40, 25, 37), (1, 13, 70, 9, 9)], ids=str
)
def test_inference(shape: tuple[int, ...], dtype: torch.dtype, normalised: bool, relu: bool) -> None:
    x, _, weight = inputs(shape, dtype, plain=True)
    args = (x, random_bn(shape[2], dtype) if normalised else None, weight, relu)
    y = ops.pointwise_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, *in_float64(reference.pointwise_inference, args), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_that_of_pytorch(dtype: torch.dtype) -> None:
    u, _, weight = inputs((2, 48, 80, 9, 11), dtype, plain=True)
    y = ops.pointwise_forward(u, None, weight, None, None, EPS, False)[0]
    expected = torch.nn.functional.conv2d(u.double(), weight.double())
    theirs = torch.nn.functional.conv2d(u, weight)
    assert relative_error(y, expected) <= 1.5 * relative_error(theirs, expected) + 1e-7


@pytest.mark.parametrize("shape", [(1, 8, 16, 25, 37), (1, 8, 13, 25, 37)], ids=str)
def test_large_mean(shape: tuple[int, ...]) -> None:
    """Mean 1e4 and standard deviation 1 give the variance."""
    n, channels, outputs, h, w = shape
    u = activation(n, channels, h, w, dtype=torch.float32)
    u[:, 0] = 1e4
    weight = torch.eye(outputs, channels)[..., None, None].contiguous()
    weight[:, 0] = 1
    y, bn = ops.pointwise_forward(u, None, weight, None, None, EPS, True)
    var, mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    assert_close(bn[0], mean, 1e-7, "mean")
    assert_close(bn[4], var, 1e-5, "var")


def test_outlier_in_front(device: Callable[..., None]) -> None:
    """A first value far from all others costs the variance nothing."""
    device(multiprocessors=1)
    u = activation(1, 8, 90, 100, dtype=torch.float32)
    u[0, :, 0, 0] = 1e4
    weight = torch.eye(16, 8)[..., None, None].contiguous()
    y, bn = ops.pointwise_forward(u, None, weight, None, None, EPS, True)
    var, mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    assert_close(bn[0], mean, 1e-5, "mean")
    assert_close(bn[4], var, 1e-5, "var")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [16, 13])
def test_nan_and_inf(dtype: torch.dtype, outputs: int) -> None:
    """A NaN of the input spoils its pixel, one of the weight its channel, and nothing else."""
    u, bn, weight = inputs((1, 24, outputs, 9, 17), dtype)
    u[0, 1, 0, 3], u[0, 2, 8, 16] = float("nan"), float("inf")
    u[0, 3, 4, 4] = float("-inf")
    args = (u, bn, weight)
    y, _ = ops.pointwise_forward(*args, None, None, EPS, False)
    assert_same_specials(y, reference.pointwise_forward(*args, None, None, EPS, False)[0].double())

    u, bn, weight = inputs((1, 24, outputs, 9, 17), dtype)
    weight[5, 3] = float("nan")
    y, made = ops.pointwise_forward(u, bn, weight, None, None, EPS, True)
    bad = torch.arange(outputs) == 5
    assert torch.equal(y.isnan(), bad.view(1, -1, 1, 1).expand_as(y))
    for row in (0, 1, 3, 4):
        assert torch.equal(made[row].isnan(), bad)


@pytest.mark.parametrize("outputs", [16, 13])
def test_infinite_statistics(outputs: int) -> None:
    u, _, weight = inputs((1, 8, outputs, 25, 37), torch.float32, plain=True)
    u[0, :, 5, 5] = 0
    u[0, 0, 5, 5] = float("inf")
    weight[2, 0] = 1
    y, bn = ops.pointwise_forward(u, None, weight, None, None, EPS, True)
    assert y[0, 2, 5, 5].isposinf() and not bn[0, 2].isfinite() and bn[4, 2].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    args = inputs((0, 8, 16, 5, 5), dtype)
    y, bn = ops.pointwise_forward(*args, None, None, EPS, True)
    assert y.shape == (0, 16, 5, 5)
    assert_close(bn, reference.pointwise_forward(*args, None, None, EPS, True)[1].double(), 1e-6)
    assert ops.pointwise_inference(args[0], None, args[2], True).shape == (0, 16, 5, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    u, bn, weight = inputs((1, 16, 24, 9, 16), dtype)

    y, made = ops.pointwise_forward(u, bn, weight, None, None, EPS, True)
    for args in ((misaligned(u), bn, weight), (u, misaligned(bn), weight), (u, bn, misaligned(weight))):
        got, got_bn = ops.pointwise_forward(*args, None, None, EPS, True)
        assert same_bits(got, y)
        assert_close(got_bn, made.double(), 1e-6)
    normalised = ops.pointwise_inference(u, random_bn(24, dtype), weight, True)
    assert normalised.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_each_run(device: Callable[..., None], dtype: torch.dtype) -> None:
    """Also when the threads of a block run in another order: none reads what another has not written yet."""
    args = (*inputs(TILED[0], dtype), *affine(TILED[0][2]), EPS, True)
    first = ops.pointwise_forward(*args)
    device(order=-1)
    second = ops.pointwise_forward(*args)
    assert same_bits(first[0], second[0]) and same_bits(first[1], second[1])


def test_squares_that_overflow() -> None:
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("pointwise", 8, torch.float32)
    y, bn = ops.pointwise_forward(u, None, weight, None, None, 1e-5, True)
    check_overflowed(bn, y)
