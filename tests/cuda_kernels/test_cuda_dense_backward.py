"""Dense 3x3 convolution in CUDA C++, backward, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from combinations import in_turn
from conv_inputs import ALL_SIDES, DTYPES, FLOAT32_AND_16_BITS, Dense, dense_backward_inputs
from convolutions import check_backward
from cpu_ops import random_bn, same_bits
from test_cuda_dense_forward import SHAPES, TILED

from mobilenet_ext import ops
from mobilenet_ext.contract import Act

pytestmark = pytest.mark.usefixtures("emulated")


@in_turn("shape, dtype", [*SHAPES, TILED], *FLOAT32_AND_16_BITS)
def test_backward(shape: Dense, dtype: torch.dtype) -> None:
    check_backward("dense_backward", *dense_backward_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", ["running", "plain"])
def test_without_batch_statistics(dtype: torch.dtype, output: str) -> None:
    check_backward("dense_backward", *dense_backward_inputs((1, 3, 8, 9, 8, 2, ALL_SIDES), dtype, output))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_before_sm_80(device: Callable[..., None], dtype: torch.dtype) -> None:
    device(capability=75)
    check_backward("dense_backward", *dense_backward_inputs(SHAPES[0], dtype))


def test_an_input_that_is_not_plain_is_refused() -> None:
    args = list(dense_backward_inputs(SHAPES[0], torch.float32))
    args[4:6] = random_bn(3, torch.float32), Act.RELU
    with pytest.raises(RuntimeError):
        ops.dense_backward(*args, True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype) -> None:
    args = dense_backward_inputs((0, 3, 8, 9, 9, 2, ALL_SIDES), dtype)
    dz_u, grad_weight, _ = ops.dense_backward(*args, True, True)
    assert dz_u.shape == (0, 3, 9, 9) and grad_weight.shape == (8, 3, 3, 3) and not grad_weight.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_each_run(device: Callable[..., None], dtype: torch.dtype) -> None:
    """Also when the threads of a block run in another order: none reads what another has not written yet."""
    args = dense_backward_inputs(TILED, dtype)
    first = ops.dense_backward(*args, True, True)
    device(order=-1)
    assert all(map(same_bits, first[:2], ops.dense_backward(*args, True, True)))
