"""The norm_act kernels in C++ for CPUs (normalise, activate, pool) and bn_from_running, against the oracle."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from combinations import combinations
from cpu_ops import (
    ACC_TOLERANCE,
    DTYPES,
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    cases,
    check_threads,
    is_channels_last_dense,
    ops,
    random_bn,
    shapes,
)

from mobilenet_ext import contract
from mobilenet_ext.contract import Act

IMAGES = shapes([(2, 32, 7, 7), (1, 24, 5, 9), (3, 1, 4, 4)], (1, 200, 1, 1), (2, 72, 20, 31), (0, 16, 7, 7))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@combinations("shape, dtype, act, batch_stats", IMAGES, DTYPES, Act, [True, False])
def test_norm_act(shape: tuple[int, ...], dtype: torch.dtype, act: Act, batch_stats: bool) -> None:
    y, bn, grad = activation(*shape, dtype=dtype), random_bn(shape[1], dtype), activation(*shape, dtype=dtype)
    out = ops.norm_act_forward(y, bn, act, False)
    assert out.dtype == dtype and is_channels_last_dense(out)
    assert_close(out, oracle.norm_act_forward(y, bn, act, False), TOLERANCE[dtype])
    dz, grad_bn = ops.norm_act_backward(grad, y, bn, act, batch_stats, False)
    expected_dz, expected_bn = oracle.norm_act_backward(grad, y, bn, act, batch_stats, False)
    assert is_channels_last_dense(dz)
    if act in (Act.LINEAR, Act.RELU, Act.RELU6):  # pass a gradient, or stop it
        assert torch.equal(dz.double(), expected_dz)
    else:
        assert_close(dz, expected_dz, TOLERANCE[dtype])
        expected_bn = oracle.grad_bn(dz, y, bn, batch_stats)
    for row in range(contract.GRAD_ROWS):
        assert_close(grad_bn[row], expected_bn[row], ACC_TOLERANCE[dtype], str(row))


@combinations("shape, dtype, act", IMAGES, DTYPES, Act)
def test_pooling(shape: tuple[int, ...], dtype: torch.dtype, act: Act) -> None:
    y, bn, grad = activation(*shape, dtype=dtype), random_bn(shape[1], dtype), activation(*shape[:2], 1, 1, dtype=dtype)
    out = ops.norm_act_forward(y, bn, act, True)
    assert_close(out, oracle.norm_act_forward(y, bn, act, True), TOLERANCE[dtype])
    dz, grad_bn = ops.norm_act_backward(grad, y, bn, act, True, True)
    expected_dz, _ = oracle.norm_act_backward(grad, y, bn, act, True, True)
    assert_close(dz, expected_dz, TOLERANCE[dtype])
    of_stored = oracle.grad_bn(dz, y, bn, True)
    assert_close(grad_bn, of_stored, ACC_TOLERANCE[dtype])


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bn_from_running(dtype: torch.dtype) -> None:
    mean, gamma, beta, bias = (torch.randn(19, dtype=torch.float64).to(dtype) for _ in range(4))
    var = torch.rand(19, dtype=torch.float64).to(dtype)
    for args in [(mean, var, gamma, beta, bias, 1e-5), (mean, var, None, None, None, 1e-3)]:
        bn = ops.bn_from_running(*args)
        assert bn.dtype == contract.acc_dtype(dtype)
        assert_close(bn, oracle.bn_from_running(*args), 1e-12 if dtype == torch.float64 else 1e-6)


def test_outputs_too_large_for_the_cache() -> None:
    # 8 MiB and more are written past the cache, other code than for the small shapes above.
    u, bn_u = activation(2, 48, 224, 224, dtype=torch.float32), random_bn(48, torch.float32)
    forward, backward = (u, bn_u, Act.RELU, False), (u, u, bn_u, Act.RELU, True, False)
    assert_close(ops.norm_act_forward(*forward), oracle.norm_act_forward(*forward), 1e-6)
    dz, grad_bn = ops.norm_act_backward(*backward)
    assert torch.equal(dz.double(), oracle.norm_act_backward(*backward)[0])
    assert_close(grad_bn, oracle.grad_bn(dz, u, bn_u, True), 1e-5)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", Act)
def test_nan_and_inf(dtype: torch.dtype, act: Act) -> None:
    y, bn = activation(1, 16, 3, 3, dtype=dtype), random_bn(16, dtype)
    y[0, :, 0, 0] = float("nan")
    y[0, :, 1, 1] = float("inf")
    y[0, :, 2, 2] = -float("inf")
    grad = activation(1, 16, 3, 3, dtype=dtype)
    grad[0, 3, 0, 1] = float("inf")
    for pool in (False, True):
        args = (y, bn, act, pool)
        assert_same_specials(ops.norm_act_forward(*args), oracle.norm_act_forward(*args))
    args = (grad, y, bn, act, True, False)
    for actual, expected in zip(ops.norm_act_backward(*args), oracle.norm_act_backward(*args), strict=True):
        assert_same_specials(actual, expected)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("act", Act)
def test_each_value_and_derivative(dtype: torch.dtype, act: Act) -> None:
    """To a few units in the last place of each element, corners and infinities included."""
    corners = [0.0, -0.0, 3.0, -3.0, 6.0, float("nan"), float("inf"), -float("inf")]
    beyond_exp = [-89.0, -104.0, -800.0, 89.0, 104.0, 800.0, 1e4, -1e4, 1e30, -1e30]
    z = torch.cat([torch.tensor(corners + beyond_exp), torch.linspace(-87, 89, 12001), torch.linspace(-7, 7, 12001)])
    z, grad = z.to(dtype).view(-1, 1, 1, 1), torch.linspace(-2, 2, len(z)).to(dtype).view(-1, 1, 1, 1)
    identity = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], dtype=dtype).view(5, 1)
    unit = torch.finfo(dtype).eps
    exact = oracle.norm_act_forward(z, identity, act, False)
    a = ops.norm_act_forward(z, identity, act, False)
    # Below the normal numbers an error is absolute; reference and kernel are of the same precision in float64.
    torch.testing.assert_close(a.double(), exact, rtol=6 * unit, atol=1e-36, equal_nan=True)
    exact = oracle.norm_act_backward(grad, z, identity, act, False, False)[0]
    dz = ops.norm_act_backward(grad, z, identity, act, False, False)[0]
    # The derivative passes through 0, or ends at a corner, as a sum of two terms.
    torch.testing.assert_close(dz.double(), exact, rtol=6 * unit, atol=6 * unit, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases([(1, 264, 7, 7)], (3, 40, 57, 60))
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    u, bn = activation(*shape, dtype=dtype), random_bn(shape[1], dtype)
    pooled = ops.norm_act_forward(u, bn, Act.RELU, True)
    check_threads(ops.norm_act_forward, (u, bn, Act.RELU, True))
    check_threads(ops.norm_act_backward, (u, u, bn, Act.RELU, True, False))
    check_threads(ops.norm_act_backward, (pooled, u, bn, Act.RELU, True, True))


def bad_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    u, bn = activation(2, 16, 8, 8, dtype=torch.float32), random_bn(16, torch.float32)
    return {
        "grad: expected shape": (ops.norm_act_backward, (u[:1], u, bn, Act.RELU, True, False)),
        "bn_y: expected shape": (ops.norm_act_forward, (u, bn[:, :3].contiguous(), Act.RELU, False)),
        "act: expected an Act": (ops.norm_act_forward, (u, bn, -1, False)),
        "running_mean: expected 1 dim": (ops.bn_from_running, (bn, bn[4], None, None, None, 1e-5)),
        "running_var: expected shape": (ops.bn_from_running, (bn[0], bn[4, :3], None, None, None, 1e-5)),
    }


@pytest.mark.parametrize("message", list(bad_calls()))
def test_bad_tensors_are_refused(message: str) -> None:
    op, args = bad_calls()[message]
    with pytest.raises(RuntimeError, match=message):
        op(*args)
