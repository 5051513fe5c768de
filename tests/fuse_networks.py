"""Networks for the tests of ``fuse``, and what is compared of a fused one and its plain twin."""

from __future__ import annotations

import copy
import functools
import operator
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def blocks(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if type(module).__name__ == "InvertedResidual"]


def first(network: nn.Module, kind: type[nn.Module], index: int = 5) -> nn.Module:
    return [module for module in network.modules() if isinstance(module, kind)][index]


def assert_same_step(fused: nn.Module, plain: nn.Module, x: Tensor, tolerance: float = 1e-9) -> None:
    """Output, gradients and buffers of a forward and backward."""
    outputs = []
    for network in (fused, plain):
        network.zero_grad()
        out = network(x)
        out.square().sum().backward()
        outputs.append(out)
    assert_close(outputs[0], outputs[1], tolerance)
    largest = max(p.grad.abs().max() for p in plain.parameters()).item()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=10 * tolerance, atol=tolerance * largest)
    for ours, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def unit(c: int, k: int, size: int = 1, act: type[nn.Module] | None = nn.ReLU) -> nn.Sequential:
    groups = c if size > 1 and c == k else 1
    conv = nn.Conv2d(c, k, size, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(k), *([act()] if act else []))


class Network(nn.Module):
    """Two units one after the other; ``calls`` says how."""

    def __init__(self, calls: Callable[[Network, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b = unit(8, 8, 3), unit(8, 8)
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.identity, self.absent = nn.Identity(), None
        self.kept: list[Tensor] = []
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("centre", torch.zeros(8))
        self.steps = {"n": 0}
        if calls is a_generator:
            self.generator = random.Random(0)
        if calls is a_method_of_a_generator:
            self.draw = random.random
        self.calls = calls
        self.double()

    def forward(self, x: Tensor) -> object:
        return self.calls(self, x)


def tap(self: Network, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.act(self.bn(y)) + y.mean()


def shape_of_the_inside(self: Network, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.act(self.bn(y)) * y.shape[2]


def twice(self: Network, x: Tensor) -> Tensor:
    return self.act(self.bn(self.conv(self.act(self.bn(self.conv(x))))))


def shared_activation(self: Network, x: Tensor) -> Tensor:
    return self.act(self.bn(self.act(self.conv(x))))


def control_flow(self: Network, x: Tensor) -> Tensor:
    return self.a(x) if x.mean() > 0 else self.b(x)


def leaves_something(self: Network, x: Tensor) -> Tensor:
    self.last = self.a(x)
    return self.b(self.last)


def fills_a_list(self: Network, x: Tensor) -> Tensor:
    self.kept.append(self.a(x))
    return self.b(self.kept[-1])


def python_random(self: Network, x: Tensor) -> Tensor:
    return self.a(x) if random.random() < 0.5 else self.b(x)


def numpy_random(self: Network, x: Tensor) -> Tensor:
    return self.a(x) if np.random.rand() < 0.5 else self.b(x)


def random_in_a_function(self: Network, x: Tensor) -> Tensor:
    from random import random as draw

    return self.a(x) if draw() < 0.5 else self.b(x)


class Settings:
    source = random
    draw = functools.partial(random.uniform, 0)


def random_elsewhere(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * (Settings.draw(1) + Settings.source.random())


GENERATORS = [random]


def random_of_a_list(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * GENERATORS[0].random()


@functools.singledispatch
def doubled(x: object) -> object:
    return x


@doubled.register
def _(x: Tensor) -> Tensor:
    return x * 2


def dispatches(self: Network, x: Tensor) -> Tensor:
    return self.b(doubled(self.a(x)))


def kind_by_name(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * (2 if getattr(x, "__class__").__name__ == "Tensor" else 1)  # noqa: B009


def is_callable(self: Network, x: Tensor) -> Tensor:
    return self.a(x()) if callable(x) else self.b(x)


def copies(self: Network, x: Tensor) -> Tensor:
    return self.b(copy.copy(self.a(x).detach()))


def random_of_a_caller(self: Network, x: Tensor) -> Tensor:
    return scaled_by(self.a(x), np.random)


def scaled_by(x: Tensor, source: object) -> Tensor:
    return x * source.uniform()


def torch_random(self: Network, x: Tensor) -> Tensor:
    return self.a(x) if float(torch.rand(())) < 0.5 else self.b(x)


def noise(self: Network, x: Tensor) -> Tensor:
    return self.b(self.a(x) + torch.rand(x.shape, dtype=x.dtype))


def without_gradients(self: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.a(x)
    return self.b(y)


def a_parameter_of_its_own(self: Network, x: Tensor) -> Tensor:
    return self.b(self.a(x) * torch.sigmoid(self.scale))


def checkpoints(self: Network, x: Tensor) -> Tensor:
    return self.b(checkpoint(self.a, x, use_reentrant=False))


def in_place(self: Network, x: Tensor) -> Tensor:
    y = self.a(x)
    z = self.bn(self.conv(y))
    return z.add_(y).mul_(2)


def functions(self: Network, x: Tensor) -> Tensor:
    return F.relu6(self.bn(F.conv2d(x, self.conv.weight, self.conv.bias)))


def several_outputs(self: Network, x: Tensor) -> dict[str, object]:
    y = self.a(x)
    return {"y": y, "all": [self.b(y), (y, 3)], "none": None}


def aliased(self: Network, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    before = y
    y *= 0.5
    return self.b(y) + before


def a_view(self: Network, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    half = y[:, :4]
    half += 1
    return self.b(y)


def is_a_tensor(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * (2 if isinstance(x, Tensor) else 1)


def dtype(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * (2 if x.dtype is torch.float64 else 1)


def looks_up(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * {6: 2.0}.get(x.shape[-1], 1.0)


def prints(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * len(f"{x.shape[-1]}{x.shape[-2]}")


def has_an_attribute(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * (2 if hasattr(x, "tensors") else getattr(x, "scale", 3))


def tries(self: Network, x: Tensor) -> Tensor:
    try:
        return self.a(x.view(7, 7))
    except RuntimeError:
        return self.b(x)


def kind_of_a_module(self: Network, x: Tensor) -> Tensor:
    for module in (self.conv, self.bn):
        x = self.act(module(x)) if type(module) is nn.BatchNorm2d else module(x)
    return x


def for_a_moment(self: Network, x: Tensor) -> Tensor:
    self.bn.eval()
    y = self.bn(self.conv(x))
    self.bn.train(self.training)
    return self.a(y)


def swaps(self: Network, x: Tensor) -> Tensor:
    self.a, self.b = self.b, self.a
    return self.a(x)


def statistics_between(self: Network, x: Tensor) -> Tensor:
    y = self.conv(x)
    mean = self.bn.running_mean.clone()
    return self.b(self.act(self.bn(y)) + mean.view(1, -1, 1, 1))


def changes_a_buffer(self: Network, x: Tensor) -> Tensor:
    y = self.a(x)
    self.centre = 0.9 * self.centre + 0.1 * y.detach().mean((0, 2, 3))
    return y - self.centre.view(1, -1, 1, 1)


def counts(self: Network, x: Tensor) -> Tensor:
    self.steps["n"] = self.steps["n"] + 1
    return self.a(x) * self.steps["n"]


def a_list_of_modules(self: Network, x: Tensor) -> Tensor:
    for module in nn.ModuleList([self.a, self.b]):
        x = module(x)
    return x


def same_object(self: Network, x: Tensor) -> Tensor:
    y = self.identity(x)
    return self.a(x) * (2 if y is x else 1)


def same_object_as_a_function(self: Network, x: Tensor) -> Tensor:
    y = F.dropout(x, 0.0)
    return self.a(x) * (1 if operator.is_not(y, x) else 2)


def matches(self: Network, x: Tensor) -> Tensor:
    match x:
        case Tensor():
            return self.a(x) * 2
    return self.a(x)


def asks_for_none(self: Network, x: Tensor) -> Tensor:
    y = x if self.absent is None else self.absent(x)
    known = y is not None
    return self.b(self.a(y)) * (3 if known else 2)


def a_generator(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * self.generator.random()


def a_method_of_a_generator(self: Network, x: Tensor) -> Tensor:
    return self.a(x) * self.draw()
