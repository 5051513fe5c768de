"""The fused depthwise-separable block in CUDA, on the emulated device, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cpu_ops import (
    activation,
    assert_close,
    assert_same_specials,
    in_float64,
    is_channels_last_dense,
    random_bn,
    same_bits,
)
from torch import Tensor

from mobilenet_ext import ops
from mobilenet_ext.backends import reference

pytestmark = pytest.mark.usefixtures("emulated")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The intermediate activation is rounded to the activations' dtype, where the reference keeps it in float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# (n, channels, filters, h, w, stride)
SHAPES = [
    (1, 8, 16, 9, 7, 1),
    (2, 32, 24, 8, 10, 2),
    (1, 3, 1, 7, 7, 2),
    (2, 24, 40, 5, 6, 1),
    (3, 1, 3, 4, 4, 1),
    (2, 40, 8, 1, 1, 2),
    (1, 16, 72, 2, 11, 1),
    (1, 72, 136, 4, 4, 1),
]
# Several tiles a program, which end in the middle of an image and of a line.
TILED = [(3, 40, 72, 19, 15, 1), (3, 40, 40, 33, 39, 2), (3, 13, 70, 19, 15, 1)]
# Too many outputs, or channels, for one kernel.
TWO_KERNELS = [(1, 16, 264, 5, 5, 1), (1, 392, 8, 5, 4, 2)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    n, c, filters, h, w, stride = shape
    return (
        activation(n, c, h, w, dtype=dtype),
        random_bn(c, dtype),
        torch.randn(c, 1, 3, 3, dtype=torch.float64).div(3).to(dtype),
        stride,
        random_bn(filters, dtype),
        (torch.randn(filters, c, 1, 1, dtype=torch.float64) / c**0.5).to(dtype),
    )


def check(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float | None = None) -> None:
    args = inputs(shape, dtype)
    y = ops.block_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, *in_float64(reference.block_inference, args), tolerance or TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *TILED, *TWO_KERNELS], ids=str)
def test_block_inference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[7], TILED[0]], ids=str)
def test_before_sm_80(device: Callable[..., None], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    device(capability=75)
    check(shape, dtype)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products of float32 may round their operands."""
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = precision


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[7], TILED[0]], ids=str)
def test_tf32(shape: tuple[int, ...]) -> None:
    check(shape, torch.float32, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("filters", [16, 13])
def test_nan_and_inf(dtype: torch.dtype, stride: int, filters: int) -> None:
    args = inputs((1, 8, filters, 9, 9, stride), dtype)
    x = args[0]
    x[0, 0, 0, 0], x[0, 1, 8, 8] = float("nan"), float("nan")
    x[0, 2, 0, 8] = float("inf")
    assert_same_specials(ops.block_inference(*args), reference.block_inference(*args).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_threads(device: Callable[..., None], dtype: torch.dtype) -> None:
    """No thread reads what another has not written yet."""
    args = inputs(TILED[0], dtype)
    y = ops.block_inference(*args)
    device(order=-1)
    assert same_bits(ops.block_inference(*args), y)


def test_empty_batch() -> None:
    assert ops.block_inference(*inputs((0, 8, 16, 9, 9, 2), torch.float32)).shape == (0, 16, 5, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    """Tensors that start one element into their storage."""
    args = list(inputs((1, 16, 24, 9, 16, 1), dtype))
    expected = ops.block_inference(*args)

    def shifted(x: Tensor) -> Tensor:
        out = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride())
        return out.copy_(x)

    for i in (0, 1, 2, 4, 5):
        got = ops.block_inference(*args[:i], shifted(args[i]), *args[i + 1 :])
        assert same_bits(got, expected)
