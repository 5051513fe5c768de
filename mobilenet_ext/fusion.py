"""Which modules may run as a fused chain: the decision, made anew at each forward, and the run.

A unit is fused only if its modules are exactly ``Conv2d``, ``BatchNorm2d`` (in inference it may be missing) and perhaps
an activation with settings the kernels support, and nothing watches or changes them: no hooks (theirs or global), no
pruning, no parametrisation, no replaced ``forward``. Everything else runs as the modules it is made of, and the chain
starts again after it.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from mobilenet_ext import chain
from mobilenet_ext.autograd import is_transformed
from mobilenet_ext.chain import Kind, Unit
from mobilenet_ext.contract import DTYPES, KERNEL_SIZES, NO_PADDING, PADDINGS, STRIDES, Act, Padding, conv_output_size
from mobilenet_ext.memory_format import gives_channels_last, match_memory_format
from mobilenet_ext.running_stats import why_unusable
from mobilenet_ext.tracing import is_followed, is_traced

TENSORS = (Tensor, nn.Parameter, nn.Buffer)  # a subclass may give its operations another meaning


class UnitModules(NamedTuple):
    """The modules of a unit that can be fused; its activation has nothing to keep."""

    kind: Kind
    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None  # None: in inference alone
    act: int
    slope: float  # of a leaky ReLU
    size: int  # how many modules: a linear unit has no activation


class Staged(nn.Module):
    """A module whose forward calls its ``stages()`` one after the other, or runs ``plans`` made of them instead."""

    plans = None  # of a frozen module: its Plans (TorchScript would look an annotation up)

    def stages(self) -> Iterable[nn.Module]:
        """The modules that ``forward`` calls in eval mode. Whoever overrides one of the two overrides both."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Staged:
        """``.to()`` and the like."""
        return super()._apply(fn, recurse) if self.plans is None else self.plans.convert(self, super()._apply, fn)


def calls_its_stages(module: nn.Module) -> bool:
    """Whether ``module`` is staged, and its forward is the one that its ``stages`` were written for."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return isinstance(module, Staged) and "stages" in vars(owner)


class FusedSequential(Staged, nn.Sequential):
    """``nn.Sequential`` whose forward runs convolution, BatchNorm and activation units through the fused kernels. The
    activation is ReLU, ReLU6, LeakyReLU, Hardswish or SiLU, or there is none. Where nothing takes gradients a unit
    needs no BatchNorm.

    Parameters, buffers, ``state_dict`` and results are those of the plain ``nn.Sequential`` of the same modules. Units
    in nested ``Sequential`` containers are found too; a final ``AdaptiveAvgPool2d(1)`` joins the chain before it.

    Shapes: input ``[N, C, H, W]`` for the first module; output as the last module gives it.
    """

    def stages(self) -> Iterable[nn.Module]:
        return self

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # a condition of its own: TorchScript compiles nothing below it
            if not is_traced():
                if self.plans is None or is_observed():
                    return run_modules(self, input)
                return self.plans.run(self, input)
        for module in self:
            input = module(input)
        return input

    def __getitem__(self, index: int | slice) -> nn.Module:
        # nn.Sequential would call the constructor of the subclass, which may take something else than modules.
        if isinstance(index, slice):
            part = FusedSequential(OrderedDict(list(self._modules.items())[index]))
            part.training, part.plans = self.training, copy.copy(self.plans)
            return part
        return super().__getitem__(index)


def run_modules(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Run modules one after the other, chains of fusable units through the kernels."""
    modules = list(flatten(modules))
    i = 0
    while i < len(modules):
        units, pool = leading_chain(modules[i:], inference=not torch.is_grad_enabled())
        if units and accepts(x, units):
            x = run_chain(units, pool, x)
            i += count_of(units) + pool
        else:
            x = modules[i](x)
            i += 1
    return x


def flatten(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """``modules``, with those of untouched sequential containers among them in their places."""
    for module in modules:
        if type(module).forward in (nn.Sequential.forward, FusedSequential.forward) and is_untouched(module):
            yield from flatten(module)
        else:
            yield module


def leading_chain(modules: list[nn.Module], inference: bool = False) -> tuple[list[UnitModules], bool]:
    """The longest chain of units (may be empty) that ``modules`` begin with; whether a global pooling follows it.

    ``inference``: a convolution without BatchNorm is a unit too.
    """
    units: list[UnitModules] = []
    tracked: set[Tensor] = set()  # and not their id(), which torch.compile would guard
    count = 0
    while (unit := _unit(modules[count : count + 3], inference)) is not None:
        if units and (unit.kind == "dense" or unit.conv.in_channels != units[-1].conv.out_channels):
            break
        buffers = [buffer for buffer in unit.bn._buffers.values() if buffer is not None] if unit.bn else []
        different = len(tracked) + len(buffers)
        tracked.update(buffers)
        if len(tracked) < different:
            break  # a chain updates the running statistics of all its units at once, and these twice
        units.append(unit)
        count += unit.size
    pool = False
    if units and (after := modules[count:]):
        pool = is_exactly(after[0], nn.AdaptiveAvgPool2d) and _pools_to_one(after[0])
    return units, pool


def count_of(units: Iterable[UnitModules]) -> int:
    """How many modules the units have."""
    return sum(unit.size for unit in units)


def accepts(x: Tensor, units: Iterable[UnitModules]) -> bool:
    """Whether the kernels take ``x`` and these units' tensors. Where not, the plain modules say what is wrong."""
    if is_transformed() or not is_ordinary(x) or x.ndim != 4 or x.numel() == 0:
        return False
    dtype = chain.compute_dtype(x)
    if x.dtype not in DTYPES or dtype not in DTYPES:
        return False
    if dtype == torch.float64 and x.device.type == "cuda":
        return False  # the GPU kernels have no float64
    conv_dtypes = (torch.float32, torch.bfloat16, torch.float16) if chain.is_autocast(x) else (dtype,)
    vector_dtypes = (dtype,) if dtype.itemsize > 2 else (dtype, torch.float32)
    _, channels, h, w = x.shape
    for _, conv, bn, *_ in units:
        conv_tensors = [t for t in (conv.weight, conv.bias) if t is not None]
        vectors = [t for t in _vectors(bn) if t is not None]
        if any(t.device != x.device for t in (*conv_tensors, *vectors)):
            return False
        if any(t.dtype not in conv_dtypes for t in conv_tensors):
            return False
        if vectors and (vectors[0].dtype not in vector_dtypes or any(t.dtype != vectors[0].dtype for t in vectors)):
            return False
        if bn is not None and any(
            why_unusable(t, _tracks(bn)) for t in (bn.running_mean, bn.running_var) if t is not None
        ):
            return False
        h, w = conv_output_size(h, w, conv.kernel_size[0], conv.stride[0], padding_of(conv))
        if channels != conv.in_channels or h < 1 or w < 1:
            return False
        channels = conv.out_channels
    return True


def is_ordinary(x: Tensor) -> bool:
    """Whether ``x`` is a tensor with strides, of no subclass, and not a list of several (a nested tensor)."""
    return type(x) in TENSORS and x.layout == torch.strided and not x.is_nested


def run_chain(units: list[UnitModules], pool: bool, x: Tensor) -> Tensor:
    """Run a chain that :func:`accepts` has accepted; the output has the plain modules' memory format."""
    tensors = [as_tensors(unit) for unit in units]
    out = chain.run(x, tensors, pool)
    # Counted after the run, like the statistics: a recomputation that stops early leaves out both or neither.
    batches = [bn.num_batches_tracked for _, _, bn, *_ in units if _tracks(bn) and bn.num_batches_tracked is not None]
    if batches:
        torch._foreach_add_(batches, 1)
    return match_memory_format(out, gives_channels_last(x, tensors))


def as_tensors(unit: UnitModules) -> Unit:
    """The unit's tensors and settings at this moment, before its batch is counted in ``num_batches_tracked``."""
    kind, conv, bn, act, slope, _ = unit
    convolution = (kind, conv.stride[0], padding_of(conv), conv.weight, conv.bias)
    if bn is None:
        return Unit(*convolution, *_vectors(None), False, None, 0.0, act, slope)
    batch_stats = bn.training or (bn.running_mean is None and bn.running_var is None)
    momentum = None
    if _tracks(bn):
        momentum = bn.momentum
        if momentum is None:  # a cumulative average
            momentum = 0.0 if bn.num_batches_tracked is None else 1.0 / (float(bn.num_batches_tracked) + 1)
    return Unit(*convolution, *_vectors(bn), batch_stats, momentum, bn.eps, act, slope)


def _vectors(bn: nn.BatchNorm2d | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if bn is None else (bn.weight, bn.bias, bn.running_mean, bn.running_var)


def _tracks(bn: nn.BatchNorm2d | None) -> bool:
    return bn is not None and bn.training and bn.track_running_stats and bn.running_mean is not None


def is_untouched(module: nn.Module) -> bool:
    """Whether calling ``module`` does what its class's ``forward`` does and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_compiled_call_impl" in module.__dict__  # of module.compile()
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def forward_hooks_around(modules: Iterable[nn.Module]) -> list[dict]:
    """Of the dictionaries that :func:`is_untouched` wants empty, those that count where nothing needs a gradient."""
    names = ("forward_hooks", "forward_pre_hooks")
    around = [getattr(nn_module, f"_global_{name}") for name in names]
    return around + [getattr(module, f"_{name}") for module in modules for name in names]


def is_observed() -> bool:
    """Whether somebody follows the operations, who must not be shown a plan: it would keep today's weights for ever
    in a graph, and whoever counts the ops wants to see each."""
    return (
        torch.compiler.is_compiling()
        or is_followed()
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, counters
        or is_transformed()
    )


def conv_kind(conv: nn.Conv2d) -> Kind | None:
    """What the kernels take this convolution for, or None where they do not support it."""
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
    elif conv.groups == 1:
        kind = "dense"
    else:
        return None
    return kind if kernel in KERNEL_SIZES[kind] else None


def padding_of(conv: nn.Conv2d) -> Padding:
    """The zeros around the image of a convolution that pads with zeros and has dilation 1."""
    if conv.padding == "valid":
        return NO_PADDING
    if conv.padding == "same":  # the larger half of what is odd comes last
        rows, columns = (size - 1 for size in conv.kernel_size)
        return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
    rows, columns = conv.padding
    return columns, columns, rows, rows


def _unit(modules: list[nn.Module], inference: bool) -> UnitModules | None:
    """The unit that these three modules, or fewer, begin with."""
    conv, bn, activation = (*modules, None, None, None)[:3]
    if not is_exactly(conv, nn.Conv2d):
        return None
    if not is_exactly(bn, nn.BatchNorm2d):
        if not inference:
            return None
        bn, activation = None, bn
    layers = (conv,) if bn is None else (conv, bn)
    known = _act_of(activation)
    act, slope = (Act.LINEAR.value, 0.0) if known is None else known
    size = len(layers) + (known is not None)
    if any(name not in layer._parameters for layer in layers for name in ("weight", "bias")):
        return None  # pruned, or a replica of DataParallel
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
        return (act.value, float(slope)) if type(slope) in (int, float) and abs(slope) <= _LARGEST else None
    return act.value, 0.0


def _is_consistent(conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> bool:
    """Whether the tensors are what the modules' settings say; where not, the plain modules complain, or compute."""
    vectors = (conv.bias, *_vectors(bn))
    if not (
        all(tensor is None or type(tensor) in TENSORS for tensor in (conv.weight, *vectors))
        and conv.weight.shape == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
        and all(vector is None or vector.shape == (conv.out_channels,) for vector in vectors)
    ):
        return False
    return bn is None or (
        bn.num_features == conv.out_channels
        and (bn.running_mean is None) == (bn.running_var is None)
        and bn.eps > 0
        and not any(type(number) is int and abs(number) > _LARGEST for number in (bn.eps, bn.momentum))
    )


_LARGEST = sys.float_info.max  # integers go on

# As they are at import: tools that quantise or trace replace them on the class.
_CONV_FORWARD = nn.Conv2d._conv_forward
_CLASSES = (nn.Conv2d, nn.BatchNorm2d, *_ACTIVATIONS, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear)
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


def _pools_to_one(pool: nn.AdaptiveAvgPool2d) -> bool:
    return pool.output_size in (1, (1, 1), [1, 1])
