"""What the tests of the C++ CPU kernels share: inputs, comparisons, subprocesses with another instruction set."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import mobilenet_ext
from mobilenet_ext.contract import BN_MEAN, BN_RSTD, BN_SCALE, BN_VAR, NO_PADDING, Act, acc_dtype

LIBRARY = Path(mobilenet_ext.__file__).parent / "_cpu.abi3.so"
torch.ops.load_library(str(LIBRARY))
ops = torch.ops.mobilenet_ext_cpu
_library = ctypes.CDLL(str(LIBRARY))
_library.mx_cpu_isa.restype = ctypes.c_char_p
ISA = _library.mx_cpu_isa().decode()  # the instruction set in use
ISAS = {  # what the processor needs for each
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
    "amx_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16"},
}

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Relative error (norm of the difference over norm of the reference) against the oracle on the same
# inputs. 16-bit outputs are rounded once: half a unit in the last place is 2^-9 (bfloat16) or 2^-12 (float16).
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 3e-3, torch.float16: 4e-4}
ACC_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def in_a_row(ops: int) -> tuple[int, list[int], list[int]]:
    """For ``make_plan``: one input, ops of which each takes what the one before gives, and the output of the last."""
    return 1, [number for op in range(ops) for number in (op, -1, -1)], [ops]


def shapes(covered: list[tuple], *more: tuple) -> list[Any]:
    """Every instruction set is tested with ``covered``, all others by default with the machine's own alone."""
    return [*(pytest.param(shape, marks=pytest.mark.cover) for shape in covered), *more]


def cases(covered: list[tuple], *more: tuple) -> Any:
    """Such shapes as a parameter."""
    return pytest.mark.parametrize("shape", shapes(covered, *more), ids=str)


def activation(*shape: int, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """A random channels_last activation."""
    x = torch.randn(shape, dtype=torch.float64) * std + mean
    return x.to(dtype=dtype, memory_format=torch.channels_last)


def random_bn(channels: int, dtype: torch.dtype) -> Tensor:
    """A normalisation [5, channels] that rectifies about half of standard normal inputs."""
    acc = acc_dtype(dtype)
    var = torch.rand(channels, dtype=torch.float64) + 0.5
    mean, beta = torch.randn(channels, dtype=torch.float64) * 0.3, torch.randn(channels, dtype=torch.float64) * 0.3
    gamma = torch.rand(channels, dtype=torch.float64) + 0.5
    rstd = var.rsqrt()
    return torch.stack([mean, gamma * rstd, beta, rstd, var]).to(acc)


def random_grad_bn(channels: int, dtype: torch.dtype) -> Tensor:
    """What a BatchNorm's backward needs, [6, channels], all rows random."""
    return torch.randn(6, channels, dtype=torch.float64).to(acc_dtype(dtype))


def rounds_operands(dtype: torch.dtype) -> bool:
    """Whether matrix products round their operands to ``dtype``, and do not keep them in float32."""
    return dtype == torch.bfloat16 and ISA in ("avx512_bf16", "amx_bf16")


def expected_backward(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The gradients of the input and of the weight of a product, of operands as the kernel rounds them."""
    if not rounds_operands(args[0].dtype):
        return oracle.conv_backward(*args)[:2]
    return oracle.product_backward(*args)


def expected_forward(op: str, args: tuple[Any, ...]) -> Tensor:
    """What an op with a product computes first, of operands as the kernel rounds them."""
    if rounds_operands(args[0].dtype):
        op, args = _with_rounded_operands(op, args)
    return first_output(getattr(oracle, op)(*args))


def _with_rounded_operands(op: str, args: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """The product alone: the op and its arguments, of what the op makes of its input first."""
    pointwise = (1, NO_PADDING)
    if op == "pointwise_forward":
        u, bn_u, act_u, weight, _, _, *rest, slope = args
        return op, (oracle.norm_act(u, bn_u, act_u, slope).to(u.dtype), None, Act.LINEAR, weight, *pointwise, *rest)
    if op == "gated_pointwise_forward":
        u, bn_u, act_u, gate, weight, *rest, slope = args
        a = (oracle.norm_act(u, bn_u, act_u, slope) * gate.double()).to(u.dtype)
        return "pointwise_forward", (a, None, Act.LINEAR, weight, *pointwise, *rest)
    if op == "gated_pointwise_inference":
        x, gate, bn_y, act_y, weight, *rest = args
        return "pointwise_inference", ((x.double() * gate.double()).to(x.dtype), bn_y, act_y, weight, *pointwise, *rest)
    if op == "block_inference":
        depthwise, (bn_y, act_y, weight) = args[:6], args[6:9]
        _, residual, depthwise_slope, slope = (*args[9:], *(None, None, 0.0, 0.0)[len(args) - 9 :])
        a = oracle.depthwise_inference(*depthwise, None, None, depthwise_slope).to(args[0].dtype)
        return "pointwise_inference", (a, bn_y, act_y, weight, *pointwise, None, residual, slope)
    return op, args


def first_output(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


# How a convolution takes its input: as it is, or normalised and activated.
INPUTS = [None, *Act]


# What a convolution's backward is given: act_u, whether there are grad_bn_y and y, and batch_stats_u.
GRADIENTS = [
    *((act, True, True, True) for act in Act),
    (Act.RELU, True, False, False),
    (Act.RELU, False, False, True),
    (None, True, True, False),
]


def norm_act_of(bn_u: Tensor, act: Act | None) -> tuple[Tensor | None, Act]:
    """A convolution's ``bn_u`` and ``act_u``, for one of ``INPUTS``."""
    return (None, Act.LINEAR) if act is None else (bn_u, act)


def weight_tolerance(dtype: torch.dtype) -> float:
    """Of a product's gradient of the weight."""
    # Operands next to the middle of two values that can be stored may be rounded to either.
    return 5e-4 if rounds_operands(dtype) else ACC_TOLERANCE[dtype]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    scale = expected.norm().item()
    return (actual.double() - expected).norm().item() / (scale if scale else 1.0)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"


def assert_statistics(bn_y: Tensor, y: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> None:
    """bn_y is the normalisation by the statistics of y as stored."""
    of_stored = oracle.batch_bn(y, gamma, beta, eps)
    assert bn_y.dtype == acc_dtype(y.dtype)
    for row, name in enumerate(["mean", "scale", "shift", "rstd", "var"]):
        assert_close(bn_y[row], of_stored[row], ACC_TOLERANCE[y.dtype], name)


def assert_grad_bn(grad_bn_y: Tensor, dz: Tensor, y: Tensor, bn_y: Tensor, batch_stats: bool, slack: float = 1) -> None:
    """grad_bn_y is what the backward of the normalisation needs, by dz as stored."""
    of_stored = oracle.grad_bn(dz, y, bn_y, batch_stats)
    for row, name in enumerate(["dz coefficient", "y coefficient", "mean", "constant", "gamma", "beta"]):
        assert_close(grad_bn_y[row], of_stored[row], slack * ACC_TOLERANCE[y.dtype], name)


def assert_same_specials(actual: Tensor, expected: Tensor) -> None:
    """NaN, Inf and -Inf are in the same places."""
    actual = actual.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isposinf(), expected.isposinf())
    assert torch.equal(actual.isneginf(), expected.isneginf())


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def misaligned(x: Tensor) -> Tensor:
    """The same values and strides, one element into their storage."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)


def is_channels_last_dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def with_threads(threads: int, op: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outputs = op(*args)
    finally:
        torch.set_num_threads(before)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check_threads(op: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The same bits on any number of threads."""
    first = with_threads(1, op, args)
    for threads in (1, 2, 5):
        again = with_threads(threads, op, args)
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True)), (op, threads)


def same_bits(a: Tensor, b: Tensor) -> bool:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def supports(isa: str) -> bool:
    """Whether this machine runs an instruction set of the kernels."""
    flags = set()
    for line in open("/proc/cpuinfo"):
        if line.startswith("flags"):
            flags.update(line.split(":")[1].split())
    return ISAS[isa] <= flags


def run_with_isa(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``python *arguments`` with the CPU kernels' instruction set forced."""
    environment = {**os.environ, "MOBILENET_EXT_CPU_ISA": isa}
    package = str(LIBRARY.parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1800, check=False
    )


def check_conv_backward(op: str, output: tuple, source: tuple) -> None:
    """A convolution's backward against the oracle, whole and each half of it alone.

    ``output``: (dz, y, grad_bn_y); ``source``: (u, bn_u, act_u, batch_stats_u, weight, ...), as the op takes them.
    """
    args = (*output, *source)
    u, bn_u, _, batch_stats, *_ = source
    backward = getattr(ops, op)
    dz_u, grad_weight, grad_bn_u = backward(*args, True, True)
    is_product = op != "depthwise_backward"
    expected_dz, expected_weight = expected_backward(args) if is_product else oracle.conv_backward(*args)[:2]
    assert dz_u.dtype == u.dtype and is_channels_last_dense(dz_u)
    assert_close(dz_u, expected_dz, TOLERANCE[u.dtype], "dz_u")
    tolerance = weight_tolerance(u.dtype) if is_product else ACC_TOLERANCE[u.dtype]
    assert_close(grad_weight, expected_weight, tolerance, "grad_weight")
    if bn_u is None:
        assert grad_bn_u.shape == (0,)
    else:
        assert_grad_bn(grad_bn_u, dz_u, u, bn_u, batch_stats)

    only_weight = backward(*args, False, True)
    assert only_weight[0].shape == (0,) and only_weight[0].dtype == u.dtype and only_weight[2].shape == (0,)
    assert same_bits(only_weight[1], grad_weight)
    only_input = backward(*args, True, False)
    assert same_bits(only_input[0], dz_u) and only_input[1].shape == (0,) and same_bits(only_input[2], grad_bn_u)


# Channels of `overflowing` whose squares no float32 holds.
OVERFLOWING = 3


def overflowing(n: int, c: int, h: int, w: int, dtype: torch.dtype, size: float = 1e22) -> Tensor:
    """Random activations but for three channels: values of either sign, one in front, and one at the end."""
    x = activation(n, c, h, w, dtype=dtype)
    x[:, 0] = torch.randn(n, h, w, dtype=torch.float64).sign() * size
    x[0, 1, 0, 0] = x[-1, 2, -1, -1] = size
    return x


def copying_weight(kind: str, channels: int, dtype: torch.dtype) -> Tensor:
    """The weight of a "depthwise", "pointwise" or "dense" convolution that gives its input."""
    side = 1 if kind == "pointwise" else 3
    weight = torch.zeros(channels, 1 if kind == "depthwise" else channels, side, side, dtype=dtype)
    for c in range(channels):
        weight[c, 0 if kind == "depthwise" else c, side // 2, side // 2] = 1
    return weight


def check_overflowed(bn: Tensor, y: Tensor) -> None:
    """``bn`` holds the statistics of ``y``, made by ``overflowing``: where squares overflow, a variance of Inf and a
    scale of 0, as nn.BatchNorm2d has it in channels_last; the other channels do not notice."""
    mean = (y.double() / (y.numel() // y.shape[1])).sum((0, 2, 3))
    torch.testing.assert_close(bn[BN_MEAN].double(), mean, rtol=1e-5, atol=1e-5 * mean.abs().max().item())
    size = OVERFLOWING
    assert bn[BN_VAR, :size].isposinf().all(), bn[BN_VAR, :size]
    assert not bn[[BN_RSTD, BN_SCALE], :size].any()
    assert_close(bn[:, size:], oracle.batch_bn(y[:, size:], None, None, 1e-5), 1e-5)
