"""What is added to a Triton kernel's output after its activation, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from cpu_ops import ACC_TOLERANCE, TOLERANCE, activation, assert_close, in_float64, is_channels_last_dense, random_bn
from torch import Tensor

from mobilenet_ext.backends import reference
from mobilenet_ext.contract import NO_PADDING, Act, conv_output_size
from mobilenet_ext.triton import gpu, heuristics, ops

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
N, C, H, W = 2, 11, 5, 7
OUTPUTS = 13
PADDING = (1, 1, 1, 1)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "H100", gpu.H100._replace(multiprocessors=1))


def filters(outputs: int, inputs: int, kernel: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(outputs, inputs, kernel, kernel, dtype=torch.float64) / inputs**0.5 / kernel).to(dtype)


def check(op: str, args: tuple, dtype: torch.dtype, rounded_once: bool = True) -> None:
    """``args`` end with the residual. ``rounded_once``: nothing is, between the operands and the output."""
    actual, (expected,) = ops[op](*args), in_float64(getattr(reference, op), args)
    assert actual.dtype == dtype and is_channels_last_dense(actual)
    assert_close(actual, expected, TOLERANCE[dtype] * (1 if rounded_once else 1.5))
    if rounded_once and dtype != torch.float32:
        # But for what float32 moves over the middle between two values. With another rounding it is every fourth.
        assert (actual != expected.to(dtype)).double().mean() < 0.02


@dtypes
@pytest.mark.parametrize(("kernel", "stride", "act"), [(3, 1, Act.RELU6), (3, 2, Act.LINEAR), (5, 1, Act.LINEAR)])
def test_depthwise(kernel: int, stride: int, act: Act, dtype: torch.dtype) -> None:
    x, weight = activation(N, C, H, W, dtype=dtype), filters(C, 1, kernel, dtype)
    residual = activation(N, C, *conv_output_size(H, W, kernel, stride, PADDING), dtype=dtype)
    check("depthwise_inference", (x, random_bn(C, dtype), act, weight, stride, PADDING, None, residual), dtype)


@dtypes
@pytest.mark.parametrize("bn", [False, True])
def test_pointwise(bn: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several tiles, and several blocks of outputs and of inputs."""
    kernel = heuristics.config(4, BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, WHOLE_K=False, FOLD=True)
    choice = {"PROGRAMS": 2, "STORED_A": False, "TMA": False, "kernel": kernel}
    monkeypatch.setattr(heuristics, "pointwise_forward", lambda *_: (choice,))
    x, weight, residual = (
        activation(N, 24, H, W, dtype=dtype),
        filters(19, 24, 1, dtype),
        activation(N, 19, H, W, dtype=dtype),
    )
    bn_y = random_bn(19, dtype) if bn else None
    check("pointwise_inference", (x, bn_y, Act.RELU, weight, 1, NO_PADDING, None, residual), dtype)


@dtypes
def test_dense(dtype: torch.dtype) -> None:
    x, weight = activation(N, 3, H, W, dtype=dtype), filters(OUTPUTS, 3, 3, dtype)
    residual = activation(N, OUTPUTS, 3, 4, dtype=dtype)
    check("dense_inference", (x, random_bn(OUTPUTS, dtype), Act.SILU, weight, 2, PADDING, None, residual), dtype)


ONE_KERNEL = heuristics.config(num_warps=4, BLOCK_H=4, BLOCK_W=8, BLOCK_N=16, BLOCK_C=16)


@dtypes
@pytest.mark.parametrize("choice", [ONE_KERNEL, heuristics.TWO_KERNELS], ids=["one kernel", "two kernels"])
def test_block(choice: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "block_inference", lambda *_: (choice,))
    x, weights = activation(N, C, H, W, dtype=dtype), (filters(C, 1, 3, dtype), filters(OUTPUTS, C, 1, dtype))
    residual = activation(N, OUTPUTS, H, W, dtype=dtype)
    depthwise, pointwise = (
        (random_bn(C, dtype), Act.RELU, weights[0]),
        (random_bn(OUTPUTS, dtype), Act.RELU, weights[1]),
    )
    check("block_inference", (x, *depthwise, 1, PADDING, *pointwise, None, residual), dtype, rounded_once=False)


@dtypes
@pytest.mark.parametrize("shape", [(N, C, H, W), (1, 200, 1, 1), (3, 72, 10, 13)], ids=str)
def test_norm_act(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y, residual = (activation(*shape, dtype=dtype) for _ in range(2))
    check("norm_act_forward", (y, random_bn(shape[1], dtype), Act.LINEAR, False, residual), dtype)


@dtypes
@pytest.mark.parametrize("act", [Act.LINEAR, Act.SILU], ids=str)
def test_sums_alone(act: Act, dtype: torch.dtype) -> None:
    """Of a linear unit before an addition the gradient is at hand: only its sums are wanted."""
    y, grad = (activation(N, C, H, W, dtype=dtype) for _ in range(2))
    args = (grad, y, random_bn(C, dtype), act, True, False, None)
    dz, grad_bn = ops["norm_act_backward"](*args)
    nothing, alone = ops["norm_act_backward"](*args, False)
    assert nothing.shape == (0,) and nothing.dtype == dtype and torch.equal(alone, grad_bn)
    of_stored = reference._make_grad_bn(dz.double(), y.double(), args[2].double(), True)
    assert_close(alone, of_stored, ACC_TOLERANCE[dtype])


def test_a_pooled_output_has_no_residual() -> None:
    y = activation(N, C, H, W, dtype=torch.float32)
    with pytest.raises(ValueError, match="residual: expected None"):
        ops["norm_act_forward"](y, random_bn(C, torch.float32), Act.RELU, True, y)
