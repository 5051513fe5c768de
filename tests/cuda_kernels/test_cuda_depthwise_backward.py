"""Depthwise convolution in CUDA C++, backward, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import ALL_SIDES, DEPTHWISE, DTYPES, FLOAT32_AND_16_BITS, backward_inputs
from convolutions import GEOMETRIES, check_backward, for_each_kernel
from cpu_ops import INPUTS, assert_close, assert_same_specials, misaligned, same_bits

from mobilenet_ext import ops
from mobilenet_ext.contract import (
    BN_SCALE,
    GRAD_BETA,
    GRAD_CONSTANT,
    GRAD_DZ_COEFFICIENT,
    GRAD_GAMMA,
    GRAD_Y_COEFFICIENT,
    Act,
    Padding,
    conv_output_size,
)

pytestmark = pytest.mark.usefixtures("emulated")

CASES = [*DEPTHWISE, (40, (2, 13, 26))]
TILED = (40, (3, 21, 17))  # several chunks of rows per image, several tasks per program


def inputs(dtype, channels, size, kernel, stride, padding, *, act: Act | None = Act.RELU, output="statistics") -> tuple:
    """dz, y, grad_bn_y, u, bn_u, act_u, batch_stats_u, weight, stride, padding."""
    n, h, w = size
    return backward_inputs((n, channels, h, w), (channels, 1, kernel, kernel), dtype, stride, padding, act, output)


@in_turn("geometry, dtype", GEOMETRIES, *FLOAT32_AND_16_BITS)
def test_backward(geometry: tuple[int, int, Padding], dtype: torch.dtype) -> None:
    kernel, stride, padding = geometry
    for channels, size in CASES:
        if min(conv_output_size(*size[1:], kernel, stride, padding)) > 0:
            check_backward("depthwise_backward", *inputs(dtype, channels, size, kernel, stride, padding))


@combinations(
    "act, output, kernel, stride, channels", INPUTS, ["statistics", "running", "plain"], [3, 5], [1, 2], [8, 3]
)
def test_inputs_and_outputs(kernel: int, channels: int, stride: int, output: str, act: Act | None) -> None:
    args = inputs(torch.float32, channels, (2, 6, 5), kernel, stride, ALL_SIDES, act=act, output=output)
    check_backward("depthwise_backward", *args)


@for_each_kernel
@pytest.mark.parametrize("stride", [1, 2])
def test_running_statistics(stride: int, kernel: int) -> None:
    """bn_u of running statistics gets no gradient through them."""
    args = list(inputs(torch.float32, 8, (2, 6, 5), kernel, stride, ALL_SIDES))
    args[6] = False
    check_backward("depthwise_backward", *args)


@combinations("dtype, kernel, stride, multiprocessors", DTYPES, [3, 5], [1, 2], [1, 3])
def test_several_tasks(
    device: Callable[..., None], kernel: int, dtype: torch.dtype, stride: int, multiprocessors: int
) -> None:
    device(multiprocessors=multiprocessors)
    check_backward("depthwise_backward", *inputs(dtype, *TILED, kernel, stride, ALL_SIDES))


@for_each_kernel
@pytest.mark.parametrize("stride", [1, 2])
def test_misaligned(stride: int, kernel: int) -> None:
    args = inputs(torch.float16, 16, (2, 6, 5), kernel, stride, ALL_SIDES)
    for i in (0, 1, 3):  # dz, y, u
        check_backward("depthwise_backward", *args[:i], misaligned(args[i]), *args[i + 1 :])


@combinations(
    "geometry, where, act, special",
    [*GEOMETRIES[:8], (5, 1, (2, 0, 1, 2)), (5, 2, (1, 2, 1, 2))],
    ["dz", "y", "u", "weight"],
    Act,
    [float("nan"), float("inf"), -float("inf")],
)
def test_nan_and_inf(geometry: tuple[int, int, Padding], where: str, act: Act, special: float) -> None:
    """In the middle and in the corners: they reach what they are multiplied with, and nothing else."""
    args = inputs(torch.float32, 8, (1, 8, 7), *geometry, act=act)
    dz, y, grad_bn, u, bn, _, _, weight, *_ = args
    x = {"dz": dz, "y": y, "u": u, "weight": weight}[where]
    x[0, 0, 0, 0] = x[-1, 0, -1, -1] = special
    if where != "weight":
        x[0, 2, x.shape[2] // 2, x.shape[3] // 2] = special
    dz_u, grad_weight, grad_bn_u = ops.depthwise_backward(*args, True, True)
    dy = oracle.output_grad(dz, y, grad_bn)
    a = oracle.norm_act(u, bn, act)
    grad_a, expected_weight = oracle.depthwise_by_taps(dy, a, weight, *geometry[1:])
    expected = oracle.activate_backward(oracle.normalise(u, bn), grad_a, act)
    assert_same_specials(dz_u, expected)
    assert_same_specials(grad_weight, expected_weight)
    finite = expected_weight.isfinite()
    assert_close(grad_weight[finite], expected_weight[finite], 1e-5)
    of_stored = oracle.grad_bn(dz_u, u, bn, True)
    assert torch.equal(grad_bn_u.isfinite(), of_stored.isfinite())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@for_each_kernel
def test_empty_batch(kernel: int, dtype: torch.dtype) -> None:
    args = inputs(dtype, 8, (0, 5, 5), kernel, 1, ALL_SIDES)
    dz_u, grad_weight, grad_bn_u = ops.depthwise_backward(*args, True, True)
    assert dz_u.shape == (0, 8, 5, 5) and not grad_weight.any()
    assert not grad_bn_u[[GRAD_Y_COEFFICIENT, GRAD_CONSTANT, GRAD_GAMMA, GRAD_BETA]].any()
    assert torch.equal(grad_bn_u[GRAD_DZ_COEFFICIENT], args[4][BN_SCALE])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@for_each_kernel
def test_same_bits_each_run(device: Callable[..., None], kernel: int, dtype: torch.dtype, stride: int) -> None:
    """Also when the threads of a block run in another order: none reads what another has not written yet."""
    args = inputs(dtype, *TILED, kernel, stride, ALL_SIDES)
    first = ops.depthwise_backward(*args, True, True)
    device(order=-1)
    assert all(map(same_bits, first, ops.depthwise_backward(*args, True, True)))


@pytest.mark.parametrize("stride", [1, 2])
def test_an_image_of_padding_alone(stride: int) -> None:
    args = inputs(torch.float32, 8, (2, 0, 5), 3, stride, (1, 1, 2, 2))
    dz_u, grad_weight, grad_bn_u = ops.depthwise_backward(*args, True, True)
    assert dz_u.shape == (2, 8, 0, 5) and not grad_weight.any() and not grad_bn_u[[GRAD_GAMMA, GRAD_BETA]].any()
