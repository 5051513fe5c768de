"""Forwards that are hard to follow: what ``mx.fuse`` does not know of them stays as it is, whatever changes."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import random
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from behaviour import KernelOps, fused_units
from fuse_networks import (
    Network,
    a_generator,
    a_list_of_modules,
    a_method_of_a_generator,
    a_parameter_of_its_own,
    a_view,
    aliased,
    asks_for_none,
    assert_close,
    assert_same_step,
    changes_a_buffer,
    checkpoints,
    control_flow,
    copies,
    counts,
    dispatches,
    dtype,
    fills_a_list,
    for_a_moment,
    functions,
    has_an_attribute,
    in_place,
    is_a_tensor,
    is_callable,
    kind_by_name,
    kind_of_a_module,
    leaves_something,
    looks_up,
    matches,
    noise,
    numpy_random,
    prints,
    python_random,
    random_elsewhere,
    random_in_a_function,
    random_of_a_caller,
    random_of_a_list,
    same_object,
    same_object_as_a_function,
    several_outputs,
    shape_of_the_inside,
    shared_activation,
    statistics_between,
    swaps,
    tap,
    torch_random,
    tries,
    twice,
    unit,
    without_gradients,
)
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext import fused_forward

HARD = {
    aliased: 2, a_view: 2, is_a_tensor: 1, dtype: 1, looks_up: 1, prints: 1, has_an_attribute: 1, tries: 1,
    kind_of_a_module: 0, for_a_moment: 1, swaps: 1, statistics_between: 1, changes_a_buffer: 1, counts: 1,
    a_list_of_modules: 2, a_generator: 1, a_method_of_a_generator: 1, same_object: 1, same_object_as_a_function: 1,
    asks_for_none: 2, matches: 1, random_of_a_list: 1, dispatches: 2, kind_by_name: 1, is_callable: 1, copies: 2,
    random_in_a_function: 1, random_elsewhere: 1, random_of_a_caller: 1,
    tap: 0, shape_of_the_inside: 0, twice: 0, shared_activation: 0, control_flow: 1, leaves_something: 2,
    fills_a_list: 2, python_random: 1, numpy_random: 1, torch_random: 1, noise: 2, without_gradients: 2,
    a_parameter_of_its_own: 2, checkpoints: 2, in_place: 2, functions: 0, several_outputs: 2,
}  # fmt: skip


@pytest.mark.parametrize("calls", HARD, ids=lambda calls: calls.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_hard_to_follow(calls: Callable, training: bool) -> None:
    """With how many units fused, in which the networks' own modules are found one by one."""
    plain = Network(calls).train(training)
    fused = mx.fuse(copy.deepcopy(plain))
    for i in range(8):
        x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
        results = []
        for network in (fused, plain):
            torch.manual_seed(i), random.seed(i), np.random.seed(i)
            network.zero_grad()
            leaf = x.clone().requires_grad_()
            with KernelOps() as ops:
                out = network(leaf)
            if network is fused:
                found = 2 if calls is for_a_moment and not training else HARD[calls]  # where nothing changes
                assert ops.units == found, ops.names
            tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            sum((t * t).sum() for t in tensors).backward()
            buffers = [] if calls is checkpoints else list(network.buffers())  # plain ones count twice
            results.append((out, leaf.grad, [p.grad for p in network.parameters()], buffers))
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
        assert type(results[0][0]) is type(results[1][0])
    torch.testing.assert_close(fused.kept, plain.kept)


def set_attribute(network: nn.Module, flag: bool) -> None:
    network.flag = flag


def set_item(network: nn.Module, flag: bool) -> None:
    network.flags["a"] = flag


def set_attribute_of_a_child(network: nn.Module, flag: bool) -> None:
    network.holder.flag = flag


def set_class_of_a_child(network: nn.Module, flag: bool) -> None:
    network.act.__class__ = nn.ReLU if flag else nn.Tanh


def set_element(network: nn.Module, flag: bool) -> None:
    network.list_of_flags[0] = flag


def asks_its_attributes(self: Network, x: Tensor) -> Tensor:
    yes = self.flag and self.flags["a"] and self.list_of_flags[0] and self.holder.flag
    return self.act((self.a if yes else self.b)(x))


CHANGES = [set_attribute, set_item, set_element, set_attribute_of_a_child, set_class_of_a_child]


@pytest.mark.parametrize("change", CHANGES)
def test_attributes_that_decide(change: Callable) -> None:
    """A forward that reads them is looked at again when they change."""
    plain = Network(lambda self, x: self.a(x) if self.flag and self.flags["a"] and self.list_of_flags[0] else self.b(x))
    plain.flag, plain.flags, plain.list_of_flags = True, {"a": True}, [True]
    plain.holder = nn.Module()
    plain.holder.flag = True
    fused = mx.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for flag in (True, False, True):
        change(fused, flag), change(plain, flag)
        assert_close(fused(x), plain(x))
        assert fused_units(fused, x) == 1


def test_a_forward_that_is_not_known_is_looked_at_once_for_each_mode(monkeypatch) -> None:
    fused = mx.fuse(Network(leaves_something))
    looks = []
    real = fused_forward.ForwardGraph
    monkeypatch.setattr(fused_forward, "ForwardGraph", lambda module: looks.append(module) or real(module))
    for training in (True, True, False, False, True):
        fused.train(training)(torch.randn(2, 8, 6, 6, dtype=torch.float64))
    assert sum(module is fused for module in looks) == 2


def test_hooks_see_tensors() -> None:
    network = Network(a_list_of_modules)
    seen: list[type] = []
    for layer in (network.a[0], network.b[1]):
        layer.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    mx.fuse(network)(torch.randn(2, 8, 6, 6, dtype=torch.float64))
    assert seen == [Tensor, Tensor]


def test_a_network_that_is_another_at_each_call_runs_its_own_forward() -> None:
    """It would cost more to look at it each time. Its parts run fused all the same."""
    plain = Network(scaled)
    fused, x = mx.fuse(copy.deepcopy(plain)), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for i in range(12):
        plain.factor = fused.factor = i / 7
        assert_close(fused(x), plain(x))
    with KernelOps() as ops:
        fused(x)
    assert ops.units == 2


def scaled(self: Network, x: Tensor) -> Tensor:
    return self.b(self.a(x) * self.factor)


def test_modules_in_a_list_are_called_themselves() -> None:
    plain = Network(lambda self, x: self.layers[1](self.layers[0](x)))
    plain.layers = [plain.a, plain.b]
    fused = mx.fuse(plain)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    with KernelOps() as ops:
        fused(x)
    assert ops.units == 2 and fused.a[1].num_batches_tracked == 1


def test_several_arguments() -> None:
    """A forward of more than one tensor runs as it is, with its children's on the kernels."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = unit(8, 8), unit(8, 8)

        def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.left(x) + scale * self.right(y)

    plain = Two().double()
    fused = mx.fuse(copy.deepcopy(plain))
    x, y = torch.randn(2, 2, 8, 5, 5, dtype=torch.float64)
    with KernelOps() as ops:
        assert_close(fused(x, y, scale=2.0), plain(x, y, scale=2.0))
    assert ops.units == 2


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "relu_": lambda x: x.relu_(),
    "F.relu6": F.relu6,
    "F.hardswish": F.hardswish,
    "F.silu": F.silu,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "F.leaky_relu by name": lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
}


def activates(self: Network, x: Tensor) -> Tensor:
    return self.b(ACTIVATIONS[self.activation](self.bn(self.conv(x))))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_as_functions(name: str) -> None:
    plain = Network(activates)
    plain.activation = name
    fused = mx.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert fused_units(fused, x) == 2
    assert sum(row.chain == 0 for row in mx.fusion_report(fused)) == 2  # in one chain
    plain(x)
    assert_same_step(_used(fused), _used(plain), x)


def _used(network: Network) -> nn.Module:
    for module in (network.a, network.scale):
        module.requires_grad_(False)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    network.zero_grad = lambda: None
    return network


def test_a_garbage_collection_changes_nothing() -> None:
    """It may call anybody's code while a forward is looked at."""

    def callback(phase: str, info: dict) -> None:
        with contextlib.suppress(KeyError):
            info["nothing"]

    threshold = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1, 1, 1)
    try:
        assert fused_units(mx.fuse(Network(tries)), torch.randn(2, 8, 6, 6, dtype=torch.float64)) == HARD[tries]
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)


@pytest.mark.parametrize("make", [mx.fuse, mx.freeze])
def test_a_container_that_is_called_twice(make: Callable) -> None:
    """Like the head of a detector, for each size of its features: it is fused in itself."""
    plain = Network(lambda self, x: self.b(self.a(self.a(x)))).eval()
    network, x = make(copy.deepcopy(plain)), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert_close(network(x), plain(x))
    rows = {row.name: row.why_not for row in mx.fusion_report(network)}
    assert rows == {"a.0": None, "b.0": None, "conv": "not called"}
    if make is mx.fuse:
        assert fused_units(network.train(), x) == 3
        assert network.a[1].num_batches_tracked == 2


class Draws(Network):
    draw = random.random

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.draw() < 0.5 else self.b(x)


class HasAGenerator(Network):
    generator = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.generator.random() < 0.5 else self.b(x)


class Turns(Network):
    turns = itertools.cycle((True, False))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if next(self.turns) else self.b(x)


@pytest.mark.parametrize("kind", [Draws, HasAGenerator, Turns])
def test_a_class_with_a_state_of_its_own(kind: type[Network]) -> None:
    plain, x = kind(tap), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    fused = mx.fuse(copy.deepcopy(plain))
    outputs = []
    for network in (fused, plain):
        random.seed(1), HasAGenerator.generator.seed(1)
        outputs.append([network(x) for _ in range(8)])
    for ours, theirs in zip(*outputs, strict=True):
        assert_close(ours, theirs)


class HasAFlag(Network):
    flag, flags = True, [True]

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.flag and self.flags[0] else self.b(x)


def test_an_attribute_of_the_class_that_decides() -> None:
    plain = HasAFlag(tap)
    fused, x = mx.fuse(copy.deepcopy(plain)), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for flag in (True, False, True):
        HasAFlag.flag = flag
        assert_close(fused(x), plain(x))
        assert fused_units(fused, x) == 1
    for flag in (False, True):
        HasAFlag.flags[0] = flag
        assert_close(fused(x), plain(x))


@pytest.mark.parametrize("images", [1, 3])
def test_names_for_another_number_of_values(images: int) -> None:
    def unpacks(self: Network, x: Tensor) -> Tensor:
        a, b = self.a(x)
        return a + b

    plain, x = Network(unpacks), torch.randn(images, 8, 6, 6, dtype=torch.float64)
    fused = mx.fuse(copy.deepcopy(plain))
    two = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    assert_close(fused(two), plain(two))
    with pytest.raises(ValueError) as expected:
        plain(x)
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        fused(x)
