"""Dense 3x3 convolution in Triton, backward, against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from combinations import in_turn
from conv_inputs import ALL_SIDES, DENSE, DTYPES, FLOAT32_AND_16_BITS, Dense, dense_backward_inputs
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    assert_close,
    is_channels_last_dense,
    random_bn,
    same_bits,
)

from mobilenet_ext.contract import NO_PADDING, Act, Padding, conv_output_size
from mobilenet_ext.triton import gpu, heuristics
from mobilenet_ext.triton.dense_backward import dense_backward

H100 = gpu.H100
TILED = (2, 3, 24, 13, 11, 2, ALL_SIDES)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per program, several programs, tiles that end outside the image, several blocks of every axis."""
    kernel = heuristics.config(num_warps=4, BLOCK_H=4, BLOCK_W=4, BLOCK_N=16, BLOCK_K=16)
    monkeypatch.setattr(heuristics, "dense_weight_gradient", lambda *_: ({"PROGRAMS": 4, "kernel": kernel},))
    kernel_input = heuristics.config(num_warps=4, BLOCK_H=8, BLOCK_W=8, BLOCK_C=16, BLOCK_N=16)
    monkeypatch.setattr(heuristics, "dense_input_gradient", lambda *_: kernel_input)


def check_backward(shape: Dense, dtype: torch.dtype, output: str = "statistics", alone: bool = False) -> None:
    """``alone``: each of the two gradients without the other, too."""
    args = dense_backward_inputs(shape, dtype, output)
    dz_u, grad_weight, grad_bn_u = dense_backward(*args, True, True)
    # The operands of the products are rounded to the activations' dtype; float32 products are exact to their order.
    exact = oracle.product_backward(*args)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 2e-4}[dtype]
    assert dz_u.dtype == dtype and is_channels_last_dense(dz_u)
    assert_close(dz_u, exact[0], TOLERANCE[dtype], "dz_u")
    assert grad_weight.dtype == torch.float32 and grad_weight.is_contiguous()
    assert_close(grad_weight, exact[1], ACC_TOLERANCE[dtype] if output == "plain" else tolerance, "grad_weight")
    assert grad_bn_u.shape == (0,) and grad_bn_u.dtype == torch.float32
    if not alone:
        return
    only_weight = dense_backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[0].dtype == dtype and same_bits(only_weight[1], grad_weight)
    only_input = dense_backward(*args, True, False)
    assert same_bits(only_input[0], dz_u) and only_input[1].shape == (0,)


@in_turn("shape, dtype", DENSE, *FLOAT32_AND_16_BITS)
def test_backward(shape: Dense, dtype: torch.dtype) -> None:
    check_backward(shape, dtype)


@in_turn("output, dtype", ["statistics", "running", "plain"], *FLOAT32_AND_16_BITS)
def test_backward_with_and_without_batch_statistics(output: str, dtype: torch.dtype) -> None:
    check_backward((1, 3, 8, 9, 8, 2, ALL_SIDES), dtype, output, alone=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles(dtype: torch.dtype, small_blocks: None) -> None:
    check_backward(TILED, dtype)


def test_a_normalisation_on_load_is_refused() -> None:
    args = dense_backward_inputs(TILED, torch.float32)
    with pytest.raises(ValueError, match="bn_u: expected None for a dense convolution, got a tensor of shape .5, 3."):
        dense_backward(*args[:4], random_bn(3, torch.float32), Act.RELU, *args[6:], True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_candidate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    n, channels, filters, h, w, *geometry = TILED
    out = conv_output_size(h, w, 3, *geometry)
    candidates = heuristics.dense_weight_gradient(n, *out, channels, filters, dtype.itemsize, H100)
    for config in candidates[1:]:
        monkeypatch.setattr(heuristics, "dense_weight_gradient", lambda *_, config=config: (config,))
        check_backward(TILED, dtype)


@in_turn("geometry, dtype", [(1, ALL_SIDES), (2, ALL_SIDES), (2, NO_PADDING)], torch.float32, [torch.bfloat16])
def test_nan_and_inf(geometry: tuple[int, Padding], dtype: torch.dtype, small_blocks: None) -> None:
    args = (*dense_backward_inputs((1, 3, 8, 10, 8, *geometry), dtype), True, True)
    dz, u = args[0], args[3]
    u[0, 0, 0, 0], u[0, 1, 7, 6], u[0, 2, 9, 7] = float("nan"), float("inf"), float("nan")
    dz[0, 1, 0, 0], dz[0, 2, 2, 2] = float("nan"), float("inf")
    for actual, expected in zip(dense_backward(*args), oracle.dense_backward(*args), strict=True):
        assert torch.equal(torch.isfinite(actual), torch.isfinite(expected))


def test_same_bits_again() -> None:
    args = (*dense_backward_inputs(TILED, torch.bfloat16), True, True)
    assert all(same_bits(a, b) for a, b in zip(dense_backward(*args), dense_backward(*args), strict=True))


def test_empty_batch() -> None:
    dz_u, grad_weight, _ = dense_backward(
        *dense_backward_inputs((0, 3, 8, 9, 9, 2, ALL_SIDES), torch.float32), True, True
    )
    assert dz_u.shape == (0, 3, 9, 9) and grad_weight.shape == (8, 3, 3, 3) and not grad_weight.any()
