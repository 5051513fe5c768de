"""Pointwise convolution in Triton, forward, inference and backward, against the reference in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    check_overflowed,
    copying_weight,
    in_float64,
    is_channels_last_dense,
    overflowing,
    random_bn,
    random_grad_bn,
    relative_error,
)
from torch import Tensor

from mobilenet_ext.backends import reference
from mobilenet_ext.triton import heuristics
from mobilenet_ext.triton.pointwise_backward import pointwise_backward
from mobilenet_ext.triton.pointwise_forward import pointwise_forward, pointwise_inference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHANNELS = [(1, 3), (3, 1), (8, 24), (24, 40), (40, 136), (136, 8)]


def blocks(m: int, n: int, k: int, **constants: bool) -> heuristics.Config:
    return heuristics.config(num_warps=4, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **constants)


def choose(monkeypatch: pytest.MonkeyPatch, forward: heuristics.Config, backward: dict[str, heuristics.Config]) -> None:
    """Replaces the heuristics; of ``backward`` that part is used which is needed."""

    def pointwise_backward(*problem: int) -> tuple[dict, ...]:
        *_, need_input, need_weight, _, _ = problem
        if need_input and need_weight and "both" in backward:
            return ({"input": backward["both"], "weight": None},)
        needed = {"input": need_input, "weight": need_weight}
        return ({part: backward[part] if need else None for part, need in needed.items()},)

    monkeypatch.setattr(heuristics, "pointwise_forward", lambda *_: (forward,))
    monkeypatch.setattr(heuristics, "pointwise_backward", pointwise_backward)


APART = {
    "input": {"PROGRAMS": 2, "kernel": blocks(32, 16, 16, WHOLE_N=False, FOLD=True)},
    "weight": {"PROGRAMS": 3, "kernel": blocks(16, 16, 16)},
}
ONE_PASS = {**APART, "both": {"PROGRAMS": 2, "kernel": blocks(64, 64, 64, WHOLE_N=True, FOLD=True)}}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a program, several programs, several blocks of channels."""
    choose(monkeypatch, {"PROGRAMS": 2, "kernel": blocks(32, 16, 16, WHOLE_K=False, FOLD=True)}, APART)


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """All channels in one block, several tiles a program and several programs."""
    choose(monkeypatch, {"PROGRAMS": 2, "kernel": blocks(64, 64, 64, WHOLE_K=True, FOLD=True)}, ONE_PASS)


def weight_of(channels: int, outputs: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(outputs, channels, 1, 1, dtype=torch.float64) / channels**0.5).to(dtype)


def assert_rounded(actual: Tensor, op: str, args: tuple, output: int, dtype: torch.dtype, name: str) -> None:
    """In 16 bits a result has two roundings behind it: of both operands, or of one and of itself."""
    bound = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 1.5)
    assert_close(actual, in_float64(getattr(reference, op), args)[output], bound, name)


def check_forward(
    channels: int, outputs: int, dtype: torch.dtype, plain: bool = False, affine: bool = True, size: tuple = (1, 9, 11)
) -> None:
    u = activation(size[0], channels, *size[1:], dtype=dtype)
    bn_u, weight = None if plain else random_bn(channels, dtype), weight_of(channels, outputs, dtype)
    gamma, beta = (torch.rand(outputs) + 0.5, torch.randn(outputs)) if affine else (None, None)
    args = (u, bn_u, weight, gamma, beta, 1e-5)
    y, bn = pointwise_forward(*args, True)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_rounded(y, "pointwise_forward", (*args, True), 0, dtype, "y")
    of_stored = reference._batch_bn(y.double(), *(None if v is None else v.double() for v in (gamma, beta)), 1e-5)
    assert bn.shape == (5, outputs) and bn.dtype == torch.float32
    for row in range(5):
        assert_close(bn[row], of_stored[row], ACC_TOLERANCE[dtype], f"bn[{row}]")
    again, nothing = pointwise_forward(*args, False)
    assert torch.equal(again, y) and nothing.shape == (0,) and nothing.dtype == torch.float32


def check_backward(
    channels: int, outputs: int, dtype: torch.dtype, case: str = "both", plain: bool = False, batch_stats: bool = True,
    size: tuple = (1, 9, 11),
) -> None:  # fmt: skip
    """``case``: which of y and grad_bn_y there are."""
    u = activation(size[0], channels, *size[1:], dtype=dtype)
    h, y = (activation(size[0], outputs, *size[1:], dtype=dtype) for _ in range(2))
    grad_bn = None if case == "neither" else random_grad_bn(outputs, dtype)
    bn_u = None if plain else random_bn(channels, dtype)
    weight = weight_of(channels, outputs, dtype)
    args = (h, y if case == "both" else None, grad_bn, u, bn_u, batch_stats, weight)
    h_u, grad_weight, grad_bn_u = pointwise_backward(*args, True, True)
    assert h_u.dtype == dtype and is_channels_last_dense(h_u) and grad_weight.dtype == torch.float32
    assert_rounded(h_u, "pointwise_backward", (*args, True, True), 0, dtype, "h_u")
    assert_rounded(grad_weight, "pointwise_backward", (*args, True, True), 1, dtype, "grad_weight")
    if plain:
        assert grad_bn_u.shape == (0,)
    else:
        of_stored = reference._make_grad_bn(h_u.double(), u.double(), bn_u.double(), batch_stats)
        for row in range(6):
            assert_close(grad_bn_u[row], of_stored[row], 3 * ACC_TOLERANCE[dtype], f"grad_bn_u[{row}]")
    only_weight = pointwise_backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[0].dtype == dtype and only_weight[2].shape == (0,)
    assert_close(only_weight[1], grad_weight.double(), 1e-5, "grad_weight alone")
    only_input = pointwise_backward(*args, True, False)
    assert only_input[1].shape == (0,) and only_input[1].dtype == torch.float32
    assert_close(only_input[0], h_u.double(), TOLERANCE[dtype], "h_u alone")
    assert only_input[2].shape == grad_bn_u.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "outputs"), CHANNELS)
def test_shapes(channels: int, outputs: int, dtype: torch.dtype) -> None:
    check_forward(channels, outputs, dtype)
    check_backward(channels, outputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles_and_blocks(dtype: torch.dtype, small_blocks: None) -> None:
    check_forward(24, 40, dtype)
    check_backward(24, 40, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass(dtype: torch.dtype, one_pass: None) -> None:
    check_forward(24, 40, dtype, size=(2, 11, 12))
    check_backward(24, 40, dtype, size=(2, 11, 12))


@pytest.mark.parametrize(("case", "plain"), list(product(["neither", "scale", "both"], [False, True])))
def test_optional_arguments(case: str, plain: bool) -> None:
    check_forward(24, 8, torch.float32, plain, affine=case == "both", size=(1, 4, 5))
    check_backward(24, 8, torch.float32, case, plain, case == "both", size=(1, 4, 5))
    check_backward(24, 8, torch.bfloat16, case, plain, case != "both", size=(1, 4, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bn", "relu"), [(False, False), (False, True), (True, False), (True, True)])
def test_inference(bn: bool, relu: bool, dtype: torch.dtype) -> None:
    for channels, outputs in ((24, 40), (136, 3)):
        x = activation(2, channels, 5, 7, dtype=dtype)
        args = (x, random_bn(outputs, dtype) if bn else None, weight_of(channels, outputs, dtype), relu)
        y = pointwise_inference(*args)
        assert y.dtype == dtype and is_channels_last_dense(y)
        assert_close(y, *in_float64(reference.pointwise_inference, args), TOLERANCE[dtype])


@pytest.mark.parametrize("blocks_of", ["small_blocks", "one_pass"])
def test_large_mean(blocks_of: str, request: pytest.FixtureRequest) -> None:
    """The variance of y, and gamma's gradient, survive a channel mean of 1e4 with standard deviation 1."""
    request.getfixturevalue(blocks_of)
    u = activation(2, 1, 12, 13, dtype=torch.float32, mean=1e4)
    weight = torch.tensor([1.0, 0.5, -1.0]).view(3, 1, 1, 1)
    y, bn = pointwise_forward(u, None, weight, None, None, 1e-5, True)
    expected = reference._batch_bn(y.double(), None, None, 1e-5)
    assert_close(bn[4], expected[4], 1e-5, "variance")
    assert_close(bn[0], expected[0], 1e-7, "mean")
    bn_u = expected[:, :1].float().contiguous()
    h = activation(2, 3, 12, 13, dtype=torch.float32)
    h_u, _, grad_bn = pointwise_backward(h, None, None, u, bn_u, True, weight, True, True)
    of_stored = reference._make_grad_bn(h_u.double(), u.double(), bn_u.double(), True)
    assert_close(grad_bn, of_stored, 1e-5)


@pytest.mark.parametrize("blocks_of", ["small_blocks", "one_pass"])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite(special: float, blocks_of: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(blocks_of)
    u, bn_u, weight = (
        activation(1, 8, 9, 9, dtype=torch.float32),
        random_bn(8, torch.float32),
        weight_of(8, 3, torch.float32),
    )
    u[0, 2, 3, 4] = special
    args = (u, bn_u, weight, None, None, 1e-5)
    y, bn = pointwise_forward(*args, True)
    assert_same_specials(y, in_float64(reference.pointwise_forward, (*args, True))[0])
    if special > 0 or special != special:
        assert not bn[4].isfinite().any()  # a variance that a gradient scaler notices
    h, y = activation(1, 3, 9, 9, dtype=torch.float32), activation(1, 3, 9, 9, dtype=torch.float32)
    h[0, 1, 5, 6] = special
    args = (h, y, random_grad_bn(3, torch.float32), u, bn_u, True, weight, True, True)
    outputs = pointwise_backward(*args)
    for actual, expected in zip(outputs[:2], in_float64(reference.pointwise_backward, args)[:2], strict=True):
        assert_same_specials(actual, expected)


@pytest.mark.parametrize("bn", [None, "bn"])
def test_nan_passes_the_mask(bn: str | None) -> None:
    """A NaN input of a ReLU lets the gradient through, as in PyTorch."""
    u, bn_u = activation(1, 8, 3, 3, dtype=torch.float32), random_bn(8, torch.float32)
    u[0, 1] = float("nan")
    h = activation(1, 8, 3, 3, dtype=torch.float32)
    args = (h, None, None, u, bn_u, True, weight_of(8, 8, torch.float32), True, False)
    h_u = pointwise_backward(*args)[0]
    assert_close(h_u, in_float64(reference.pointwise_backward, args)[0], 1e-6)
    assert (h_u[0, 1] != 0).all()


@pytest.mark.parametrize("batch_stats", [True, False])
def test_empty_batch(batch_stats: bool) -> None:
    u, bn_u, weight = torch.empty(0, 8, 4, 4), random_bn(8, torch.float32), weight_of(8, 3, torch.float32)
    args = (u, bn_u, weight, None, None, 1e-5, True)
    for actual, expected in zip(pointwise_forward(*args), reference.pointwise_forward(*args), strict=True):
        torch.testing.assert_close(actual, expected)
    h = torch.empty(0, 3, 4, 4)
    args = (h, h, random_grad_bn(3, torch.float32), u, bn_u, batch_stats, weight, True, True)
    outputs, expected = pointwise_backward(*args), reference.pointwise_backward(*args)
    assert [o.shape for o in outputs] == [e.shape for e in expected]
    assert not outputs[1].any() and torch.equal(outputs[2][1::2], expected[2][1::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_candidates_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    channels, outputs = 24, 32
    forward = heuristics.pointwise_forward(90, 40, outputs, dtype.itemsize, False, 132, 227 * 1024)
    backward = heuristics.pointwise_backward(90, channels, outputs, dtype.itemsize, False, True, True, 132, 227 * 1024)
    assert len(backward) > 1
    for choice in forward:
        monkeypatch.setattr(heuristics, "pointwise_forward", lambda *_, choice=choice: (choice,))
        check_forward(40, outputs, dtype, size=(1, 9, 10))
    for choice in backward:
        monkeypatch.setattr(heuristics, "pointwise_backward", lambda *_, choice=choice: (choice,))
        u, bn_u = activation(1, channels, 9, 10, dtype=dtype), random_bn(channels, dtype)
        h, y = (activation(1, outputs, 9, 10, dtype=dtype) for _ in range(2))
        weight = weight_of(channels, outputs, dtype)
        args = (h, y, random_grad_bn(outputs, dtype), u, bn_u, True, weight, True, True)
        h_u, grad_weight, _ = pointwise_backward(*args)
        assert_rounded(h_u, "pointwise_backward", args, 0, dtype, "h_u")
        assert_rounded(grad_weight, "pointwise_backward", args, 1, dtype, "grad_weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocks_of", ["small_blocks", "one_pass"])
def test_error_in_16_bits(dtype: torch.dtype, blocks_of: str, request: pytest.FixtureRequest) -> None:
    """At most 1.5 times the error of PyTorch's own path, which rounds a, dy and every result to 16 bits."""
    request.getfixturevalue(blocks_of)
    u, bn_u, weight = activation(2, 40, 12, 12, dtype=dtype), random_bn(40, dtype), weight_of(40, 24, dtype)
    h, y = (activation(2, 24, 12, 12, dtype=dtype) for _ in range(2))
    grad_bn = random_grad_bn(24, dtype)
    args = (h, y, grad_bn, u, bn_u, True, weight, True, True)
    dy = reference._conv_output_grad(h, y, grad_bn).to(dtype)
    a = reference._activation(u, bn_u).to(dtype)
    own = torch.ops.aten.convolution_backward(
        dy, a, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    masked = own[0].masked_fill(reference._normalise(u, bn_u) <= 0, 0)
    expected = in_float64(reference.pointwise_backward, args)
    for actual, theirs, true in zip(pointwise_backward(*args)[:2], (masked, own[1]), expected[:2], strict=True):
        assert relative_error(actual, true) <= 1.5 * relative_error(theirs, true)
    args = (u, bn_u, weight, None, None, 1e-5, False)
    true = in_float64(reference.pointwise_forward, args)[0]
    theirs = torch.nn.functional.conv2d(a, weight)
    assert relative_error(pointwise_forward(*args)[0], true) <= 1.5 * relative_error(theirs, true)


def test_squares_that_overflow(small_blocks: None) -> None:
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("pointwise", 8, torch.float32)
    y, bn = pointwise_forward(u, None, weight, None, None, 1e-5, True)
    check_overflowed(bn, y)
