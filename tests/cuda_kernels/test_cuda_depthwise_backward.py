"""Depthwise convolution in CUDA C++, backward, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from convolutions import (
    ACTS,
    ALL_SIDES,
    DTYPES,
    GEOMETRIES,
    INPUTS,
    check_backward,
    for_each_kernel,
    norm_act,
    output_inputs,
)
from cpu_ops import activation, assert_close, assert_same_specials, misaligned, same_bits
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.backends import reference
from mobilenet_ext.contract import (
    BN_SCALE,
    GRAD_BETA,
    GRAD_CONSTANT,
    GRAD_DZ_COEFFICIENT,
    GRAD_GAMMA,
    GRAD_Y_COEFFICIENT,
    Padding,
    conv_output_size,
)

pytestmark = pytest.mark.usefixtures("emulated")

CASES = [(1, (2, 9, 3)), (3, (2, 5, 7)), (8, (5, 1, 1)), (24, (3, 4, 4)), (40, (2, 13, 26))]  # channels, N, H and W
TILED = (40, (3, 21, 17))  # several chunks of rows per image, several tasks per program


def inputs(dtype, channels, size, kernel, stride, padding, *, kind="relu", output="statistics") -> tuple:
    """dz, y, grad_bn_y, u, bn_u, act_u, batch_stats_u, weight, stride, padding."""
    n, h, w = size
    of_y = output_inputs(n, channels, *conv_output_size(h, w, kernel, stride, padding), dtype, output)
    weight = torch.randn(channels, 1, kernel, kernel).to(dtype)
    u = activation(n, channels, h, w, dtype=dtype)
    return (*of_y, u, *norm_act(kind, channels, dtype), True, weight, stride, padding)


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype: torch.dtype, kernel: int, stride: int, padding: Padding) -> None:
    for channels, size in CASES:
        if min(conv_output_size(*size[1:], kernel, stride, padding)) > 0:
            check_backward("depthwise_backward", *inputs(dtype, channels, size, kernel, stride, padding))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("output", ["statistics", "running", "plain"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [8, 3])
@for_each_kernel
def test_inputs_and_outputs(kernel: int, channels: int, stride: int, output: str, kind: str) -> None:
    args = inputs(torch.float32, channels, (2, 6, 5), kernel, stride, ALL_SIDES, kind=kind, output=output)
    check_backward("depthwise_backward", *args)


@for_each_kernel
@pytest.mark.parametrize("stride", [1, 2])
def test_running_statistics(stride: int, kernel: int) -> None:
    """bn_u of running statistics gets no gradient through them."""
    args = list(inputs(torch.float32, 8, (2, 6, 5), kernel, stride, ALL_SIDES))
    args[6] = False
    check_backward("depthwise_backward", *args)


@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@for_each_kernel
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


def literal_backward(dy: Tensor, a: Tensor, weight: Tensor, stride: int, padding: Padding) -> tuple[Tensor, Tensor]:
    """The gradients of a and weight, summed over what exists: nothing is multiplied by padding."""
    left, _, top, _ = padding
    grad_a, grad_weight = torch.zeros_like(a), torch.zeros_like(weight)
    height, width = a.shape[2:]
    for i, j, row, column in product(*map(range, (*weight.shape[2:], *dy.shape[2:]))):
        y, x = row * stride + i - top, column * stride + j - left
        if 0 <= y < height and 0 <= x < width:
            grad_a[:, :, y, x] += dy[:, :, row, column] * weight[:, 0, i, j]
            grad_weight[:, 0, i, j] += (dy[:, :, row, column] * a[:, :, y, x]).sum(0)
    return grad_a, grad_weight


@pytest.mark.parametrize(("kernel", "stride", "padding"), [*GEOMETRIES[:8], (5, 1, (2, 0, 1, 2)), (5, 2, (1, 2, 1, 2))])
@pytest.mark.parametrize("where", ["dz", "y", "u", "weight"])
@pytest.mark.parametrize("kind", ACTS)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf(special: float, kind: str, where: str, kernel: int, stride: int, padding: Padding) -> None:
    """In the middle and in the corners: they reach what they are multiplied with, and nothing else."""
    args = inputs(torch.float32, 8, (1, 8, 7), kernel, stride, padding, kind=kind)
    dz, y, grad_bn, u, bn, act, _, weight, *_ = args
    x = {"dz": dz, "y": y, "u": u, "weight": weight}[where]
    x[0, 0, 0, 0] = x[-1, 0, -1, -1] = special
    if where != "weight":
        x[0, 2, x.shape[2] // 2, x.shape[3] // 2] = special
    dz_u, grad_weight, grad_bn_u = ops.depthwise_backward(*args, True, True)
    dy = reference._conv_output_grad(dz.double(), y.double(), grad_bn.double())
    a = reference._norm_act(u.double(), bn.double(), act, 0.0)
    grad_a, expected_weight = literal_backward(dy, a, weight.double(), stride, padding)
    expected = reference._ACTIVATE_BACKWARD[act](reference._normalise(u.double(), bn.double()), grad_a, 0.0)
    assert_same_specials(dz_u, expected)
    assert_same_specials(grad_weight, expected_weight)
    finite = expected_weight.isfinite()
    assert_close(grad_weight[finite], expected_weight[finite], 1e-5)
    of_stored = reference._make_grad_bn(dz_u.double(), u.double(), bn.double(), True)
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
