"""Which modules make a unit that the kernels can run: a convolution, its normalisation and its activation.

The modules are exactly ``Conv2d``, ``BatchNorm2d`` (in inference it may be missing) and perhaps an activation, or what
libraries have in their places, with settings that the kernels support, and nothing watches or changes them: no hooks
(theirs or global), no pruning, no parametrisation, no replaced ``forward``.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mobilenet_ext.contract import Act, Padding
from mobilenet_ext.convolutions import Convolution, is_convolution, leading_convolution
from mobilenet_ext.unit_tensors import Unit
from mobilenet_ext.untouched import is_exactly, is_known, is_of_library, library_name

TENSORS = (Tensor, nn.Parameter, nn.Buffer)  # a subclass may give its operations another meaning


class UnitModules(NamedTuple):
    """The modules of a unit that can be fused; its activation has nothing to keep."""

    convolution: Convolution
    bn: nn.Module | None  # a BatchNorm2d, or what a library has in its place; None: in inference alone
    act: int
    slope: float  # of a leaky ReLU
    size: int  # how many modules: a linear unit has no activation


MOST_MODULES = 4  # of a unit: a layer that pads, the convolution, BatchNorm and the activation


def as_tensors(unit: UnitModules, padding: Padding) -> Unit:
    """The unit's tensors and settings at this moment, before its batch is counted in ``num_batches_tracked``."""
    (kind, conv, *_), bn, act, slope, _ = unit
    convolution = (kind, conv.stride[0], padding, conv.weight, conv.bias)
    if bn is None:
        return Unit(*convolution, *vectors_of(None), False, None, 0.0, act, slope)
    batch_stats = not _is_frozen(bn) and (bn.training or (bn.running_mean is None and bn.running_var is None))
    momentum = None
    if tracks(bn):
        momentum = bn.momentum
        if momentum is None:  # a cumulative average
            momentum = 0.0 if bn.num_batches_tracked is None else 1.0 / (float(bn.num_batches_tracked) + 1)
    return Unit(*convolution, *vectors_of(bn), batch_stats, momentum, bn.eps, act, slope)


def vectors_of(bn: nn.Module | None) -> tuple[Tensor | None, ...]:
    """Weight, bias and running statistics of a normalisation."""
    return (None,) * 4 if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)


def tracks(bn: nn.Module | None) -> bool:
    """Whether a forward changes its running statistics."""
    return (
        bn is not None and not _is_frozen(bn) and bn.training and bn.track_running_stats and bn.running_mean is not None
    )


def counts_batches(bn: nn.Module | None) -> bool:
    """Whether a forward adds one to its ``num_batches_tracked``."""
    return (
        bn is not None
        and not _is_frozen(bn)
        and bn.training
        and bn.track_running_stats
        and bn.num_batches_tracked is not None
    )


def has_its_tensors(layer: nn.Module) -> bool:
    """Whether a layer's tensors are where its class puts them; not so where it was pruned, or is a replica of
    DataParallel."""
    frozen = is_norm(layer) and _is_frozen(layer)
    parameters, buffers = ((), ("weight", "bias")) if frozen else (("weight", "bias"), ())
    if is_norm(layer):
        buffers = (*buffers, "running_mean", "running_var", *(() if frozen else ("num_batches_tracked",)))
    return all(name in layer._parameters for name in parameters) and all(name in layer._buffers for name in buffers)


def _is_frozen(bn: nn.Module) -> bool:
    """Whether it is a FrozenBatchNorm2d, whose vectors are buffers and whose statistics no mode changes."""
    return not isinstance(bn, nn.BatchNorm2d)


def leading_unit(modules: list[nn.Module], inference: bool) -> UnitModules | None:
    """The unit that modules begin with.

    ``inference``: a convolution without BatchNorm is a unit too.
    """
    convolution = leading_convolution(modules[:2])
    if convolution is None:
        return None
    conv = convolution.layer
    bn, activation = (*modules[convolution.size : convolution.size + 2], None, None)[:2]
    if not is_norm(bn):
        if not inference:
            return None
        bn, activation = None, bn
    holds_activation = bn is not None and _holds_activation(bn)
    layers = (conv,) if bn is None else (conv, bn)
    known = act_of(bn.act if holds_activation else activation)
    act, slope = (Act.LINEAR.value, 0.0) if known is None else known
    size = convolution.size + (bn is not None) + (known is not None and not holds_activation)
    if not all(map(has_its_tensors, layers)) or not _is_consistent(conv, bn):
        return None
    return UnitModules(convolution, bn, act, slope, size)


_ACTIVATIONS: dict[type[nn.Module], Act] = {
    nn.Identity: Act.LINEAR,
    nn.ReLU: Act.RELU,
    nn.ReLU6: Act.RELU6,
    nn.Hardswish: Act.HARDSWISH,
    nn.SiLU: Act.SILU,
    nn.LeakyReLU: Act.LEAKY_RELU,
}


# Activations of libraries, by the names of their classes.
_LIBRARY_ACTIVATIONS = {("efficientnet_pytorch.utils", "MemoryEfficientSwish"): Act.SILU}


def act_of(module: nn.Module | None) -> tuple[int, float] | None:
    """The activation that ``module`` is, and its slope, or None where the kernels have none like it."""
    if is_of_library(module, _LIBRARY_ACTIVATIONS):
        return _LIBRARY_ACTIVATIONS[library_name(type(module))].value, 0.0
    act = _ACTIVATIONS.get(type(module))
    if act is None or not is_exactly(module, type(module)):
        return None
    if act == Act.RELU6 and (module.min_val, module.max_val) != (0, 6):  # a Hardtanh, whose bounds can be set
        return None
    if act == Act.LEAKY_RELU:
        slope = module.negative_slope
        return (act.value, float(slope)) if type(slope) in (int, float) and abs(slope) <= _LARGEST_SLOPE else None
    return act.value, 0.0


# What libraries have in the place of BatchNorm2d, by the names of their classes, and whether an activation is in it
# (``act``, after a ``drop``). They compute what BatchNorm2d and the activation compute.
_LIBRARY_NORMS = {
    ("timm.layers.norm_act", "BatchNormAct2d"): True,
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): True,
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): False,
    ("timm.layers.norm", "FrozenBatchNorm2d"): False,
}


def is_norm(module: nn.Module | None) -> bool:
    """Whether calling ``module`` normalises as BatchNorm2d does, with an activation at the most, and nothing else."""
    if is_exactly(module, nn.BatchNorm2d):
        return True
    if not is_of_library(module, _LIBRARY_NORMS):
        return False
    return not _holds_activation(module) or (is_exactly(module.drop, nn.Identity) and act_of(module.act) is not None)


def _holds_activation(bn: nn.Module) -> bool:
    return _LIBRARY_NORMS.get(library_name(type(bn)), False)


_STOCHASTIC_DEPTH = {("torchvision.ops.stochastic_depth", "StochasticDepth")}


def is_layer(module: nn.Module) -> bool:
    """Whether chains are made of modules like this one, as far as its class and who watches it say."""
    return (
        is_norm(module)
        or is_convolution(module)
        or is_of_library(module, _LIBRARY_ACTIVATIONS)
        or is_of_library(module, _STOCHASTIC_DEPTH)
        or (is_known(type(module)) and is_exactly(module, type(module)))
    )


def does_nothing(module: nn.Module) -> bool:
    """Whether a module in its present mode gives what it is given."""
    drops = is_exactly(module, nn.Dropout) or is_of_library(module, _STOCHASTIC_DEPTH)
    return is_exactly(module, nn.Identity) or (drops and (not module.training or module.p == 0))


def _is_consistent(conv: nn.Conv2d, bn: nn.Module | None) -> bool:
    """Whether the tensors are what the modules' settings say; where not, the plain modules complain, or compute."""
    tensors = (conv.weight, conv.bias, *vectors_of(bn))
    if not all(tensor is None or type(tensor) in TENSORS for tensor in tensors) or not has_its_shapes(conv, bn):
        return False
    if bn is None:
        return True
    numbers = (bn.eps,) if _is_frozen(bn) else (bn.eps, bn.momentum)
    return (
        (_is_frozen(bn) or bn.num_features == conv.out_channels)
        and (bn.running_mean is None) == (bn.running_var is None)
        and bn.eps > 0
        and not any(type(number) is int and abs(number) > _LARGEST for number in numbers)
    )


def has_its_shapes(conv: nn.Conv2d, bn: nn.Module | None) -> bool:
    """Whether the tensors have the shapes that the modules' settings say."""
    vectors = (conv.bias, *vectors_of(bn))
    return conv.weight.shape == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size) and all(
        vector is None or vector.shape == (conv.out_channels,) for vector in vectors
    )


_LARGEST = sys.float_info.max  # integers go on
_LARGEST_SLOPE = torch.finfo(torch.float32).max  # PyTorch refuses larger ones, but in float64


def pools_to_one(pool: nn.AdaptiveAvgPool2d) -> bool:
    size = pool.output_size
    numbers = size if type(size) in (tuple, list) else (size,)
    return len(numbers) in (1, 2) and all(type(number) is int and number == 1 for number in numbers)
