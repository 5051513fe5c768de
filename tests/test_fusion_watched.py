"""Hooks, parametrisations, replaced forwards: whatever watches a unit is honoured, and everything else still fuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from behaviour import (
    UNITS,
    KernelOps,
    Plain,
    assert_same_step,
    first_units,
    fused_units,
    image_with_gradient,
    units_without,
)
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import mobilenet_ext as mx


@pytest.fixture
def model(backend64) -> nn.Module:
    return first_units()


@pytest.fixture
def x() -> Tensor:
    return image_with_gradient()


def shapes_of(calls: list, tensors: object) -> None:
    calls.append([tuple(t.shape) for t in tensors if t is not None])


# What a hook sees at the children of unit 3 (depthwise, stride 2; 16 channels, 16x16), at the unit, and in front of and
# behind them.
INSIDE, OUTSIDE = (2, 16, 8, 8), (2, 16, 16, 16)
LEVELS = {"conv": ((3, 0), OUTSIDE, INSIDE), "bn": ((3, 1), INSIDE, INSIDE), "relu": ((3, 2), INSIDE, INSIDE)}


def child(model: nn.Module, path: tuple[int, ...]) -> nn.Module:
    for index in path:
        model = model[index]
    return model


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre", "with_kwargs"])
def test_hook_on_a_leaf(model, x, level, kind):
    path, shape_in, shape_out = LEVELS[level]
    target, calls = child(model, path), []
    if kind == "forward":
        handle = target.register_forward_hook(lambda m, i, o: shapes_of(calls, (*i, o)))
        expected = [shape_in, shape_out]
    elif kind == "with_kwargs":
        handle = target.register_forward_hook(lambda m, i, k, o: shapes_of(calls, (*i, o)), with_kwargs=True)
        expected = [shape_in, shape_out]
    elif kind == "forward_pre":
        handle = target.register_forward_pre_hook(lambda m, i: shapes_of(calls, i))
        expected = [shape_in]
    elif kind == "full_backward":
        handle = target.register_full_backward_hook(lambda m, gi, go: shapes_of(calls, (*gi, *go)))
        expected = [shape_in, shape_out]
    else:
        handle = target.register_full_backward_pre_hook(lambda m, go: shapes_of(calls, go))
        expected = [shape_out]
    with KernelOps() as ops:
        model(x).sum().backward()
    assert ops.units == units_without(path[-1])
    assert calls == [expected]
    handle.remove()
    assert fused_units(model, x) == UNITS
    assert calls == [expected] or kind not in ("full_backward", "full_backward_pre")


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hook_on_a_unit_leaves_it_fused(model, x, kind):
    """A unit's hook sees the unit's input and output; its inside is nobody's business."""
    calls, unit = [], model[3]
    if kind == "forward":
        unit.register_forward_hook(lambda m, i, o: shapes_of(calls, (*i, o)))
    elif kind == "forward_pre":
        unit.register_forward_pre_hook(lambda m, i: shapes_of(calls, i))
    elif kind == "full_backward":
        unit.register_full_backward_hook(lambda m, gi, go: shapes_of(calls, (*gi, *go)))
    else:
        unit.register_full_backward_pre_hook(lambda m, go: shapes_of(calls, go))
    with KernelOps() as ops:
        model(x).sum().backward()
    assert ops.units == UNITS
    expected = {
        "forward": [[OUTSIDE, INSIDE]],
        "forward_pre": [[OUTSIDE]],
        "full_backward": [[OUTSIDE, INSIDE]],
        "full_backward_pre": [[INSIDE]],
    }
    assert calls == expected[kind]


def test_hook_on_the_container_and_the_pooling(model, x):
    calls = []
    model.register_forward_hook(lambda m, i, o: shapes_of(calls, (*i, o)))
    model[-1].register_forward_hook(lambda m, i, o: shapes_of(calls, (*i, o)))
    assert fused_units(model, x) == UNITS
    assert calls == [[(2, 64, 4, 4), (2, 64, 1, 1)], [(2, 3, 32, 32), (2, 64, 1, 1)]]


def test_hooks_that_change_what_passes(model, x):
    """The activation of one, the gradient of the other: the result is that of plain modules with the same hooks."""
    model[2][1].register_forward_hook(lambda m, i, o: o * 2)
    model[5][0].register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    model[7].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    leaves = Plain(model)
    # Plain() calls leaves only: the unit's own backward hook is applied to its input there.
    leaves.module[7]._backward_hooks.clear()
    leaves.module[7][0].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    other = x.detach().clone().requires_grad_()
    with KernelOps() as ops:
        actual = model(x)
    assert ops.units == UNITS - 2
    expected = leaves(other)
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


GLOBAL_HOOKS = {
    "forward": (nn_module.register_module_forward_hook, lambda calls: lambda m, i, o: calls.append(type(m))),
    "forward_pre": (nn_module.register_module_forward_pre_hook, lambda calls: lambda m, i: calls.append(type(m))),
    "backward": (nn_module.register_module_full_backward_hook, lambda calls: lambda m, i, o: calls.append(type(m))),
    "backward_pre": (
        nn_module.register_module_full_backward_pre_hook,
        lambda calls: lambda m, o: calls.append(type(m)),
    ),
}


@pytest.fixture
def remove_handles() -> Iterator[list]:
    handles: list = []
    yield handles
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_hook_fires_for_every_module(model, x, kind, remove_handles):
    register, make = GLOBAL_HOOKS[kind]
    calls: list = []
    expected = model(x)
    remove_handles.append(register(make(calls)))
    with KernelOps() as ops:
        actual = model(x)
    assert ops.units == 0
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    for leaf in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU):
        assert calls.count(leaf) == UNITS
    remove_handles.pop().remove()
    assert fused_units(model, x) == UNITS


def reparametrise(conv: nn.Module, how: str) -> None:
    if how == "prune":
        prune.l1_unstructured(conv, "weight", amount=0.5)
    elif how == "prune bias":
        prune.random_unstructured(conv, "bias", amount=0.5)
    elif how == "weight_norm":
        parametrizations.weight_norm(conv)
    elif how == "spectral_norm":
        parametrizations.spectral_norm(conv)
    elif how == "old weight_norm":
        old_weight_norm(conv)
    elif how == "old spectral_norm":
        old_spectral_norm(conv)
    else:
        parametrize.register_parametrization(conv, "weight", Doubled())


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize(
    "how",
    [
        "prune",
        "prune bias",
        "parametrize",
        "weight_norm",
        "spectral_norm",
        pytest.param("old weight_norm", marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")),
        pytest.param("old spectral_norm", marks=pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated")),
    ],
)
def test_parametrised_convolution(model, x, how):
    before = model.eval()(x)
    reparametrise(model[4][0], how)
    # In eval mode: spectral_norm's power iteration moves at each forward in training.
    assert not torch.allclose(model(x), before) or "weight_norm" in how
    assert_same_step(model, x, units=UNITS - 1)
    assert any(name.startswith("4.0.") and p.grad is not None for name, p in model.named_parameters())


def test_pruned_entries_stay_zero(model, x):
    prune.l1_unstructured(model[4][0], "weight", amount=0.5)
    model(x).sum().backward()
    mask = model[4][0].weight_mask
    assert (model[4][0].weight_orig.grad[mask == 0] == 0).all()
    prune.remove(model[4][0], "weight")
    assert fused_units(model, x) == UNITS  # a plain parameter again
    assert_same_step(model, x, units=UNITS)


def test_parametrised_batch_norm(model, x):
    parametrize.register_parametrization(model[4][1], "weight", Doubled())
    assert_same_step(model, x, units=UNITS - 1)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_replaced_forward(model, x, index):
    target, calls = model[3][index], []

    def forward(input: Tensor) -> Tensor:
        calls.append(tuple(input.shape))
        return type(target).forward(target, input) * 0.5

    expected = model.eval()(x)
    target.forward = forward
    with KernelOps() as ops:
        actual = model(x)
    assert ops.units == units_without(index)
    assert calls == [OUTSIDE if index == 0 else INSIDE]
    assert not torch.allclose(actual, expected)


def test_forward_replaced_on_the_class(model, x, monkeypatch):
    """As quantisation and tracing tools do it."""
    original, calls = nn.ReLU.forward, []

    def forward(self: nn.ReLU, input: Tensor) -> Tensor:
        calls.append(tuple(input.shape))
        return original(self, input)

    monkeypatch.setattr(nn.ReLU, "forward", forward)
    model(x)
    assert len(calls) == UNITS


def test_replaced_inner_method(model, x):
    conv = model[3][0]
    conv._conv_forward = lambda input, weight, bias: F.conv2d(input, weight * 2, bias, 2, 1, 1, 16)
    assert_same_step(model.eval(), x, units=UNITS - 1)


def test_network_with_a_hook(backend64):
    torch.manual_seed(0)
    net = mx.MobileNetV1(10, 0.25).double()
    calls = []
    net.feature[13][0].register_forward_hook(lambda m, i, o: shapes_of(calls, (o,)))
    assert fused_units(net, torch.randn(2, 3, 64, 64, dtype=torch.float64)) == 26
    assert calls == [[(2, 128, 4, 4)]]


def test_optimisation_hooks_on_parameters(model, x):
    """Hooks of tensors are autograd's, and fire without leaving the kernels."""
    calls = []
    weight = model[3][0].weight
    weight.register_hook(lambda grad: calls.append(tuple(grad.shape)))
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.grad.shape)))
    with KernelOps() as ops:
        model(x).sum().backward()
    assert ops.units == UNITS
    assert calls == [(16, 1, 3, 3)] * 2
