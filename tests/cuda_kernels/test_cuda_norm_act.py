"""Normalisation and activation, pooled or not, in CUDA C++, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import oracle
import pytest
import torch
from combinations import combinations
from conv_inputs import DTYPES
from convolutions import for_each_act
from cpu_ops import (
    TOLERANCE,
    activation,
    assert_close,
    assert_grad_bn,
    assert_same_specials,
    is_channels_last_dense,
    misaligned,
    random_bn,
    same_bits,
)
from test_reference import SPECIAL
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.contract import BN_MEAN, Act

pytestmark = pytest.mark.usefixtures("emulated")

# The last one gives a program several tiles.
SHAPES = [(2, 32, 7, 7), (1, 24, 5, 9), (3, 1, 4, 4), (2, 3, 9, 5), (1, 200, 1, 1), (3, 72, 40, 41)]


def identity(x: Tensor) -> Tensor:
    return x


def check(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    act: Act,
    *,
    pool: bool,
    batch_stats: bool = True,
    mean: float = 0.0,
    place: Callable[[Tensor], Tensor] = identity,
) -> None:
    y, bn = place(activation(*shape, dtype=dtype, mean=mean)), random_bn(shape[1], dtype)
    grad = place(activation(*shape[:2], *((1, 1) if pool else shape[2:]), dtype=dtype))
    bn[BN_MEAN] += mean
    args = (y, bn, act, pool)
    out = ops.norm_act_forward(*args)
    assert out.dtype == dtype and is_channels_last_dense(out)
    assert_close(out, oracle.norm_act_forward(*args), TOLERANCE[dtype])

    args = (grad, y, bn, act, batch_stats, pool)
    dz, grad_bn = ops.norm_act_backward(*args)
    expected_dz, _ = oracle.norm_act_backward(*args)
    assert dz.dtype == dtype and is_channels_last_dense(dz)
    if pool or act in (Act.HARDSWISH, Act.SILU):  # else it is 0 or da
        assert_close(dz, expected_dz, TOLERANCE[dtype])
    else:
        assert torch.equal(dz.double(), expected_dz)
    assert_grad_bn(grad_bn, dz, y, bn, batch_stats)


@combinations("shape, act, dtype, pool", SHAPES, Act, DTYPES, [False, True])
def test_norm_act(shape: tuple[int, ...], pool: bool, act: Act, dtype: torch.dtype) -> None:
    check(shape, dtype, act, pool=pool)


@pytest.mark.parametrize("pool", [False, True])
def test_running_statistics(pool: bool) -> None:
    for shape, dtype in product(SHAPES, DTYPES):
        check(shape, dtype, Act.RELU, pool=pool, batch_stats=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [False, True])
def test_misaligned(pool: bool, dtype: torch.dtype) -> None:
    check((2, 16, 5, 5), dtype, Act.RELU, pool=pool, place=misaligned)


def test_large_mean() -> None:
    check((2, 24, 8, 8), torch.float32, Act.RELU, pool=False, mean=1e4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@for_each_act
@pytest.mark.parametrize("pool", [False, True])
def test_nan_and_inf(pool: bool, act: Act, dtype: torch.dtype) -> None:
    """-Inf too: what is linear passes a gradient even there."""
    y, bn = activation(1, 16, 3, 3, dtype=dtype), random_bn(16, dtype)
    grad = activation(1, 16, *((1, 1) if pool else (3, 3)), dtype=dtype)
    y[0, 1, 0, 0], y[0, 2, 1, 1], y[0, 3, 2, 2] = float("nan"), float("inf"), -float("inf")
    grad[0, 5, 0, 0] = float("inf")
    args = (y, bn, act, pool)
    assert_same_specials(ops.norm_act_forward(*args), oracle.norm_act_forward(*args))
    args = (grad, y, bn, act, True, pool)
    ours, theirs = ops.norm_act_backward(*args), oracle.norm_act_backward(*args)
    assert_close(ours[0].nan_to_num(0, 0, 0), theirs[0].nan_to_num(0, 0, 0), TOLERANCE[dtype])
    for mine, expected in zip(ours, theirs, strict=True):
        assert_same_specials(mine, expected)


@for_each_act
def test_corners_and_extremes(act: Act) -> None:
    """Each value by itself, near 0 and far from it: z is y."""
    z = torch.cat([torch.tensor(SPECIAL), torch.linspace(-100, 100, 4001), torch.linspace(-8, 8, 1001)])
    y, grad = z.view(1, 1, -1, 1), torch.linspace(-2, 2, len(z)).view(1, 1, -1, 1)
    bn = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]).view(5, 1)
    torch.testing.assert_close(
        ops.norm_act_forward(y, bn, act, False).double(),
        oracle.norm_act_forward(y, bn, act, False),
        rtol=1e-5,
        atol=1e-35,
        equal_nan=True,
    )
    ours = ops.norm_act_backward(grad, y, bn, act, False, False)[0].double()
    theirs = oracle.norm_act_backward(grad, y, bn, act, False, False)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("pool", [False, True])
def test_empty_batch(pool: bool) -> None:
    y, bn = activation(0, 8, 4, 4, dtype=torch.float32), random_bn(8, torch.float32)
    grad = activation(0, 8, 1, 1, dtype=torch.float32) if pool else y
    assert ops.norm_act_forward(y, bn, Act.RELU, pool).shape == grad.shape
    args = (grad, y, bn, Act.RELU, True, pool)
    dz, grad_bn = ops.norm_act_backward(*args)
    assert dz.shape == y.shape and torch.equal(grad_bn.double(), oracle.norm_act_backward(*args)[1])


def test_the_same_bits_whatever_the_order_of_the_threads(device: Callable[..., None]) -> None:
    y, grad = (activation(3, 24, 40, 40, dtype=torch.bfloat16) for _ in range(2))
    bn = random_bn(24, y.dtype)
    runs = []
    for order in (1, -1):
        device(order=order)
        backward = ops.norm_act_backward(grad, y, bn, Act.RELU, True, False)
        runs.append([*backward, ops.norm_act_forward(y, bn, Act.RELU, True)])
    assert all(map(same_bits, *runs))
