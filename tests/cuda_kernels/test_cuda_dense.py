"""The stem in CUDA C++, forward, inference and backward, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    check_overflowed,
    copying_weight,
    in_float64,
    is_channels_last_dense,
    overflowing,
    random_bn,
    random_grad_bn,
    same_bits,
)
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.backends import reference

pytestmark = pytest.mark.usefixtures("emulated")

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
    (1, 9, 72, 5, 5, 2, 1),
]
TILED = (2, 3, 32, 45, 41, 2, 1)  # several tiles a program, which end in the middle of a line


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, bn, and for the backward h, y, grad_bn_y."""
    n, c, filters, h, w, stride, padding = shape
    weight = (torch.randn(filters, c, 3, 3, dtype=torch.float64) / (9 * c) ** 0.5).to(dtype)
    out = (n, filters, *((side + 2 * padding - 3) // stride + 1 for side in (h, w)))
    return (
        activation(n, c, h, w, dtype=dtype),
        weight,
        random_bn(filters, dtype),
        activation(*out, dtype=dtype),
        activation(*out, dtype=dtype),
        random_grad_bn(filters, dtype),
    )


def check_forward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bn, *_ = inputs(shape, dtype)
    gamma, beta = bn[1], bn[2]
    args = (x, weight, *shape[5:], gamma, beta, 1e-5, True)
    y, bn_y = ops.stem_forward(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, in_float64(reference.stem_forward, args)[0], TOLERANCE[dtype], "y")
    of_stored = reference._batch_bn(y.double(), gamma.double(), beta.double(), 1e-5)
    for row, name in enumerate(["mean", "scale", "shift", "rstd", "var"]):
        assert_close(bn_y[row], of_stored[row], ACC_TOLERANCE[dtype], name)


def check_backward(shape: tuple[int, ...], dtype: torch.dtype, with_y: bool = True, with_bn: bool = True) -> None:
    x, weight, _, h, y, grad_bn_y = inputs(shape, dtype)
    args = (h, y if with_y and with_bn else None, grad_bn_y if with_bn else None, x, weight, *shape[5:])
    grad_x, grad_weight = ops.stem_backward(*args, True, True)
    assert grad_x.dtype == dtype and is_channels_last_dense(grad_x)
    assert_close(grad_x, in_float64(reference.stem_backward, (*args, True, True))[0], TOLERANCE[dtype], "grad_x")
    # The operands of the weight's product are rounded to the activations' dtype.
    dy = reference._conv_output_grad(*(None if t is None else t.double() for t in args[:3])).to(dtype)
    exact = in_float64(reference.stem_backward, (dy, None, None, *args[3:], False, True))[1]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-4, torch.float16: 1e-4}[dtype]
    assert grad_weight.dtype == torch.float32 and grad_weight.is_contiguous()
    assert_close(grad_weight, exact, tolerance, "grad_weight")
    only_weight = ops.stem_backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[0].dtype == dtype and same_bits(only_weight[1], grad_weight)
    only_input = ops.stem_backward(*args, True, False)
    assert same_bits(only_input[0], grad_x) and only_input[1].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, TILED], ids=str)
def test_forward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_forward(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, TILED], ids=str)
def test_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_backward(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("with_y", "with_bn"), [(False, True), (False, False)])
def test_backward_without_batch_statistics(dtype: torch.dtype, with_y: bool, with_bn: bool) -> None:
    check_backward((1, 3, 8, 9, 8, 2, 1), dtype, with_y, with_bn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_before_sm_80(device: Callable[..., None], dtype: torch.dtype) -> None:
    device(capability=75)
    check_forward(SHAPES[0], dtype)
    check_backward(SHAPES[0], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("with_bn", "relu"), [(True, True), (True, False), (False, True), (False, False)])
def test_inference(dtype: torch.dtype, with_bn: bool, relu: bool) -> None:
    x, weight, bn, *_ = inputs(TILED, dtype)
    args = (x, bn if with_bn else None, weight, 2, 1, relu)
    y = ops.stem_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, *in_float64(reference.stem_inference, args), TOLERANCE[dtype])


def test_no_statistics_and_no_affine() -> None:
    x, weight, *_ = inputs(SHAPES[0], torch.float32)
    y, bn = ops.stem_forward(x, weight, 2, 1, None, None, 1e-5, True)
    plain, none = ops.stem_forward(x, weight, 2, 1, None, None, 1e-5, False)
    assert same_bits(y, plain) and none.shape == (0,)
    assert_close(bn, reference._batch_bn(y.double(), None, None, 1e-5), 1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_nan_reaches_the_pixels_that_see_it(stride: int) -> None:
    x, weight, *_ = inputs((1, 3, 8, 9, 10, stride, 1), torch.float32)
    x[0, 1, 4, 5] = float("nan")
    y, _ = ops.stem_forward(x, weight, stride, 1, None, None, 1e-5, False)
    assert torch.equal(y.isnan(), torch.nn.functional.conv2d(x, weight, stride=stride, padding=1).isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    x, weight, bn, h, y, grad_bn = inputs((0, 3, 8, 9, 9, 2, 1), dtype)
    out, made = ops.stem_forward(x, weight, 2, 1, None, None, 1e-5, True)
    assert out.shape == (0, 8, 5, 5)
    assert_close(made, reference.stem_forward(x, weight, 2, 1, None, None, 1e-5, True)[1].double(), 1e-6)
    grad_x, grad_weight = ops.stem_backward(h, y, grad_bn, x, weight, 2, 1, True, True)
    assert grad_x.shape == x.shape and grad_weight.shape == weight.shape and not grad_weight.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_each_run(device: Callable[..., None], dtype: torch.dtype) -> None:
    """Also when the threads of a block run in another order: none reads what another has not written yet."""
    x, weight, _, h, y, grad_bn = inputs(TILED, dtype)

    def run() -> tuple[Tensor, ...]:
        forward = ops.stem_forward(x, weight, 2, 1, None, None, 1e-5, True)
        return (*forward, *ops.stem_backward(h, y, grad_bn, x, weight, 2, 1, True, True))

    first = run()
    device(order=-1)
    assert all(map(same_bits, first, run()))


def test_squares_that_overflow() -> None:
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("stem", 8, torch.float32)
    y, bn = ops.stem_forward(u, weight, 1, 1, None, None, 1e-5, True)
    check_overflowed(bn, y)
