"""The pointwise convolution of a gated input in CUDA C++, against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import DTYPES, output_inputs
from convolutions import EPS, PRODUCT_TOLERANCE, affine
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    assert_statistics,
    is_channels_last_dense,
    misaligned,
    random_bn,
    relative_error,
    same_bits,
)
from plain import activate, normalise
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.contract import Act

pytestmark = pytest.mark.usefixtures("emulated")

SLOPE = 0.2
# (n, channels, outputs, h, w): images that end in a tile and in a warp's part of it, of one pixel, of fewer than a
# warp's rows, of whole parts, and of many tiles.
SHAPES = [
    (2, 24, 16, 9, 9),
    (5, 40, 8, 7, 7),
    (3, 33, 20, 1, 1),
    (70, 16, 24, 1, 1),
    (9, 13, 7, 3, 5),
    (5, 8, 72, 4, 8),
    (3, 3, 5, 17, 19),
]
# Several tiles and blocks of columns per program, wide and narrow tiles, products of several steps.
TILED = [(7, 136, 264, 7, 7), (2, 264, 136, 13, 15), (3, 40, 72, 13, 15), (1, 70, 13, 25, 37)]
INPUTS = [None, *Act]  # act(norm(u)), or u
OUTPUTS = ["statistics", "running", "plain"]


class Problem:
    """A gated convolution: its operands, and a = act(norm(u)) in float64."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, act: Act | None = Act.SILU) -> None:
        n, c, k, h, w = shape
        self.dtype = dtype
        self.u, self.gate = activation(n, c, h, w, dtype=dtype), activation(n, c, 1, 1, dtype=dtype)
        self.weight = (torch.randn(k, c, 1, 1, dtype=torch.float64) / c**0.5).to(dtype)
        self.bn, self.act = (None, Act.LINEAR) if act is None else (random_bn(c, dtype), act)
        self.gamma, self.beta = affine(k)
        self.bias = torch.randn(k)

    @property
    def a(self) -> Tensor:
        u = self.u.double()
        return u if self.bn is None else activate(self.act, normalise(u, self.bn.double()), SLOPE)

    @property
    def gated(self) -> Tensor:
        """What is multiplied with the weight: rounded, as the kernel does it."""
        return (self.a * self.gate.double()).to(self.dtype).double()

    def forward(self) -> tuple[Tensor, Tensor]:
        """y and its statistics."""
        args = (self.u, self.bn, self.act, self.gate, self.weight)
        return ops.gated_pointwise_forward(*args, self.gamma, self.beta, EPS, True, self.bias, SLOPE)

    def backward(self, output: tuple, need_input: bool = True, need_weight: bool = True) -> tuple[Tensor, ...]:
        args = (*output, self.u, self.bn, self.act, self.gate, self.weight)
        return ops.gated_pointwise_backward(*args, need_input, need_weight, SLOPE)

    def gradients(self, output: tuple) -> tuple[Tensor, ...]:
        """da, and the gradients of the weight and of the gate."""
        dy = output_gradient(*output).to(self.dtype).double()
        a, gate = self.a.requires_grad_(), self.gate.double().requires_grad_()
        weight = self.weight.double().requires_grad_()
        da, grad_gate = torch.autograd.grad(convolve(a * gate, weight), (a, gate), dy)
        return da, torch.autograd.grad(convolve(self.gated, weight), weight, dy)[0], grad_gate


def convolve(gated: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,kc->nkhw", gated, weight.double().flatten(1))


def output_gradient(dz: Tensor, y: Tensor | None, grad_bn: Tensor | None) -> Tensor:
    if grad_bn is None:
        return dz.double()
    dz_coefficient, y_coefficient, mean, constant = (row.view(1, -1, 1, 1) for row in grad_bn[:4].double())
    dy = dz.double() * dz_coefficient
    return dy if y is None else dy + y_coefficient * (y.double() - mean) + constant


def check_forward(p: Problem, allowed: float = 0.0) -> None:
    y, bn_y = p.forward()
    assert y.dtype == p.dtype and is_channels_last_dense(y)
    assert_close(y, convolve(p.gated, p.weight) + p.bias.double().view(1, -1, 1, 1), allowed or TOLERANCE[p.dtype])
    assert_statistics(bn_y, y, p.gamma, p.beta, EPS)


def check_backward(p: Problem, kind: str = "statistics", allowed: float = 0.0) -> None:
    n, _, h, w = p.u.shape
    output = output_inputs(n, len(p.weight), h, w, p.dtype, kind)
    da, grad_weight, grad_gate = p.backward(output)
    expected_da, expected_weight, expected_gate = p.gradients(output)
    assert da.dtype == p.dtype and is_channels_last_dense(da)
    assert grad_weight.dtype == grad_gate.dtype == torch.float32 and grad_gate.shape == p.gate.shape
    assert_close(da, expected_da, allowed or TOLERANCE[p.dtype], "da")
    assert_close(grad_weight, expected_weight, allowed or PRODUCT_TOLERANCE[p.dtype], "grad_weight")
    tolerance = ACC_TOLERANCE if kind == "plain" else PRODUCT_TOLERANCE  # a dy that is not rounded is exact
    assert_close(grad_gate, expected_gate, allowed or tolerance[p.dtype], "grad_gate")

    only_weight = p.backward(output, need_input=False)
    assert same_bits(only_weight[1], grad_weight) and only_weight[0].shape == only_weight[2].shape == (0,)
    only_input = p.backward(output, need_weight=False)
    assert same_bits(only_input[0], da) and only_input[1].shape == (0,) and same_bits(only_input[2], grad_gate)


@combinations("shape, dtype, act", SHAPES, DTYPES, INPUTS)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype, act: Act | None) -> None:
    check_forward(Problem(shape, dtype, act))


@combinations("shape, dtype, act", SHAPES, DTYPES, INPUTS)
def test_backward(shape: tuple[int, ...], dtype: torch.dtype, act: Act | None) -> None:
    for kind in OUTPUTS:
        check_backward(Problem(shape, dtype, act), kind)


@in_turn("shape, dtype", TILED, DTYPES[0], DTYPES[1:])
def test_several_tiles(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = Problem(shape, dtype)
    check_forward(p)
    check_backward(p)


@combinations("shape, dtype, normalised", [*SHAPES, TILED[0]], DTYPES, [False, True])
def test_inference(shape: tuple[int, ...], dtype: torch.dtype, normalised: bool) -> None:
    p = Problem(shape, dtype, None)
    bn_y = random_bn(shape[2], dtype) if normalised else None
    residual = activation(shape[0], *shape[2:], dtype=dtype)
    expected = convolve(p.gated, p.weight)
    expected = activate(Act.HARDSWISH, normalise(expected, bn_y.double()) if normalised else expected)
    args = (p.u, p.gate, bn_y, Act.HARDSWISH, p.weight)
    assert_close(ops.gated_pointwise_inference(*args), expected, TOLERANCE[dtype])
    assert_close(ops.gated_pointwise_inference(*args, None, residual), expected + residual.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], TILED[2]], ids=str)
def test_before_sm_80(device: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device(capability=75)
    p = Problem(shape, dtype)
    check_forward(p)
    check_backward(p)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], TILED[0]], ids=str)
def test_tf32(shape: tuple[int, ...]) -> None:
    p = Problem(shape, torch.float32)
    check_forward(p, allowed=5e-4)
    check_backward(p, allowed=5e-4)
    y = ops.gated_pointwise_inference(p.u, p.gate, None, Act.LINEAR, p.weight)
    assert relative_error(y, convolve(p.u.double() * p.gate.double(), p.weight)) > 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [16, 13])
def test_nan_and_inf(outputs: int, dtype: torch.dtype) -> None:
    """What is not finite in an image or its gate reaches no other image."""
    for special in (float("nan"), float("inf"), -float("inf")):
        p = Problem((3, 24, outputs, 7, 7), dtype, Act.LINEAR)
        p.gate[1, 5] = special
        assert torch.equal(p.forward()[0].isfinite(), convolve(p.gated, p.weight).isfinite())
        output = output_inputs(3, outputs, 7, 7, dtype)
        da, grad_weight, grad_gate = p.backward(output)
        where = torch.zeros(3, 24, 1, 1, dtype=torch.bool)
        where[1, 5] = True
        assert torch.equal(~da.isfinite(), where.expand_as(da)) and grad_gate.isfinite().all()
        assert torch.equal(~grad_weight.isfinite(), (torch.arange(24) == 5).view(1, 24, 1, 1).expand_as(grad_weight))

        p = Problem((3, 24, outputs, 7, 7), dtype, Act.LINEAR)
        p.u[1, 5, 6, 6] = special  # the last pixel, in the tile and part of the next image's first
        da, _, grad_gate = p.backward(output)
        assert da.isfinite().all() and torch.equal(~grad_gate.isfinite(), where)

        p = Problem((3, 24, outputs, 7, 7), dtype, Act.LINEAR)
        output[0][1, 3, 0, 0] = special
        da, _, grad_gate = p.backward(output)
        bad = torch.arange(3).view(3, 1, 1, 1) == 1
        assert torch.equal(~grad_gate.isfinite(), bad.expand_as(grad_gate))
        assert not da[1, :, 0, 0].isfinite().any() and int((~da.isfinite()).sum()) == 24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    """Tensors that start one element into their storage."""
    p = Problem((2, 16, 24, 9, 8), dtype)
    output = output_inputs(2, 24, 9, 8, dtype)
    y, gradients = p.forward()[0], p.backward(output)
    for name in ("u", "gate", "weight", "bn"):
        aligned = getattr(p, name)
        setattr(p, name, misaligned(aligned))
        assert same_bits(p.forward()[0], y), name
        check_backward(p)
        setattr(p, name, aligned)
    for i in range(3):
        moved = [*output[:i], misaligned(output[i]), *output[i + 1 :]]
        assert_close(p.backward(moved)[2], gradients[2].double(), 1e-6)
    residual = activation(2, 24, 9, 8, dtype=dtype)
    args = (p.u, p.gate, None, Act.RELU, p.weight, None)
    inference = ops.gated_pointwise_inference
    assert same_bits(inference(*args, misaligned(residual)), inference(*args, residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 16, 8, 7, 7), (0, 5, 8, 1, 1)], ids=str)
def test_empty_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = Problem(shape, dtype)
    y, bn_y = p.forward()
    da, grad_weight, grad_gate = p.backward((y, None, None))
    assert y.shape == (0, *shape[2:]) and da.shape == p.u.shape and grad_gate.shape == p.gate.shape
    assert not bn_y[0].any() and not grad_weight.any()


@in_turn("shape, dtype", [SHAPES[4], TILED[0], TILED[2]], DTYPES[0], DTYPES[1:])
def test_same_bits_each_run(device: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Also when the threads of a block run in another order: none reads what another has not written yet."""
    p = Problem(shape, dtype)
    output = output_inputs(shape[0], *shape[2:], dtype)
    first = [*p.forward(), *p.backward(output)]
    device(order=-1)
    assert all(map(same_bits, first, [*p.forward(), *p.backward(output)]))


def test_each_row_has_its_image() -> None:
    """Images of any size: the gates, and the gradients of a sum, say which of them a row was taken to be of."""
    for pixels in (1, 2, 3, 7, 31, 32, 33, 127, 128, 129, 640):
        n = 1 + 700 // pixels
        u, weight = activation(n, 1, pixels, 1, dtype=torch.float32), torch.ones(1, 1, 1, 1)
        gate = torch.arange(1.0, n + 1).view(n, 1, 1, 1)
        y = ops.gated_pointwise_inference(u, gate, None, Act.LINEAR, weight)
        assert torch.equal(y, u * gate), pixels
        ones = torch.ones_like(u)
        *_, grad_gate = ops.gated_pointwise_backward(
            ones, None, None, ones, None, Act.LINEAR, gate, weight, True, False
        )  # fmt: skip
        assert torch.equal(grad_gate, torch.full_like(gate, pixels)), pixels
