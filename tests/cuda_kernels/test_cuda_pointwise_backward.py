"""Pointwise convolution in CUDA C++, backward, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    as_double,
    assert_close,
    assert_same_specials,
    is_channels_last_dense,
    misaligned,
    random_bn,
    random_grad_bn,
    relative_error,
    same_bits,
)
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.backends import reference

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (n, channels, outputs, h, w)
SHAPES = [
    (2, 8, 16, 5, 7),
    (1, 3, 1, 1, 1),
    (3, 40, 24, 4, 5),
    (1, 13, 70, 9, 9),
    (1, 72, 136, 6, 7),
    (2, 136, 72, 5, 5),
]
# Several tiles and several blocks of columns a program, tails everywhere; wide and narrow tiles.
TILED = [(2, 136, 264, 15, 17), (3, 40, 72, 13, 15), (1, 264, 136, 21, 13)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, *, normalise=True, output="stats") -> tuple:
    """h, y, grad_bn_y, u, bn_u, batch_stats_u, weight."""
    n, channels, outputs, h, w = shape
    grad, y = (activation(n, outputs, h, w, dtype=dtype) for _ in range(2))
    of_y = {"stats": (y, random_grad_bn(outputs, dtype)), "no stats": (None, random_grad_bn(outputs, dtype))}
    u, bn_u = activation(n, channels, h, w, dtype=dtype), random_bn(channels, dtype) if normalise else None
    weight = (torch.randn(outputs, channels, 1, 1, dtype=torch.float64) / outputs**0.5).to(dtype)
    return (grad, *of_y.get(output, (None, None)), u, bn_u, True, weight)


def expected_gradients(args: tuple) -> tuple[Tensor, Tensor]:
    """h_u and the weight's gradient, in float64 of operands that are rounded as the kernels round them."""
    dtype = args[0].dtype
    h, y, grad_bn, u, bn, _, weight = map(as_double, args)
    dy = reference._conv_output_grad(h, y, grad_bn).to(dtype).double()
    a = reference._activation(u, bn).to(dtype).double()
    grad_a = torch.einsum("nohw,oc->nchw", dy, weight[:, :, 0, 0])
    if bn is not None:
        grad_a = grad_a.masked_fill(reference._normalise(u, bn) <= 0, 0)
    return grad_a, torch.einsum("nohw,nchw->oc", dy, a)[..., None, None]


def check(args: tuple, allowed: float = 0.0) -> None:
    u, bn_u, batch_stats = args[3:6]
    dtype = u.dtype
    h_u, grad_weight, grad_bn_u = ops.pointwise_backward(*args, True, True)
    expected_h, expected_weight = expected_gradients(args)
    assert h_u.dtype == dtype and is_channels_last_dense(h_u) and grad_weight.dtype == torch.float32
    assert_close(h_u, expected_h, allowed or TOLERANCE[dtype], "h_u")
    # dy and a next to the middle of two values that can be stored may be rounded to either.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-4, torch.float16: 1e-4}[dtype]
    assert_close(grad_weight, expected_weight, allowed or tolerance, "grad_weight")
    if bn_u is None:
        assert grad_bn_u.shape == (0,)
    else:
        of_stored = reference._make_grad_bn(h_u.double(), u.double(), bn_u.double(), batch_stats)
        for row, name in enumerate(["P", "Q", "MEAN", "O", "GAMMA", "BETA"]):
            assert_close(grad_bn_u[row], of_stored[row], ACC_TOLERANCE[dtype], name)
    only_weight = ops.pointwise_backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[2].shape == (0,)
    assert same_bits(only_weight[1], grad_weight)
    only_input = ops.pointwise_backward(*args, True, False)
    assert same_bits(only_input[0], h_u) and only_input[1].shape == (0,) and same_bits(only_input[2], grad_bn_u)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *TILED], ids=str)
def test_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(inputs(shape, dtype))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("output", ["stats", "no stats", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_without_optional_arguments(shape: tuple[int, ...], dtype: torch.dtype, output: str, normalise: bool) -> None:
    check(inputs(shape, dtype, normalise=normalise, output=output))


def test_running_statistics() -> None:
    """bn_u of running statistics gets no gradient through them."""
    args = list(inputs(SHAPES[0], torch.float32))
    args[5] = False
    check(tuple(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], TILED[1]], ids=str)
def test_before_sm_80(device: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device(capability=75)
    check(inputs(shape, dtype))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], TILED[0]], ids=str)
def test_tf32(shape: tuple[int, ...]) -> None:
    args = inputs(shape, torch.float32)
    check(args, 5e-4)
    outputs = ops.pointwise_backward(*args, True, True)
    for ours, theirs in zip(outputs[:2], expected_gradients(args), strict=True):
        assert relative_error(ours, theirs) > 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_that_of_pytorch(dtype: torch.dtype) -> None:
    args = inputs((2, 48, 80, 9, 11), dtype, normalise=False, output="plain")
    h, u, weight = args[0], args[3], args[6]
    ours = ops.pointwise_backward(*args, True, True)[:2]

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            *tensors, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
        )[:2]

    exact, theirs = gradients(h.double(), u.double(), weight.double()), gradients(h, u, weight)
    for mine, wanted, plain in zip(ours, exact, theirs, strict=True):
        assert relative_error(mine, wanted) <= 1.5 * relative_error(plain, wanted) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [16, 13])
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_nan_and_inf(special: float, outputs: int, dtype: torch.dtype) -> None:
    """They reach what they are multiplied with, and nothing else; a NaN passes the gradient through the ReLU."""
    for where in (0, 1, 3, 6):  # h, y, u, weight
        args = inputs((1, 24, outputs, 9, 17), dtype)
        x = args[where]
        x[0, 1, 0, 0] = special
        if where != 6:
            x[0, 5, 8, 16] = special
        h_u, grad_weight, grad_bn_u = ops.pointwise_backward(*args, True, True)
        expected_h, expected_weight = expected_gradients(args)
        assert torch.equal(h_u.isfinite(), expected_h.isfinite()), where
        assert_same_specials(grad_weight, expected_weight)
        of_stored = reference._make_grad_bn(h_u.double(), args[3].double(), args[4].double(), True)
        assert torch.equal(grad_bn_u.isfinite(), of_stored.isfinite()), where


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    args = inputs((1, 16, 24, 9, 16), dtype)
    for i in (0, 1, 2, 3, 4, 6):
        check((*args[:i], misaligned(args[i]), *args[i + 1 :]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    args = inputs((0, 8, 16, 5, 5), dtype)
    h_u, grad_weight, grad_bn_u = ops.pointwise_backward(*args, True, True)
    assert h_u.shape == (0, 8, 5, 5) and grad_weight.shape == (16, 8, 1, 1) and not grad_weight.any()
    assert_close(grad_bn_u, reference.pointwise_backward(*args, True, True)[2].double(), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_each_run(device: Callable[..., None], dtype: torch.dtype) -> None:
    """Also when the threads of a block run in another order: none reads what another has not written yet."""
    args = inputs(TILED[1], dtype)
    first = ops.pointwise_backward(*args, True, True)
    device(order=-1)
    second = ops.pointwise_backward(*args, True, True)
    assert all(map(same_bits, first, second))
