"""The pointwise convolution of a gated input in C++ for CPUs, against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_ops import (
    DTYPES,
    TOLERANCE,
    activation,
    assert_close,
    assert_statistics,
    cases,
    check_threads,
    is_channels_last_dense,
    ops,
    random_bn,
    random_grad_bn,
    rounds_operands,
    same_bits,
    weight_tolerance,
)
from plain import activate, normalise
from torch import Tensor

from mobilenet_ext.contract import Act, acc_dtype

SLOPE = 0.2
# (images, channels, outputs, height, width): tiles within an image, images within a tile, one pixel each, and a weight
# that is too large for a gradient per chunk of tiles.
SHAPES = cases([(2, 24, 16, 9, 9), (5, 40, 7, 7, 7), (3, 33, 20, 1, 1)], (3, 3, 5, 40, 33), (3, 280, 290, 5, 4))
INPUTS = [None, Act.LINEAR, Act.RELU, Act.SILU, Act.LEAKY_RELU]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Problem:
    """A gated convolution's input, and the activation and the gated activation in float64."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, act: Act | None) -> None:
        n, c, k, h, w = shape
        self.u, self.gate = activation(n, c, h, w, dtype=dtype), torch.rand(n, c, 1, 1, dtype=torch.float64).to(dtype)
        self.weight = (torch.randn(k, c, 1, 1, dtype=torch.float64) / c**0.5).to(dtype)
        self.bn, self.act = (None, Act.LINEAR) if act is None else (random_bn(c, dtype), act)
        self.a = self.u.double()
        if act is not None:
            self.a = activate(act, normalise(self.a, self.bn.double()), SLOPE)
        self.gated = self.a * self.gate.double()

    def forward(self, *rest: Any) -> tuple[Any, ...]:
        return self.u, self.bn, self.act, self.gate, self.weight, *rest


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x``, as products of this dtype take it."""
    return x.to(dtype).double() if rounds_operands(dtype) else x


def product(gated: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,kc->nkhw", gated, weight.double().flatten(1))


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", INPUTS, ids=str)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, act: Act | None) -> None:
    p = Problem(shape, dtype, act)
    gamma, beta, bias = torch.randn(3, shape[2], dtype=torch.float64).to(acc_dtype(dtype))
    y, bn_y = ops.gated_pointwise_forward(*p.forward(gamma, beta, 1e-3, True, bias, SLOPE))
    assert y.dtype == dtype and is_channels_last_dense(y)
    expected = product(operand(p.gated, dtype), p.weight) + bias.double().view(1, -1, 1, 1)
    assert_close(y, expected, TOLERANCE[dtype])
    assert_statistics(bn_y, y, gamma, beta, 1e-3)


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = Problem(shape, dtype, None)
    bn_y, residual = random_bn(shape[2], dtype), activation(shape[0], *shape[2:], dtype=dtype)
    expected = product(operand(p.gated, dtype), p.weight)
    expected = activate(Act.HARDSWISH, normalise(expected, bn_y.double())) + residual.double()
    packed = ops.pack(None, None, p.weight)
    args = (p.u, p.gate, bn_y, Act.HARDSWISH, p.weight)
    y = ops.gated_pointwise_inference(*args, None, residual)
    assert_close(y, expected, TOLERANCE[dtype])
    assert same_bits(y, ops.gated_pointwise_inference(*args, packed, residual))


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", INPUTS, ids=str)
def test_backward(shape: tuple[int, ...], dtype: torch.dtype, act: Act | None) -> None:
    p = Problem(shape, dtype, act)
    n, _, k, h, w = shape
    dz, y, grad_bn_y = (
        activation(n, k, h, w, dtype=dtype),
        activation(n, k, h, w, dtype=dtype),
        random_grad_bn(k, dtype),
    )
    for of_output in ((dz, y, grad_bn_y), (dz, None, grad_bn_y), (dz, None, None)):
        args = (*of_output, *p.forward())
        da, grad_weight, grad_gate = ops.gated_pointwise_backward(*args, True, True, SLOPE)
        dy = operand(output_gradient(*of_output), dtype)
        a, weight, gate = (t.double().clone().requires_grad_() for t in (p.a, p.weight, p.gate))
        product(a * gate, weight).backward(dy)
        assert da.dtype == dtype and is_channels_last_dense(da)
        assert_close(da, a.grad, TOLERANCE[dtype], "da")
        assert grad_gate.dtype == acc_dtype(dtype) and grad_gate.shape == gate.shape
        assert_close(grad_gate, gate.grad, weight_tolerance(dtype), "grad_gate")
        (expected,) = torch.autograd.grad(product(operand(p.gated, dtype), weight), weight, dy)
        assert_close(grad_weight, expected, weight_tolerance(dtype), "grad_weight")
    only_weight = ops.gated_pointwise_backward(*args, False, True, SLOPE)
    assert same_bits(only_weight[1], grad_weight) and only_weight[0].shape == only_weight[2].shape == (0,)
    only_input = ops.gated_pointwise_backward(*args, True, False, SLOPE)
    assert same_bits(only_input[0], da) and only_input[1].shape == (0,) and same_bits(only_input[2], grad_gate)


def output_gradient(dz: Tensor, y: Tensor | None, grad_bn: Tensor | None) -> Tensor:
    if grad_bn is None:
        return dz.double()
    dz_coefficient, y_coefficient, mean, constant = (row.view(1, -1, 1, 1) for row in grad_bn[:4].double())
    dy = dz.double() * dz_coefficient
    return dy if y is None else dy + y_coefficient * (y.double() - mean) + constant


@pytest.mark.cover
def test_without_images() -> None:
    u = activation(0, 16, 7, 7, dtype=torch.float32)
    gate, weight = torch.rand(0, 16, 1, 1), torch.randn(8, 16, 1, 1)
    y, _ = ops.gated_pointwise_forward(u, None, Act.LINEAR, gate, weight, None, None, 1e-5, True)
    da, grad_weight, grad_gate = ops.gated_pointwise_backward(
        y, None, None, u, None, Act.LINEAR, gate, weight, True, True
    )  # fmt: skip
    assert y.shape == (0, 8, 7, 7) and da.shape == u.shape and grad_gate.shape == gate.shape
    assert torch.equal(grad_weight, torch.zeros(8, 16, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    p = Problem((7, 48, 40, 13, 11), dtype, Act.SILU)
    dz = activation(7, 40, 13, 11, dtype=dtype)
    check_threads(ops.gated_pointwise_forward, p.forward(None, None, 1e-5, True))
    check_threads(ops.gated_pointwise_backward, (dz, None, None, *p.forward(), True, True))


@pytest.mark.cover
def test_what_does_not_fit_is_refused() -> None:
    p = Problem((2, 8, 4, 3, 3), torch.float32, None)
    for gate, message in (
        (p.gate[:1], "gate: expected shape"),
        (p.gate[:, :4].contiguous(), "gate: expected shape"),
        (p.gate.double(), "gate: expected scalar type"),
        (p.gate.expand(2, 8, 3, 3), "gate: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.gated_pointwise_inference(p.u, gate, None, Act.LINEAR, p.weight)
