"""Training statistics of finite values whose squares are not: the same on every instruction set and backend."""

from __future__ import annotations

import oracle
import plain
import pytest
import torch
from cpu_ops import (
    DTYPES,
    OVERFLOWING,
    check_overflowed,
    copying_weight,
    overflowing,
)
from cpu_ops import ops as cpu_ops
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext import contract, ops
from mobilenet_ext.contract import Act

pytestmark = pytest.mark.cover  # on every instruction set

UNITS = {
    "depthwise": lambda: mx.nn.DepthwiseConvBNReLU(8, bias=False),
    "pointwise": lambda: mx.nn.PointwiseConvBNReLU(8, 8, bias=False),
    "dense": lambda: mx.nn.StemConvBNReLU(8, 8, bias=False),
}
KINDS = tuple(UNITS)
SHAPES = [(2, 8, 9, 9), (1, 33, 60, 7), (3, 5, 2, 1)]
# Not float16: no sum of squares of such numbers overflows float32.
WIDE = [dtype for dtype in DTYPES if dtype != torch.float16]


def forward(kind: str, x: Tensor, kernels=cpu_ops) -> tuple[Tensor, Tensor]:
    """The convolution that copies, with the statistics of its output."""
    padding = 0 if kind == "pointwise" else 1
    weight = copying_weight(kind, x.shape[1], x.dtype).to(x.device)
    return getattr(kernels, f"{kind}_forward")(x, None, Act.LINEAR, weight, 1, padding, None, None, 1e-5, True)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_squares_that_overflow(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = overflowing(*shape, dtype, 1e200 if dtype == torch.float64 else 1e22)
    y, bn = forward(kind, x)
    assert torch.equal(y, x)
    check_overflowed(bn, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_that_overflow(kind: str, dtype: torch.dtype) -> None:
    """The mean of finite values is finite, and it is their mean."""
    largest = torch.finfo(torch.bfloat16).max
    x = overflowing(2, 8, 9, 9, dtype, largest)
    x[:, 3] = largest  # of all pixels
    y, bn = forward(kind, x)
    mean = (y.double() / 162).sum((0, 2, 3))
    assert torch.isfinite(bn[contract.BN_MEAN]).all()
    torch.testing.assert_close(bn[contract.BN_MEAN].double(), mean, rtol=1e-5, atol=1e-5 * largest)
    assert bn[contract.BN_VAR, :OVERFLOWING].isposinf().all()
    assert not bn.isnan().any()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_an_infinite_value_among_them(value: float) -> None:
    x = overflowing(2, 8, 9, 9, torch.float32)
    x[1, 0, 4, 4] = value
    # All taps 1: a tap of 0 would make a NaN of an Inf.
    y, bn = cpu_ops.depthwise_forward(x, None, Act.LINEAR, torch.ones(8, 1, 3, 3), 1, 1, None, None, 1e-5, True)
    expected = nn.BatchNorm2d(8, momentum=1.0)
    expected(y)
    torch.testing.assert_close(bn[contract.BN_MEAN, 0], expected.running_mean[0], equal_nan=True)
    assert bn[contract.BN_VAR, 0].isnan() and expected.running_var[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-18, 1e-25, 1e-30, 1e-36])
def test_squares_that_underflow(kind: str, dtype: torch.dtype, size: float) -> None:
    x = (torch.randn(2, 8, 9, 9) * size).to(dtype).contiguous(memory_format=torch.channels_last)
    y, bn = forward(kind, x)
    expected = oracle.batch_bn(y, None, None, 1e-5)
    torch.testing.assert_close(bn.double(), expected, rtol=1e-5, atol=1e-45)


@pytest.mark.parametrize("kind", KINDS)
def test_every_backend(backend: str, device: str, kind: str) -> None:
    x = overflowing(2, 8, 9, 9, torch.float32).to(device)
    y, bn = forward(kind, x, ops)
    check_overflowed(bn.cpu(), y.cpu())


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_that_overflows_trains_on(backend: str, device: str, kind: str) -> None:
    """As nn.BatchNorm2d in channels_last: beta where the variance is Inf, and no NaN anywhere, in backward too."""
    units = {
        "depthwise": mx.nn.DepthwiseConvBNReLU,
        "pointwise": mx.nn.PointwiseConvBNReLU,
        "dense": mx.nn.StemConvBNReLU,
    }
    fused = units[kind](8, bias=False) if kind == "depthwise" else units[kind](8, 8, bias=False)
    plain.randomise_(fused)
    fused[0].weight.data = copying_weight(kind, 8, torch.float32)
    fused[1].momentum = 1.0
    expected = plain.unit(kind, 8, 8, bias=False).to(memory_format=torch.channels_last)
    expected.load_state_dict(fused.state_dict())
    expected[1].momentum = 1.0
    fused.to(device)
    x = overflowing(2, 8, 9, 9, torch.float32)
    ours, theirs = plain.leaf(x.to(device)), plain.leaf(x)
    out, wanted = fused(ours), expected(theirs)
    out.sum().backward(), wanted.sum().backward()
    beta = fused[1].bias.relu().detach().cpu()[:OVERFLOWING].view(1, -1, 1, 1)
    assert torch.equal(out.detach().cpu()[:, :OVERFLOWING], beta.expand(2, -1, 9, 9))
    pairs = {"output": (out, wanted), "input": (ours.grad, theirs.grad)}
    pairs |= {
        name: (p.grad, q.grad) for (name, p), q in zip(fused.named_parameters(), expected.parameters(), strict=True)
    }
    for name, (actual, other) in pairs.items():
        assert torch.equal(actual.cpu().isfinite(), other.isfinite()), name
    assert torch.equal(fused[1].running_var.cpu().isposinf(), expected[1].running_var.isposinf())
    assert not fused[1].running_mean.isnan().any()
