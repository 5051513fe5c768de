"""Which modules make a unit that the kernels can run: a convolution, its normalisation and its activation.

The modules are exactly ``Conv2d``, ``BatchNorm2d`` (in inference it may be missing) and perhaps an activation, or what
libraries have in their places, with settings that the kernels support, and nothing watches or changes them: no hooks
(theirs or global), no pruning, no parametrisation, no replaced ``forward``.
"""

from __future__ import annotations

import operator
import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from mobilenet_ext.contract import KERNEL_SIZES, NO_PADDING, PADDINGS, STRIDES, Act, Padding
from mobilenet_ext.unit_tensors import Kind, Unit

TENSORS = (Tensor, nn.Parameter, nn.Buffer)  # a subclass may give its operations another meaning


# Of a dense 3x3 unit's input: the kernels are made for the first layers of a network, and PyTorch's are faster from 64
# channels on (benchmarks/NOTES.md).
MOST_DENSE_CHANNELS = 32


class UnitModules(NamedTuple):
    """The modules of a unit that can be fused; its activation has nothing to keep."""

    kind: Kind
    conv: nn.Conv2d
    bn: nn.Module | None  # a BatchNorm2d, or what a library has in its place; None: in inference alone
    act: int
    slope: float  # of a leaky ReLU
    size: int  # how many modules: a linear unit has no activation


def as_tensors(unit: UnitModules) -> Unit:
    """The unit's tensors and settings at this moment, before its batch is counted in ``num_batches_tracked``."""
    kind, conv, bn, act, slope, _ = unit
    convolution = (kind, conv.stride[0], padding_of(conv), conv.weight, conv.bias)
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


def conv_kind(conv: nn.Conv2d) -> Kind | None:
    """What the kernels take this convolution for, or None where they do not support it."""
    pairs = [conv.kernel_size, conv.stride, conv.dilation]
    if conv.padding not in ("valid", "same"):
        pairs.append(conv.padding)
    if not all(map(_is_pair, pairs)):
        return None  # F.conv2d takes more than that, and says what is wrong
    if conv.padding_mode != "zeros" or conv.dilation != (1, 1):
        return None
    kernel, padding = conv.kernel_size[0], padding_of(conv)
    if conv.kernel_size != (kernel, kernel):
        return None
    if kernel == 1:
        return "pointwise" if (conv.groups, conv.stride, padding) == (1, (1, 1), NO_PADDING) else None
    if conv.stride not in [(s, s) for s in STRIDES] or any(side not in PADDINGS for side in padding):
        return None
    if conv.groups == conv.in_channels == conv.out_channels:
        kind = "depthwise"
    elif conv.groups == 1 and conv.in_channels <= MOST_DENSE_CHANNELS:
        kind = "dense"
    else:
        return None
    return kind if kernel in KERNEL_SIZES[kind] else None


def _is_pair(setting: object) -> bool:
    return type(setting) is tuple and [type(number) for number in setting] == [int, int]


def padding_of(conv: nn.Conv2d) -> Padding:
    """The zeros around the image of a convolution that pads with zeros and has dilation 1."""
    if conv.padding == "valid":
        return NO_PADDING
    if conv.padding == "same":  # the larger half of what is odd comes last
        rows, columns = (size - 1 for size in conv.kernel_size)
        return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
    rows, columns = conv.padding
    return columns, columns, rows, rows


def leading_unit(modules: list[nn.Module], inference: bool) -> UnitModules | None:
    """The unit that these three modules, or fewer, begin with.

    ``inference``: a convolution without BatchNorm is a unit too.
    """
    conv, bn, activation = (*modules, None, None, None)[:3]
    if not is_exactly(conv, nn.Conv2d):
        return None
    if not is_norm(bn):
        if not inference:
            return None
        bn, activation = None, bn
    holds_activation = bn is not None and _holds_activation(bn)
    layers = (conv,) if bn is None else (conv, bn)
    known = _act_of(bn.act if holds_activation else activation)
    act, slope = (Act.LINEAR.value, 0.0) if known is None else known
    size = len(layers) + (known is not None and not holds_activation)
    if not all(map(has_its_tensors, layers)):
        return None
    if "_conv_forward" in conv.__dict__ or nn.Conv2d._conv_forward is not _CONV_FORWARD:
        return None
    kind = conv_kind(conv)
    return UnitModules(kind, conv, bn, act, slope, size) if kind is not None and _is_consistent(conv, bn) else None


_ACTIVATIONS = {
    nn.Identity: Act.LINEAR,
    nn.ReLU: Act.RELU,
    nn.ReLU6: Act.RELU6,
    nn.Hardswish: Act.HARDSWISH,
    nn.SiLU: Act.SILU,
    nn.LeakyReLU: Act.LEAKY_RELU,
}


def _act_of(module: nn.Module | None) -> tuple[int, float] | None:
    """The activation that ``module`` is, and its slope, or None where the kernels have none like it."""
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
    with_act = _LIBRARY_NORMS.get(_name(type(module)))
    if with_act is None or not is_untouched(module) or "forward" not in vars(type(module)):
        return False
    return not with_act or (is_exactly(module.drop, nn.Identity) and _act_of(module.act) is not None)


def _holds_activation(bn: nn.Module) -> bool:
    return _LIBRARY_NORMS.get(_name(type(bn)), False)


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def is_layer(module: nn.Module) -> bool:
    """Whether chains are made of modules like this one, as far as its class and who watches it say."""
    return (
        is_norm(module)
        or _is_stochastic_depth(module)
        or (type(module) in _FORWARDS and is_exactly(module, type(module)))
    )


def does_nothing(module: nn.Module) -> bool:
    """Whether a module in its present mode gives what it is given."""
    drops = is_exactly(module, nn.Dropout) or _is_stochastic_depth(module)
    return is_exactly(module, nn.Identity) or (drops and (not module.training or module.p == 0))


def _is_stochastic_depth(module: nn.Module) -> bool:
    return _name(type(module)) == ("torchvision.ops.stochastic_depth", "StochasticDepth") and is_untouched(module)


def _is_consistent(conv: nn.Conv2d, bn: nn.Module | None) -> bool:
    """Whether the tensors are what the modules' settings say; where not, the plain modules complain, or compute."""
    vectors = (conv.bias, *vectors_of(bn))
    if not (
        all(tensor is None or type(tensor) in TENSORS for tensor in (conv.weight, *vectors))
        and conv.weight.shape == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        and all(vector is None or vector.shape == (conv.out_channels,) for vector in vectors)
    ):
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


_LARGEST = sys.float_info.max  # integers go on
_LARGEST_SLOPE = torch.finfo(torch.float32).max  # PyTorch refuses larger ones, but in float64

# As they are at import: tools that quantise or trace replace them on the class.
_CONV_FORWARD = nn.Conv2d._conv_forward
_PARTS_OF_ACTIVATIONS = (nn.Sigmoid, nn.Hardsigmoid)
_CLASSES = (
    nn.Conv2d, nn.BatchNorm2d, *_ACTIVATIONS, *_PARTS_OF_ACTIVATIONS, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Flatten,
    nn.Linear,
)  # fmt: skip
_FORWARDS = {kind: kind.forward for kind in _CLASSES}
_forward_of = operator.attrgetter("forward")


def forwards_are_original() -> bool:
    """Whether the classes of a unit's modules have their own ``forward``."""
    return nn.Conv2d._conv_forward is _CONV_FORWARD and all(
        map(operator.is_, map(_forward_of, _FORWARDS), _FORWARDS.values())
    )


def is_exactly(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what PyTorch's own class does and nothing else."""
    return type(module) is kind and kind.forward is _FORWARDS[kind] and is_untouched(module)


def pools_to_one(pool: nn.AdaptiveAvgPool2d) -> bool:
    size = pool.output_size
    numbers = size if type(size) in (tuple, list) else (size,)
    return len(numbers) in (1, 2) and all(type(number) is int and number == 1 for number in numbers)
