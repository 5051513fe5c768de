"""The reference backend, which is read as the specification of the ops, against the oracle."""

from __future__ import annotations

import math

import every_op
import oracle
import pytest
import torch
from cpu_ops import TOLERANCE, assert_close
from torch import Tensor

import mobilenet_ext as mx
from mobilenet_ext import ops
from mobilenet_ext.contract import Act

SPECIAL = [math.nan, math.inf, -math.inf, -3.0, 3.0, 0.0, -0.0, 6.0, -1e4, 1e4, -88.0, -104.0, 1e30, -1e30]


@pytest.fixture(autouse=True)
def _reference():
    with mx.backends.use("reference"):
        yield


def test_every_op() -> None:
    seen = set()
    for call in every_op.calls("cpu", (torch.float32,)):
        call = call._replace(args=[a.double() if isinstance(a, Tensor) else a for a in call.args])
        expected = getattr(oracle, call.op)(*call.args)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for i, (actual, wanted) in enumerate(zip(call.run(), expected, strict=True)):
            assert_close(actual, wanted, 1e-10 if i else 1e-12, str(call))
        seen.add(call.op)
    assert seen == every_op.kernel_ops()


@pytest.mark.parametrize("dtype", every_op.DTYPES, ids=str)
def test_an_activation_is_rounded_once(dtype: torch.dtype) -> None:
    for call in every_op.calls("cpu", (dtype,)):
        expected = getattr(oracle, call.op)(*call.args)
        actual = call.run()[0]
        if actual.dtype == dtype:
            # Each of a few values may be off by nearly half a unit.
            tolerance = TOLERANCE[dtype] if actual.numel() >= 64 else max(TOLERANCE[dtype], torch.finfo(dtype).eps / 2)
            assert_close(actual, expected[0] if isinstance(expected, tuple) else expected, tolerance, str(call))


@pytest.mark.parametrize("act", Act)
def test_values_and_derivatives_of_an_activation(act: Act) -> None:
    z = torch.cat([torch.tensor(SPECIAL), torch.linspace(-8, 8, 1001)]).double().view(-1, 1, 1, 1)
    da = torch.linspace(-2, 2, len(z)).double().view(-1, 1, 1, 1)
    bn = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]).double().view(5, 1)
    a = ops.norm_act_forward(z, bn, act, False, None, 0.1)
    dz, _ = ops.norm_act_backward(da, z, bn, act, False, False, None, True, 0.1)
    torch.testing.assert_close(a, oracle.activate(z, act, 0.1), equal_nan=True)
    torch.testing.assert_close(dz, oracle.activate_backward(z, da, act, 0.1), equal_nan=True)


def test_zero_stays_zero() -> None:
    """Padding relies on it."""
    zero, bn = torch.zeros(1, 1, 1, 1), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]).view(5, 1)
    assert not any(ops.norm_act_forward(zero, bn, act, False).item() for act in Act)


def test_autocast_does_not_reach_into_an_op() -> None:
    """What it casts are an op's arguments: the op computes in the accumulation dtype all the same."""
    calls = [call for call in every_op.calls("cpu", (torch.bfloat16,)) if "norm" not in call.op]
    for call in calls:
        expected = call.run()
        with torch.autocast("cpu", torch.bfloat16):
            actual = call.run()
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b), str(call)


def test_the_mean_of_an_infinite_channel_is_infinite() -> None:
    y = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    y[:, 1] = math.inf
    y[0, 2, 0, 0] = -math.inf
    _, bn = ops.pointwise_forward(
        y, None, Act.LINEAR, torch.eye(3).view(3, 3, 1, 1) * 0 + 1, 1, [0] * 4, None, None, 1e-5, True
    )
    assert bn[0].isnan().all()  # Inf - Inf
    weight = torch.ones(3, 1, 3, 3)
    _, bn = ops.depthwise_forward(y, None, Act.LINEAR, weight, 1, [1, 1, 1, 1], None, None, 1e-5, True)
    assert bn[0, 1] == math.inf and bn[0, 2] == -math.inf and bn[0, 0].isfinite()
