"""The C++ CPU kernels made of matrix products (pointwise, stem, fused block), against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_ops import (
    ACC_TOLERANCE,
    DTYPES,
    TOLERANCE,
    activation,
    as_double,
    assert_close,
    assert_same_specials,
    cases,
    check_conv_backward,
    expected_backward,
    in_float64,
    is_channels_last_dense,
    ops,
    random_bn,
    random_grad_bn,
    relative_error,
    rounds_operands,
    same_bits,
    weight_tolerance,
    with_threads,
)
from torch import Tensor

from mobilenet_ext.backends import reference

# (n, c_in, h, w, c_out). Channel counts of 1, 3, 17 and 33 end in one lane of a vector, 40 and 72 in half a vector;
# 49 rows are one tile, 196 two that are built together, 4608 several; weights of 330 x 410 and above send the backward
# pass through stretches of rows, and the 2 x 40 x 41 rows here are several stretches.
each_pointwise = cases(
    [(3, 33, 9, 11, 17), (1, 40, 7, 7, 72), (1, 24, 14, 14, 520)],
    (2, 1, 5, 7, 1),
    (2, 64, 48, 48, 32),
    (9, 3, 1, 1, 5),
    (1, 520, 7, 7, 300),
    (2, 330, 40, 41, 410),
    (0, 16, 7, 7, 24),
    (0, 400, 7, 7, 400),
)
# (n, c_in, h, w, c_out, stride, padding)
each_stem = cases(
    [(2, 3, 33, 32, 32, 2, 1), (3, 1, 9, 11, 5, 1, 0), (2, 4, 12, 9, 17, 2, 0), (1, 40, 13, 12, 33, 2, 1)],
    (2, 3, 32, 33, 8, 1, 1),
    (9, 3, 1, 1, 32, 2, 1),
    (1, 2, 3, 130, 6, 1, 1),
    (0, 3, 8, 8, 16, 2, 1),
)
# (n, c, h, w, c_out, stride)
each_block = cases(
    [(2, 32, 28, 28, 64, 1), (2, 32, 28, 28, 64, 2), (3, 33, 9, 11, 17, 1), (1, 3, 8, 7, 5, 2)],
    (9, 16, 1, 1, 8, 2),
    (3, 16, 2, 3, 8, 1),
    (1, 520, 7, 7, 300, 1),
    (0, 16, 7, 7, 8, 1),
)


def pointwise_inputs(
    shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u, bn_u, weight, and for the backward h, y, grad_bn_y."""
    n, c_in, h, w, c_out = shape
    weight = torch.randn(c_out, c_in, 1, 1, dtype=torch.float64) / c_in**0.5
    gradients = [activation(n, c_out, h, w, dtype=dtype) for _ in range(2)]
    bn_u, grad_bn_y = random_bn(c_in, dtype), random_grad_bn(c_out, dtype)
    return activation(n, c_in, h, w, dtype=dtype), bn_u, weight.to(dtype), *gradients, grad_bn_y


def stem_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, and for the backward h, y, grad_bn_y."""
    n, c_in, h, w, c_out, stride, padding = shape
    out = ((h + 2 * padding - 3) // stride + 1, (w + 2 * padding - 3) // stride + 1)
    weight = torch.randn(c_out, c_in, 3, 3, dtype=torch.float64) / (9 * c_in) ** 0.5
    gradients = [activation(n, c_out, *out, dtype=dtype) for _ in range(2)]
    return activation(n, c_in, h, w, dtype=dtype), weight.to(dtype), *gradients, random_grad_bn(c_out, dtype)


def assert_statistics(bn_y: Tensor, y: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> None:
    """bn_y is the normalisation by the statistics of y as stored."""
    of_stored = reference._batch_bn(y.double(), *(v if v is None else v.double() for v in (gamma, beta)), eps)
    assert bn_y.dtype == reference.acc_dtype(y.dtype)
    for row, name in enumerate(["mean", "scale", "shift", "rstd", "var"]):
        assert_close(bn_y[row], of_stored[row], ACC_TOLERANCE[y.dtype], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_pointwise
@pytest.mark.parametrize("normalised", [True, False])
def test_pointwise_forward(shape: tuple[int, ...], dtype: torch.dtype, normalised: bool) -> None:
    u, bn_u, weight, _, _, grad_bn_y = pointwise_inputs(shape, dtype)
    gamma, beta = (grad_bn_y[0], grad_bn_y[1]) if normalised else (None, None)
    args = (u, bn_u if normalised else None, weight, gamma, beta, 1e-5)
    y, bn_y = ops.pointwise_forward(*args, True)
    assert y.dtype == dtype and is_channels_last_dense(y)
    exact = (*args, True)
    if rounds_operands(dtype):
        a = reference._activation(u.double(), as_double(args[1])).to(dtype)
        exact = (a, None, *args[2:], True)
    assert_close(y, in_float64(reference.pointwise_forward, exact)[0], TOLERANCE[dtype], "y")
    assert_statistics(bn_y, y, gamma, beta, 1e-5)
    plain, empty = ops.pointwise_forward(*args, False)
    assert same_bits(y, plain) and empty.shape == (0,) and empty.dtype == bn_y.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_pointwise
@pytest.mark.parametrize(
    ("normalised", "with_grad_bn", "with_y", "batch_stats"),
    [(True, True, True, True), (True, True, False, False), (True, False, False, True), (False, True, True, False)],
)
def test_pointwise_backward(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    normalised: bool,
    with_grad_bn: bool,
    with_y: bool,
    batch_stats: bool,
) -> None:
    u, bn_u, weight, h, y, grad_bn_y = pointwise_inputs(shape, dtype)
    output = (h, y if with_y else None, grad_bn_y if with_grad_bn else None)
    source = (u, bn_u if normalised else None, batch_stats, weight)
    check_conv_backward("pointwise_backward", output, source)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", range(1, 30))
def test_every_number_of_rows_and_columns_that_ends_a_tile(count: int, dtype: torch.dtype) -> None:
    u, bn_u, weight, h, y, grad_bn_y = pointwise_inputs((1, 5, 1, count, count), dtype)
    args = (u, None, weight, None, None, 1e-5, False)
    assert_close(
        ops.pointwise_forward(*args)[0], in_float64(reference.pointwise_forward, args)[0], TOLERANCE[dtype], "y"
    )
    check_conv_backward("pointwise_backward", (h, y, grad_bn_y), (u, bn_u, True, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_pointwise
@pytest.mark.parametrize(("with_bn", "relu"), [(True, True), (True, False), (False, True), (False, False)])
def test_pointwise_inference(shape: tuple[int, ...], dtype: torch.dtype, with_bn: bool, relu: bool) -> None:
    x, _, weight, *_ = pointwise_inputs(shape, dtype)
    args = (x, random_bn(shape[4], dtype) if with_bn else None, weight, relu)
    y = ops.pointwise_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, *in_float64(reference.pointwise_inference, args), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_stem
def test_stem(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, h, y_before, grad_bn_y = stem_inputs(shape, dtype)
    gamma, beta = grad_bn_y[0], grad_bn_y[1]
    args = (x, weight, *shape[5:], gamma, beta, 1e-3, True)
    y, bn_y = ops.stem_forward(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, in_float64(reference.stem_forward, args)[0], TOLERANCE[dtype], "y")
    assert_statistics(bn_y, y, gamma, beta, 1e-3)

    for normalised in (True, False):
        before = (h, y_before, grad_bn_y) if normalised else (h, None, None)
        backward = (*before, x, weight, *shape[5:])
        grad_x, grad_weight = ops.stem_backward(*backward, True, True)
        expected_x, expected_weight = expected_backward("stem_backward", (*backward, True, True))
        assert grad_x.dtype == dtype and is_channels_last_dense(grad_x)
        assert_close(grad_x, expected_x, TOLERANCE[dtype], "grad_x")
        assert_close(grad_weight, expected_weight, weight_tolerance(dtype), "grad_weight")
        no_input, only_weight = ops.stem_backward(*backward, False, True)
        assert no_input.shape == (0,) and same_bits(only_weight, grad_weight)
        only_input, no_weight = ops.stem_backward(*backward, True, False)
        assert no_weight.shape == (0,) and same_bits(only_input, grad_x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_stem
@pytest.mark.parametrize(("with_bn", "relu"), [(True, True), (True, False), (False, True), (False, False)])
def test_stem_inference(shape: tuple[int, ...], dtype: torch.dtype, with_bn: bool, relu: bool) -> None:
    x, weight, *_ = stem_inputs(shape, dtype)
    args = (x, random_bn(shape[4], dtype) if with_bn else None, weight, *shape[5:], relu)
    assert_close(ops.stem_inference(*args), *in_float64(reference.stem_inference, args), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_block
def test_block_inference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, c, h, w, c_out, stride = shape
    x, depthwise_bn, pointwise_bn = activation(n, c, h, w, dtype=dtype), random_bn(c, dtype), random_bn(c_out, dtype)
    depthwise_weight = torch.randn(c, 1, 3, 3, dtype=torch.float64).to(dtype)
    pointwise_weight = (torch.randn(c_out, c, 1, 1, dtype=torch.float64) / c**0.5).to(dtype)
    args = (x, depthwise_bn, depthwise_weight, stride, pointwise_bn, pointwise_weight)
    y = ops.block_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    if rounds_operands(dtype):
        inside = reference._inference(x.double(), depthwise_bn.double(), depthwise_weight.double(), stride, 1, c, True)
        exact = (inside.to(dtype), pointwise_bn, pointwise_weight, True)
        assert_close(y, *in_float64(reference.pointwise_inference, exact), TOLERANCE[dtype])
    else:
        assert_close(y, *in_float64(reference.block_inference, args), TOLERANCE[dtype])


@pytest.mark.cover
@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_statistics_survive_a_large_mean(mean: float) -> None:
    # The identity as weight copies the input, so the statistics are those of the input.
    u = activation(4, 40, 56, 60, dtype=torch.float32, mean=mean)
    y, bn_y = ops.pointwise_forward(u, None, torch.eye(40).view(40, 40, 1, 1), None, None, 1e-5, True)
    assert torch.equal(y, u)
    exact = u.double().var((0, 2, 3), correction=0)
    module = torch.nn.BatchNorm2d(40, momentum=1.0)
    module(u)
    theirs = relative_error(module.running_var * (1 - 1 / (u.numel() // 40)), exact)
    assert relative_error(bn_y[4], exact) <= max(theirs, 1e-6)


@pytest.mark.cover
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["u", "h", "y", "weight", "bn_u"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pointwise_nan_and_inf(dtype: torch.dtype, where: str, value: float) -> None:
    u, bn_u, weight, h, y, grad_bn_y = pointwise_inputs((2, 33, 7, 9, 40), dtype)
    {"u": u[1, 3, 2], "h": h[0, 5, 6], "y": y[1, 39, 0], "weight": weight[7, 32], "bn_u": bn_u[1]}[where][0] = value
    args = (u, bn_u, weight, None, None, 1e-5, True)
    ours, bn_y = ops.pointwise_forward(*args)
    theirs, their_bn = reference.pointwise_forward(*args)
    assert_same_specials(ours, theirs.double())
    assert torch.equal(torch.isfinite(bn_y), torch.isfinite(their_bn))
    args = (h, y, grad_bn_y, u, bn_u, True, weight, True, True)
    for actual, expected in zip(ops.pointwise_backward(*args), reference.pointwise_backward(*args), strict=True):
        assert_same_specials(actual, expected.double())


@pytest.mark.cover
@pytest.mark.parametrize("where", ["x", "h", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stem_nan_and_inf(where: str, value: float) -> None:
    x, weight, h, y, grad_bn_y = stem_inputs((2, 3, 9, 8, 17, 2, 1), torch.float32)
    # Corners: what lies outside the image is multiplied as 0, forward and in the gradient of the weight, as in PyTorch
    # with float64. In float32, whether PyTorch does so depends on the shape.
    {"x": x[1, 2, 0], "h": h[0, 5, 0], "weight": weight[7, 1, 0]}[where][0] = value
    args = (x, weight, 2, 1, None, None, 1e-5, True)
    assert_same_specials(ops.stem_forward(*args)[0], in_float64(reference.stem_forward, args)[0])
    args = (h, y, grad_bn_y, x, weight, 2, 1, True, True)
    for actual, expected in zip(ops.stem_backward(*args), in_float64(reference.stem_backward, args), strict=True):
        assert_same_specials(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases([(1, 300, 7, 7, 520)], (3, 40, 57, 60, 72), (2, 330, 20, 41, 410))
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    u, bn_u, weight, h, y, grad_bn_y = pointwise_inputs(shape, dtype)
    image, stem_weight, stem_h, stem_y, stem_grad_bn = stem_inputs((2, 3, 40, 40, 24, 2, 1), dtype)
    depthwise_weight = torch.randn(shape[1], 1, 3, 3).to(dtype)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.pointwise_forward, (u, bn_u, weight, None, None, 1e-5, True)),
        (ops.pointwise_backward, (h, y, grad_bn_y, u, bn_u, True, weight, True, True)),
        (ops.stem_forward, (image, stem_weight, 2, 1, None, None, 1e-5, True)),
        (ops.stem_backward, (stem_h, stem_y, stem_grad_bn, image, stem_weight, 2, 1, True, True)),
        (ops.block_inference, (u, bn_u, depthwise_weight, 1, random_bn(shape[4], dtype), weight)),
    ]
    for op, args in calls:
        first = with_threads(1, op, args)
        for threads in (1, 2, 5):
            again = with_threads(threads, op, args)
            assert all(same_bits(a, b) for a, b in zip(first, again, strict=True)), (op, threads)


def test_more_channels_than_fit_on_a_stack() -> None:
    x, bn_u, weight, *_ = pointwise_inputs((1, 20_000, 1, 2, 3), torch.float32)
    args = (x, bn_u, weight, None, None, 1e-5, False)
    assert_close(ops.pointwise_forward(*args)[0], in_float64(reference.pointwise_forward, args)[0], 1e-5)
    x, bn_u, weight, h, y, grad_bn_y = pointwise_inputs((1, 3, 1, 2, 20_000), torch.float32)
    args = (h, y, grad_bn_y, x, bn_u, True, weight, True, True)
    for actual, expected in zip(
        ops.pointwise_backward(*args), in_float64(reference.pointwise_backward, args), strict=True
    ):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [64, 96])
def test_outputs_past_the_cache(dtype, channels):
    """From 8 MiB on, outputs are written past the cache: the same bits as of each image alone."""
    images = 12 if dtype is torch.float32 else 24
    u = torch.randn(images, 32, 96, 96).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 32, 1, 1).to(dtype)
    h = torch.randn(images, channels, 96, 96).to(dtype).contiguous(memory_format=torch.channels_last)
    assert h.numel() * h.element_size() >= 16 << 20
    y = ops.pointwise_inference(u, None, weight, False)
    back = weight.transpose(0, 1).contiguous()  # [32, channels]: its input gradient is the large one
    h_u = ops.pointwise_backward(u, None, None, h, None, False, back, True, False)[0]
    for i in range(images):
        one = slice(i, i + 1)
        assert torch.equal(y[one], ops.pointwise_inference(u[one], None, weight, False))
        alone = ops.pointwise_backward(u[one], None, None, h[one], None, False, back, True, False)[0]
        assert torch.equal(h_u[one], alone)
