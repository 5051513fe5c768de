"""Activations and their derivatives in Triton, against the oracle."""

from __future__ import annotations

import oracle
import pytest
import torch
import triton
import triton.language as tl

from mobilenet_ext.contract import Act
from mobilenet_ext.triton.activation import activate, activate_backward, activate_backward_by_output, gates

INF, NAN = float("inf"), float("nan")
CORNERS = [-INF, -1e30, -104, -88, -6, -3, -2.5, -1e-40, -0.0, 0, 1e-40, 0.5, 3, 6, 88, 1e30, INF, NAN]
Z = torch.cat([torch.tensor(CORNERS, dtype=torch.float32), torch.linspace(-9, 9, 1024 - len(CORNERS))])


@triton.jit
def _kernel(z_ptr, da_ptr, a_ptr, dz_ptr, by_output_ptr, SIZE: tl.constexpr, ACT: tl.constexpr):
    i = tl.arange(0, SIZE)
    z = tl.load(z_ptr + i)
    da = tl.load(da_ptr + i)
    a = activate(z, ACT)
    tl.store(a_ptr + i, a)
    tl.store(dz_ptr + i, activate_backward(z, da, ACT))
    tl.store(by_output_ptr + i, activate_backward_by_output(a, z, (0.0, 1.0, 0.0), da, ACT))


def run(act: int, da: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    da = torch.randn(len(Z)) if da is None else da
    a, dz, by_output = (torch.empty_like(Z) for _ in range(3))
    _kernel[(1,)](Z, da, a, dz, by_output, SIZE=len(Z), ACT=act)
    return da, a, dz, by_output


@pytest.mark.parametrize("act", Act)
def test_value_and_derivative(act: Act) -> None:
    da, a, dz, by_output = run(act)
    # A gate's values are exact, of the others a few roundings.
    tolerance = {"rtol": 0, "atol": 0} if gates(act) else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(a.double(), oracle.activate(Z, act), equal_nan=True, **tolerance)
    expected = oracle.activate_backward(Z, da, act)
    torch.testing.assert_close(dz.double(), expected, equal_nan=True, **tolerance)
    torch.testing.assert_close(by_output, dz, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("act", Act)
def test_where_the_derivative_is_0_or_1(act: Act) -> None:
    """``gates`` says of which activations."""
    _, _, dz, _ = run(act, torch.ones(len(Z)))
    assert gates(act) == bool(((dz == 0) | (dz == 1)).all())


@pytest.mark.parametrize("act", [Act.RELU, Act.RELU6, Act.HARDSWISH])
def test_no_gradient_passes_where_the_derivative_is_0(act: Act) -> None:
    """Neither does an infinite one."""
    _, _, dz, _ = run(act, torch.full((len(Z),), INF))
    assert not dz[Z <= (-3 if act == Act.HARDSWISH else 0)].any()
    assert dz[Z.isnan()].isinf()


@pytest.mark.parametrize("act", Act)
def test_zero_stays_zero(act: Act) -> None:
    """Which padding and the channels past the last one rely on."""
    _, a, _, _ = run(act)
    assert not a[Z == 0].any()


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(Exception, match="unknown ACT"):
        run(len(Act))
