"""Depthwise convolution in CUDA C++, backward, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from cpu_ops import (
    activation,
    assert_close,
    assert_same_specials,
    check_conv_backward,
    misaligned,
    random_bn,
    random_grad_bn,
    same_bits,
)
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.backends import reference

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [(1, (1, 9, 3)), (3, (2, 5, 7)), (8, (5, 1, 1)), (24, (3, 4, 4)), (40, (2, 13, 26))]  # channels, N, H and W
GEOMETRIES = list(product([1, 2], [0, 1]))
TILED = (40, (3, 21, 17))  # several chunks of rows an image, several tasks a program


def inputs(dtype, channels, size, stride, padding, *, normalise=True, output="stats") -> tuple[tuple, tuple]:
    """(h, y, grad_bn_y) and (u, bn_u, batch_stats_u, weight, stride, padding)."""
    n, h, w = size
    out = [(side + 2 * padding - 3) // stride + 1 for side in (h, w)]
    grad, y = (activation(n, channels, *out, dtype=dtype) for _ in range(2))
    of_y = {"stats": (y, random_grad_bn(channels, dtype)), "no stats": (None, random_grad_bn(channels, dtype))}
    bn_u = random_bn(channels, dtype) if normalise else None
    weight = torch.randn(channels, 1, 3, 3).to(dtype)
    u = activation(n, channels, h, w, dtype=dtype)
    return (grad, *of_y.get(output, (None, None))), (u, bn_u, True, weight, stride, padding)


@pytest.mark.parametrize(("stride", "padding"), GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(dtype: torch.dtype, stride: int, padding: int) -> None:
    for channels, size in CASES:
        if min(size[1:]) + 2 * padding >= 3:
            check_conv_backward("depthwise_backward", *inputs(dtype, channels, size, stride, padding))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("output", ["stats", "no stats", "plain"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [8, 3])
def test_without_optional_arguments(channels: int, stride: int, output: str, normalise: bool) -> None:
    args = inputs(torch.float32, channels, (2, 6, 5), stride, 1, normalise=normalise, output=output)
    check_conv_backward("depthwise_backward", *args)


@pytest.mark.parametrize("stride", [1, 2])
def test_running_statistics(stride: int) -> None:
    """bn_u of running statistics gets no gradient through them."""
    output, (u, bn_u, _, *rest) = inputs(torch.float32, 8, (2, 6, 5), stride, 1)
    check_conv_backward("depthwise_backward", output, (u, bn_u, False, *rest))


@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tasks(device: Callable[..., None], dtype: torch.dtype, stride: int, multiprocessors: int) -> None:
    device(multiprocessors=multiprocessors)
    check_conv_backward("depthwise_backward", *inputs(dtype, *TILED, stride, 1))


@pytest.mark.parametrize("stride", [1, 2])
def test_misaligned(stride: int) -> None:
    (h, y, grad_bn), (u, *rest) = inputs(torch.float16, 16, (2, 6, 5), stride, 1)
    for output, source in (((misaligned(h), y, grad_bn), u), ((h, misaligned(y), grad_bn), u)):
        check_conv_backward("depthwise_backward", output, (source, *rest))
    check_conv_backward("depthwise_backward", (h, y, grad_bn), (misaligned(u), *rest))


def literal_backward(dy: Tensor, a: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """The gradients of a and weight, summed over what exists: nothing is multiplied by padding."""
    grad_a, grad_weight = torch.zeros_like(a), torch.zeros_like(weight)
    height, width = a.shape[2:]
    for i, j, row, column in product(range(3), range(3), range(dy.shape[2]), range(dy.shape[3])):
        y, x = row * stride + i - padding, column * stride + j - padding
        if 0 <= y < height and 0 <= x < width:
            grad_a[:, :, y, x] += dy[:, :, row, column] * weight[:, 0, i, j]
            grad_weight[:, 0, i, j] += (dy[:, :, row, column] * a[:, :, y, x]).sum(0)
    return grad_a, grad_weight


@pytest.mark.parametrize(("stride", "padding"), GEOMETRIES)
@pytest.mark.parametrize("where", ["h", "y", "u", "weight"])
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_nan_and_inf(special: float, where: str, stride: int, padding: int) -> None:
    """In the middle and in the corners: they reach what they are multiplied with, and nothing else."""
    output, source = inputs(torch.float32, 8, (1, 8, 7), stride, padding)
    (h, y, grad_bn), (u, bn, _, weight, *_) = output, source
    x = {"h": h, "y": y, "u": u, "weight": weight}[where]
    x[0, 0, 0, 0] = x[-1, 0, -1, -1] = special
    if where != "weight":
        x[0, 2, x.shape[2] // 2, x.shape[3] // 2] = special
    h_u, grad_weight, grad_bn_u = ops.depthwise_backward(*output, *source, True, True)
    dy = reference._conv_output_grad(h.double(), y.double(), grad_bn.double())
    a = reference._activation(u.double(), bn.double())
    grad_a, expected_weight = literal_backward(dy, a, weight.double(), stride, padding)
    expected = grad_a.masked_fill(reference._normalise(u.double(), bn.double()) <= 0, 0)
    assert_same_specials(h_u, expected)
    assert_same_specials(grad_weight, expected_weight)
    finite = expected_weight.isfinite()
    assert_close(grad_weight[finite], expected_weight[finite], 1e-5)
    of_stored = reference._make_grad_bn(h_u.double(), u.double(), bn.double(), True)
    assert torch.equal(grad_bn_u.isfinite(), of_stored.isfinite())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    output, source = inputs(dtype, 8, (0, 5, 5), 1, 1)
    h_u, grad_weight, grad_bn_u = ops.depthwise_backward(*output, *source, True, True)
    assert h_u.shape == (0, 8, 5, 5) and not grad_weight.any()
    assert not grad_bn_u[[reference.GRAD_Y_COEFFICIENT, reference.GRAD_CONSTANT, reference.GRAD_GAMMA, reference.GRAD_BETA]].any()
    assert torch.equal(grad_bn_u[reference.GRAD_DZ_COEFFICIENT], source[1][reference.BN_SCALE])


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_each_run(device: Callable[..., None], dtype: torch.dtype, stride: int) -> None:
    """Also when the threads of a block run in another order: none reads what another has not written yet."""
    output, source = inputs(dtype, *TILED, stride, 1)
    first = ops.depthwise_backward(*output, *source, True, True)
    device(order=-1)
    second = ops.depthwise_backward(*output, *source, True, True)
    assert all(map(same_bits, first, second))
