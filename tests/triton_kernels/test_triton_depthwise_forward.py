"""Depthwise convolution in Triton, forward and inference, against the oracle."""

from __future__ import annotations

from itertools import product

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import ALL_SIDES, DEPTHWISE, DTYPES, FLOAT32_AND_16_BITS, forward_inputs
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
)

from mobilenet_ext import contract
from mobilenet_ext.contract import NO_PADDING, Act, Padding, conv_output_size
from mobilenet_ext.triton import heuristics
from mobilenet_ext.triton.depthwise_forward import depthwise_forward, depthwise_inference

GEOMETRIES = list(product([1, 2], [NO_PADDING, ALL_SIDES]))
UNEVEN = [(2, (0, 1, 0, 1)), (1, (2, 0, 1, 2)), (2, (2, 0, 1, 2))]  # the first is TensorFlow's "same"


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a program, several programs, several chunks of rows and blocks of channels."""

    def tile(*_: int, maxnreg: int, **constants: int) -> heuristics.Config:
        return {"waves": 1, "kernel": heuristics.config(num_warps=1, BLOCK_P=4, BLOCK_C=16, **constants)}

    monkeypatch.setattr(heuristics, "depthwise_forward", heuristics.depthwise_forward.__wrapped__)

    def grid(images: int, channels: int, height: int, lanes: int, *_: object) -> tuple[int, int]:
        rows = 2
        return rows, min(3, heuristics.cdiv(images * lanes, 4) * heuristics.cdiv(height, rows))

    monkeypatch.setattr(heuristics, "_depthwise", tile)
    monkeypatch.setattr(heuristics, "depthwise_grid", grid)


@pytest.fixture
def one_program(monkeypatch):
    """All rows at once: the interpreter takes a while for each program."""
    monkeypatch.setattr(heuristics, "depthwise_grid", lambda *_: (100, 1))


def fits(size: tuple[int, int, int], padding: Padding) -> bool:
    return min(conv_output_size(*size[1:], 3, 1, padding)) >= 1


def check_forward(
    dtype, channels, size, stride, padding, *, act: Act | None = Act.RELU, affine=True, kernel=3, alone=False
) -> None:
    """``alone``: y without its statistics, too."""
    n, h, w = size
    args = forward_inputs((n, channels, h, w), (channels, 1, kernel, kernel), dtype, stride, padding, act)
    gamma, beta = (torch.rand(channels) + 0.5, torch.randn(channels)) if affine else (None, None)
    bias = beta.flip(0) if affine else None
    args = (*args, gamma, beta, 1e-5, True, bias)
    y, bn_y = depthwise_forward(*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    assert_close(y, oracle.depthwise_forward(*args)[0], TOLERANCE[dtype], "y")
    if y.numel() > channels:  # the statistics of single values are rounding errors
        assert_statistics(bn_y, y, gamma, beta, 1e-5)
    if alone:
        again, without = depthwise_forward(*args[:-2], False, bias)
        assert torch.equal(again, y) and without.shape == (0,) and without.dtype == torch.float32


@in_turn("geometry, dtype", GEOMETRIES, *FLOAT32_AND_16_BITS)
def test_forward(geometry, dtype):
    stride, padding = geometry
    for channels, size in DEPTHWISE:
        if fits(size, padding):
            check_forward(dtype, channels, size, stride, padding)


@in_turn("geometry, dtype", GEOMETRIES, *FLOAT32_AND_16_BITS)
@pytest.mark.usefixtures("small_tiles")
def test_forward_over_several_tiles(geometry, dtype):
    """Linear in float32: the padding is 0 where a normalised 0 is not."""
    check_forward(dtype, 24, (5, 6, 5), *geometry, act=Act.LINEAR if dtype == torch.float32 else Act.RELU)


@pytest.mark.parametrize("stride, padding", UNEVEN, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_sides_of_the_padding(stride, padding):
    """Rows and columns of nothing but padding, on any side: it is 0 where a normalised 0 is not."""
    check_forward(torch.float32, 8, (3, 6, 5), stride, padding, act=Act.LINEAR)


@pytest.mark.parametrize("stride", [1, 2])
def test_an_image_smaller_than_its_padding(stride):
    check_forward(torch.bfloat16, 8, (2, 1, 1), stride, (1, 2, 2, 0))


@combinations("act, dtype, geometry", Act, DTYPES[:2], [(1, ALL_SIDES), (2, NO_PADDING)])
def test_every_activation_on_load(act, dtype, geometry):
    check_forward(dtype, 8, (1, 5, 6), *geometry, act=act)


def test_an_activation_without_a_normalisation_is_refused():
    u = activation(1, 8, 3, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match="act_u: expected 0 .linear. without bn_u, got 1"):
        depthwise_forward(u, None, Act.RELU, torch.randn(8, 1, 3, 3), 1, ALL_SIDES, None, None, 1e-5, True)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("given", [False, True])
def test_forward_with_and_without_optional_arguments(given, stride):
    check_forward(
        torch.float32, 8, (2, 5, 5), stride, ALL_SIDES, act=Act.RELU if given else None, affine=given, alone=True
    )


def test_statistics_survive_a_large_mean(monkeypatch):
    monkeypatch.setattr(heuristics, "depthwise_grid", lambda *_: (100, 1))
    u = activation(1, 8, 100, 2, dtype=torch.float32) + 1e4
    weight = torch.zeros(8, 1, 3, 3)
    weight[:, :, 1, 1] = 1.0
    y, bn = depthwise_forward(u, None, Act.LINEAR, weight, 1, ALL_SIDES, None, None, 1e-5, True)
    assert torch.equal(y, u)
    assert_close(bn[contract.BN_VAR], u.double().var((0, 2, 3), correction=0), 1e-5)


def test_statistics_survive_an_outlier_before_them(monkeypatch):
    """Of a lane with many values the first may be unlike all others, so that differences from it say little of them."""
    monkeypatch.setattr(heuristics, "depthwise_grid", lambda *_: (150, 1))
    u = activation(1, 8, 150, 2, dtype=torch.float32)
    u[:, :, 0] = 1e4
    weight = torch.zeros(8, 1, 3, 3)
    weight[:, :, 1, 1] = 1.0
    _, bn = depthwise_forward(u, None, Act.LINEAR, weight, 1, ALL_SIDES, None, None, 1e-5, True)
    assert_close(bn[contract.BN_VAR], u.double().var((0, 2, 3), correction=0), 1e-6)


def test_a_column_outside_the_image_may_overflow():
    """With an odd width the last lane's second column is computed, but is no output and no part of the statistics."""
    u = torch.full((2, 8, 3, 1), 300.0).half().contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 1, 3, 3).half()
    weight[:, :, 1, 0], weight[:, :, 1, 1] = 300.0, 1.0
    args = (u, None, Act.LINEAR, weight, 1, ALL_SIDES, None, None, 1e-5, True)
    y, bn = depthwise_forward(*args)
    expected_y, expected_bn = oracle.depthwise_forward(*args)
    assert torch.equal(y.double(), expected_y)
    assert torch.equal(bn[:1].double(), expected_bn[:1]) and not bn[contract.BN_VAR].any()


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("images, channels, height, width", [(9400, 64, 112, 112), (1, 8, 1, 4_400_000)])
def test_a_grid_that_cuda_allows(images, channels, height, width, stats):
    choice = heuristics.depthwise_forward(channels, width, width, 1, 4, 3, 1, stats)[0]
    kernel = choice["kernel"]
    tile, lanes = (kernel["BLOCK_P"], kernel["BLOCK_C"]), heuristics.cdiv(width, kernel["COLUMNS"])
    _, programs = heuristics.depthwise_grid(images, channels, height, lanes, 132, tile, choice["waves"])
    assert 0 < programs <= 65535


FIVE = [(1, (2, 2, 2, 2)), (2, (1, 2, 1, 2)), (1, (0, 1, 2, 0))]  # the second is TensorFlow's "same"


@pytest.mark.parametrize("stride, padding", FIVE, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_5x5_over_several_tiles(stride, padding):
    check_forward(torch.float32, 8, (3, 7, 6), stride, padding, act=Act.LINEAR, kernel=5)


@pytest.mark.parametrize("stride", [1, 2])
def test_5x5_of_a_small_image(stride):
    check_forward(torch.bfloat16, 20, (2, 1, 2), stride, (2, 2, 2, 2), kernel=5)


@pytest.mark.parametrize("stride, padding", FIVE[:2], ids=str)
@pytest.mark.usefixtures("one_program")
def test_5x5_inference(stride, padding):
    """And that NaN and Inf at the border reach the outputs that see them, and no others."""
    x = activation(1, 8, 6, 7, dtype=torch.float16)
    args = (x, random_bn(8, x.dtype), Act.RELU, torch.rand(8, 1, 5, 5).half() + 0.5, stride, padding)
    assert_close(depthwise_inference(*args), oracle.depthwise_inference(*args), TOLERANCE[x.dtype])
    x[0, 1, 0, 0], x[0, 2, 5, 6], x[0, 3, 0, 6] = float("nan"), float("inf"), -float("inf")
    assert_same_specials(depthwise_inference(*args), oracle.depthwise_inference(*args))


@pytest.mark.usefixtures("one_program")
def test_5x5_candidates_agree(monkeypatch):
    for candidate in heuristics.depthwise_forward(24, 3, 3, 2, 2, 5, 1, True)[1:]:
        monkeypatch.setattr(heuristics, "depthwise_forward", lambda *_, candidate=candidate: (candidate,))
        check_forward(torch.float16, 8, (1, 4, 3), 1, (2, 2, 2, 2), kernel=5)


@combinations("act, geometry, dtype, with_bn, channels", Act, GEOMETRIES, DTYPES, [True, False], [3, 24])
def test_inference(act, geometry, dtype, with_bn, channels):
    x = activation(2, channels, 5, 6, dtype=dtype)
    bn = random_bn(channels, dtype) if with_bn else None
    args = (x, bn, act, torch.randn(channels, 1, 3, 3).to(dtype), *geometry)
    out = depthwise_inference(*args)
    assert out.dtype == dtype and is_channels_last_dense(out)
    assert_close(out, oracle.depthwise_inference(*args), TOLERANCE[dtype])


@pytest.mark.parametrize("act, dtype", [*product([Act.RELU], DTYPES), *product(Act, [torch.float32])], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_specials_go_where_pytorch_sends_them(act, dtype, stride):
    """Away from the border, where PyTorch's own kernels differ in whether they multiply the padding."""
    u = activation(2, 8, 9, 9, dtype=dtype)
    u[0, 1, 4, 4], u[0, 2, 4, 4], u[1, 3, 4, 4] = float("nan"), float("inf"), -float("inf")
    weight = torch.rand(8, 1, 3, 3).to(dtype) + 0.5
    args = (u, random_bn(8, dtype), act, weight, stride, ALL_SIDES, None, None, 1e-5, True)
    y, _ = depthwise_forward(*args)
    assert_same_specials(y, oracle.depthwise_forward(*args)[0])
    assert y.isnan().any() and (act == Act.RELU6 or y.isinf().any())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [5, 8])
def test_all_candidates_agree(monkeypatch, stride, width):
    candidates = heuristics.depthwise_forward(24, width, (width - 1) // stride + 1, 1, 2, 3, stride, True)
    assert len({str(candidate) for candidate in candidates}) == len(candidates) > 1
    for candidate in candidates:
        assert candidate["kernel"]["EXACT"] == (width == 8)
        monkeypatch.setattr(heuristics, "depthwise_forward", lambda *_, candidate=candidate: (candidate,))
        check_forward(torch.bfloat16, 24, (2, 7, width), stride, ALL_SIDES)


@pytest.mark.parametrize("kernel, stride, height", [(3, 1, 5), (3, 2, 6), (3, 2, 7), (5, 1, 3), (5, 2, 4)])
@pytest.mark.usefixtures("small_tiles")
def test_lanes_that_are_all_full(kernel, stride, height):
    """Where only the first and last columns of a lane's input may be padding, and NaN in them is not."""
    padding, channels, width = (kernel // 2,) * 4, 8, 8
    check_forward(torch.float16, channels, (3, height, width), stride, padding, kernel=kernel)
    u = activation(2, channels, height, width, dtype=torch.float32)
    u[0, 1, 0, 0], u[0, 2, -1, -1], u[1, 3, 0, -1] = float("nan"), float("inf"), -float("inf")
    args = (u, random_bn(channels, u.dtype), Act.RELU, torch.rand(channels, 1, kernel, kernel) + 0.5, stride, padding)
    assert_same_specials(depthwise_inference(*args), oracle.depthwise_inference(*args))


def test_an_empty_batch():
    u = torch.empty(0, 8, 5, 5).to(memory_format=torch.channels_last)
    args = (u, None, Act.LINEAR, torch.ones(8, 1, 3, 3), 1, ALL_SIDES, None, None, 1e-5, True)
    y, bn = depthwise_forward(*args)
    assert y.shape == (0, 8, 5, 5)
    torch.testing.assert_close(bn.double(), oracle.depthwise_forward(*args)[1])


def test_squares_that_overflow():
    u, weight = overflowing(1, 8, 25, 7, dtype=torch.float32), copying_weight("depthwise", 8, torch.float32)
    y, bn = depthwise_forward(u, None, Act.LINEAR, weight, 1, ALL_SIDES, None, None, 1e-5, True)
    check_overflowed(bn, y)
