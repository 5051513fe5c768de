"""Dense 3x3 convolution in Triton, forward and inference, against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import ALL_SIDES, DENSE, DTYPES, FLOAT32_AND_16_BITS, Dense, dense_inputs
from cpu_ops import (
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    assert_statistics,
    check_overflowed,
    copying_weight,
    is_channels_last_dense,
    overflowing,
    random_bn,
    relative_error,
    same_bits,
)

from mobilenet_ext.contract import BN_MEAN, BN_SHIFT, BN_VAR, NO_PADDING, Act, Padding, conv_output_size
from mobilenet_ext.triton import gpu, heuristics
from mobilenet_ext.triton.dense_forward import dense_forward, dense_inference

H100 = gpu.H100
TILED = (2, 3, 24, 13, 11, 2, ALL_SIDES)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per program, several programs, tiles that end outside the image, several blocks of every axis."""
    kernel = heuristics.config(num_warps=4, BLOCK_H=4, BLOCK_W=4, BLOCK_N=16, BLOCK_K=16)
    monkeypatch.setattr(heuristics, "dense_forward", lambda *_: ({"PROGRAMS": 4, "kernel": kernel},))


def check_forward(shape: Dense, dtype: torch.dtype) -> None:
    gamma, beta = torch.rand(shape[2]) + 0.5, torch.randn(shape[2])
    bias = beta.flip(0) if shape[1] != 3 else None
    args = (*dense_inputs(shape, dtype), gamma, beta, 1e-5, True, bias)
    y, bn_y = dense_forward(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, oracle.dense_forward(*args)[0], TOLERANCE[dtype], "y")
    assert_statistics(bn_y, y, gamma, beta, 1e-5)


@in_turn("shape, dtype", DENSE, *FLOAT32_AND_16_BITS)
def test_forward(shape: Dense, dtype: torch.dtype) -> None:
    check_forward(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles(dtype: torch.dtype, small_blocks: None) -> None:
    check_forward(TILED, dtype)


@combinations("act, dtype, with_bn", Act, DTYPES, [True, False])
def test_inference(act: Act, dtype: torch.dtype, with_bn: bool) -> None:
    x, _, _, *rest = dense_inputs(TILED, dtype)
    args = (x, random_bn(TILED[2], dtype) if with_bn else None, act, *rest)
    y = dense_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, oracle.dense_inference(*args), TOLERANCE[dtype])


def test_a_normalisation_on_load_is_refused() -> None:
    u, _, _, *rest = dense_inputs(TILED, torch.float32)
    with pytest.raises(ValueError, match="bn_u: expected None for a dense convolution, got a tensor of shape .5, 3."):
        dense_forward(u, random_bn(3, u.dtype), Act.RELU, *rest, None, None, 1e-5, True)
    with pytest.raises(ValueError, match="act_u: expected 0 .linear. without bn_u, got 1"):
        dense_forward(u, None, Act.RELU, *rest, None, None, 1e-5, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_candidate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    n, channels, filters, h, w, *geometry = TILED
    out = conv_output_size(h, w, 3, *geometry)
    for config in heuristics.dense_forward(n, *out, channels, filters, dtype.itemsize, H100)[1:]:
        monkeypatch.setattr(heuristics, "dense_forward", lambda *_, config=config: (config,))
        check_forward(TILED, dtype)


def test_no_statistics_and_no_affine() -> None:
    args = (*dense_inputs(TILED, torch.float32), None, None, 1e-3)
    y, bn = dense_forward(*args, True)
    plain, empty = dense_forward(*args, False)
    assert same_bits(y, plain) and empty.shape == (0,) and empty.dtype == torch.float32
    assert_close(bn, oracle.batch_bn(y, None, None, 1e-3), 1e-5)


def test_statistics_survive_a_large_mean(small_blocks: None) -> None:
    u = activation(2, 8, 13, 11, dtype=torch.float32, mean=1e4)
    weight = copying_weight("dense", 8, torch.float32)
    y, bn = dense_forward(u, None, Act.LINEAR, weight, 1, ALL_SIDES, None, None, 1e-5, True)
    assert torch.equal(y, u)
    assert relative_error(bn[BN_MEAN], u.double().mean((0, 2, 3))) < 1e-7
    assert relative_error(bn[BN_VAR], u.double().var((0, 2, 3), correction=0)) < 1e-5


@in_turn("geometry, dtype", [(1, ALL_SIDES), (2, ALL_SIDES), (2, NO_PADDING)], torch.float32, [torch.bfloat16])
def test_nan_and_inf(geometry: tuple[int, Padding], dtype: torch.dtype, small_blocks: None) -> None:
    args = dense_inputs((1, 3, 8, 10, 8, *geometry), dtype)
    u = args[0]
    u[0, 0, 0, 0], u[0, 1, 7, 6], u[0, 2, 9, 7] = float("nan"), float("inf"), float("nan")
    forward = (*args, None, None, 1e-5, False)
    assert_same_specials(dense_forward(*forward)[0], oracle.dense_forward(*forward)[0])
    inference = (u, random_bn(8, dtype), Act.RELU, *args[3:])
    assert_same_specials(dense_inference(*inference), oracle.dense_inference(*inference))


def test_same_bits_again() -> None:
    args = (*dense_inputs(TILED, torch.bfloat16), torch.rand(TILED[2]), torch.randn(TILED[2]), 1e-5, True)
    assert all(same_bits(a, b) for a, b in zip(dense_forward(*args), dense_forward(*args), strict=True))


def test_empty_batch() -> None:
    args = dense_inputs((0, 3, 8, 9, 9, 2, ALL_SIDES), torch.float32)
    y, bn_y = dense_forward(*args, None, None, 1e-5, True)
    assert y.shape == (0, 8, 5, 5) and not bn_y[[BN_MEAN, BN_SHIFT, BN_VAR]].any()
    assert dense_inference(args[0], random_bn(8, torch.float32), Act.RELU, *args[3:]).shape == y.shape


def test_squares_that_overflow(small_blocks: None) -> None:
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("dense", 8, torch.float32)
    y, bn = dense_forward(u, None, Act.LINEAR, weight, 1, ALL_SIDES, None, None, 1e-5, True)
    check_overflowed(bn, y)
