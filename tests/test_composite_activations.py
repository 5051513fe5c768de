"""Activations that a forward spells out, in fused and frozen networks: one with their unit, and only where they are."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from behaviour import KernelOps
from fuse_networks import assert_close, assert_same_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mobilenet_ext as mx


class Modules(nn.Module):
    """Parts of activations as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid, self.hardsigmoid = nn.Sigmoid(), nn.Hardsigmoid()
        self.relu6, self.relu6_ = nn.ReLU6(), nn.ReLU6(inplace=True)


Spelled = Callable[[Modules, Tensor], Tensor]
ACTIVATIONS: dict[str, Spelled] = {
    "x * sigmoid": lambda m, x: x * torch.sigmoid(x),
    "sigmoid * x": lambda m, x: x.sigmoid() * x,
    "sigmoid module": lambda m, x: torch.mul(x, m.sigmoid(x)),
    "in place": lambda m, x: x.mul_(F.sigmoid(x)),
    "imul": lambda m, x: operator.imul(x, x.sigmoid()),
    "relu6 / 6": lambda m, x: x * F.relu6(x + 3, inplace=True) / 6,
    "(relu6 / 6)": lambda m, x: x * (m.relu6(x + 3.0) / 6.0),
    "relu6 module in place": lambda m, x: m.relu6_(3 + x).div(6).mul(x),
    "times a sixth": lambda m, x: x * (m.relu6_(x + 3) * (1 / 6)),
    "clamp": lambda m, x: x * torch.clamp(x.add(3), 0, 6).div_(6),
    "clamp by name": lambda m, x: x.mul(torch.add(x, 3).clamp_(min=0.0, max=6.0)) / 6,
    "hardtanh": lambda m, x: x * F.hardtanh(x + 3, 0.0, 6.0) / 6,
    "hardsigmoid": lambda m, x: x * F.hardsigmoid(x),
    "hardsigmoid module": lambda m, x: m.hardsigmoid(x) * x,
}
OTHERS: dict[str, Spelled] = {
    "quick GELU": lambda m, x: x * torch.sigmoid(1.702 * x),
    "read again": lambda m, x: x * torch.sigmoid(x) + x,
    "a part read again": lambda m, x: (lambda s: x * s + s)(torch.sigmoid(x)),
    "another limit": lambda m, x: x * torch.clamp(x + 3, 0, 5) / 6,
    "another sum": lambda m, x: x * F.relu6(x + 2) / 6,
    "another divisor": lambda m, x: x * F.relu6(x + 3) / 5,
    "divides by": lambda m, x: 6 / (x * F.relu6(x + 3) + 7),
    "rounds": lambda m, x: torch.div(x * F.relu6(x + 3), 6, rounding_mode="floor") + x,
    "gates another": lambda m, x: x * torch.sigmoid(x.flip(2)),
    "changes its input": lambda m, x: (lambda y: x * F.relu6(y) / 6)(x.add_(3)),
    "a square": lambda m, x: x * x,
    "only a sigmoid": lambda m, x: x.sigmoid(),
    "twice": lambda m, x: (lambda s: s * s)(x * torch.sigmoid(x)),
    "doubled often": lambda m, x: functools.reduce(lambda y, _: y + y, range(30), x) / 2**30,
}


class Activation(Modules):
    def __init__(self, spelled: Spelled) -> None:
        super().__init__()
        self.spelled = (spelled,)  # no method

    def forward(self, x: Tensor) -> Tensor:
        return self.spelled[0](self, x)


class Network(nn.Module):
    def __init__(self, spelled: Spelled) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), Activation(spelled)
        self.last, self.last_bn = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.last_bn(self.last(self.act(self.bn(self.conv(x))))))


class Operations(TorchDispatchMode):
    """The names of PyTorch's own operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


SPELLED_OUT = {"aten::mul.Tensor", "aten::mul_.Tensor", "aten::sigmoid", "aten::hardsigmoid", "aten::div.Tensor"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_is_one_with_its_unit(name: str) -> None:
    plain = Network(ACTIVATIONS[name]).double()
    fused, x = mx.fuse(copy.deepcopy(plain)), 3 * torch.randn(2, 8, 6, 5, dtype=torch.float64)
    tolerance = 1e-6 if name.startswith("hardsigmoid") else 1e-9  # PyTorch's own has a sixth in float32
    for _ in range(2):
        assert_same_step(fused, plain, x, tolerance)
    with Operations() as operations, KernelOps() as ops:
        fused(x)
    plain(x)
    assert ops.units == 2 and not operations.names & SPELLED_OUT
    assert {row.chain for row in mx.fusion_report(fused)} == {0}
    with torch.no_grad():
        expected = plain.eval()(x)
        for network in (fused.eval(), mx.freeze(plain), mx.freeze(fused)):
            assert_close(network(x), expected, tolerance)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_activation_stays(name: str) -> None:
    plain = Network(OTHERS[name]).double()
    fused, x = mx.fuse(copy.deepcopy(plain)), torch.randn(2, 8, 6, 5, dtype=torch.float64)
    assert_same_step(fused, plain, x)
    with torch.no_grad():
        expected = plain.eval()(x)
        for network in (fused.eval(), mx.freeze(plain)):
            assert_close(network(x), expected)


def test_in_16_bits() -> None:
    """No farther from float64 than the operations one by one."""
    for name in ("x * sigmoid", "relu6 / 6"):
        plain = Network(ACTIVATIONS[name]).eval()
        x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            plain = plain.bfloat16()
            expected = copy.deepcopy(plain).double()(x.bfloat16().double())
            own = plain(x.bfloat16())
            ours = mx.fuse(copy.deepcopy(plain))(x.bfloat16())
        errors = [(out.double() - expected).norm() for out in (ours, own)]
        assert errors[0] <= errors[1]


def test_hooks_and_subclasses_are_seen() -> None:
    class Louder(nn.Sigmoid):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plain = Network(ACTIVATIONS["sigmoid module"]).double()
    x, seen = torch.randn(2, 8, 6, 5, dtype=torch.float64), []
    plain.act.sigmoid = Louder()
    assert_same_step(mx.fuse(copy.deepcopy(plain)), plain, x)
    plain.act.sigmoid = nn.Sigmoid()
    fused = mx.fuse(copy.deepcopy(plain))
    fused(x)
    fused.act.sigmoid.register_forward_hook(lambda *_: seen.append(1))
    assert_close(fused(x), plain(x))
    assert len(seen) == 2
