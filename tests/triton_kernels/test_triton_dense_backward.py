"""Dense 3x3 convolution in Triton, backward, against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from combinations import in_turn
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    is_channels_last_dense,
    random_bn,
    random_grad_bn,
    same_bits,
)
from torch import Tensor

from mobilenet_ext.contract import NO_PADDING, Act, Padding, conv_output_size
from mobilenet_ext.triton import gpu, heuristics
from mobilenet_ext.triton.dense_backward import dense_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
H100 = gpu.H100
Shape = tuple[int | Padding, ...]
ONE = (1, 1, 1, 1)  # on each side
# (n, channels, filters, h, w, stride, padding)
SHAPES = [
    (2, 3, 32, 9, 11, 2, ONE),
    (1, 3, 8, 9, 7, 1, NO_PADDING),
    (2, 1, 24, 6, 8, 1, ONE),
    (1, 4, 3, 10, 8, 2, NO_PADDING),
    (1, 8, 40, 4, 5, 1, ONE),
    (3, 3, 16, 1, 1, 2, ONE),
    (1, 2, 1, 3, 3, 1, NO_PADDING),
    (1, 3, 8, 6, 8, 2, (0, 1, 0, 1)),  # TensorFlow's "same"
    (1, 3, 4, 2, 5, 1, (2, 0, 1, 2)),
    (1, 3, 4, 5, 2, 2, (1, 2, 2, 0)),
]
TILED = (2, 3, 24, 13, 11, 2, ONE)
FLOAT32_AND_16_BITS = (DTYPES[0], DTYPES[1:])  # which differ in no more than the conversions


def out_sizes(shape: Shape) -> tuple[int, int]:
    *_, h, w, stride, padding = shape
    return conv_output_size(h, w, 3, stride, padding)


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """dz, y, grad_bn_y, u and weight."""
    n, c, filters, h, w, _, _ = shape
    weight = (torch.randn(filters, c, 3, 3, dtype=torch.float64) / (9 * c) ** 0.5).to(dtype)
    dz, y = (activation(n, filters, *out_sizes(shape), dtype=dtype) for _ in range(2))
    return dz, y, random_grad_bn(filters, dtype), activation(n, c, h, w, dtype=dtype), weight


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per program, several programs, tiles that end outside the image, several blocks of every axis."""
    kernel = heuristics.config(num_warps=4, BLOCK_H=4, BLOCK_W=4, BLOCK_N=16, BLOCK_K=16)
    monkeypatch.setattr(heuristics, "dense_weight_gradient", lambda *_: ({"PROGRAMS": 4, "kernel": kernel},))
    kernel_input = heuristics.config(num_warps=4, BLOCK_H=8, BLOCK_W=8, BLOCK_C=16, BLOCK_N=16)
    monkeypatch.setattr(heuristics, "dense_input_gradient", lambda *_: kernel_input)


def check_backward(
    shape: Shape, dtype: torch.dtype, with_y: bool = True, with_bn: bool = True, alone: bool = False
) -> None:
    """``alone``: each of the two gradients without the other, too."""
    dz, y, grad_bn_y, u, weight = inputs(shape, dtype)
    output = (dz, y if with_y else None, grad_bn_y if with_bn else None)
    source = (u, None, Act.LINEAR, False, weight, *shape[5:])
    dz_u, grad_weight, grad_bn_u = dense_backward(*output, *source, True, True)
    # The operands of the products are rounded to the activations' dtype; float32 products are exact to their order.
    dy = oracle.output_grad(*output)
    exact = oracle.dense_backward(dy.to(dtype), None, None, *source, True, True)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 2e-4}[dtype]
    assert dz_u.dtype == dtype and is_channels_last_dense(dz_u)
    assert_close(dz_u, exact[0], TOLERANCE[dtype], "dz_u")
    assert grad_weight.dtype == torch.float32 and grad_weight.is_contiguous()
    assert_close(grad_weight, exact[1], tolerance if with_bn else ACC_TOLERANCE[dtype], "grad_weight")
    assert grad_bn_u.shape == (0,) and grad_bn_u.dtype == torch.float32
    if not alone:
        return
    only_weight = dense_backward(*output, *source, False, True)
    assert only_weight[0].shape == (0,) and only_weight[0].dtype == dtype and same_bits(only_weight[1], grad_weight)
    only_input = dense_backward(*output, *source, True, False)
    assert same_bits(only_input[0], dz_u) and only_input[1].shape == (0,)


@in_turn("shape, dtype", SHAPES, *FLOAT32_AND_16_BITS)
def test_backward(shape: Shape, dtype: torch.dtype) -> None:
    check_backward(shape, dtype)


@in_turn("given, dtype", [(True, True), (False, True), (True, False), (False, False)], *FLOAT32_AND_16_BITS)
def test_backward_with_and_without_batch_statistics(given: tuple[bool, bool], dtype: torch.dtype) -> None:
    check_backward((1, 3, 8, 9, 8, 2, ONE), dtype, *given, alone=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles(dtype: torch.dtype, small_blocks: None) -> None:
    check_backward(TILED, dtype)


def test_a_normalisation_on_load_is_refused() -> None:
    dz, _, _, u, weight = inputs(TILED, torch.float32)
    with pytest.raises(ValueError, match="bn_u: expected None for a dense convolution, got a tensor of shape .5, 3."):
        dense_backward(dz, None, None, u, random_bn(3, u.dtype), Act.RELU, True, weight, 2, ONE, True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_candidate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _, channels, filters, *_ = TILED
    candidates = heuristics.dense_weight_gradient(2, *out_sizes(TILED), channels, filters, dtype.itemsize, H100)
    for config in candidates[1:]:
        monkeypatch.setattr(heuristics, "dense_weight_gradient", lambda *_, config=config: (config,))
        check_backward(TILED, dtype)


@in_turn("geometry, dtype", [(1, ONE), (2, ONE), (2, NO_PADDING)], torch.float32, [torch.bfloat16])
def test_nan_and_inf(geometry: tuple[int, Padding], dtype: torch.dtype, small_blocks: None) -> None:
    stride, padding = geometry
    dz, y, grad_bn_y, u, weight = inputs((1, 3, 8, 10, 8, stride, padding), dtype)
    u[0, 0, 0, 0], u[0, 1, 7, 6], u[0, 2, 9, 7] = float("nan"), float("inf"), float("nan")
    dz[0, 1, 0, 0], dz[0, 2, 2, 2] = float("nan"), float("inf")
    args = (dz, y, grad_bn_y, u, None, Act.LINEAR, False, weight, stride, padding, True, True)
    for actual, expected in zip(dense_backward(*args), oracle.dense_backward(*args), strict=True):
        assert torch.equal(torch.isfinite(actual), torch.isfinite(expected))


def test_same_bits_again() -> None:
    dz, y, grad_bn_y, u, weight = inputs(TILED, torch.bfloat16)
    args = (dz, y, grad_bn_y, u, None, Act.LINEAR, False, weight, 2, ONE, True, True)
    assert all(same_bits(a, b) for a, b in zip(dense_backward(*args), dense_backward(*args), strict=True))


def test_empty_batch() -> None:
    dz, y, grad_bn_y, u, weight = inputs((0, 3, 8, 9, 9, 2, ONE), torch.float32)
    args = (dz, y, grad_bn_y, u, None, Act.LINEAR, False, weight, 2, ONE, True, True)
    dz_u, grad_weight, _ = dense_backward(*args)
    assert dz_u.shape == u.shape and grad_weight.shape == weight.shape and not grad_weight.any()
