"""The activations of the reference, which the kernels are compared with, are PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from plain import activate

from mobilenet_ext.backends import reference
from mobilenet_ext.contract import Act

SLOPE = 0.1  # of leaky ReLU
SPECIAL = [math.nan, math.inf, -math.inf, -3.0, 3.0, 0.0, -0.0, 6.0, -1e4, 1e4, -88.0, -104.0, 1e30, -1e30]


@pytest.mark.parametrize("act", Act)
def test_value_and_derivative(act: Act) -> None:
    z = torch.cat([torch.tensor(SPECIAL), torch.linspace(-8, 8, 1001)]).double().requires_grad_()
    da = torch.linspace(-2, 2, len(z)).double()
    expected = activate(act, z, SLOPE)
    expected_dz = torch.autograd.grad(expected, z, da)[0]
    torch.testing.assert_close(reference._ACTIVATE[act](z, SLOPE), expected, equal_nan=True)
    dz = reference._ACTIVATE_BACKWARD[act](z, da, SLOPE)
    if act in (Act.RELU6, Act.HARDSWISH):  # at NaN PyTorch's vectorised and scalar code differ
        assert dz[0] == da[0]
        dz, expected_dz = dz[1:], expected_dz[1:]
    torch.testing.assert_close(dz, expected_dz, equal_nan=True)


def test_zero_stays_zero() -> None:
    """Padding relies on it."""
    for act in Act:
        assert reference._ACTIVATE[act](torch.zeros(1), SLOPE).item() == 0
