"""BatchNorm + ReLU, pooled or not, and running statistics in CUDA C++, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    in_float64,
    is_channels_last_dense,
    misaligned,
    random_bn,
    same_bits,
)
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.backends import reference

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The last one gives a program several tiles.
SHAPES = [(2, 32, 7, 7), (1, 24, 5, 9), (3, 1, 4, 4), (2, 3, 9, 5), (1, 200, 1, 1), (3, 72, 40, 41)]


def identity(x: Tensor) -> Tensor:
    return x


def check(shape, dtype, relu=True, batch_stats=True, mean=0.0, place: Callable[[Tensor], Tensor] = identity) -> None:
    y, bn = activation(*shape, dtype=dtype, mean=mean), random_bn(shape[1], dtype)
    y, grad = place(y), place(activation(*shape, dtype=dtype))
    bn[0] += mean
    out = ops.bn_relu_forward(y, bn, relu)
    assert out.dtype == dtype and is_channels_last_dense(out)
    assert_close(out, *in_float64(reference.bn_relu_forward, (y, bn, relu)), TOLERANCE[dtype])
    h, grad_bn = ops.bn_relu_backward(grad, y, bn, batch_stats, relu)
    expected_h, expected_bn = in_float64(reference.bn_relu_backward, (grad, y, bn, batch_stats, relu))
    assert torch.equal(h.double(), expected_h) and is_channels_last_dense(h)
    for row in range(6):
        assert_close(grad_bn[row], expected_bn[row], ACC_TOLERANCE[dtype], str(row))


def check_pool(shape, dtype, batch_stats=True, place: Callable[[Tensor], Tensor] = identity) -> None:
    y, bn = place(activation(*shape, dtype=dtype)), random_bn(shape[1], dtype)
    grad = place(activation(*shape[:2], 1, 1, dtype=dtype))
    out = ops.bn_relu_pool_forward(y, bn)
    assert out.dtype == dtype and is_channels_last_dense(out)
    assert_close(out, *in_float64(reference.bn_relu_pool_forward, (y, bn)), TOLERANCE[dtype])
    h, grad_bn = ops.bn_relu_pool_backward(grad, y, bn, batch_stats)
    expected_h, _ = in_float64(reference.bn_relu_pool_backward, (grad, y, bn, batch_stats))
    assert h.dtype == dtype and is_channels_last_dense(h)
    assert_close(h, expected_h, TOLERANCE[dtype])
    of_stored = reference._make_grad_bn(h.double(), y.double(), bn.double(), batch_stats)
    for row in range(6):
        assert_close(grad_bn[row], of_stored[row], ACC_TOLERANCE[dtype], str(row))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bn_relu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for relu, batch_stats in [(True, True), (False, True), (True, False)]:
        check(shape, dtype, relu, batch_stats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pool(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for batch_stats in (True, False):
        check_pool(shape, dtype, batch_stats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    check((2, 16, 5, 5), dtype, place=misaligned)
    check_pool((2, 16, 5, 5), dtype, place=misaligned)


def test_large_mean() -> None:
    check((2, 24, 8, 8), torch.float32, mean=1e4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf(dtype: torch.dtype) -> None:
    y, bn, grad = activation(1, 16, 3, 3, dtype=dtype), random_bn(16, dtype), activation(1, 16, 3, 3, dtype=dtype)
    y[0, 1, 0, 0], y[0, 2, 1, 1], y[0, 3, 2, 2] = float("nan"), float("inf"), -float("inf")
    grad[0, 5, 0, 1] = float("inf")
    assert_same_specials(ops.bn_relu_forward(y, bn, True), *in_float64(reference.bn_relu_forward, (y, bn, True)))
    assert_same_specials(ops.bn_relu_pool_forward(y, bn), *in_float64(reference.bn_relu_pool_forward, (y, bn)))
    pooled = activation(1, 16, 1, 1, dtype=dtype)
    for op, args in [
        ("bn_relu_backward", (grad, y, bn, True, True)),
        ("bn_relu_pool_backward", (pooled, y, bn, True)),
    ]:
        for ours, theirs in zip(getattr(ops, op)(*args), in_float64(getattr(reference, op), args), strict=True):
            assert_same_specials(ours, theirs)


def test_empty_batch() -> None:
    y, bn = activation(0, 8, 4, 4, dtype=torch.float32), random_bn(8, torch.float32)
    assert ops.bn_relu_forward(y, bn, True).shape == y.shape
    h, grad_bn = ops.bn_relu_backward(y, y, bn, True, True)
    assert h.shape == y.shape and torch.equal(grad_bn, reference.bn_relu_backward(y, y, bn, True, True)[1])


def test_the_same_bits_whatever_the_order_of_the_threads(device: Callable[..., None]) -> None:
    y, grad = (activation(3, 24, 40, 40, dtype=torch.bfloat16) for _ in range(2))
    bn = random_bn(24, y.dtype)
    runs = []
    for order in (1, -1):
        device(order=order)
        runs.append([*ops.bn_relu_backward(grad, y, bn, True, True), ops.bn_relu_pool_forward(y, bn)])
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_bn_from_running(affine: bool, conv_bias: bool, dtype: torch.dtype) -> None:
    vectors = [torch.randn(300), torch.rand(300) + 0.1]
    vectors += [torch.randn(300), torch.randn(300)] if affine else [None, None]
    vectors += [torch.randn(300)] if conv_bias else [None]
    vectors = [v if v is None else v.to(dtype) for v in vectors]
    bn = ops.bn_from_running(*vectors, 1e-3)
    expected = reference.bn_from_running(*(v if v is None else v.double() for v in vectors), 1e-3)
    assert bn.dtype == torch.float32
    torch.testing.assert_close(bn.double(), expected, rtol=1e-6, atol=1e-6)
