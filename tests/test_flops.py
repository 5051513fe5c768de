"""``FlopCounterMode`` counts the kernels' convolutions as it counts the plain modules'."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from behaviour import Plain
from every_op import calls
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mobilenet_ext as mx
from mobilenet_ext import fusion, layers


def flops(function: Callable[..., Tensor], *args: Tensor, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        out = function(*args)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def network() -> nn.Module:
    torch.manual_seed(0)
    return mx.MobileNetV1(10, 0.25)


def image(requires_grad: bool = False) -> Tensor:
    return torch.randn(2, 3, 32, 32, requires_grad=requires_grad)


def kernels(modules: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The chain of these units on the kernels, also where a mode watches the calls of modules."""
    units, pool = fusion.leading_chain(modules)
    assert fusion.count_of(units) + pool == len(modules)
    return lambda x: fusion.run_chain(units, x, "mean" if pool else "activation")


@pytest.mark.parametrize("training", [True, False])
def test_network(cpu_backend, training):
    model = network().train(training)
    plain = Plain(model)
    assert flops(model, image()) == flops(plain, image()) > 0
    for needs_x in (False, True):
        ours, theirs = (flops(m, image(needs_x), backward=True) for m in (model, plain))
        assert ours == theirs > flops(plain, image())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs_x", [True, False])
def test_chain(cpu_backend, training, needs_x):
    """The kernels themselves: the mode registers hooks for all modules, so that a module runs as its children."""
    model = network().train(training).feature
    run = kernels(list(fusion.flatten(model)))
    plain = Plain(model)
    with torch.no_grad():
        assert flops(run, image()) == flops(plain, image()) > 0
    ours, theirs = (flops(f, image(needs_x), backward=True) for f in (run, plain))
    assert ours == theirs > 0


def test_chain_with_frozen_parameters(cpu_backend):
    """Gradients that nobody wants are not computed, and not counted."""
    model = network().feature
    for unit in model[:5]:
        unit.requires_grad_(False)
    run, plain = kernels(list(fusion.flatten(model))), Plain(model)
    assert flops(run, image(), backward=True) == flops(plain, image(), backward=True)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    run, plain = kernels(list(fusion.flatten(model))), Plain(model)
    assert flops(run, image(), backward=True) == flops(plain, image(), backward=True)


def test_frozen(cpu_backend):
    model = network().eval()
    plain = Plain(model)
    frozen = mx.freeze(model)
    with torch.no_grad():
        assert flops(frozen, image()) == flops(plain, image()) > 0


@pytest.mark.parametrize("stride", [1, 2])
def test_functional(cpu_backend, stride):
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    x, w, p, bias = leaf(2, 8, 9, 7), leaf(8, 1, 3, 3), leaf(5, 8, 1, 1), leaf(5)

    def convolutions(x: Tensor) -> Tensor:
        return mx.functional.pointwise_conv2d(mx.functional.depthwise_conv2d(x, w, stride=stride), p, bias)

    def units(x: Tensor) -> Tensor:
        y = mx.functional.depthwise_bn_relu(x, w, None, None, None, None, None, stride=stride, training=True)
        return mx.functional.pointwise_bn_relu(y, p, bias, None, None, None, None, training=True)

    def plain(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, w, None, stride, 1, groups=8), p, bias)

    for function in (convolutions, units):
        assert flops(function, x) == flops(plain, x) > 0
        assert flops(function, x, backward=True) == flops(plain, x, backward=True)


@pytest.mark.parametrize("needs", [(0,), (4,), (0, 4)])
def test_layers(cpu_backend, needs):
    x, w, p = torch.randn(2, 8, 9, 7), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1)
    vectors = torch.zeros(8), torch.ones(8), torch.zeros(8)
    for ours, theirs, weight in (
        (lambda u, w: layers.depthwise(u, *vectors, w, 2, 1)[0], lambda u, w: F.conv2d(u, w, None, 2, 1, 1, 8), w),
        (lambda u, w: layers.pointwise(u, *vectors, w)[0], F.conv2d, p),
    ):
        u, weight = x.clone().requires_grad_(0 in needs), weight.clone().requires_grad_(4 in needs)
        assert flops(ours, u, weight, backward=True) == flops(theirs, u, weight, backward=True) > 0


def test_every_op_that_convolves_counts(cpu_backend):
    seen = set()
    for call in calls("cpu", (torch.float32,)):
        counted = flops(call.run)
        assert (counted > 0) == (not call.op.startswith(("norm_", "bn_"))), call
        seen.add(call.op)
    assert {op for op in dir(torch.ops.mobilenet_ext) if op.endswith(("_forward", "_backward", "_inference"))} <= seen


def test_a_known_figure():
    """A multiplication and an addition for each tap, channel and pixel."""
    x, w, p = torch.randn(1, 8, 9, 7), torch.randn(8, 1, 3, 3), torch.randn(5, 8, 1, 1)
    assert flops(lambda: mx.functional.depthwise_conv2d(x, w, stride=2)) == 2 * 9 * 8 * 5 * 4
    assert flops(lambda: mx.functional.pointwise_conv2d(x, p)) == 2 * 8 * 5 * 9 * 7


def test_on_the_meta_device():
    """Counted without computing."""
    model = network().feature.to("meta")
    run = kernels(list(fusion.flatten(model)))
    x = torch.empty(2, 3, 32, 32, device="meta")
    assert flops(run, x) == flops(Plain(model), x) > 0
