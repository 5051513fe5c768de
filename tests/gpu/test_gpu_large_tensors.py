"""Tensors of more than 2^31 elements on a GPU. All but the end of each is zero, and so is what comes of it."""

from __future__ import annotations

import plain
import pytest
import torch
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.backends import reference
from mobilenet_ext.contract import BN_MEAN, BN_ROWS, BN_RSTD, BN_SCALE, BN_VAR, GRAD_GAMMA, NO_PADDING, Act

# One image of more than 2^31 elements, and a batch of small ones.
SHAPES = {"image": (1, 8, 16_400, 16_400), "batch": (170_000, 64, 14, 15)}
TAIL = 6  # rows of the last image that are not zero; even, and the height too, so that stride 2 meets them alike
NEEDED = 30 * 2**30
PADDING = (1, 1, 1, 1)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest, backend: str) -> tuple[int, ...]:
    if torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free GPU memory")
    return SHAPES[request.param]


def with_tail(shape: tuple[int, ...], device: str) -> Tensor:
    n, c, h, w = shape
    x = torch.zeros(n, h, w, c, dtype=torch.bfloat16, device=device).permute(0, 3, 1, 2)
    x[-1, :, -TAIL:] = torch.randn(c, TAIL, w)
    return x


def tail(x: Tensor, rows: int = TAIL) -> Tensor:
    """The rows that are not zero, in float64 on the CPU."""
    return x[-1:, :, -rows:].cpu().double()


def zero_keeping_bn(channels: int, device: str) -> Tensor:
    """A normalisation that leaves zero where it is."""
    bn = torch.zeros(BN_ROWS, channels)
    bn[[BN_SCALE, BN_RSTD, BN_VAR]] = torch.rand(3, channels) + 0.5
    return bn.to(device)


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    plain.assert_close(actual, expected, 1e-2, what)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(shape: tuple[int, ...], device: str, stride: int) -> None:
    x, channels = with_tail(shape, device), shape[1]
    assert x.numel() > 2**31
    weight = torch.randn(channels, 1, 3, 3).to(device, torch.bfloat16)
    bn = zero_keeping_bn(channels, device)
    y, bn_y = ops.depthwise_forward(x, bn, Act.RELU, weight, stride, PADDING, None, None, 1e-5, True)
    part, bn64, weight64 = tail(x), bn.cpu().double(), weight.cpu().double()
    expected, _ = reference.depthwise_forward(part, bn64, Act.RELU, weight64, stride, PADDING, None, None, 1e-5, False)
    check(tail(y, TAIL // stride), expected, "y")
    assert not y[:-1].any() and not y[-1, :, : -TAIL // stride - 1].any()
    check(bn_y[BN_MEAN], y.sum((0, 2, 3), dtype=torch.float64) / (y.numel() // channels), "mean")

    dz = with_tail(tuple(y.shape), device)
    dz[-1, :, : -TAIL // stride] = 0  # with stride 2 the same rows of the input
    dz_u, grad_weight, grad_bn = ops.depthwise_backward(
        dz, None, None, x, bn, Act.RELU, True, weight, stride, PADDING, True, True
    )
    expected, wanted_weight, wanted_bn = reference.depthwise_backward(
        tail(dz, TAIL // stride), None, None, part, bn64, Act.RELU, True, weight64, stride, PADDING, True, True
    )
    check(tail(dz_u), expected, "dz_u")
    check(grad_weight, wanted_weight, "grad_weight")
    check(grad_bn[GRAD_GAMMA:], wanted_bn[GRAD_GAMMA:], "grad_bn")
    del dz, y
    assert not dz_u[:-1].any()


def test_pointwise(shape: tuple[int, ...], device: str) -> None:
    x, channels = with_tail(shape, device), shape[1]
    weight = torch.randn(channels, channels, 1, 1).to(device, torch.bfloat16)
    bn = zero_keeping_bn(channels, device)
    y, bn_y = ops.pointwise_forward(x, bn, Act.RELU, weight, 1, 0, None, None, 1e-5, True)
    part, bn64, weight64 = tail(x), bn.cpu().double(), weight.cpu().double()
    expected, _ = reference.pointwise_forward(part, bn64, Act.RELU, weight64, 1, NO_PADDING, None, None, 1e-5, False)
    check(tail(y), expected, "y")
    assert not y[:-1].any() and not y[-1, :, :-TAIL].any()
    check(bn_y[BN_MEAN], y.sum((0, 2, 3), dtype=torch.float64) / (y.numel() // channels), "mean")
    del y

    dz = with_tail(shape, device)
    dz_u, grad_weight, grad_bn = ops.pointwise_backward(dz, None, None, x, bn, Act.RELU, True, weight, 1, 0, True, True)
    expected, wanted_weight, wanted_bn = reference.pointwise_backward(
        tail(dz), None, None, part, bn64, Act.RELU, True, weight64, 1, NO_PADDING, True, True
    )
    check(tail(dz_u), expected, "dz_u")
    check(grad_weight, wanted_weight, "grad_weight")
    check(grad_bn[GRAD_GAMMA:], wanted_bn[GRAD_GAMMA:], "grad_bn")


def test_norm_act(shape: tuple[int, ...], device: str) -> None:
    x = with_tail(shape, device)
    bn = zero_keeping_bn(shape[1], device)
    part, bn64 = tail(x), bn.cpu().double()
    expected = reference.norm_act_forward(part, bn64, Act.RELU, False)
    check(tail(ops.norm_act_forward(x, bn, Act.RELU, False)), expected, "output")
    grad = with_tail(shape, device)
    dz, grad_bn = ops.norm_act_backward(grad, x, bn, Act.RELU, True, False)
    expected, wanted_bn = reference.norm_act_backward(tail(grad), part, bn64, Act.RELU, True, False)
    check(tail(dz), expected, "dz")
    check(grad_bn[GRAD_GAMMA:], wanted_bn[GRAD_GAMMA:], "grad_bn")


def test_inference(shape: tuple[int, ...], device: str) -> None:
    x, channels = with_tail(shape, device), shape[1]
    depthwise, pointwise = (
        torch.randn(channels, *inner).to(device, torch.bfloat16) for inner in ((1, 3, 3), (channels, 1, 1))
    )
    bn = zero_keeping_bn(channels, device)
    part = tail(x)
    bn64, depthwise64, pointwise64 = (t.cpu().double() for t in (bn, depthwise, pointwise))
    expected = reference.block_inference(part, bn64, Act.RELU, depthwise64, 2, PADDING, bn64, Act.RELU, pointwise64)
    y = ops.block_inference(x, bn, Act.RELU, depthwise, 2, PADDING, bn, Act.RELU, pointwise)
    check(tail(y, TAIL // 2), expected, "block")
    expected = reference.pointwise_inference(part, bn64, Act.RELU, pointwise64, 1, NO_PADDING)
    check(tail(ops.pointwise_inference(x, bn, Act.RELU, pointwise, 1, 0)), expected, "pointwise")


def test_dense(shape: tuple[int, ...], device: str) -> None:
    x, channels = with_tail(shape, device), shape[1]
    weight = torch.randn(16, channels, 3, 3).to(device, torch.bfloat16)
    y, _ = ops.dense_forward(x, None, Act.LINEAR, weight, 2, 1, None, None, 1e-5, True)
    weight64 = weight.cpu().double()
    expected, _ = reference.dense_forward(tail(x), None, Act.LINEAR, weight64, 2, PADDING, None, None, 1e-5, False)
    check(tail(y, TAIL // 2), expected, "y")
    dz = with_tail(tuple(y.shape), device)
    dz[-1, :, : -TAIL // 2] = 0
    source = (None, Act.LINEAR, False)
    _, grad_weight, _ = ops.dense_backward(dz, None, None, x, *source, weight, 2, 1, False, True)
    part = tail(dz, TAIL // 2)
    _, expected, _ = reference.dense_backward(part, None, None, tail(x), *source, weight64, 2, PADDING, False, True)
    check(grad_weight, expected, "grad_weight")
