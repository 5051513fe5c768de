"""What the tests of behaviour share: which units ran fused, and one training step beside the plain modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from plain import batch_norms, is_conv_bias, relative_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_CONVOLUTIONS = {
    f"{kind}_{pass_}": 1 for kind in ("stem", "depthwise", "pointwise") for pass_ in ("forward", "inference")
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

    batch_stats = {id(bn) for bn in batch_norms(module) if bn.training or bn.running_mean is None}
    cancelled = {id(unit[0].bias) for unit in module.modules() if _is_unit(unit) and id(unit[1]) in batch_stats}
    for (name, a), b in zip(module.named_parameters(), plain.parameters(), strict=True):
        if is_conv_bias(name) and id(a) in cancelled and b.grad is not None:
            assert a.grad is not None and a.grad.dtype == b.grad.dtype, name
            assert torch.equal(a.grad, torch.zeros_like(a)), f"{name}: a bias in front of batch statistics"
        else:
            _assert_same(f"gradient of {name}", a.grad, b.grad, tolerance)
    for (name, a), b in zip(module.named_buffers(), plain.buffers(), strict=True):
        _assert_same(name, a, b, tolerance)


def _is_unit(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) > 1 and isinstance(module[0], nn.Conv2d)


def _assert_same(what: str, actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    if expected is None:
        assert actual is None, what
        return
    assert actual is not None, what
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    if expected.is_floating_point():
        error = relative_error(actual, expected)
        assert error <= tolerance, f"{what}: relative error {error:.1e}"
    else:
        assert torch.equal(actual, expected), what
