"""The oracle, where it is not PyTorch's own function."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from plain import activate, assert_close

from mobilenet_ext.contract import GRAD_BETA, GRAD_GAMMA, Act

SLOPE = 0.25  # of leaky ReLU


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", Act)
def test_what_a_backward_needs_gives_the_gradients_of_batch_norm(act: Act, training: bool) -> None:
    y, upstream = (torch.randn(2, 5, 4, 3).double() for _ in range(2))
    gamma, beta, mean, var = torch.randn(4, 5).double().unbind()
    var = var.square() + 0.5
    leaves = [t.clone().requires_grad_() for t in (y, gamma, beta)]
    z = F.batch_norm(leaves[0], mean.clone(), var.clone(), *leaves[1:], training, eps=0.1)
    dy, by_gamma, by_beta = torch.autograd.grad(activate(act, z, SLOPE), leaves, upstream)

    vectors = (gamma, beta, 0.1)
    bn = oracle.batch_bn(y, *vectors) if training else oracle.make_bn(mean, var, *vectors)
    assert_close(oracle.normalise(y, bn), z, 1e-12)
    dz = oracle.activate_backward(z, upstream, act, SLOPE)
    grad_bn = oracle.grad_bn(dz, y, bn, training)
    assert_close(oracle.output_grad(dz, y, grad_bn), dy, 1e-12)
    assert_close(grad_bn[GRAD_GAMMA], by_gamma, 1e-12)
    assert_close(grad_bn[GRAD_BETA], by_beta, 1e-12)


@pytest.mark.parametrize("act", Act)
def test_a_nan_is_on_no_side_of_a_corner(act: Act) -> None:
    nan, one = torch.tensor([torch.nan]), torch.ones(1)
    assert oracle.activate(nan, act, SLOPE).isnan()
    expected = {Act.SILU: torch.nan, Act.LEAKY_RELU: SLOPE}.get(act, 1.0)  # a leaky ReLU asks what is above 0
    torch.testing.assert_close(oracle.activate_backward(nan, one, act, SLOPE).item(), expected, equal_nan=True)


@pytest.mark.parametrize(("stride", "padding"), [(1, (1, 1, 1, 1)), (2, (0, 2, 1, 0)), (2, (2, 2, 2, 2))])
@pytest.mark.parametrize("kernel", [3, 5])
def test_taps_are_those_of_the_convolution(kernel: int, stride: int, padding: tuple[int, ...]) -> None:
    a, weight = torch.randn(2, 4, 7, 6).double().requires_grad_(), torch.randn(4, 1, kernel, kernel).double()
    weight.requires_grad_()
    y = F.conv2d(F.pad(a, padding), weight, stride=stride, groups=4)
    dy = torch.randn_like(y)
    for ours, theirs in zip(
        oracle.depthwise_by_taps(dy, a, weight, stride, padding), torch.autograd.grad(y, (a, weight), dy), strict=True
    ):
        assert_close(ours, theirs, 1e-12)
