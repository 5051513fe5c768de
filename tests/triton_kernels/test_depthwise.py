"""Depthwise convolution in Triton, forward, inference and backward, against the reference in float64."""

from __future__ import annotations

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
    overflowing,
    random_bn,
    random_grad_bn,
)

from mobilenet_ext.backends import reference
from mobilenet_ext.triton import heuristics
from mobilenet_ext.triton.depthwise_backward import depthwise_backward
from mobilenet_ext.triton.depthwise_forward import depthwise_forward, depthwise_inference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(1, (1, 9, 3)), (3, (2, 5, 7)), (8, (5, 1, 1)), (24, (3, 4, 4)), (40, (1, 5, 6))]  # channels, N, H and W
GEOMETRIES = list(product([1, 2], [0, 1]))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a program, several programs, several chunks of rows and blocks of channels."""
    tile = heuristics.config(num_warps=1, BLOCK_P=4, BLOCK_C=16)
    monkeypatch.setattr(heuristics, "depthwise_forward", lambda *_: (tile,))
    monkeypatch.setattr(heuristics, "depthwise_backward", lambda *_: (tile,))
    monkeypatch.setattr(heuristics, "depthwise_grid", lambda *_: (2, 3))


def fits(size: tuple[int, int, int], padding: int) -> bool:
    return min(size[1:]) + 2 * padding >= 3


def check_forward(dtype, channels, size, stride, padding, *, normalise=True, affine=True) -> None:
    n, h, w = size
    u = activation(n, channels, h, w, dtype=dtype)
    bn = random_bn(channels, dtype) if normalise else None
    weight = torch.randn(channels, 1, 3, 3).to(dtype)
    gamma, beta = (torch.rand(channels) + 0.5, torch.randn(channels)) if affine else (None, None)
    args = (u, bn, weight, stride, padding, gamma, beta, 1e-5, True)
    y, bn_y = depthwise_forward(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, in_float64(reference.depthwise_forward, args)[0], TOLERANCE[dtype], "y")
    of_stored = reference._batch_bn(y.double(), *(v if v is None else v.double() for v in (gamma, beta)), 1e-5)
    if y.numel() > channels:  # the statistics of single values are rounding errors
        for row, name in enumerate(["MEAN", "SCALE", "SHIFT", "RSTD", "VAR"]):
            assert_close(bn_y[row], of_stored[row], ACC_TOLERANCE[dtype], name)
    again, without = depthwise_forward(*args[:-1], False)
    assert torch.equal(again, y) and without.shape == (0,) and without.dtype == torch.float32


@pytest.mark.parametrize("stride, padding", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype, stride, padding):
    for channels, size in CASES:
        if fits(size, padding):
            check_forward(dtype, channels, size, stride, padding)


@pytest.mark.parametrize("stride, padding", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_forward_over_several_tiles(dtype, stride, padding):
    check_forward(dtype, 24, (5, 6, 5), stride, padding)


def test_forward_without_optional_arguments():
    check_forward(torch.float32, 8, (2, 5, 5), 1, 1, normalise=False, affine=False)


def test_statistics_survive_a_large_mean(monkeypatch):
    monkeypatch.setattr(heuristics, "depthwise_grid", lambda *_: (300, 1))
    u = activation(1, 8, 300, 2, dtype=torch.float32) + 1e4
    weight = torch.zeros(8, 1, 3, 3)
    weight[:, :, 1, 1] = 1.0
    y, bn = depthwise_forward(u, None, weight, 1, 1, None, None, 1e-5, True)
    assert torch.equal(y, u)
    assert_close(bn[reference.BN_VAR], u.double().var((0, 2, 3), correction=0), 1e-5)


def test_statistics_survive_an_outlier_in_front(monkeypatch):
    """Of a lane with many values the first may be unlike all others, so that differences from it say little of them."""
    monkeypatch.setattr(heuristics, "depthwise_grid", lambda *_: (300, 1))
    u = activation(1, 8, 300, 2, dtype=torch.float32)
    u[:, :, 0] = 1e4
    weight = torch.zeros(8, 1, 3, 3)
    weight[:, :, 1, 1] = 1.0
    _, bn = depthwise_forward(u, None, weight, 1, 1, None, None, 1e-5, True)
    assert_close(bn[reference.BN_VAR], u.double().var((0, 2, 3), correction=0), 1e-6)


def test_a_column_outside_the_image_may_overflow():
    """With an odd width the last lane's second column is computed, but is no output and no part of the statistics."""
    u = torch.full((2, 8, 3, 1), 300.0).half().contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 1, 3, 3).half()
    weight[:, :, 1, 0], weight[:, :, 1, 1] = 300.0, 1.0
    args = (u, None, weight, 1, 1, None, None, 1e-5, True)
    y, bn = depthwise_forward(*args)
    expected_y, expected_bn = in_float64(reference.depthwise_forward, args)
    assert torch.equal(y.double(), expected_y)
    assert torch.equal(bn[:1].double(), expected_bn[:1]) and not bn[reference.BN_VAR].any()


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("images, channels, height, width", [(9400, 64, 112, 112), (1, 8, 1, 4_400_000)])
def test_a_grid_that_cuda_allows(images, channels, height, width, stats):
    tile = [heuristics.depthwise_forward(channels, 4)[0][name] for name in ("BLOCK_P", "BLOCK_C")]
    _, programs = heuristics.depthwise_grid(images, channels, height, (width + 1) // 2, 132, tuple(tile), stats)
    assert 0 < programs <= 65535


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference(dtype):
    for channels, (stride, padding), relu, with_bn in product([3, 24], GEOMETRIES, [False, True], [False, True]):
        x = activation(2, channels, 5, 6, dtype=dtype)
        bn = random_bn(channels, dtype) if with_bn else None
        args = (x, bn, torch.randn(channels, 1, 3, 3).to(dtype), stride, padding, relu)
        out = depthwise_inference(*args)
        assert out.dtype == dtype and is_channels_last_dense(out)
        assert_close(out, in_float64(reference.depthwise_inference, args)[0], TOLERANCE[dtype])


def check_backward(dtype, channels, size, stride, padding, *, normalise=True, output="stats") -> None:
    n, h, w = size
    u = activation(n, channels, h, w, dtype=dtype)
    bn_u = random_bn(channels, dtype) if normalise else None
    out = [(side + 2 * padding - 3) // stride + 1 for side in (h, w)]
    grad = activation(n, channels, *out, dtype=dtype)
    y = activation(n, channels, *out, dtype=dtype) if output == "stats" else None
    grad_bn = None if output == "plain" else random_grad_bn(channels, dtype)
    weight = torch.randn(channels, 1, 3, 3).to(dtype)
    args = (grad, y, grad_bn, u, bn_u, True, weight, stride, padding)

    h_u, grad_weight, grad_bn_u = depthwise_backward(*args, True, True)
    expected_h, expected_weight, _ = in_float64(reference.depthwise_backward, (*args, True, True))
    assert h_u.dtype == dtype and is_channels_last_dense(h_u) and grad_weight.dtype == torch.float32
    assert_close(h_u, expected_h, TOLERANCE[dtype], "h_u")
    assert_close(grad_weight, expected_weight, ACC_TOLERANCE[dtype], "grad_weight")
    if normalise:
        of_stored = reference._make_grad_bn(h_u.double(), u.double(), bn_u.double(), True)
        for row, name in enumerate(["P", "Q", "MEAN", "O", "GAMMA", "BETA"]):
            assert_close(grad_bn_u[row], of_stored[row], ACC_TOLERANCE[dtype], name)
    else:
        assert grad_bn_u.shape == (0,)

    only_weight = depthwise_backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[2].shape == (0,)
    assert_close(only_weight[1], grad_weight.double(), ACC_TOLERANCE[dtype])
    only_input = depthwise_backward(*args, True, False)
    assert torch.equal(only_input[0], h_u) and only_input[1].shape == (0,)
    assert_close(only_input[2], grad_bn_u.double(), ACC_TOLERANCE[dtype])


@pytest.mark.parametrize("stride, padding", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype, stride, padding):
    for channels, size in CASES:
        if fits(size, padding):
            check_backward(dtype, channels, size, stride, padding)


@pytest.mark.parametrize("stride, padding", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_backward_over_several_tiles(dtype, stride, padding):
    check_backward(dtype, 24, (5, 6, 5), stride, padding)


@pytest.mark.parametrize("output", ["plain", "scaled", "stats"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_backward_with_optional_arguments(stride, normalise, output):
    check_backward(torch.float32, 8, (2, 5, 6), stride, 1, normalise=normalise, output=output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_specials_go_where_the_reference_sends_them(dtype, stride):
    """Away from the border, where PyTorch's own kernels differ in whether they multiply the padding."""
    u = activation(2, 8, 9, 9, dtype=dtype)
    u[0, 1, 4, 4], u[0, 2, 4, 4], u[1, 3, 4, 4] = float("nan"), float("inf"), -float("inf")
    bn = random_bn(8, dtype)
    weight = torch.rand(8, 1, 3, 3).to(dtype) + 0.5
    args = (u, bn, weight, stride, 1, None, None, 1e-5, True)
    y, _ = depthwise_forward(*args)
    assert_same_specials(y, in_float64(reference.depthwise_forward, args)[0])
    assert y.isnan().any() and y.isinf().any()

    out = (9 - 1) // stride + 1
    grad = activation(2, 8, out, out, dtype=dtype)
    grad[1, 5, out // 2, out // 2] = float("nan")
    args = (grad, None, random_grad_bn(8, dtype), u, bn, False, weight, stride, 1, True, True)
    h_u, grad_weight, grad_bn = depthwise_backward(*args)
    expected = in_float64(reference.depthwise_backward, args)
    assert_same_specials(h_u, expected[0])
    assert torch.equal(grad_weight.isfinite(), expected[1].isfinite())
    assert torch.equal(grad_bn.isfinite(), expected[2].isfinite())


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_an_input_that_no_output_sees_reaches_no_gradient(special):
    u = activation(1, 8, 6, 6, dtype=torch.float32)
    u[:, :, 5] = u[:, :, :, 5] = special
    grad = activation(1, 8, 2, 2, dtype=torch.float32)
    args = (grad, None, None, u, None, False, torch.randn(8, 1, 3, 3), 2, 0, True, True)
    h_u, grad_weight, _ = depthwise_backward(*args)
    expected = in_float64(reference.depthwise_backward, args)
    assert_close(h_u, expected[0], TOLERANCE[torch.float32])
    assert_close(grad_weight, expected[1], ACC_TOLERANCE[torch.float32])


def test_nan_passes_the_gradient():
    u = torch.full((1, 8, 3, 3), float("nan")).contiguous(memory_format=torch.channels_last)
    grad = torch.ones(1, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    h_u, _, _ = depthwise_backward(
        grad, None, None, u, random_bn(8, u.dtype), False, torch.ones(8, 1, 3, 3), 1, 1, True, False
    )
    assert torch.equal(h_u[0, 0], torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]]))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", ["depthwise_forward", "depthwise_backward"])
def test_all_candidates_agree(monkeypatch, op, stride):
    candidates = getattr(heuristics, op)(24, 2)
    assert len({str(candidate) for candidate in candidates}) == len(candidates) > 1
    for candidate in candidates:
        monkeypatch.setattr(heuristics, op, lambda *_, candidate=candidate: (candidate,))
        check = check_forward if op == "depthwise_forward" else check_backward
        check(torch.bfloat16, 24, (2, 7, 5), stride, 1)


def test_an_empty_batch():
    u = torch.empty(0, 8, 5, 5).to(memory_format=torch.channels_last)
    weight = torch.ones(8, 1, 3, 3)
    y, bn = depthwise_forward(u, None, weight, 1, 1, None, None, 1e-5, True)
    assert y.shape == (0, 8, 5, 5)
    torch.testing.assert_close(bn, reference.depthwise_forward(u, None, weight, 1, 1, None, None, 1e-5, True)[1])
    h_u, grad_weight, _ = depthwise_backward(y, None, None, u, None, False, weight, 1, 1, True, True)
    assert h_u.shape == u.shape and torch.equal(grad_weight, torch.zeros_like(weight))


def test_squares_that_overflow():
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("depthwise", 8, torch.float32)
    y, bn = depthwise_forward(u, None, weight, 1, 1, None, None, 1e-5, True)
    check_overflowed(bn, y)
