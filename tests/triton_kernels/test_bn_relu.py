"""BatchNorm + ReLU in Triton, against the reference in float64."""

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
from mobilenet_ext.triton.bn_relu import bn_relu_backward, bn_relu_forward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 32, 7, 7), (1, 24, 5, 9), (3, 1, 4, 4), (2, 3, 9, 5), (1, 200, 1, 1), (2, 40, 20, 31)]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a program, several programs, and tiles that end outside the matrix."""
    kernel = heuristics.config(num_warps=4, BLOCK_M=16, BLOCK_C=16)
    monkeypatch.setattr(heuristics, "bn_relu", lambda *_: ({"PROGRAMS": 3, "kernel": kernel},))


def check(shape: tuple[int, ...], dtype: torch.dtype, relu: bool, batch_stats: bool, mean: float = 0.0) -> None:
    y, bn, grad = activation(*shape, dtype=dtype), random_bn(shape[1], dtype), activation(*shape, dtype=dtype)
    if mean:
        y, bn[0] = y + mean, bn[0] + mean
    out = bn_relu_forward(y, bn, relu)
    assert out.dtype == dtype and is_channels_last_dense(out)
    assert_close(out, *in_float64(reference.bn_relu_forward, (y, bn, relu)), TOLERANCE[dtype])
    h, grad_bn = bn_relu_backward(grad, y, bn, batch_stats, relu)
    expected_h, expected_bn = in_float64(reference.bn_relu_backward, (grad, y, bn, batch_stats, relu))
    assert torch.equal(h.double(), expected_h) and is_channels_last_dense(h)
    for row in range(6):
        assert_close(grad_bn[row], expected_bn[row], ACC_TOLERANCE[dtype], str(row))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("relu", "batch_stats"), [(True, True), (False, True), (True, False)])
def test_bn_relu(shape: tuple[int, ...], dtype: torch.dtype, relu: bool, batch_stats: bool) -> None:
    check(shape, dtype, relu, batch_stats)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 7, 9), (3, 3, 6, 6)], ids=str)
def test_several_tiles(shape: tuple[int, ...], dtype: torch.dtype, small_blocks: None) -> None:
    check(shape, dtype, True, True)


def test_large_mean(small_blocks: None) -> None:
    check((2, 24, 8, 8), torch.float32, True, True, mean=1e4)


@pytest.mark.parametrize("config", heuristics.bn_relu(1000, 40, 2, 132), ids=str)
def test_every_candidate(config: heuristics.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "bn_relu", lambda *_: (config,))
    check((2, 40, 20, 25), torch.bfloat16, True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf(dtype: torch.dtype) -> None:
    y, bn, grad = activation(1, 16, 3, 3, dtype=dtype), random_bn(16, dtype), activation(1, 16, 3, 3, dtype=dtype)
    y[0, :, 0, 0] = float("nan")
    y[0, :, 1, 1] = float("inf")
    y[0, :, 2, 2] = -float("inf")
    grad[0, 3, 0, 1] = float("inf")
    assert_same_specials(bn_relu_forward(y, bn, True), *in_float64(reference.bn_relu_forward, (y, bn, True)))
    expected = in_float64(reference.bn_relu_backward, (grad, y, bn, True, True))
    for ours, theirs in zip(bn_relu_backward(grad, y, bn, True, True), expected, strict=True):
        assert_same_specials(ours, theirs)


def test_empty_batch() -> None:
    y, bn = activation(0, 8, 4, 4, dtype=torch.float32), random_bn(8, torch.float32)
    assert bn_relu_forward(y, bn, True).shape == y.shape
    h, grad_bn = bn_relu_backward(y, y, bn, True, True)
    assert h.shape == y.shape and torch.equal(grad_bn, reference.bn_relu_backward(y, y, bn, True, True)[1])
