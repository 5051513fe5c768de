"""Pointwise convolution in CUDA C++, backward, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import DTYPES, FLOAT32_AND_16_BITS, backward_inputs
from convolutions import check_backward, expected_backward
from cpu_ops import INPUTS, assert_close, assert_same_specials, misaligned, relative_error, same_bits
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.contract import Act

pytestmark = pytest.mark.usefixtures("emulated")

# (n, channels, outputs, h, w)
SHAPES = [
    (2, 8, 16, 5, 7),
    (1, 3, 1, 1, 1),
    (3, 40, 24, 4, 5),
    (1, 13, 70, 9, 9),
    (1, 72, 136, 6, 7),
    (2, 136, 72, 5, 5),
]
# Several tiles and several blocks of columns per program, tails everywhere; wide and narrow tiles.
TILED = [(2, 136, 264, 15, 17), (3, 40, 72, 13, 15), (1, 264, 136, 21, 13)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, *, act: Act | None = Act.RELU, output="statistics") -> tuple:
    """dz, y, grad_bn_y, u, bn_u, act_u, batch_stats_u, weight, stride, padding."""
    n, channels, outputs, h, w = shape
    return backward_inputs((n, channels, h, w), (outputs, channels, 1, 1), dtype, act=act, output=output)


@in_turn("shape, dtype", [*SHAPES, *TILED], *FLOAT32_AND_16_BITS)
def test_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_backward("pointwise_backward", *inputs(shape, dtype))


@combinations("act, output, dtype, shape", INPUTS, ["statistics", "running", "plain"], DTYPES, [SHAPES[0], SHAPES[3]])
def test_inputs_and_outputs(shape: tuple[int, ...], dtype: torch.dtype, output: str, act: Act | None) -> None:
    check_backward("pointwise_backward", *inputs(shape, dtype, act=act, output=output))


def test_running_statistics() -> None:
    """bn_u of running statistics gets no gradient through them."""
    args = list(inputs(SHAPES[0], torch.float32))
    args[6] = False
    check_backward("pointwise_backward", *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], TILED[1]], ids=str)
def test_before_sm_80(device: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device(capability=75)
    check_backward("pointwise_backward", *inputs(shape, dtype))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[3], TILED[0]], ids=str)
def test_tf32(shape: tuple[int, ...]) -> None:
    args = inputs(shape, torch.float32)
    check_backward("pointwise_backward", *args, allowed=5e-4)
    outputs = ops.pointwise_backward(*args, True, True)
    for ours, theirs in zip(outputs[:2], expected_backward("pointwise_backward", *args), strict=True):
        assert relative_error(ours, theirs) > 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_that_of_pytorch(dtype: torch.dtype) -> None:
    args = inputs((2, 48, 80, 9, 11), dtype, act=None, output="plain")
    dz, u, weight = args[0], args[3], args[7]
    ours = ops.pointwise_backward(*args, True, True)[:2]

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.aten.convolution_backward(
            *tensors, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
        )[:2]

    exact, theirs = gradients(dz.double(), u.double(), weight.double()), gradients(dz, u, weight)
    for mine, wanted, plain in zip(ours, exact, theirs, strict=True):
        assert relative_error(mine, wanted) <= 1.5 * relative_error(plain, wanted) + 1e-7


@combinations("act, special, dtype, outputs", Act, [float("nan"), float("inf"), -float("inf")], DTYPES, [16, 13])
def test_nan_and_inf(special: float, act: Act, outputs: int, dtype: torch.dtype) -> None:
    """They reach what they are multiplied with, and nothing else; a NaN passes the gradient through a clamp."""
    for where in (0, 1, 3, 7):  # dz, y, u, weight
        args = inputs((1, 24, outputs, 9, 17), dtype, act=act)
        x = args[where]
        x[0, 1, 0, 0] = special
        if where != 7:
            x[0, 5, 8, 16] = special
        dz_u, grad_weight, grad_bn_u = ops.pointwise_backward(*args, True, True)
        expected_dz, expected_weight = expected_backward("pointwise_backward", *args)
        assert torch.equal(dz_u.isfinite(), expected_dz.isfinite()), where
        assert_same_specials(grad_weight, expected_weight)
        of_stored = oracle.grad_bn(dz_u, args[3], args[4], True)
        assert torch.equal(grad_bn_u.isfinite(), of_stored.isfinite()), where


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    args = inputs((1, 16, 24, 9, 16), dtype)
    for i in (0, 1, 2, 3, 4, 7):
        check_backward("pointwise_backward", *args[:i], misaligned(args[i]), *args[i + 1 :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    args = inputs((0, 8, 16, 5, 5), dtype)
    dz_u, grad_weight, grad_bn_u = ops.pointwise_backward(*args, True, True)
    assert dz_u.shape == (0, 8, 5, 5) and grad_weight.shape == (16, 8, 1, 1) and not grad_weight.any()
    assert_close(grad_bn_u, oracle.pointwise_backward(*args, True, True)[2], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_each_run(device: Callable[..., None], dtype: torch.dtype) -> None:
    """Also when the threads of a block run in another order: none reads what another has not written yet."""
    args = inputs(TILED[1], dtype)
    first = ops.pointwise_backward(*args, True, True)
    device(order=-1)
    assert all(map(same_bits, first, ops.pointwise_backward(*args, True, True)))
