"""Activations and their derivatives in Triton, against the reference."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from mobilenet_ext.backends import reference
from mobilenet_ext.contract import Act
from mobilenet_ext.triton.activation import activate, activate_backward, activate_backward_by_output

Z = torch.tensor([-float("inf"), -1e30, -2.5, -1e-40, -0.0, 0.0, 1e-40, 0.5, 3.0, 1e30, float("inf"), float("nan")])


@triton.jit
def _kernel(z_ptr, da_ptr, a_ptr, dz_ptr, by_output_ptr, size, ACT: tl.constexpr):
    i = tl.arange(0, 16)
    mask = i < size
    z = tl.load(z_ptr + i, mask=mask, other=0.0)
    da = tl.load(da_ptr + i, mask=mask, other=0.0)
    a = activate(z, ACT)
    tl.store(a_ptr + i, a, mask=mask)
    tl.store(dz_ptr + i, activate_backward(z, da, ACT), mask=mask)
    tl.store(by_output_ptr + i, activate_backward_by_output(a, da, ACT), mask=mask)


def run(act: int) -> tuple[torch.Tensor, ...]:
    da = torch.randn(len(Z))
    a, dz, by_output = (torch.empty_like(Z) for _ in range(3))
    _kernel[(1,)](Z, da, a, dz, by_output, len(Z), ACT=act)
    return da, a, dz, by_output


@pytest.mark.parametrize("act", Act)
def test_value_and_derivative(act: Act) -> None:
    da, a, dz, by_output = run(act)
    torch.testing.assert_close(a, reference._ACTIVATE[act](Z), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dz, reference._ACTIVATE_BACKWARD[act](Z, da), rtol=0, atol=0)
    torch.testing.assert_close(by_output, dz, rtol=0, atol=0)


@pytest.mark.parametrize("act", Act)
def test_zero_stays_zero(act: Act) -> None:
    """Which padding and the channels past the last one rely on."""
    _, a, _, _ = run(act)
    assert not a[Z == 0].any()


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(Exception, match="unknown ACT"):
        run(len(Act))
