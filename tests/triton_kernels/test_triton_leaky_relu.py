"""LeakyReLU in every Triton kernel that activates, against the oracle.

The slopes are those by which a kernel could go wrong that takes the derivative from the activation's output.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from cpu_ops import (
    ACC_TOLERANCE,
    TOLERANCE,
    activation,
    assert_close,
    assert_same_specials,
    first_output,
    random_bn,
    random_grad_bn,
)
from torch import Tensor

from mobilenet_ext.contract import NO_PADDING, Act, conv_output_size
from mobilenet_ext.triton import gpu, heuristics, ops

LEAKY = Act.LEAKY_RELU
SLOPES = [0.2, 0.0, -0.3, 3.0]
# Every slope, and every dtype.
NUMBERS = [*((torch.float32, slope) for slope in SLOPES), (torch.bfloat16, 0.2), (torch.float16, -0.3)]
numbers = pytest.mark.parametrize(("dtype", "slope"), NUMBERS)
# For a kernel that has its activations from the same functions as one that all numbers go through.
few_numbers = pytest.mark.parametrize(("dtype", "slope"), [(torch.float32, -0.3), (torch.bfloat16, 0.2)])
N, C, H, W = 2, 11, 4, 5
OUTPUTS = 7
# kernel, stride, padding
DEPTHWISE = [
    *((3, 1, (1, 1, 1, 1), *number) for number in NUMBERS[1:]),
    (3, 2, (0, 1, 0, 1), torch.bfloat16, -0.3),
    (5, 1, (2, 2, 2, 2), torch.float32, -0.3),
    (5, 2, (2, 2, 2, 2), torch.float16, 0.2),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "H100", gpu.H100._replace(multiprocessors=1))


def filters(outputs: int, inputs: int, kernel: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(outputs, inputs, kernel, kernel, dtype=torch.float64) / inputs**0.5 / kernel).to(dtype)


def check(op: str, args: tuple, dtype: torch.dtype, roundings: float = 1.0) -> None:
    """``roundings``: to 16 bits, one after the other, that a result comes from."""
    actual, expected = first_output(ops[op](*args)), first_output(getattr(oracle, op)(*args))
    bound = TOLERANCE[dtype] * (1 if dtype == torch.float32 else roundings)
    assert_close(actual, expected, bound, op)


def check_backward(op: str, args: tuple, dtype: torch.dtype) -> None:
    """All that a convolution's backward gives; ``grad_bn_u`` is of dz_u as stored."""
    *rest, slope = args
    dz_u, grad_weight, grad_bn_u = ops[op](*args)
    expected = getattr(oracle, op)(*args)
    bound = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 1.5)
    assert_close(dz_u, expected[0], bound, "dz_u")
    assert_close(grad_weight, expected[1], bound, "grad_weight")
    u, bn_u = rest[3:5]
    assert_close(grad_bn_u, oracle.grad_bn(dz_u, u, bn_u, True), 1e-4, "grad_bn_u")


def product(m: int, n: int, k: int, **constants: bool) -> heuristics.Config:
    kernel = heuristics.config(num_warps=4, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, **constants)
    return {"PROGRAMS": 2, "STORED_A": True, "TMA": False, "kernel": kernel}


@pytest.mark.parametrize(("kernel", "stride", "padding", "dtype", "slope"), DEPTHWISE)
def test_depthwise(kernel: int, stride: int, padding: tuple, dtype: torch.dtype, slope: float) -> None:
    u, bn, weight = activation(N, C, H, W, dtype=dtype), random_bn(C, dtype), filters(C, 1, kernel, dtype)
    args = (u, bn, LEAKY, weight, stride, padding)
    check("depthwise_forward", (*args, None, None, 1e-5, False, None, slope), dtype)
    check("depthwise_inference", (*args, None, None, slope), dtype)
    out = conv_output_size(H, W, kernel, stride, padding)
    dz, y = (activation(N, C, *out, dtype=dtype) for _ in range(2))
    args = (dz, y, random_grad_bn(C, dtype), u, bn, LEAKY, True, weight, stride, padding, True, True, slope)
    check_backward("depthwise_backward", args, dtype)


@few_numbers
@pytest.mark.parametrize("stored", [False, True], ids=["on load", "stored"])
def test_pointwise(stored: bool, dtype: torch.dtype, slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
    u, bn, weight = activation(N, C, H, W, dtype=dtype), random_bn(C, dtype), filters(OUTPUTS, C, 1, dtype)
    choice = {**product(32, 16, 16, WHOLE_K=True, FOLD=True), "STORED_A": stored}
    monkeypatch.setattr(heuristics, "pointwise_forward", lambda *_: (choice,))
    check("pointwise_forward", (u, bn, LEAKY, weight, 1, NO_PADDING, None, None, 1e-5, False, None, slope), dtype, 1.5)


@few_numbers
def test_pointwise_inference(dtype: torch.dtype, slope: float) -> None:
    u, weight = activation(N, C, H, W, dtype=dtype), filters(OUTPUTS, C, 1, dtype)
    args = (u, random_bn(OUTPUTS, dtype), LEAKY, weight, 1, NO_PADDING, None, None, slope)
    check("pointwise_inference", args, dtype)


ONE_PASS = {"STORED_DY": False, "input": product(32, 16, 16, WHOLE_N=True, FOLD=True), "weight": None}
APART = {"STORED_DY": True, "input": product(32, 16, 16, WHOLE_N=False, FOLD=True), "weight": product(32, 16, 16)}


@numbers
@pytest.mark.parametrize("choice", [ONE_PASS, APART], ids=["one pass", "apart"])
def test_pointwise_backward(choice: dict, dtype: torch.dtype, slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "pointwise_backward", lambda *_: (choice,))
    u, bn, weight = activation(N, C, H, W, dtype=dtype), random_bn(C, dtype), filters(OUTPUTS, C, 1, dtype)
    dz, y = (activation(N, OUTPUTS, H, W, dtype=dtype) for _ in range(2))
    args = (dz, y, random_grad_bn(OUTPUTS, dtype), u, bn, LEAKY, True, weight, 1, NO_PADDING, True, True, slope)
    check_backward("pointwise_backward", args, dtype)


@numbers
def test_norm_act(dtype: torch.dtype, slope: float) -> None:
    y, bn, grad = activation(N, C, H, W, dtype=dtype), random_bn(C, dtype), activation(N, C, H, W, dtype=dtype)
    for pool in (False, True):
        check("norm_act_forward", (y, bn, LEAKY, pool, None, slope), dtype)
        if pool:
            grad = activation(N, C, 1, 1, dtype=dtype)
        args = (grad, y, bn, LEAKY, True, pool, None, True, slope)
        check("norm_act_backward", args, dtype)
        dz, grad_bn = ops["norm_act_backward"](*args)
        of_stored = oracle.grad_bn(dz, y, bn, True)
        assert_close(grad_bn, of_stored, ACC_TOLERANCE[dtype])


@few_numbers
def test_dense(dtype: torch.dtype, slope: float) -> None:
    x, bn, weight = activation(1, 3, H, W, dtype=dtype), random_bn(OUTPUTS, dtype), filters(OUTPUTS, 3, 3, dtype)
    check("dense_inference", (x, bn, LEAKY, weight, 2, (1, 1, 1, 1), None, None, slope), dtype)


ONE_KERNEL = heuristics.config(num_warps=4, BLOCK_H=4, BLOCK_W=8, BLOCK_N=16, BLOCK_C=16)


@few_numbers
@pytest.mark.parametrize("choice", [ONE_KERNEL, heuristics.TWO_KERNELS], ids=["one kernel", "two kernels"])
def test_block(choice: dict, dtype: torch.dtype, slope: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two slopes are not the same."""
    monkeypatch.setattr(heuristics, "block_inference", lambda *_: (choice,))
    x, weights = activation(1, C, H, W, dtype=dtype), (filters(C, 1, 3, dtype), filters(OUTPUTS, C, 1, dtype))
    args = (x, random_bn(C, dtype), LEAKY, weights[0], 1, (1, 1, 1, 1), random_bn(OUTPUTS, dtype), LEAKY, weights[1])
    check("block_inference", (*args, None, None, slope, slope + 0.3), dtype, 1.5)


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_infinity(slope: float) -> None:
    """An infinity times a slope of 0 is a NaN."""
    y, bn = activation(N, C, H, W, dtype=torch.float32), random_bn(C, torch.float32)
    y[0, 1, 2, 3], y[1, 2, 0, 0], y[1, 3, 0, 0] = -float("inf"), float("inf"), float("nan")
    args = (y, bn, LEAKY, False, None, slope)
    out = ops["norm_act_forward"](*args)
    assert_same_specials(out, oracle.norm_act_forward(*args))
    assert out[0, 1, 2, 3].isnan() if slope == 0 else out[0, 1, 2, 3].isinf()
    grad = torch.full_like(y, float("inf"))
    args = (grad, y, bn, LEAKY, True, False, None, True, slope)
    dz, expected = ops["norm_act_backward"](*args)[0], oracle.norm_act_backward(*args)[0]
    assert_same_specials(dz, expected)
    assert slope or dz.isnan().any()
