"""Convolutions with a bias and an activation but no BatchNorm run on the kernels in inference."""

from __future__ import annotations

import copy

import pytest
import torch
from behaviour import Plain, fused_units
from plain import FORWARD, assert_close, assert_no_worse
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext.plans import FoldedChain, parts_of


def reparameterised() -> mx.nn.FusedSequential:
    """What MobileOne is after reparameterisation (arXiv:2206.04040, figure 3), and a detection head."""
    return mx.nn.FusedSequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(),
        nn.Conv2d(16, 40, 1), nn.ReLU(),
        nn.Conv2d(40, 40, 5, 2, 2, groups=40), nn.LeakyReLU(0.1),
        nn.Conv2d(40, 24, 1), nn.BatchNorm2d(24), nn.SiLU(),
        nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False), nn.Hardswish(),
        nn.Conv2d(24, 7, 1),
    )  # fmt: skip


@pytest.fixture
def model(backend64: str) -> nn.Module:
    torch.manual_seed(0)
    return reparameterised().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 33, 31)


def test_outputs_of_a_frozen_model(model, x):
    frozen = mx.freeze(model)
    (part,) = parts_of(frozen)
    assert isinstance(part, FoldedChain) and len(part.units) == 7
    assert_close(frozen(x), Plain(copy.deepcopy(model).double())(x.double()), FORWARD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(model, x, dtype):
    """Layer by layer, on the same input: the promise is one for units."""
    x = x.to(dtype)
    modules = list(model.to(dtype))
    i = 0
    while i < len(modules):
        size = 3 if isinstance(modules[min(i + 1, len(modules) - 1)], nn.BatchNorm2d) else 2
        unit = mx.nn.FusedSequential(*modules[i : i + size])
        own, ours = Plain(unit)(x).detach(), mx.freeze(unit)(x)
        assert_no_worse(ours, own, Plain(copy.deepcopy(unit).double())(x.double()), str(i))
        x = own
        i += size


def test_without_gradients_and_with_them(model, x):
    with torch.no_grad():
        assert fused_units(model, x) == 7
        assert_close(model(x), Plain(copy.deepcopy(model).double())(x.double()), FORWARD)
    assert fused_units(model, x) == 1  # with gradients the one with a BatchNorm
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_after_batch_statistics(model, x):
    """A BatchNorm in training mode in the middle, as long as nobody wants gradients."""
    model.train()
    twin = Plain(copy.deepcopy(model).double())
    with torch.no_grad():
        assert_close(model(x), twin(x.double()), 10 * FORWARD)


def test_a_bias_that_changes_is_noticed(model, x):
    frozen = mx.freeze(model)
    before = frozen(x)
    with torch.no_grad():
        frozen[-1].bias += 1
    assert_close(frozen(x), before.double() + 1, FORWARD)
