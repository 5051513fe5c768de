"""Normalising and activating in Triton, alone and with pooling, against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
from combinations import combinations
from conv_inputs import DTYPES
from cpu_ops import (
    TOLERANCE,
    activation,
    assert_close,
    assert_grad_bn,
    assert_same_specials,
    is_channels_last_dense,
    random_bn,
)

from mobilenet_ext.contract import BN_MEAN, Act
from mobilenet_ext.triton import heuristics
from mobilenet_ext.triton.activation import gates
from mobilenet_ext.triton.norm_act import norm_act_backward, norm_act_forward

SHAPES = [(2, 32, 7, 7), (1, 24, 5, 9), (3, 1, 4, 4), (2, 3, 9, 5), (1, 200, 1, 1), (2, 72, 10, 13)]
pooled = pytest.mark.parametrize("pool", [False, True], ids=["whole", "pooled"])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per program and image, several programs, and tiles that end outside the matrix."""
    choice = {"PROGRAMS": 3, "kernel": heuristics.config(num_warps=4, BLOCK_M=16, BLOCK_C=16)}
    monkeypatch.setattr(heuristics, "norm_act", lambda *_: (choice,))
    monkeypatch.setattr(heuristics, "norm_act_pool", lambda *_: (choice,))


def check(
    shape: tuple[int, ...], dtype: torch.dtype, pool: bool, act: Act = Act.RELU, batch_stats: bool = True,
    mean: float = 0.0,
) -> None:  # fmt: skip
    y, bn = activation(*shape, dtype=dtype), random_bn(shape[1], dtype)
    grad = activation(*shape[:2], *((1, 1) if pool else shape[2:]), dtype=dtype)
    if mean:
        y, bn[BN_MEAN] = y + mean, bn[BN_MEAN] + mean
    out = norm_act_forward(y, bn, act, pool)
    assert out.dtype == dtype and is_channels_last_dense(out)
    assert_close(out, oracle.norm_act_forward(y, bn, act, pool), TOLERANCE[dtype])
    dz, grad_bn = norm_act_backward(grad, y, bn, act, batch_stats, pool)
    expected, _ = oracle.norm_act_backward(grad, y, bn, act, batch_stats, pool)
    assert dz.dtype == dtype and is_channels_last_dense(dz)
    if gates(act) and not pool:
        assert torch.equal(dz.double(), expected)
    else:
        assert_close(dz, expected, TOLERANCE[dtype])
    assert_grad_bn(grad_bn, dz, y, bn, batch_stats)


@combinations(
    "shape, dtype, act_and_statistics, pool",
    SHAPES,
    DTYPES,
    [(Act.RELU, True), (Act.LINEAR, True), (Act.RELU, False)],
    [False, True],
)
def test_norm_act(shape: tuple[int, ...], dtype: torch.dtype, act_and_statistics: tuple[Act, bool], pool: bool) -> None:
    check(shape, dtype, pool, *act_and_statistics)


@combinations("act, dtype, pool, shape", Act, DTYPES, [False, True], [(2, 3, 6, 6), (5, 40, 7, 9)])
def test_several_tiles(act: Act, dtype: torch.dtype, pool: bool, shape: tuple[int, ...], small_blocks: None) -> None:
    check(shape, dtype, pool, act)


@pooled
def test_large_mean(pool: bool, small_blocks: None) -> None:
    check((2, 24, 8, 8), torch.float32, pool, mean=1e4)


@pytest.mark.parametrize("config", heuristics.norm_act(1000, 40, 2, 132), ids=str)
def test_every_candidate(config: heuristics.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "norm_act", lambda *_: (config,))
    check((2, 40, 20, 25), torch.bfloat16, False)


@pytest.mark.parametrize("config", heuristics.norm_act_pool(4, 49, 200, 2, 132), ids=str)
def test_every_candidate_with_pooling(config: heuristics.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "norm_act_pool", lambda *_: (config,))
    check((4, 200, 7, 7), torch.bfloat16, True)


@combinations("act, dtype, pool", Act, DTYPES, [False, True])
def test_nan_and_inf(act: Act, dtype: torch.dtype, pool: bool) -> None:
    y, bn = activation(2, 16, 3, 3, dtype=dtype), random_bn(16, dtype)
    grad = activation(2, 16, *((1, 1) if pool else (3, 3)), dtype=dtype)
    y[0, 1, 0, 0] = float("nan")
    y[0, 2, 1, 1] = float("inf")
    y[0, 3, 2, 2] = -float("inf")
    grad[0, 4, 0, 0], grad[0, 5, 0, 0] = float("inf"), float("nan")
    args = (y, bn, act, pool)
    assert_same_specials(norm_act_forward(*args), oracle.norm_act_forward(*args))
    args = (grad, y, bn, act, True, pool)
    expected = oracle.norm_act_backward(*args)
    for ours, theirs in zip(norm_act_backward(*args), expected, strict=True):
        assert_same_specials(ours, theirs)


@pooled
def test_empty_batch(pool: bool) -> None:
    y, bn = activation(0, 8, 4, 4, dtype=torch.float32), random_bn(8, torch.float32)
    out = norm_act_forward(y, bn, Act.RELU, pool)
    assert out.shape == ((0, 8, 1, 1) if pool else y.shape)
    args = (out, y, bn, Act.RELU, True, pool)
    dz, grad_bn = norm_act_backward(*args)
    assert dz.shape == y.shape and torch.equal(grad_bn.double(), oracle.norm_act_backward(*args)[1])
