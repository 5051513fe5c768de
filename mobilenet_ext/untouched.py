"""Whether calling a module does what its class is known to do: nothing watches or changes it, no hooks (its own or
global), no replaced ``forward``, and PyTorch's classes are as they were at import."""

from __future__ import annotations

import operator

from torch import nn
from torch.nn.modules import module as nn_module

PLAIN = "_plain_class"  # of a class that fuse() made: the one that it stands for


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    return vars(kind).get(PLAIN, kind)


# What a call goes through: an attribute of the module itself takes its place. The second is of module.compile().
_CALLED = ("forward", "_compiled_call_impl", "_call_impl", "_wrapped_call_impl", "_check_input_dim")


def is_untouched(module: nn.Module) -> bool:
    """Whether calling ``module`` does what its class's ``forward`` does and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(name in module.__dict__ for name in _CALLED)
        or type(module).__call__ is not nn.Module.__call__
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


# As they are at import: tools that quantise or trace replace them on the class.
CONV_FORWARD = nn.Conv2d._conv_forward
_CLASSES = (
    nn.Conv2d, nn.ZeroPad2d, nn.ConstantPad2d, nn.BatchNorm2d, nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU,
    nn.LeakyReLU, nn.Sigmoid, nn.Hardsigmoid, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Flatten, nn.Linear,
)  # fmt: skip
_FORWARDS = {kind: kind.forward for kind in _CLASSES}
_forward_of = operator.attrgetter("forward")


def forwards_are_original() -> bool:
    """Whether the classes of a unit's modules have their own ``forward``."""
    return nn.Conv2d._conv_forward is CONV_FORWARD and all(
        map(operator.is_, map(_forward_of, _FORWARDS), _FORWARDS.values())
    )


def is_known(kind: type[nn.Module]) -> bool:
    """Whether :func:`is_exactly` may be asked of it."""
    return kind in _FORWARDS


def is_exactly(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what PyTorch's own class does and nothing else."""
    return type(module) is kind and kind.forward is _FORWARDS[kind] and is_untouched(module)


def is_of_library(module: nn.Module | None, classes: object) -> bool:
    """Whether calling ``module`` does what one of these classes does, which libraries have and (module, name) names."""
    kind = type(module)
    return library_name(kind) in classes and "forward" in vars(kind) and is_untouched(module)


def library_name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
