"""Pointwise convolution in Triton, backward, against the oracle."""

from __future__ import annotations

from itertools import product

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import DTYPES, FLOAT32_AND_16_BITS, pointwise_weight
from cpu_ops import (
    TOLERANCE,
    activation,
    assert_close,
    assert_grad_bn,
    assert_same_specials,
    is_channels_last_dense,
    random_bn,
    random_grad_bn,
    relative_error,
)
from torch import Tensor

from mobilenet_ext.contract import NO_PADDING, Act
from mobilenet_ext.triton import gpu, heuristics
from mobilenet_ext.triton.pointwise_backward import pointwise_backward

H100 = gpu.H100
CHANNELS = [(1, 3), (3, 1), (8, 24), (24, 40), (40, 136), (136, 8)]


def blocks(m: int, n: int, k: int, **constants: bool) -> heuristics.Config:
    return heuristics.config(num_warps=4, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **constants)


APART = {
    "STORED_DY": False,
    "input": {"PROGRAMS": 2, "TMA": False, "kernel": blocks(32, 16, 16, WHOLE_N=False, FOLD=True)},
    "weight": {"PROGRAMS": 3, "STORED_A": False, "TMA": False, "kernel": blocks(16, 16, 16)},
}
STORED = {**APART, "STORED_DY": True, "weight": {**APART["weight"], "STORED_A": True}}
ONE_PASS = {**APART, "both": {"PROGRAMS": 2, "TMA": False, "kernel": blocks(64, 64, 64, WHOLE_N=True, FOLD=True)}}


def choose(monkeypatch: pytest.MonkeyPatch, backward: dict[str, heuristics.Config]) -> None:
    """Replaces the heuristics; of ``backward`` that part is used which is needed."""

    def pointwise_backward(*problem: int) -> tuple[dict, ...]:
        *_, need_input, need_weight, _, _ = problem
        if need_input and need_weight and "both" in backward:
            return ({"STORED_DY": False, "input": backward["both"], "weight": None},)
        needed = {"STORED_DY": True, "input": need_input, "weight": need_weight}
        return ({part: backward[part] if need else None for part, need in needed.items()},)

    monkeypatch.setattr(heuristics, "pointwise_backward", pointwise_backward)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per program, several programs, several blocks of channels."""
    choose(monkeypatch, APART)


@pytest.fixture
def stored_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``small_blocks``; dy and a are stored before their products."""
    choose(monkeypatch, STORED)


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """All channels in one block, several tiles per program and several programs."""
    choose(monkeypatch, ONE_PASS)


BLOCKS = ["small_blocks", "stored_operands", "one_pass"]


def assert_rounded(actual: Tensor, args: tuple, output: int, dtype: torch.dtype, name: str) -> None:
    """In 16 bits a result comes from two roundings: of both operands, or of one and of itself."""
    bound = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 1.5)
    assert_close(actual, oracle.pointwise_backward(*args)[output], bound, name)


def check_backward(
    channels: int, outputs: int, dtype: torch.dtype, case: str = "both", plain: bool = False, batch_stats: bool = True,
    size: tuple = (1, 9, 11), act: Act = Act.RELU, alone: bool = False,
) -> None:  # fmt: skip
    """``case``: which of y and grad_bn_y there are; ``alone``: each of the two gradients without the other, too."""
    u = activation(size[0], channels, *size[1:], dtype=dtype)
    dz, y = (activation(size[0], outputs, *size[1:], dtype=dtype) for _ in range(2))
    grad_bn = None if case == "neither" else random_grad_bn(outputs, dtype)
    bn_u = None if plain else random_bn(channels, dtype)
    weight = pointwise_weight(channels, outputs, dtype)
    act_u = Act.LINEAR if plain else act
    args = (dz, y if case == "both" else None, grad_bn, u, bn_u, act_u, batch_stats, weight, 1, NO_PADDING)
    dz_u, grad_weight, grad_bn_u = pointwise_backward(*args, True, True)
    assert dz_u.dtype == dtype and is_channels_last_dense(dz_u) and grad_weight.dtype == torch.float32
    assert_rounded(dz_u, (*args, True, True), 0, dtype, "dz_u")
    assert_rounded(grad_weight, (*args, True, True), 1, dtype, "grad_weight")
    if plain:
        assert grad_bn_u.shape == (0,)
    else:
        assert_grad_bn(grad_bn_u, dz_u, u, bn_u, batch_stats, slack=3)
    if not alone:
        return
    only_weight = pointwise_backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[0].dtype == dtype and only_weight[2].shape == (0,)
    assert_close(only_weight[1], grad_weight.double(), 1e-5, "grad_weight alone")
    only_input = pointwise_backward(*args, True, False)
    assert only_input[1].shape == (0,) and only_input[1].dtype == torch.float32
    assert_close(only_input[0], dz_u.double(), TOLERANCE[dtype], "dz_u alone")
    assert only_input[2].shape == grad_bn_u.shape


@in_turn("channels_and_outputs, dtype", CHANNELS, *FLOAT32_AND_16_BITS)
def test_shapes(channels_and_outputs: tuple[int, int], dtype: torch.dtype) -> None:
    check_backward(*channels_and_outputs, dtype)


@combinations("act, dtype, blocks_of", Act, DTYPES, BLOCKS)
def test_several_tiles_and_blocks(act: Act, dtype: torch.dtype, blocks_of: str, request: pytest.FixtureRequest) -> None:
    """Each of the two gradients alone, too, which is what runs in several blocks where ``one_pass`` makes both."""
    request.getfixturevalue(blocks_of)
    size = (2, 11, 12) if blocks_of == "one_pass" else (1, 9, 11)
    check_backward(24, 40, dtype, size=size, act=act, alone=act == Act.RELU)


@pytest.mark.parametrize(("case", "plain"), list(product(["neither", "scale", "both"], [False, True])))
def test_optional_arguments(case: str, plain: bool) -> None:
    check_backward(24, 8, torch.float32, case, plain, case == "both", size=(1, 4, 5), alone=True)
    check_backward(24, 8, torch.bfloat16, case, plain, case != "both", size=(1, 4, 5))


@pytest.mark.parametrize("blocks_of", BLOCKS)
def test_large_mean(blocks_of: str, request: pytest.FixtureRequest) -> None:
    """Gamma's gradient survives a channel mean of 1e4 with standard deviation 1."""
    request.getfixturevalue(blocks_of)
    u = activation(2, 1, 12, 13, dtype=torch.float32, mean=1e4)
    weight = torch.tensor([1.0, 0.5, -1.0]).view(3, 1, 1, 1)
    bn_u = oracle.batch_bn(u, None, None, 1e-5).float()
    dz = activation(2, 3, 12, 13, dtype=torch.float32)
    args = (dz, None, None, u, bn_u, Act.RELU, True, weight, 1, NO_PADDING, True, True)
    dz_u, _, grad_bn = pointwise_backward(*args)
    of_stored = oracle.grad_bn(dz_u, u, bn_u, True)
    assert_close(grad_bn, of_stored, 1e-5)


@combinations("act, special, blocks_of", Act, [float("nan"), float("inf"), float("-inf")], BLOCKS)
def test_nonfinite(act: Act, special: float, blocks_of: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(blocks_of)
    u = activation(1, 8, 9, 9, dtype=torch.float32)
    u[0, 2, 3, 4] = special
    dz, y = activation(1, 3, 9, 9, dtype=torch.float32), activation(1, 3, 9, 9, dtype=torch.float32)
    dz[0, 1, 5, 6] = special
    bn_u, weight = random_bn(8, torch.float32), pointwise_weight(8, 3, torch.float32)
    args = (dz, y, random_grad_bn(3, torch.float32), u, bn_u, act, True, weight, 1, NO_PADDING, True, True)
    outputs = pointwise_backward(*args)
    for actual, expected in zip(outputs[:2], oracle.pointwise_backward(*args)[:2], strict=True):
        assert_same_specials(actual, expected)


def test_nan_passes_the_gradient() -> None:
    """A NaN input of a ReLU lets the gradient through, as in PyTorch."""
    u, bn_u = activation(1, 8, 3, 3, dtype=torch.float32), random_bn(8, torch.float32)
    u[0, 1] = float("nan")
    dz = activation(1, 8, 3, 3, dtype=torch.float32)
    args = (
        dz,
        None,
        None,
        u,
        bn_u,
        Act.RELU,
        True,
        pointwise_weight(8, 8, torch.float32),
        1,
        NO_PADDING,
        True,
        False,
    )
    dz_u = pointwise_backward(*args)[0]
    assert_close(dz_u, oracle.pointwise_backward(*args)[0], 1e-6)
    assert (dz_u[0, 1] != 0).all()


@pytest.mark.parametrize("batch_stats", [True, False])
def test_empty_batch(batch_stats: bool) -> None:
    u, bn_u, weight = (
        torch.empty(0, 8, 4, 4),
        random_bn(8, torch.float32),
        pointwise_weight(8, 3, torch.float32),
    )
    dz = torch.empty(0, 3, 4, 4)
    args = (dz, dz, random_grad_bn(3, torch.float32), u, bn_u, Act.RELU, batch_stats, weight, 1, NO_PADDING, True, True)
    outputs, expected = pointwise_backward(*args), oracle.pointwise_backward(*args)
    assert [o.shape for o in outputs] == [e.shape for e in expected]
    assert not outputs[1].any() and torch.equal(outputs[2][1::2].double(), expected[2][1::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_candidates_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = heuristics.pointwise_backward(90, 24, 32, dtype.itemsize, False, True, True, False, H100)
    assert len(candidates) > 1
    for choice in candidates:
        monkeypatch.setattr(heuristics, "pointwise_backward", lambda *_, choice=choice: (choice,))
        u, bn_u, weight = (
            activation(1, 24, 9, 10, dtype=dtype),
            random_bn(24, dtype),
            pointwise_weight(24, 32, dtype),
        )
        dz, y = (activation(1, 32, 9, 10, dtype=dtype) for _ in range(2))
        args = (dz, y, random_grad_bn(32, dtype), u, bn_u, Act.RELU, True, weight, 1, NO_PADDING, True, True)
        dz_u, grad_weight, _ = pointwise_backward(*args)
        assert_rounded(dz_u, args, 0, dtype, "dz_u")
        assert_rounded(grad_weight, args, 1, dtype, "grad_weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocks_of", BLOCKS)
def test_error_in_16_bits(dtype: torch.dtype, blocks_of: str, request: pytest.FixtureRequest) -> None:
    """At most 1.5 times the error of PyTorch's own path, which rounds a, dy and every result to 16 bits."""
    request.getfixturevalue(blocks_of)
    u, bn_u, weight = (
        activation(2, 40, 12, 12, dtype=dtype),
        random_bn(40, dtype),
        pointwise_weight(40, 24, dtype),
    )
    dz, y = (activation(2, 24, 12, 12, dtype=dtype) for _ in range(2))
    grad_bn = random_grad_bn(24, dtype)
    args = (dz, y, grad_bn, u, bn_u, Act.RELU, True, weight, 1, NO_PADDING, True, True)
    dy = oracle.output_grad(dz, y, grad_bn).to(dtype)
    a = oracle.norm_act(u, bn_u, Act.RELU).to(dtype)
    own = torch.ops.aten.convolution_backward(
        dy, a, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    own_dz_u = own[0].masked_fill(oracle.normalise(u, bn_u) <= 0, 0)
    expected = oracle.pointwise_backward(*args)
    for actual, theirs, true in zip(pointwise_backward(*args)[:2], (own_dz_u, own[1]), expected[:2], strict=True):
        assert relative_error(actual, true) <= 1.5 * relative_error(theirs, true)
