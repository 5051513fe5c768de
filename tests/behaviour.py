"""What the tests of behaviour share: which units ran fused, and one training step beside the plain modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from plain import is_conv_bias, randomise_
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mobilenet_ext as mx

_CONVOLUTIONS = {
    f"{kind}_{pass_}": 1 for kind in ("dense", "depthwise", "pointwise") for pass_ in ("forward", "inference")
} | {"block_inference": 2}


class KernelOps(TorchDispatchMode):
    """Records the kernel ops that are called while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "mobilenet_ext":
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    @property
    def units(self) -> int:
        """How many convolution units ran on the kernels."""
        return sum(_CONVOLUTIONS.get(name, 0) for name in self.names)


def fused_units(module: nn.Module, x: Tensor) -> int:
    """How many units of ``module`` run fused for ``x``."""
    with KernelOps() as ops:
        module(x)
    return ops.units


def plain_forward(module: nn.Module, x: Tensor) -> Tensor:
    """The forward of ``module`` (nested ``Sequential`` containers, or a network of them), leaf by leaf."""
    if hasattr(module, "feature"):
        return plain_forward(module.classifier, plain_forward(module.feature, x))
    if isinstance(module, nn.Sequential):
        for child in module:
            x = plain_forward(child, x)
        return x
    return module(x)


class Plain(nn.Module):
    """A copy of a module whose forward calls leaf after leaf, so that nothing in it can be fused."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for child in module.modules():
            for name, value in child.__dict__.items():
                if isinstance(value, Tensor):  # what pruning computes at each forward, which has a history: no copy
                    child.__dict__[name] = value.detach()
        self.module = copy.deepcopy(module)

    def forward(self, x: Tensor) -> Tensor:
        return plain_forward(self.module, x)


def assert_same_step(module: nn.Module, x: Tensor, *, tolerance: float = 1e-9, units: int | None = None) -> None:
    """One forward and backward of ``module`` equals that of its leaves: output, every gradient, every buffer.

    ``units``: how many units have to run fused, where that is known. Both take ``x`` and the mode as they are.
    """
    module.zero_grad()
    plain = Plain(module)
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad) for _ in range(2)]
    with KernelOps() as ops:
        actual = module(inputs[0])
    expected = plain(inputs[1])
    if units is not None:
        assert ops.units == units
    assert actual.stride() == expected.stride()
    _assert_same("output", actual, expected, tolerance)
    assert actual.requires_grad == expected.requires_grad
    if expected.requires_grad:
        upstream = torch.randn_like(expected)
        actual.backward(upstream)
        expected.backward(upstream)
        _assert_same("gradient of the input", inputs[0].grad, inputs[1].grad, tolerance)

    parameters = dict(plain.module.named_parameters())
    for name, a in module.named_parameters():
        b, scale = parameters[name].grad, 1.0
        beta = parameters.get(f"{name.removesuffix('0.bias')}1.bias")
        if is_conv_bias(name) and beta is not None and beta.grad is not None:
            # A rounding error of nothing in front of batch statistics: measured beside the BatchNorm's gradient.
            scale += beta.grad.norm().item()
        _assert_same(f"gradient of {name}", a.grad, b, tolerance, scale)
    for (name, a), b in zip(module.named_buffers(), plain.buffers(), strict=True):
        _assert_same(name, a, b, tolerance)


def _assert_same(
    what: str, actual: Tensor | None, expected: Tensor | None, tolerance: float, scale: float = 0.0
) -> None:
    if expected is None:
        assert actual is None, what
        return
    assert actual is not None, what
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    if expected.is_floating_point():
        difference = (actual.detach() - expected.detach()).double().norm().item()
        limit = tolerance * (expected.detach().double().norm().item() + scale)
        assert difference <= limit, f"{what}: {difference:.1e} from the plain modules, {limit:.1e} is accepted"
    else:
        assert torch.equal(actual, expected), what


UNITS = 9  # of `first_units`


def first_units() -> nn.Module:
    """The first nine units of MobileNetV1 and a pooling, in float64."""
    torch.manual_seed(5)
    feature = randomise_(mx.MobileNetV1(10, 0.25)).double().feature
    return mx.nn.FusedSequential(*feature[:UNITS], feature[-1])


def image_with_gradient() -> Tensor:
    torch.manual_seed(6)
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)


def units_without(index: int) -> int:
    """How many units are left where one's module ``index`` runs by itself: in front of an activation a linear unit."""
    return UNITS if index == 2 else UNITS - 1
