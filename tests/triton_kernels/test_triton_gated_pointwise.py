"""Pointwise convolutions with a gate (squeeze-excite) in Triton, and the gradient at a pooled output beside the whole
one, which a gate needs, against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
import triton
import triton.language as tl
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    assert_statistics,
    is_channels_last_dense,
    random_bn,
    random_grad_bn,
    relative_error,
)
from torch import Tensor

from mobilenet_ext.contract import BN_MEAN, BN_VAR, Act
from mobilenet_ext.triton import gpu, heuristics, merge, ops
from mobilenet_ext.triton.merge import store_image_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Images [N, H, W] of one pixel, smaller and larger than a tile of 16 rows.
IMAGES = [(18, 1, 1), (3, 2, 5), (2, 5, 5)]
images = pytest.mark.parametrize("size", IMAGES, ids=str)
K, OUTPUTS = 19, 13


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "H100", gpu.H100._replace(multiprocessors=1))


def product(m: int, n: int, k: int, **constants: bool) -> heuristics.Config:
    kernel = heuristics.config(num_warps=4, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **constants)
    return {"PROGRAMS": 2, "STORED_A": False, "TMA": False, "kernel": kernel}


FORWARD = {
    "whole": product(16, 32, 32, WHOLE_K=True, FOLD=True),
    "blocks": product(16, 16, 16, WHOLE_K=False, FOLD=False),
}
BACKWARD = {
    "one pass": {"STORED_DY": False, "input": product(16, 32, 32, WHOLE_N=True, FOLD=True), "weight": None},
    "apart": {
        "STORED_DY": False,
        "input": product(16, 16, 16, WHOLE_N=False, FOLD=False),
        "weight": product(16, 16, 16),
    },
    "stored dy": {
        "STORED_DY": True,
        "input": product(16, 32, 16, WHOLE_N=False, FOLD=False),
        "weight": product(16, 32, 16),
    },
}


def gate_of(n: int, channels: int, dtype: torch.dtype) -> Tensor:
    gate = torch.randn(n, channels, 1, 1, dtype=torch.float64).sigmoid()
    gate[:, ::5] = 0  # of a hardsigmoid
    return gate.to(dtype)


def weight_of(dtype: torch.dtype) -> Tensor:
    return (torch.randn(OUTPUTS, K, 1, 1, dtype=torch.float64) / K**0.5).to(dtype)


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str) -> None:
    """In 16 bits a result comes from two roundings: of an operand, and of itself or of the other operand."""
    assert_close(actual, expected, TOLERANCE[dtype] * (1 if dtype == torch.float32 else 1.5), name)


@images
@pytest.mark.parametrize(
    ("choice", "dtype"), [("blocks", torch.float32), ("blocks", torch.float16), ("whole", torch.bfloat16)]
)
def test_forward(choice: str, dtype: torch.dtype, size: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "pointwise_forward", lambda *_: (FORWARD[choice],))
    n, h, w = size
    u, gate, weight = activation(n, K, h, w, dtype=dtype), gate_of(n, K, dtype), weight_of(dtype)
    gamma, beta, bias = torch.rand(OUTPUTS) + 0.5, torch.randn(OUTPUTS), torch.randn(OUTPUTS)
    args = (u, random_bn(K, dtype), Act.HARDSWISH, gate, weight, gamma, beta, 1e-5, True, bias)
    y, bn = ops["gated_pointwise_forward"](*args)
    assert y.dtype == dtype and is_channels_last_dense(y)
    check(y, oracle.gated_pointwise_forward(*args)[0], dtype, "y")
    assert_statistics(bn, y, gamma, beta, 1e-5)

    residual = activation(n, OUTPUTS, h, w, dtype=dtype)
    args = (u, gate, random_bn(OUTPUTS, dtype), Act.LEAKY_RELU, weight, None, residual, 0.2)
    check(ops["gated_pointwise_inference"](*args), oracle.gated_pointwise_inference(*args), dtype, "out")


@images
@pytest.mark.parametrize(("choice", "dtype"), list(zip(BACKWARD, DTYPES, strict=True)))
def test_backward(choice: str, dtype: torch.dtype, size: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "pointwise_backward", lambda *_: (BACKWARD[choice],))
    n, h, w = size
    u, gate, weight = activation(n, K, h, w, dtype=dtype), gate_of(n, K, dtype), weight_of(dtype)
    dz, y = (activation(n, OUTPUTS, h, w, dtype=dtype) for _ in range(2))
    args = (dz, y, random_grad_bn(OUTPUTS, dtype), u, random_bn(K, dtype), Act.LEAKY_RELU, gate, weight)
    args = (*args, True, True, 0.2)
    da, grad_weight, grad_gate = ops["gated_pointwise_backward"](*args)
    assert da.dtype == dtype and is_channels_last_dense(da)
    assert grad_gate.shape == gate.shape and grad_gate.dtype == grad_weight.dtype == torch.float32
    expected = oracle.gated_pointwise_backward(*args)
    for ours, theirs, name in zip((da, grad_weight, grad_gate), expected, ("da", "weight", "gate"), strict=True):
        check(ours, theirs, dtype, name)


@pytest.mark.parametrize(("case", "bn"), [("neither", False), ("scale", True), ("both", True)])
def test_optional_arguments(case: str, bn: bool) -> None:
    """Which of y and grad_bn_y there are; each half of the backward alone, chosen by the heuristics."""
    dtype = torch.float32
    u, gate, weight = activation(2, K, 2, 3, dtype=dtype), gate_of(2, K, dtype), weight_of(dtype)
    source = (u, random_bn(K, dtype), Act.SILU) if bn else (u, None, Act.LINEAR)
    forward = (*source, gate, weight, None, None, 1e-5, False)
    y, nothing = ops["gated_pointwise_forward"](*forward)
    check(y, oracle.gated_pointwise_forward(*forward)[0], dtype, "y")
    assert nothing.shape == (0,)
    output = (torch.randn_like(y), y if case == "both" else None, None)
    if case != "neither":
        output = (*output[:2], random_grad_bn(OUTPUTS, dtype))
    for needs in ((True, True), (True, False), (False, True)):
        args = (*output, *source, gate, weight, *needs)
        expected = oracle.gated_pointwise_backward(*args)
        for ours, theirs in zip(ops["gated_pointwise_backward"](*args), expected, strict=True):
            if theirs.numel() == 0:
                assert ours.shape == (0,)
            else:
                check(ours, theirs, dtype, str(needs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_in_16_bits(dtype: torch.dtype) -> None:
    """At most 1.5 times that of PyTorch's own path, which rounds what is between to 16 bits."""
    u, gate, weight = activation(3, K, 5, 5, dtype=dtype), gate_of(3, K, dtype), weight_of(dtype)
    bn, dz = random_bn(K, dtype), activation(3, OUTPUTS, 5, 5, dtype=dtype)
    a = oracle.norm_act(u, bn, Act.RELU, 0.0).to(dtype).requires_grad_()
    factor, filters = gate.clone().requires_grad_(), weight.clone().requires_grad_()
    own_y = torch.nn.functional.conv2d(a * factor, filters)
    own = (own_y, *torch.autograd.grad(own_y, (a, filters, factor), dz))
    forward = (u, bn, Act.RELU, gate, weight, None, None, 1e-5, False)
    backward = (dz, None, None, u, bn, Act.RELU, gate, weight, True, True)
    expected = oracle.gated_pointwise_forward(*forward)[:1]
    expected += oracle.gated_pointwise_backward(*backward)
    actual = ops["gated_pointwise_forward"](*forward)[:1] + ops["gated_pointwise_backward"](*backward)
    for ours, theirs, true in zip(actual, own, expected, strict=True):
        assert relative_error(ours, true) <= 1.5 * relative_error(theirs, true)


def test_what_is_not_finite_stays_in_its_image() -> None:
    dtype = torch.float32
    u, gate, weight = activation(5, K, 2, 3, dtype=dtype), gate_of(5, K, dtype), weight_of(dtype)
    dz, bn = activation(5, OUTPUTS, 2, 3, dtype=dtype), random_bn(K, dtype)
    u[1, 2, 1, 1], dz[3, 4, 0, 2], gate[4, 6] = float("nan"), float("inf"), float("-inf")
    args = (u, bn, Act.RELU, gate, weight, None, None, 1e-5, False)
    expected = oracle.gated_pointwise_forward(*args)[0]
    assert_same_specials(ops["gated_pointwise_forward"](*args)[0], expected)
    args = (dz, None, None, u, bn, Act.RELU, gate, weight, True, True)
    expected = oracle.gated_pointwise_backward(*args)
    for ours, theirs in zip(ops["gated_pointwise_backward"](*args), expected, strict=True):
        assert_same_specials(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (3, 8, 0, 4)], ids=str)
def test_no_pixels(shape: tuple[int, ...]) -> None:
    n, channels, *pixels = shape
    u, gate, weight = torch.empty(shape), torch.rand(n, channels, 1, 1), torch.randn(3, channels, 1, 1)
    u = u.contiguous(memory_format=torch.channels_last)
    source = (u, random_bn(channels, torch.float32), Act.RELU, gate, weight)
    y, bn = ops["gated_pointwise_forward"](*source, None, None, 1e-5, True)
    assert y.shape == (n, 3, *pixels) and not bn[[BN_MEAN, BN_VAR]].any()
    da, *gradients = ops["gated_pointwise_backward"](y, None, None, *source, True, True)
    assert da.shape == shape
    for gradient, of in zip(gradients, (weight, gate), strict=True):
        assert gradient.shape == of.shape and not gradient.any()


@triton.jit
def _sum_images(x_ptr, partial_ptr, rows, pixels, channels, BLOCK_M: tl.constexpr):
    c = tl.arange(0, 4)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (m < rows)[:, None] & (c < channels)[None, :]
    x = tl.load(x_ptr + m[:, None] * channels + c[None, :], mask=mask, other=0.0)
    store_image_sums(partial_ptr, tl.program_id(0), rows, pixels, channels, c, c < channels, x, BLOCK_M)


@pytest.mark.parametrize("pixels", [1, 7, 15, 16, 17, 32, 40])
def test_sums_of_images(pixels: int) -> None:
    """Whatever the border of a tile and that of an image have to do with each other, every value counts once; and
    places that no tile writes to are not read."""
    block_m, channels = 16, 3
    n = max(2, 50 // pixels)
    rows = n * pixels
    x = torch.randint(-9, 9, (rows, channels)).float()
    tiles = -(-rows // block_m)
    partial = merge.empty_image_sums(x, tiles, n, channels).fill_(float("nan"))
    _sum_images[(tiles,)](x, partial, rows, pixels, channels, BLOCK_M=block_m)
    sums = merge.image_sums(partial, n, pixels, block_m)
    assert torch.equal(sums.flatten(1), x.view(n, pixels, channels).sum(1))


@dtypes
@pytest.mark.parametrize("size", [(7, 1, 1), (2, 7, 7), (1, 9, 10)], ids=str)
@pytest.mark.parametrize("act", [Act.LINEAR, Act.SILU], ids=str)
def test_gradient_of_a_pooled_output_too(act: Act, size: tuple, dtype: torch.dtype) -> None:
    n, h, w = size
    y, grad, grad_pooled = (activation(n, K, *side, dtype=dtype) for side in ((h, w), (h, w), (1, 1)))
    bn = random_bn(K, dtype)
    args = (grad, y, bn, act, True, False, grad_pooled)
    dz, grad_bn = ops["norm_act_backward"](*args)
    assert dz.dtype == dtype and is_channels_last_dense(dz)
    assert_close(dz, oracle.norm_act_backward(*args)[0], TOLERANCE[dtype])
    of_stored = oracle.grad_bn(dz, y, bn, True)
    assert_close(grad_bn, of_stored, ACC_TOLERANCE[dtype])
    nothing, alone = ops["norm_act_backward"](*args, False)
    assert nothing.shape == (0,) and torch.equal(alone, grad_bn)


def test_a_pooled_gradient_has_no_other_beside_it() -> None:
    y, pooled = activation(2, 8, 3, 3, dtype=torch.float32), activation(2, 8, 1, 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="grad_pooled: expected None"):
        ops["norm_act_backward"](pooled, y, random_bn(8, torch.float32), Act.RELU, True, True, pooled)


@pytest.mark.parametrize(("k", "outputs"), [(24, 64), (160, 960), (960, 160), (1152, 320)])
def test_there_is_a_choice_that_stores_no_operand(k: int, outputs: int) -> None:
    """The pass that stores one before the product knows of no gate."""
    for bn, needs_input in ((False, False), (True, True)):
        forward = heuristics.pointwise_forward(4096, k, outputs, 2, False, bn, False, gpu.H100)
        backward = heuristics.pointwise_backward(4096, k, outputs, 2, False, needs_input, True, False, gpu.H100)
        assert not all(choice["STORED_A"] for choice in forward)
        assert not all(choice["weight"] and choice["weight"]["STORED_A"] for choice in backward)
