"""Depthwise convolution in Triton, backward, against the oracle."""

from __future__ import annotations

from itertools import product

import oracle
import pytest
import torch
from combinations import combinations, in_turn
from conv_inputs import ALL_SIDES, DEPTHWISE, DTYPES, FLOAT32_AND_16_BITS, backward_inputs
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    assert_grad_bn,
    assert_same_specials,
    is_channels_last_dense,
    random_bn,
    random_grad_bn,
)

from mobilenet_ext.contract import NO_PADDING, Act, Padding, conv_output_size
from mobilenet_ext.triton import heuristics
from mobilenet_ext.triton.depthwise_backward import depthwise_backward

GEOMETRIES = list(product([1, 2], [NO_PADDING, ALL_SIDES]))
UNEVEN = [(2, (0, 1, 0, 1)), (1, (2, 0, 1, 2)), (2, (2, 0, 1, 2))]  # the first is TensorFlow's "same"


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles per program, several programs, several chunks of rows and blocks of channels."""

    def tile(*_, **constants):
        return {"waves": 1, "kernel": heuristics.config(num_warps=1, BLOCK_P=4, BLOCK_C=16, **constants)}

    monkeypatch.setattr(heuristics, "depthwise_backward", heuristics.depthwise_backward.__wrapped__)
    monkeypatch.setattr(heuristics, "_depthwise", tile)
    monkeypatch.setattr(heuristics, "depthwise_grid", lambda *_: (2, 3))


@pytest.fixture
def one_program(monkeypatch):
    """All rows at once: the interpreter takes a while for each program."""
    monkeypatch.setattr(heuristics, "depthwise_grid", lambda *_: (100, 1))


def fits(size: tuple[int, int, int], padding: Padding) -> bool:
    return min(conv_output_size(*size[1:], 3, 1, padding)) >= 1


def check_backward(
    dtype, channels, size, stride, padding, *, act: Act | None = Act.RELU, output="statistics", kernel=3, alone=False
) -> None:
    """``alone``: each of the two gradients without the other, too."""
    n, h, w = size
    weight = (channels, 1, kernel, kernel)
    args = backward_inputs((n, channels, h, w), weight, dtype, stride, padding, act, output)
    u, bn_u = args[3:5]
    dz_u, grad_weight, grad_bn_u = depthwise_backward(*args, True, True)
    expected_dz, expected_weight, _ = oracle.depthwise_backward(*args, True, True)
    assert dz_u.dtype == dtype and is_channels_last_dense(dz_u) and grad_weight.dtype == torch.float32
    assert_close(dz_u, expected_dz, TOLERANCE[dtype], "dz_u")
    assert_close(grad_weight, expected_weight, ACC_TOLERANCE[dtype], "grad_weight")
    if bn_u is None:
        assert grad_bn_u.shape == (0,)
    else:
        assert_grad_bn(grad_bn_u, dz_u, u, bn_u, True)

    if not alone:
        return
    only_weight = depthwise_backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[2].shape == (0,)
    assert_close(only_weight[1], grad_weight.double(), ACC_TOLERANCE[dtype])
    only_input = depthwise_backward(*args, True, False)
    assert torch.equal(only_input[0], dz_u) and only_input[1].shape == (0,)
    assert_close(only_input[2], grad_bn_u.double(), ACC_TOLERANCE[dtype])


@in_turn("geometry, dtype", GEOMETRIES, *FLOAT32_AND_16_BITS)
def test_backward(geometry, dtype):
    stride, padding = geometry
    for channels, size in DEPTHWISE:
        if fits(size, padding):
            check_backward(dtype, channels, size, stride, padding)


@in_turn("geometry, dtype", GEOMETRIES, *FLOAT32_AND_16_BITS)
@pytest.mark.usefixtures("small_tiles")
def test_backward_over_several_tiles(geometry, dtype):
    check_backward(dtype, 24, (3, 6, 5), *geometry, act=Act.LINEAR if dtype == torch.float32 else Act.RELU)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.usefixtures("small_tiles")
def test_lanes_that_are_all_full(stride):
    check_backward(torch.float16, 8, (3, 6, 8), stride, ALL_SIDES)


@pytest.mark.parametrize("stride, padding", UNEVEN, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_sides_of_the_padding(stride, padding):
    check_backward(torch.float32, 8, (3, 6, 5), stride, padding, act=Act.LINEAR)


@pytest.mark.parametrize("stride", [1, 2])
def test_an_image_smaller_than_its_padding(stride):
    check_backward(torch.bfloat16, 8, (2, 1, 1), stride, (1, 2, 2, 0))


@pytest.mark.parametrize("output", ["plain", "running", "statistics"])
@pytest.mark.parametrize("act", [None, Act.RELU])
@pytest.mark.parametrize("stride", [1, 2])
def test_backward_with_optional_arguments(stride, act, output):
    check_backward(torch.float32, 8, (2, 5, 6), stride, ALL_SIDES, act=act, output=output, alone=True)


@combinations("act, dtype, geometry", Act, DTYPES[:2], [(1, ALL_SIDES), (2, NO_PADDING)])
def test_every_activation_on_load(act, dtype, geometry):
    check_backward(dtype, 8, (1, 5, 6), *geometry, act=act)


@pytest.mark.parametrize("act, dtype", [*product([Act.RELU], DTYPES), *product(Act, [torch.float32])], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_specials_go_where_pytorch_sends_them(act, dtype, stride):
    """Away from the border, where PyTorch's own kernels differ in whether they multiply the padding."""
    u = activation(2, 8, 9, 9, dtype=dtype)
    u[0, 1, 4, 4], u[0, 2, 4, 4], u[1, 3, 4, 4] = float("nan"), float("inf"), -float("inf")
    weight = torch.rand(8, 1, 3, 3).to(dtype) + 0.5
    out = conv_output_size(9, 9, 3, stride, ALL_SIDES)
    dz = activation(2, 8, *out, dtype=dtype)
    dz[1, 5, out[0] // 2, out[1] // 2] = float("nan")
    args = (
        dz,
        None,
        random_grad_bn(8, dtype),
        u,
        random_bn(8, dtype),
        act,
        False,
        weight,
        stride,
        ALL_SIDES,
        True,
        True,
    )
    dz_u, grad_weight, grad_bn = depthwise_backward(*args)
    expected = oracle.depthwise_backward(*args)
    assert_same_specials(dz_u, expected[0])
    assert torch.equal(grad_weight.isfinite(), expected[1].isfinite())
    assert torch.equal(grad_bn.isfinite(), expected[2].isfinite())


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_an_input_that_no_output_sees_reaches_no_gradient(special):
    u = activation(1, 8, 6, 6, dtype=torch.float32)
    u[:, :, 5] = u[:, :, :, 5] = special
    dz = activation(1, 8, 2, 2, dtype=torch.float32)
    args = (dz, None, None, u, None, Act.LINEAR, False, torch.randn(8, 1, 3, 3), 2, NO_PADDING, True, True)
    dz_u, grad_weight, _ = depthwise_backward(*args)
    expected = oracle.depthwise_backward(*args)
    assert_close(dz_u, expected[0], TOLERANCE[torch.float32])
    assert_close(grad_weight, expected[1], ACC_TOLERANCE[torch.float32])


@pytest.mark.parametrize("stride, padding", [(1, (0, 1, 2, 0)), (2, (2, 2, 2, 2))], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_5x5_over_several_tiles(stride, padding):
    check_backward(torch.float32, 8, (2, 6, 5), stride, padding, act=Act.LINEAR, kernel=5)


@pytest.mark.parametrize("stride", [1, 2])
def test_5x5_of_a_small_image(stride):
    check_backward(torch.bfloat16, 20, (2, 1, 2), stride, (2, 2, 2, 2), kernel=5)


@pytest.mark.usefixtures("one_program")
def test_5x5_of_tensorflow():
    check_backward(torch.float16, 8, (1, 4, 6), 2, (1, 2, 1, 2), act=Act.SILU, kernel=5)


@pytest.mark.parametrize("output", ["plain", "running"])
@pytest.mark.usefixtures("one_program")
def test_5x5_with_optional_arguments(output):
    check_backward(
        torch.float32,
        8,
        (1, 5, 6),
        2,
        (2, 2, 2, 2),
        act=Act.RELU if output == "running" else None,
        output=output,
        kernel=5,
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.usefixtures("one_program")
def test_5x5_specials_go_where_pytorch_sends_them(stride):
    """Those of dz at the border too, which no padding multiplies; of inputs, see the kernel, away from it."""
    u = activation(1, 8, 11, 11, dtype=torch.float32)
    u[0, 1, 5, 5], u[0, 2, 6, 5] = float("nan"), float("inf")
    out = conv_output_size(11, 11, 5, stride, (2, 2, 2, 2))
    dz = activation(1, 8, *out, dtype=torch.float32)
    dz[0, 3, 0, 0], dz[0, 4, -1, -1], dz[0, 5, 0, -1] = float("nan"), float("inf"), -float("inf")
    weight = torch.rand(8, 1, 5, 5) + 0.5
    args = (dz, None, None, u, random_bn(8, u.dtype), Act.RELU, False, weight, stride, (2, 2, 2, 2), True, True)
    dz_u, grad_weight, grad_bn = depthwise_backward(*args)
    expected = oracle.depthwise_backward(*args)
    assert_same_specials(dz_u, expected[0])
    assert torch.equal(grad_weight[:3].isfinite(), expected[1][:3].isfinite())
    assert torch.equal(grad_bn.isfinite(), expected[2].isfinite())


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.usefixtures("one_program")
def test_5x5_an_input_that_no_output_sees_reaches_no_gradient(special):
    u = activation(1, 8, 8, 8, dtype=torch.float32)
    u[:, :, 7] = u[:, :, :, 7] = special
    dz = activation(1, 8, 2, 2, dtype=torch.float32)
    args = (dz, None, None, u, None, Act.LINEAR, False, torch.randn(8, 1, 5, 5), 2, NO_PADDING, True, True)
    dz_u, grad_weight, _ = depthwise_backward(*args)
    expected = oracle.depthwise_backward(*args)
    assert_close(dz_u, expected[0], TOLERANCE[torch.float32])
    assert_close(grad_weight, expected[1], ACC_TOLERANCE[torch.float32])


@pytest.mark.usefixtures("one_program")
def test_5x5_candidates_agree(monkeypatch):
    for candidate in heuristics.depthwise_backward(24, 2, 5)[1:]:
        monkeypatch.setattr(heuristics, "depthwise_backward", lambda *_, candidate=candidate: (candidate,))
        check_backward(torch.float16, 8, (1, 3, 4), 2, (2, 2, 2, 2), kernel=5)


def test_nan_passes_the_gradient():
    u = torch.full((1, 8, 3, 3), float("nan")).contiguous(memory_format=torch.channels_last)
    dz = torch.ones(1, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    dz_u, _, _ = depthwise_backward(
        dz, None, None, u, random_bn(8, u.dtype), Act.RELU, False, torch.ones(8, 1, 3, 3), 1, ALL_SIDES, True, False
    )
    assert torch.equal(dz_u[0, 0], torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]]))


@pytest.mark.parametrize("stride", [1, 2])
def test_all_candidates_agree(monkeypatch, stride):
    candidates = heuristics.depthwise_backward(24, 2, 3)
    assert len({str(candidate) for candidate in candidates}) == len(candidates) > 1
    for candidate in candidates:
        monkeypatch.setattr(heuristics, "depthwise_backward", lambda *_, candidate=candidate: (candidate,))
        check_backward(torch.bfloat16, 24, (2, 7, 5), stride, ALL_SIDES)


def test_an_empty_batch():
    u = torch.empty(0, 8, 5, 5).to(memory_format=torch.channels_last)
    weight = torch.ones(8, 1, 3, 3)
    dz_u, grad_weight, _ = depthwise_backward(
        u, None, None, u, None, Act.LINEAR, False, weight, 1, ALL_SIDES, True, True
    )
    assert dz_u.shape == u.shape and torch.equal(grad_weight, torch.zeros_like(weight))
