"""Block inference in CUDA C++: depthwise and pointwise convolution in one kernel, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import BLOCKS, DTYPES, FLOAT32_AND_16_BITS, Block, block_inputs
from cpu_ops import (
    assert_close,
    assert_same_specials,
    is_channels_last_dense,
    misaligned,
    same_bits,
)

from mobilenet_ext import ops
from mobilenet_ext.contract import NO_PADDING, Act, Padding

pytestmark = pytest.mark.usefixtures("emulated")

# The intermediate activation is rounded to the activations' dtype, where the oracle keeps it in float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
# Several tiles per program, which end in the middle of an image and of a line.
TILED = [(3, 40, 72, 19, 15, 1), (3, 40, 40, 33, 39, 2), (3, 13, 70, 19, 15, 1)]
# Too many outputs, or channels, for one kernel.
TWO_KERNELS = [(1, 16, 264, 5, 5, 1), (1, 392, 8, 5, 4, 2)]


def check(args: tuple, tolerance: float | None = None) -> None:
    dtype = args[0].dtype
    y = ops.block_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, oracle.block_inference(*args), tolerance or TOLERANCE[dtype])


@in_turn("shape, dtype", [*BLOCKS, *TILED, *TWO_KERNELS], *FLOAT32_AND_16_BITS)
def test_block_inference(shape: Block, dtype: torch.dtype) -> None:
    check(block_inputs(shape, dtype))


@pytest.mark.parametrize("padding", [NO_PADDING, (0, 1, 0, 1), (1, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("shape", [BLOCKS[0], BLOCKS[1], *TWO_KERNELS], ids=str)
def test_padding(shape: Block, padding: Padding) -> None:
    check(block_inputs(shape, torch.float32, padding=padding))


@combinations("first, second, dtype, shape", Act, Act, DTYPES, [BLOCKS[1], (1, 3, 5, 7, 7, 1), TWO_KERNELS[0]])
def test_activations(first: Act, second: Act, dtype: torch.dtype, shape: Block) -> None:
    check(block_inputs(shape, dtype, first, second))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [BLOCKS[2], BLOCKS[7], TILED[0]], ids=str)
def test_before_sm_80(device: Callable[..., None], shape: Block, dtype: torch.dtype) -> None:
    device(capability=75)
    check(block_inputs(shape, dtype))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("shape", [BLOCKS[2], BLOCKS[7], TILED[0]], ids=str)
def test_tf32(shape: Block) -> None:
    check(block_inputs(shape, torch.float32), 1e-3)


@combinations("act, dtype, stride, filters", Act, DTYPES, [1, 2], [16, 13])
def test_nan_and_inf(act: Act, filters: int, stride: int, dtype: torch.dtype) -> None:
    args = block_inputs((1, 8, filters, 9, 9, stride), dtype, act, act)
    x = args[0]
    x[0, 0, 0, 0], x[0, 1, 8, 8] = float("nan"), float("nan")
    x[0, 2, 0, 8] = float("inf")
    assert_same_specials(ops.block_inference(*args), oracle.block_inference(*args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_threads(device: Callable[..., None], dtype: torch.dtype) -> None:
    """No thread reads what another has not written yet."""
    args = block_inputs(TILED[0], dtype)
    y = ops.block_inference(*args)
    device(order=-1)
    assert same_bits(ops.block_inference(*args), y)


def test_empty_batch() -> None:
    assert ops.block_inference(*block_inputs((0, 8, 16, 9, 9, 2), torch.float32)).shape == (0, 16, 5, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(dtype: torch.dtype) -> None:
    """Tensors that start one element into their storage."""
    args = block_inputs((1, 16, 24, 9, 16, 1), dtype)
    expected = ops.block_inference(*args)
    for i in (0, 1, 3, 6, 8):
        assert same_bits(ops.block_inference(*args[:i], misaligned(args[i]), *args[i + 1 :]), expected)
