"""The stem's convolution in Triton, forward, inference and backward, against the reference in float64."""

from __future__ import annotations

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
    overflowing,
    random_bn,
    random_grad_bn,
    relative_error,
    same_bits,
)
from torch import Tensor

from mobilenet_ext.backends import reference
from mobilenet_ext.triton import heuristics
from mobilenet_ext.triton.stem_backward import stem_backward
from mobilenet_ext.triton.stem_forward import stem_forward, stem_inference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (n, channels, filters, h, w, stride, padding)
SHAPES = [
    (2, 3, 32, 9, 11, 2, 1),
    (1, 3, 8, 9, 7, 1, 0),
    (2, 1, 24, 6, 8, 1, 1),
    (1, 4, 3, 10, 8, 2, 0),
    (1, 16, 40, 4, 5, 1, 1),
    (3, 3, 16, 1, 1, 2, 1),
    (1, 2, 1, 3, 3, 1, 0),
]
TILED = (2, 3, 24, 13, 11, 2, 1)
# Every shape in float32 and in one of the 16-bit dtypes, which differ in no more than the conversions.
CASES = [(shape, dtype) for i, shape in enumerate(SHAPES) for dtype in (DTYPES[0], DTYPES[1 + i % 2])]


def out_sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    *_, h, w, stride, padding = shape
    return (h + 2 * padding - 3) // stride + 1, (w + 2 * padding - 3) // stride + 1


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bn, and for the backward h, y, grad_bn_y."""
    n, c, filters, h, w, _, _ = shape
    weight = (torch.randn(filters, c, 3, 3, dtype=torch.float64) / (9 * c) ** 0.5).to(dtype)
    out = (n, filters, *out_sizes(shape))
    return (
        activation(n, c, h, w, dtype=dtype),
        weight,
        random_bn(filters, dtype),
        activation(*out, dtype=dtype),
        activation(*out, dtype=dtype),
        random_grad_bn(filters, dtype),
    )


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a program, several programs, tiles that end outside the image, several blocks of every axis."""
    forward = heuristics.config(num_warps=4, BLOCK_H=4, BLOCK_W=4, BLOCK_N=16, BLOCK_K=16)
    monkeypatch.setattr(heuristics, "stem", lambda *_: ({"PROGRAMS": 4, "kernel": forward},))
    monkeypatch.setattr(heuristics, "stem_weight_gradient", lambda *_: ({"PROGRAMS": 4, "kernel": forward},))
    backward = heuristics.config(num_warps=4, BLOCK_H=8, BLOCK_W=8, BLOCK_C=16, BLOCK_N=16)
    monkeypatch.setattr(heuristics, "stem_input_gradient", lambda *_: backward)


def check_forward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bn, *_ = inputs(shape, dtype)
    gamma, beta = bn[1], bn[2]
    args = (x, weight, *shape[5:], gamma, beta, 1e-5, True)
    y, bn_y = stem_forward(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, in_float64(reference.stem_forward, args)[0], TOLERANCE[dtype], "y")
    of_stored = reference._batch_bn(y.double(), gamma.double(), beta.double(), 1e-5)
    for row, name in enumerate(["mean", "scale", "shift", "rstd", "var"]):
        assert_close(bn_y[row], of_stored[row], ACC_TOLERANCE[dtype], name)


def check_backward(shape: tuple[int, ...], dtype: torch.dtype, with_y: bool = True, with_bn: bool = True) -> None:
    x, weight, _, h, y, grad_bn_y = inputs(shape, dtype)
    args = (h, y if with_y else None, grad_bn_y if with_bn else None, x, weight, *shape[5:])
    grad_x, grad_weight = stem_backward(*args, True, True)
    # The operands of the products are rounded to the activations' dtype; float32 products are exact to their order.
    dy = reference._conv_output_grad(h.double(), *(None if t is None else t.double() for t in args[1:3]))
    exact = in_float64(reference.stem_backward, (dy.to(dtype), None, None, *args[3:], True, True))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 2e-4}[dtype]
    assert grad_x.dtype == dtype and is_channels_last_dense(grad_x)
    assert_close(grad_x, exact[0], TOLERANCE[dtype], "grad_x")
    assert grad_weight.dtype == torch.float32 and grad_weight.is_contiguous()
    assert_close(grad_weight, exact[1], tolerance if with_bn else ACC_TOLERANCE[dtype], "grad_weight")
    if shape == TILED:
        return
    only_weight = stem_backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[0].dtype == dtype and same_bits(only_weight[1], grad_weight)
    only_input = stem_backward(*args, True, False)
    assert same_bits(only_input[0], grad_x) and only_input[1].shape == (0,)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_forward(shape, dtype)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_backward(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("with_y", "with_bn"), [(False, True), (True, False), (False, False)])
def test_backward_without_batch_statistics(dtype: torch.dtype, with_y: bool, with_bn: bool) -> None:
    check_backward((1, 3, 8, 9, 8, 2, 1), dtype, with_y, with_bn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    check_forward(TILED, dtype)
    check_backward(TILED, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("with_bn", "relu"), [(True, True), (True, False), (False, True), (False, False)])
def test_inference(dtype: torch.dtype, with_bn: bool, relu: bool) -> None:
    x, weight, bn, *_ = inputs(TILED, dtype)
    args = (x, bn if with_bn else None, weight, 2, 1, relu)
    y = stem_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, *in_float64(reference.stem_inference, args), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_candidate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _, channels, filters, *_ = TILED
    problem = (2, *out_sizes(TILED), channels, filters, dtype.itemsize, 132)
    for op, check in (("stem", check_forward), ("stem_weight_gradient", check_backward)):
        candidates = getattr(heuristics, op)(*problem)
        for config in candidates[1:]:
            monkeypatch.setattr(heuristics, op, lambda *_, config=config: (config,))
            check(TILED, dtype)


def test_no_statistics_and_no_affine() -> None:
    x, weight, *_ = inputs(TILED, torch.float32)
    y, bn = stem_forward(x, weight, 2, 1, None, None, 1e-3, True)
    plain, empty = stem_forward(x, weight, 2, 1, None, None, 1e-3, False)
    assert same_bits(y, plain) and empty.shape == (0,) and empty.dtype == torch.float32
    assert_close(bn, reference._batch_bn(y.double(), None, None, 1e-3), 1e-5)


def test_statistics_survive_a_large_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    x = activation(2, 8, 13, 11, dtype=torch.float32, mean=1e4)
    weight = torch.zeros(8, 8, 3, 3)
    weight[range(8), range(8), 1, 1] = 1  # copies the input
    y, bn = stem_forward(x, weight, 1, 1, None, None, 1e-5, True)
    assert torch.equal(y, x)
    assert relative_error(bn[0], x.double().mean((0, 2, 3))) < 1e-7
    assert relative_error(bn[4], x.double().var((0, 2, 3), correction=0)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, 0)])
def test_nan_and_inf(dtype: torch.dtype, stride: int, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    shape = (1, 3, 8, 10, 8, stride, padding)
    x, weight, bn, h, y, grad_bn_y = inputs(shape, dtype)
    x[0, 0, 0, 0], x[0, 1, 7, 6], x[0, 2, 9, 7] = float("nan"), float("inf"), float("nan")
    h[0, 1, 0, 0], h[0, 2, 2, 2] = float("nan"), float("inf")
    calls: list[tuple[Any, Any, tuple[Any, ...]]] = [
        (stem_forward, reference.stem_forward, (x, weight, stride, padding, None, None, 1e-5, False)),
        (stem_inference, reference.stem_inference, (x, bn, weight, stride, padding, True)),
    ]
    for ours, theirs, args in calls:
        actual, expected = ours(*args), theirs(*args)
        if isinstance(actual, tuple):
            actual, expected = actual[0], expected[0]
        assert_same_specials(actual, expected.double())
    args = (h, y, grad_bn_y, x, weight, stride, padding, True, True)
    for actual, expected in zip(stem_backward(*args), reference.stem_backward(*args), strict=True):
        assert torch.equal(torch.isfinite(actual), torch.isfinite(expected))


def test_same_bits_again() -> None:
    x, weight, bn, h, y, grad_bn_y = inputs(TILED, torch.bfloat16)
    for op, args in (
        (stem_forward, (x, weight, 2, 1, bn[1], bn[2], 1e-5, True)),
        (stem_backward, (h, y, grad_bn_y, x, weight, 2, 1, True, True)),
    ):
        assert all(same_bits(a, b) for a, b in zip(op(*args), op(*args), strict=True))


def test_empty_batch() -> None:
    x, weight, bn, h, y, grad_bn_y = inputs((0, 3, 8, 9, 9, 2, 1), torch.float32)
    out, bn_y = stem_forward(x, weight, 2, 1, None, None, 1e-5, True)
    assert out.shape == (0, 8, 5, 5) and not bn_y[[0, 2, 4]].any()
    assert stem_inference(x, bn, weight, 2, 1, True).shape == out.shape
    grad_x, grad_weight = stem_backward(h, y, grad_bn_y, x, weight, 2, 1, True, True)
    assert grad_x.shape == x.shape and grad_weight.shape == weight.shape and not grad_weight.any()


def test_squares_that_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("stem", 8, torch.float32)
    y, bn = stem_forward(u, weight, 1, 1, None, None, 1e-5, True)
    check_overflowed(bn, y)
