"""Pointwise convolution in Triton, forward and inference, against the oracle."""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import DTYPES, FLOAT32_AND_16_BITS, pointwise_weight
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
)

from mobilenet_ext.contract import BN_MEAN, BN_ROWS, BN_VAR, NO_PADDING, Act
from mobilenet_ext.triton import gpu, heuristics
from mobilenet_ext.triton.pointwise_forward import pointwise_forward, pointwise_inference

H100 = gpu.H100
CHANNELS = [(1, 3), (3, 1), (8, 24), (24, 40), (40, 136), (136, 8)]


def blocks(m: int, n: int, k: int, **constants: bool) -> heuristics.Config:
    return heuristics.config(num_warps=4, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **constants)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per program, several programs, several blocks of channels."""
    config = {"PROGRAMS": 2, "STORED_A": False, "TMA": False, "kernel": blocks(32, 16, 16, WHOLE_K=False, FOLD=True)}
    monkeypatch.setattr(heuristics, "pointwise_forward", lambda *_: (config,))


@pytest.fixture
def stored_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``small_blocks``; what is normalised is stored before the product."""

    def pointwise_forward(*problem: int) -> tuple[heuristics.Config]:
        normalised = problem[5]
        kernel = blocks(32, 16, 16, WHOLE_K=False, FOLD=True)
        return ({"PROGRAMS": 2, "STORED_A": normalised, "TMA": False, "kernel": kernel},)

    monkeypatch.setattr(heuristics, "pointwise_forward", pointwise_forward)


@pytest.fixture
def whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """All channels in one block, several tiles per program and several programs."""
    config = {"PROGRAMS": 2, "STORED_A": False, "TMA": False, "kernel": blocks(64, 64, 64, WHOLE_K=True, FOLD=True)}
    monkeypatch.setattr(heuristics, "pointwise_forward", lambda *_: (config,))


BLOCKS = ["small_blocks", "stored_operand", "whole_weight"]


def check_forward(
    channels: int, outputs: int, dtype: torch.dtype, plain: bool = False, affine: bool = True,
    size: tuple = (1, 9, 11), act: Act = Act.RELU, alone: bool = False,
) -> None:  # fmt: skip
    """``alone``: y without its statistics, too."""
    u = activation(size[0], channels, *size[1:], dtype=dtype)
    bn_u, weight = None if plain else random_bn(channels, dtype), pointwise_weight(channels, outputs, dtype)
    gamma, beta = (torch.rand(outputs) + 0.5, torch.randn(outputs)) if affine else (None, None)
    bias = beta.flip(0) if affine else None
    args = (u, bn_u, Act.LINEAR if plain else act, weight, 1, NO_PADDING, gamma, beta, 1e-5)
    y, bn = pointwise_forward(*args, True, bias)
    assert y.dtype == dtype and is_channels_last_dense(y)
    # In 16 bits it comes from two roundings: of an operand, and of itself.
    bound = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 1.5)
    assert_close(y, oracle.pointwise_forward(*args, True, bias)[0], bound, "y")
    assert bn.shape == (BN_ROWS, outputs)
    assert_statistics(bn, y, gamma, beta, 1e-5)
    if alone:
        again, nothing = pointwise_forward(*args, False, bias)
        assert torch.equal(again, y) and nothing.shape == (0,) and nothing.dtype == torch.float32


@in_turn("channels_and_outputs, dtype", CHANNELS, *FLOAT32_AND_16_BITS)
def test_shapes(channels_and_outputs: tuple[int, int], dtype: torch.dtype) -> None:
    check_forward(*channels_and_outputs, dtype)


@combinations("act, dtype, blocks_of", Act, DTYPES, BLOCKS)
def test_several_tiles_and_blocks(act: Act, dtype: torch.dtype, blocks_of: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(blocks_of)
    check_forward(24, 40, dtype, size=(2, 11, 12) if blocks_of == "whole_weight" else (1, 9, 11), act=act)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_optional_arguments(plain: bool, affine: bool) -> None:
    check_forward(24, 8, torch.float32, plain, affine, size=(1, 4, 5), alone=True)


@combinations("act, dtype, bn, channels_and_outputs", Act, DTYPES, [True, False], [(24, 40), (136, 3)])
def test_inference(act: Act, dtype: torch.dtype, bn: bool, channels_and_outputs: tuple[int, int]) -> None:
    channels, outputs = channels_and_outputs
    x = activation(2, channels, 5, 7, dtype=dtype)
    args = (
        x,
        random_bn(outputs, dtype) if bn else None,
        act,
        pointwise_weight(channels, outputs, dtype),
        1,
        NO_PADDING,
    )
    y = pointwise_inference(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, oracle.pointwise_inference(*args), TOLERANCE[dtype])


@pytest.mark.parametrize("setting", [{"stride": 2}, {"padding": (0, 0, 1, 0)}])
def test_what_a_pointwise_convolution_has_not_is_refused(setting: dict[str, Any]) -> None:
    geometry = {"stride": 1, "padding": NO_PADDING, **setting}
    ((name, value),) = setting.items()
    message = f"{name}: expected .* for a pointwise convolution, got {re.escape(str(value))}"
    x, weight = activation(1, 8, 3, 3, dtype=torch.float32), pointwise_weight(8, 3, torch.float32)
    with pytest.raises(ValueError, match=message):
        pointwise_inference(x, None, Act.LINEAR, weight, **geometry)
    with pytest.raises(ValueError, match=message):
        pointwise_forward(x, None, Act.LINEAR, weight, **geometry, gamma=None, beta=None, eps=1e-5, stats=True)


@pytest.mark.parametrize("blocks_of", BLOCKS)
def test_large_mean(blocks_of: str, request: pytest.FixtureRequest) -> None:
    """The variance of y survives a channel mean of 1e4 with standard deviation 1."""
    request.getfixturevalue(blocks_of)
    u = activation(2, 1, 12, 13, dtype=torch.float32, mean=1e4)
    weight = torch.tensor([1.0, 0.5, -1.0]).view(3, 1, 1, 1)
    y, bn = pointwise_forward(u, None, Act.LINEAR, weight, 1, NO_PADDING, None, None, 1e-5, True)
    expected = oracle.batch_bn(y, None, None, 1e-5)
    assert_close(bn[BN_VAR], expected[BN_VAR], 1e-5, "variance")
    assert_close(bn[BN_MEAN], expected[BN_MEAN], 1e-7, "mean")


@combinations("act, special, blocks_of", Act, [float("nan"), float("inf"), float("-inf")], BLOCKS)
def test_nonfinite(act: Act, special: float, blocks_of: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(blocks_of)
    u = activation(1, 8, 9, 9, dtype=torch.float32)
    u[0, 2, 3, 4] = special
    weight = pointwise_weight(8, 3, torch.float32)
    args = (u, random_bn(8, torch.float32), act, weight, 1, NO_PADDING, None, None, 1e-5, True)
    y, bn = pointwise_forward(*args)
    assert_same_specials(y, oracle.pointwise_forward(*args)[0])
    if not y.isfinite().all():
        assert not bn[BN_VAR].isfinite().any()  # a variance that a gradient scaler notices


def test_empty_batch() -> None:
    u, bn_u, weight = (
        torch.empty(0, 8, 4, 4),
        random_bn(8, torch.float32),
        pointwise_weight(8, 3, torch.float32),
    )
    args = (u, bn_u, Act.RELU, weight, 1, NO_PADDING, None, None, 1e-5, True)
    for actual, expected in zip(pointwise_forward(*args), oracle.pointwise_forward(*args), strict=True):
        torch.testing.assert_close(actual.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_candidates_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for choice in heuristics.pointwise_forward(90, 40, 32, dtype.itemsize, False, True, False, H100):
        monkeypatch.setattr(heuristics, "pointwise_forward", lambda *_, choice=choice: (choice,))
        check_forward(40, 32, dtype, size=(1, 9, 10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocks_of", BLOCKS)
def test_error_in_16_bits(dtype: torch.dtype, blocks_of: str, request: pytest.FixtureRequest) -> None:
    """At most 1.5 times the error of PyTorch's own path, which rounds a and y to 16 bits."""
    request.getfixturevalue(blocks_of)
    u, bn_u, weight = (
        activation(2, 40, 12, 12, dtype=dtype),
        random_bn(40, dtype),
        pointwise_weight(40, 24, dtype),
    )
    args = (u, bn_u, Act.RELU, weight, 1, NO_PADDING, None, None, 1e-5, False)
    expected = oracle.pointwise_forward(*args)[0]
    own = torch.nn.functional.conv2d(oracle.norm_act(u, bn_u, Act.RELU).to(dtype), weight)
    assert relative_error(pointwise_forward(*args)[0], expected) <= 1.5 * relative_error(own, expected)


def test_squares_that_overflow(small_blocks: None) -> None:
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("pointwise", 8, torch.float32)
    y, bn = pointwise_forward(u, None, Act.LINEAR, weight, 1, NO_PADDING, None, None, 1e-5, True)
    check_overflowed(bn, y)
