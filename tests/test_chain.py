"""Chains of units with any activation at any place, against the plain modules in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from plain import FORWARD, GRADIENT, MODULES, assert_close, one_thread, randomise_
from torch import Tensor, nn

from mobilenet_ext import backends, chain
from mobilenet_ext.contract import Act, Padding
from mobilenet_ext.convolutions import padding_of
from mobilenet_ext.inference_steps import as_input, steps_of
from mobilenet_ext.unit_tensors import Unit, fold

# Three activations: every pair at every two places.
TRIPLES = [(first, second, Act((first + second) % len(Act))) for first, second in itertools.product(Act, repeat=2)]
KINDS = ("dense", "depthwise", "pointwise", "depthwise", "pointwise")


def plain_units(acts: tuple[Act, ...]) -> nn.Sequential:
    """One unit per activation, of the kinds above in turn."""
    units, channels = [], 3
    for kind, act in zip(KINDS, acts, strict=False):
        out_channels = channels if kind == "depthwise" else 8
        kernel, padding = (1, 0) if kind == "pointwise" else (3, 1)
        groups = channels if kind == "depthwise" else 1
        conv = nn.Conv2d(channels, out_channels, kernel, 2 if kind == "dense" else 1, padding, groups=groups)
        units.append(nn.Sequential(conv, nn.BatchNorm2d(out_channels), MODULES[act]()))
        channels = out_channels
    return randomise_(nn.Sequential(*units)).double()


def units_of(plain: nn.Sequential, acts: tuple[Act, ...], training: bool) -> list[Unit]:
    """The same as tensors and settings; running statistics are left alone."""
    units = []
    for kind, (conv, bn, activation), act in zip(KINDS, plain, acts, strict=False):
        slope = activation.negative_slope if act == Act.LEAKY_RELU else 0.0
        vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
        shape = (kind, conv.stride[0], padding_of(conv))
        units.append(Unit(*shape, conv.weight, conv.bias, *vectors, training, None, bn.eps, act.value, slope))
    return units


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("acts", [*TRIPLES, (Act.RELU, Act.LINEAR) * 2 + (Act.LINEAR,)], ids=str)
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients(cpu_backend: str, acts: tuple[Act, ...], pool: bool, training: bool) -> None:
    """In float64, where a turned sign at a corner is as good as impossible."""
    plain = plain_units(acts).train(training)
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    wanted = [x, *plain.parameters()]
    out = chain.run(x, units_of(plain, acts, training), "mean" if pool else "activation")
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, wanted, grad)
    with one_thread():
        expected = pooled(plain(x)) if pool else plain(x)
        expected_grads = torch.autograd.grad(expected, wanted, grad)
    assert_close(out, expected, 1e-11, "output")
    # Some gradients are 0 but for rounding: of what the batch statistics after a linear unit cancel.
    for (name, _), ours, theirs in zip([("x", x), *plain.named_parameters()], grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


class Padded(nn.Module):
    """A unit with other zeros around it, on each side."""

    def __init__(self, unit: nn.Sequential, padding: Padding) -> None:
        super().__init__()
        unit[0].padding = (0, 0)
        self.unit, self.padding = unit, padding

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(F.pad(x, self.padding))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sides", [(0, 1, 0, 1), (1, 0, 1, 1), (2, 0, 1, 2)], ids=str)
def test_other_padding_on_each_side(cpu_backend: str, sides: Padding, training: bool) -> None:
    """As for TensorFlow's "same" at stride 2, or a ZeroPad2d in front: with a block, and in a plan."""
    acts = (Act.RELU, Act.SILU, Act.LINEAR, Act.RELU, Act.RELU6)
    plain = plain_units(acts).train(training)
    units = units_of(plain, acts, training)
    for i, kind in enumerate(KINDS):
        if kind != "pointwise":
            units[i] = units[i]._replace(padding=sides)
            plain[i] = Padded(plain[i], sides)
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64, requires_grad=True)
    wanted = [x, *plain.parameters()]
    out = chain.run(x, units, "activation")
    grad = torch.randn_like(out)
    with one_thread():
        expected = plain(x)
    assert_close(out, expected, 1e-11, "output")
    for ours, theirs in zip(
        torch.autograd.grad(out, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    if not training and cpu_backend == "cpu":
        steps = steps_of([fold(unit) for unit in units], torch.float64, backends.cpu.pack)
        builder = backends.cpu.PlanBuilder(1)
        plan = builder.build([builder.add_steps(steps, 0)])
        assert_close(plan([as_input(x, torch.float64)])[0], expected, 1e-11, "plan")


@pytest.mark.parametrize("acts", TRIPLES, ids=str)
def test_float32(cpu_backend: str, acts: tuple[Act, ...]) -> None:
    """Inference, blocks in one kernel included."""
    plain = plain_units(acts).eval()
    x = torch.randn(2, 3, 33, 31)
    with torch.no_grad(), one_thread():
        expected = plain(x.double())
        out = chain.run(x, units_of(plain.float(), acts, False), "activation")
    assert_close(out, expected, FORWARD)


def test_the_gradient_of_a_linear_chain_is_that_of_its_convolutions(cpu_backend: str) -> None:
    """Without a corner there is nothing to turn: float32 too."""
    acts = (Act.LINEAR,) * 5
    plain = plain_units(acts).train()
    x = torch.randn(4, 3, 17, 19)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    with one_thread():
        out = plain(theirs)
        grad = torch.randn_like(out)
        out.backward(grad)
    chain.run(ours, units_of(plain.float(), acts, True), "activation").backward(grad.float())
    assert_close(ours.grad, theirs.grad, GRADIENT)
