"""BatchNorm + ReLU + pooling in Triton, against the reference in float64."""

from __future__ import annotations

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
    random_bn,
)

from mobilenet_ext.backends import reference
from mobilenet_ext.triton import heuristics
from mobilenet_ext.triton.bn_relu_pool import bn_relu_pool_backward, bn_relu_pool_forward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 32, 7, 7), (1, 24, 5, 9), (3, 1, 4, 4), (2, 3, 9, 5), (1, 200, 1, 1), (2, 72, 10, 13)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles an image, several tiles a program, several programs."""
    kernel = heuristics.config(num_warps=4, BLOCK_M=16, BLOCK_C=16)
    monkeypatch.setattr(heuristics, "bn_relu_pool", lambda *_: ({"PROGRAMS": 3, "kernel": kernel},))


def check(shape: tuple[int, ...], dtype: torch.dtype, batch_stats: bool, mean: float = 0.0) -> None:
    y, bn, grad = activation(*shape, dtype=dtype), random_bn(shape[1], dtype), activation(*shape[:2], 1, 1, dtype=dtype)
    if mean:
        y, bn[0] = y + mean, bn[0] + mean
    out = bn_relu_pool_forward(y, bn)
    assert out.dtype == dtype and is_channels_last_dense(out)
    assert_close(out, *in_float64(reference.bn_relu_pool_forward, (y, bn)), TOLERANCE[dtype])
    h, grad_bn = bn_relu_pool_backward(grad, y, bn, batch_stats)
    expected_h, _ = in_float64(reference.bn_relu_pool_backward, (grad, y, bn, batch_stats))
    assert h.dtype == dtype and is_channels_last_dense(h)
    assert_close(h, expected_h, TOLERANCE[dtype])
    of_stored = reference._make_grad_bn(h.double(), y.double(), bn.double(), batch_stats)
    for row in range(6):
        assert_close(grad_bn[row], of_stored[row], ACC_TOLERANCE[dtype], str(row))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch_stats", [True, False])
def test_bn_relu_pool(shape: tuple[int, ...], dtype: torch.dtype, batch_stats: bool) -> None:
    check(shape, dtype, batch_stats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 40, 7, 7), (2, 3, 6, 6)], ids=str)
def test_several_tiles(shape: tuple[int, ...], dtype: torch.dtype, small_blocks: None) -> None:
    check(shape, dtype, True)


def test_large_mean(small_blocks: None) -> None:
    check((3, 24, 5, 5), torch.float32, True, mean=1e4)


@pytest.mark.parametrize("config", heuristics.bn_relu_pool(4, 49, 200, 2, 132), ids=str)
def test_every_candidate(config: heuristics.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "bn_relu_pool", lambda *_: (config,))
    check((4, 200, 7, 7), torch.bfloat16, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf(dtype: torch.dtype) -> None:
    y, bn, grad = activation(2, 16, 3, 3, dtype=dtype), random_bn(16, dtype), activation(2, 16, 1, 1, dtype=dtype)
    y[0, 1, 0, 0] = float("nan")
    y[0, 2, 1, 1] = float("inf")
    y[0, 3, 2, 2] = -float("inf")
    grad[0, 4], grad[0, 5] = float("inf"), float("nan")
    assert_same_specials(bn_relu_pool_forward(y, bn), *in_float64(reference.bn_relu_pool_forward, (y, bn)))
    expected = in_float64(reference.bn_relu_pool_backward, (grad, y, bn, True))
    for ours, theirs in zip(bn_relu_pool_backward(grad, y, bn, True), expected, strict=True):
        assert_same_specials(ours, theirs)


def test_empty_batch() -> None:
    y, bn = activation(0, 8, 4, 4, dtype=torch.float32), random_bn(8, torch.float32)
    grad = bn_relu_pool_forward(y, bn)
    assert grad.shape == (0, 8, 1, 1)
    h, grad_bn = bn_relu_pool_backward(grad, y, bn, True)
    assert h.shape == y.shape and torch.equal(grad_bn, reference.bn_relu_pool_backward(grad, y, bn, True)[1])
