"""Pointwise convolution in CUDA C++, forward and inference, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from combinations import combinations
from conv_inputs import DTYPES, forward_inputs
from convolutions import EPS, affine, check_forward, check_inference, for_each_act
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
    relative_error,
    same_bits,
)

from mobilenet_ext import ops
from mobilenet_ext.contract import NO_PADDING, Act

pytestmark = pytest.mark.usefixtures("emulated")

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
# Several tiles per program, the last one a tail; channels in and out of one block.
TILED = [(1, 40, 72, 25, 37), (1, 13, 70, 25, 37), (3, 48, 264, 16, 19)]
NO_STATISTICS, STATISTICS = (None, None, EPS, False), (None, None, EPS, True)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, act: Act | None = Act.RELU) -> tuple:
    """u, bn_u, act_u, weight, stride, padding."""
    n, channels, outputs, h, w = shape
    return forward_inputs((n, channels, h, w), (outputs, channels, 1, 1), dtype, act=act)


@combinations("shape, act, dtype", SHAPES, INPUTS, DTYPES)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, act: Act | None) -> None:
    check_forward("pointwise_forward", *inputs(shape, dtype, act))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TILED, ids=str)
def test_several_tiles(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_forward("pointwise_forward", *inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], TILED[0]], ids=str)
def test_before_sm_80(device: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device(capability=75)
    check_forward("pointwise_forward", *inputs(shape, dtype))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], TILED[0]], ids=str)
def test_tf32(shape: tuple[int, ...]) -> None:
    args = inputs(shape, torch.float32)
    check_forward("pointwise_forward", *args, allowed=5e-4)
    args = (*args, *NO_STATISTICS)
    expected, _ = oracle.pointwise_forward(*args)
    assert relative_error(ops.pointwise_forward(*args)[0], expected) > 1e-5


def test_no_affine() -> None:
    check_forward("pointwise_forward", *inputs((2, 24, 40, 8, 17), torch.float32), with_affine=False)


@combinations(
    "shape, dtype, normalised, act",
    [(2, 3, 1, 5, 3), (1, 40, 136, 3, 43), (1, 24, 40, 25, 37), (1, 13, 70, 9, 9)],
    DTYPES,
    [False, True],
    Act,
)
def test_inference(shape: tuple[int, ...], dtype: torch.dtype, normalised: bool, act: Act) -> None:
    x, _, _, weight, *_ = inputs(shape, dtype, None)
    bn = random_bn(shape[2], dtype) if normalised else None
    check_inference("pointwise_inference", x, bn, act, weight, 1, NO_PADDING)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_that_of_pytorch(dtype: torch.dtype) -> None:
    args = inputs((2, 48, 80, 9, 11), dtype, None)
    u, weight = args[0], args[3]
    y = ops.pointwise_forward(*args, *NO_STATISTICS)[0]
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
    y, bn = ops.pointwise_forward(u, None, Act.LINEAR, weight, 1, NO_PADDING, *STATISTICS)
    var, mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    assert_close(bn[0], mean, 1e-7, "mean")
    assert_close(bn[4], var, 1e-5, "var")


def test_first_value_is_an_outlier(device: Callable[..., None]) -> None:
    """A first value far from all others costs the variance nothing."""
    device(multiprocessors=1)
    u = activation(1, 8, 90, 100, dtype=torch.float32)
    u[0, :, 0, 0] = 1e4
    weight = torch.eye(16, 8)[..., None, None].contiguous()
    y, bn = ops.pointwise_forward(u, None, Act.LINEAR, weight, 1, NO_PADDING, *STATISTICS)
    var, mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    assert_close(bn[0], mean, 1e-5, "mean")
    assert_close(bn[4], var, 1e-5, "var")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [16, 13])
@for_each_act
def test_nan_and_inf(dtype: torch.dtype, outputs: int, act: Act) -> None:
    """A NaN of the input spoils its pixel, one of the weight its channel, and nothing else."""
    args = inputs((1, 24, outputs, 9, 17), dtype, act)
    u = args[0]
    u[0, 1, 0, 3], u[0, 2, 8, 16] = float("nan"), float("inf")
    u[0, 3, 4, 4] = float("-inf")
    y, _ = ops.pointwise_forward(*args, *NO_STATISTICS)
    assert_same_specials(y, oracle.pointwise_forward(*args, *NO_STATISTICS)[0])

    args = inputs((1, 24, outputs, 9, 17), dtype, act)
    args[3][5, 3] = float("nan")
    y, made = ops.pointwise_forward(*args, *STATISTICS)
    bad = torch.arange(outputs) == 5
    assert torch.equal(y.isnan(), bad.view(1, -1, 1, 1).expand_as(y))
    for row in (0, 1, 3, 4):
        assert torch.equal(made[row].isnan(), bad)


@pytest.mark.parametrize("outputs", [16, 13])
def test_infinite_statistics(outputs: int) -> None:
    args = inputs((1, 8, outputs, 25, 37), torch.float32, None)
    u, weight = args[0], args[3]
    u[0, :, 5, 5] = 0
    u[0, 0, 5, 5] = float("inf")
    weight[2, 0] = 1
    y, bn = ops.pointwise_forward(*args, *STATISTICS)
    assert y[0, 2, 5, 5].isposinf() and not bn[0, 2].isfinite() and bn[4, 2].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    args = inputs((0, 8, 16, 5, 5), dtype)
    y, bn = ops.pointwise_forward(*args, *STATISTICS)
    assert y.shape == (0, 16, 5, 5)
    assert_close(bn, oracle.pointwise_forward(*args, *STATISTICS)[1], 1e-6)
    assert ops.pointwise_inference(args[0], None, Act.RELU, *args[3:]).shape == (0, 16, 5, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    args = inputs((1, 16, 24, 9, 16), dtype)
    y, made = ops.pointwise_forward(*args, *STATISTICS)
    for i in (0, 1, 3):  # u, bn_u, weight
        got, got_bn = ops.pointwise_forward(*args[:i], misaligned(args[i]), *args[i + 1 :], *STATISTICS)
        assert same_bits(got, y)
        assert_close(got_bn, made.double(), 1e-6)
    normalised = ops.pointwise_inference(args[0], random_bn(24, dtype), Act.RELU, *args[3:])
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
    y, bn = ops.pointwise_forward(u, None, Act.LINEAR, weight, 1, NO_PADDING, *STATISTICS)
    check_overflowed(bn, y)
