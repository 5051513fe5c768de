"""Dense 3x3 convolution in CUDA C++, forward and inference, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import ALL_SIDES, DENSE, DTYPES, FLOAT32_AND_16_BITS, Dense, dense_inputs
from convolutions import EPS, affine, check_forward, check_inference
from cpu_ops import assert_close, check_overflowed, copying_weight, overflowing, random_bn, same_bits

from mobilenet_ext import ops
from mobilenet_ext.contract import Act

pytestmark = pytest.mark.usefixtures("emulated")

SHAPES = [*DENSE, (1, 9, 72, 5, 5, 2, ALL_SIDES)]
TILED = (2, 3, 32, 45, 41, 2, ALL_SIDES)  # several tiles per program, which end in the middle of a line
NO_STATISTICS, STATISTICS = (None, None, EPS, False), (None, None, EPS, True)


@in_turn("shape, dtype", [*SHAPES, TILED], *FLOAT32_AND_16_BITS)
def test_forward(shape: Dense, dtype: torch.dtype) -> None:
    check_forward("dense_forward", *dense_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_before_sm_80(device: Callable[..., None], dtype: torch.dtype) -> None:
    device(capability=75)
    check_forward("dense_forward", *dense_inputs(SHAPES[0], dtype))


def test_no_affine() -> None:
    check_forward("dense_forward", *dense_inputs(SHAPES[0], torch.float32), with_affine=False)


@combinations("act, dtype, normalised", Act, DTYPES, [False, True])
def test_inference(dtype: torch.dtype, normalised: bool, act: Act) -> None:
    x, _, _, *rest = dense_inputs(TILED, dtype)
    bn = random_bn(TILED[2], dtype) if normalised else None
    check_inference("dense_inference", x, bn, act, *rest)


def test_an_input_that_is_not_plain_is_refused() -> None:
    u, _, _, *rest = dense_inputs(SHAPES[0], torch.float32)
    with pytest.raises(RuntimeError):
        ops.dense_forward(u, random_bn(3, u.dtype), Act.RELU, *rest, *NO_STATISTICS)


@pytest.mark.parametrize("stride", [1, 2])
def test_nan_reaches_the_pixels_that_see_it(stride: int) -> None:
    args = dense_inputs((1, 3, 8, 9, 10, stride, ALL_SIDES), torch.float32)
    x, weight = args[0], args[3]
    x[0, 1, 4, 5] = float("nan")
    y, _ = ops.dense_forward(*args, *NO_STATISTICS)
    assert torch.equal(y.isnan(), torch.nn.functional.conv2d(x, weight, stride=stride, padding=1).isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    args = (*dense_inputs((0, 3, 8, 9, 9, 2, ALL_SIDES), dtype), *STATISTICS)
    y, bn = ops.dense_forward(*args)
    assert y.shape == (0, 8, 5, 5)
    assert_close(bn, oracle.dense_forward(*args)[1], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_each_run(device: Callable[..., None], dtype: torch.dtype) -> None:
    """Also when the threads of a block run in another order: none reads what another has not written yet."""
    args = (*dense_inputs(TILED, dtype), *affine(TILED[2]), EPS, True)
    first = ops.dense_forward(*args)
    device(order=-1)
    assert all(map(same_bits, first, ops.dense_forward(*args)))


def test_squares_that_overflow() -> None:
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("dense", 8, torch.float32)
    y, bn = ops.dense_forward(u, None, Act.LINEAR, weight, 1, ALL_SIDES, *STATISTICS)
    check_overflowed(bn, y)
