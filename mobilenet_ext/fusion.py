"""Which modules may run as a fused chain: the decision, made anew at each forward, and the run.

What is no unit (``units.py``) runs as the modules that it is made of, and the chain starts again after it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from mobilenet_ext import chain
from mobilenet_ext.autograd import is_transformed
from mobilenet_ext.chain import Gives, Normalised
from mobilenet_ext.contract import DTYPES, Padding, conv_output_size
from mobilenet_ext.memory_format import gives_channels_last, is_channels_last, match_memory_format
from mobilenet_ext.running_stats import share_memory, why_unusable
from mobilenet_ext.tracing import is_followed, is_traced
from mobilenet_ext.unit_tensors import Unit, compute_dtype, is_autocast
from mobilenet_ext.units import (
    MOST_MODULES,
    TENSORS,
    UnitModules,
    as_tensors,
    counts_batches,
    leading_unit,
    pools_to_one,
    tracks,
    vectors_of,
)
from mobilenet_ext.untouched import is_exactly, is_untouched, plain_class


class Staged(nn.Module):
    """A module whose forward calls its ``stages()`` one after the other, or runs ``plans`` made of them instead."""

    plans = None  # of a frozen module: its Plans (TorchScript would look an annotation up)

    def stages(self) -> Iterable[nn.Module]:
        """The modules that ``forward`` calls in eval mode. Whoever overrides one of the two overrides both."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Staged:
        return super().train(mode) if self.plans is None else self  # a frozen module stays in eval mode

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
            x = run_chain(units, x, "mean" if pool else "activation")
            i += count_of(units) + pool
        else:
            x = modules[i](x)
            i += 1
    return x


def flatten(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """``modules``, with those of untouched sequential containers among them in their places."""
    for module in modules:
        forward = plain_class(type(module)).forward
        if forward in (nn.Sequential.forward, FusedSequential.forward) and is_untouched(module):
            yield from flatten(module)
        else:
            yield module


def leading_chain(modules: list[nn.Module], inference: bool = False) -> tuple[list[UnitModules], bool]:
    """The longest chain of units (may be empty) that ``modules`` begin with; whether a global pooling follows it.

    ``inference``: a convolution without BatchNorm is a unit too.
    """
    units: list[UnitModules] = []
    count = 0
    while (unit := leading_unit(modules[count : count + MOST_MODULES], inference)) is not None:
        conv = unit.convolution
        if units and (conv.kind == "dense" or conv.layer.in_channels != units[-1].convolution.layer.out_channels):
            break
        units.append(unit)
        count += unit.size
    # A chain updates the buffers of all its units at once.
    while share_memory([buffer for unit in units for buffer in _updated(unit)]):
        count -= units.pop().size
    pool = False
    if units and (after := modules[count:]):
        pool = is_exactly(after[0], nn.AdaptiveAvgPool2d) and pools_to_one(after[0])
    return units, pool


def _updated(unit: UnitModules) -> list[Tensor]:
    """The buffers that a forward of the unit changes, or more of its BatchNorm's."""
    if not (tracks(unit.bn) or counts_batches(unit.bn)):
        return []
    return [buffer for buffer in unit.bn._buffers.values() if buffer is not None]


def count_of(units: Iterable[UnitModules]) -> int:
    """How many modules the units have."""
    return sum(unit.size for unit in units)


def accepts(x: Tensor, units: Iterable[UnitModules]) -> bool:
    """Whether the kernels take ``x`` and these units' tensors. Where not, the plain modules say what is wrong."""
    if is_transformed() or not is_ordinary(x) or x.ndim != 4 or x.numel() == 0:
        return False
    dtype = compute_dtype(x)
    if x.dtype not in DTYPES or dtype not in DTYPES:
        return False
    if dtype == torch.float64 and x.device.type == "cuda":
        return False  # the GPU kernels have no float64
    conv_dtypes = (torch.float32, torch.bfloat16, torch.float16) if is_autocast(x) else (dtype,)
    vector_dtypes = (dtype,) if dtype.itemsize > 2 else (dtype, torch.float32)
    _, channels, h, w = x.shape
    for convolution, bn, *_ in units:
        conv = convolution.layer
        conv_tensors = [t for t in (conv.weight, conv.bias) if t is not None]
        vectors = [t for t in vectors_of(bn) if t is not None]
        if any(t.device != x.device for t in (*conv_tensors, *vectors)):
            return False
        if any(t.dtype not in conv_dtypes for t in conv_tensors):
            return False
        if vectors and (vectors[0].dtype not in vector_dtypes or any(t.dtype != vectors[0].dtype for t in vectors)):
            return False
        if bn is not None and any(
            why_unusable(t, tracks(bn)) for t in (bn.running_mean, bn.running_var) if t is not None
        ):
            return False
        h, w = conv_output_size(h, w, conv.kernel_size[0], conv.stride[0], convolution.padding_of(h, w))
        if channels != conv.in_channels or h < 1 or w < 1:
            return False
        channels = conv.out_channels
    return True


def is_ordinary(x: Tensor) -> bool:
    """Whether ``x`` is a tensor with strides, of no subclass, and not a list of several (a nested tensor)."""
    return type(x) in TENSORS and x.layout == torch.strided and not x.is_nested


def gate_fits(gate: Tensor, x: Tensor) -> bool:
    """Whether the kernels take ``gate`` as a factor of ``x``, and PyTorch would give the product the dtype of both."""
    size = (*x.shape[:2], 1, 1)
    return (
        is_ordinary(gate)
        and gate.shape == size
        and gate.dtype == x.dtype == compute_dtype(x)
        and gate.device == x.device
    )


def paddings(size: tuple[int, ...], units: Iterable[UnitModules]) -> list[Padding]:
    """The zeros that each unit puts around the images, the first one's of this size."""
    h, w = size[2:]
    found = []
    for unit in units:
        conv = unit.convolution.layer
        found.append(unit.convolution.padding_of(h, w))
        h, w = conv_output_size(h, w, conv.kernel_size[0], conv.stride[0], found[-1])
    return found


def output_size(size: tuple[int, ...], units: Iterable[Unit]) -> tuple[int, ...]:
    """Of what the units make of an activation of this size."""
    for unit in units:
        size = unit.output_size(size[0], *size[2:])
    return tuple(size)


def residual_fits(
    residual: Tensor, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool
) -> bool:
    """Whether the kernels take ``residual`` as an addend of an activation, and PyTorch would give the sum the dtype and
    memory format (channels_last or not) of both."""
    # One channel or one pixel is contiguous in both formats, and PyTorch takes it for the usual one.
    channels_last = channels_last and 1 not in (size[1], size[2] * size[3])
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return (
        is_ordinary(residual)
        and residual.shape == size
        and residual.dtype == dtype
        and residual.device == device
        and residual.is_contiguous(memory_format=memory_format)
    )


def run_chain(
    units: list[UnitModules],
    x: Tensor | Normalised,
    gives: Gives = "activation",
    gate: Tensor | None = None,
    add: Callable[[Tensor, Tensor], Tensor] = torch.add,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor | Normalised, Tensor]:
    """Run a chain that :func:`accepts` has accepted; the output has the plain modules' memory format.

    ``add`` is what adds a residual that the kernels do not take.
    """
    u, is_last = (x.y, x.channels_last) if isinstance(x, Normalised) else (x, is_channels_last(x))
    tensors = list(map(as_tensors, units, paddings(u.shape, units)))
    channels_last = gives_channels_last(u.shape, is_last, tensors)
    joins = residual is not None and residual_fits(
        residual, output_size(u.shape, tensors), compute_dtype(u), u.device, channels_last
    )
    out = chain.run(x, tensors, gives, gate, residual if joins else None)
    # Counted after the run, like the statistics: a recomputation that stops early leaves out both or neither.
    batches = [unit.bn.num_batches_tracked for unit in units if counts_batches(unit.bn)]
    if batches:
        torch._foreach_add_(batches, 1)
    if gives == "both":
        activation, mean = out
        if isinstance(activation, Normalised):
            return activation._replace(channels_last=channels_last), mean
        return match_memory_format(activation, channels_last), mean
    out = match_memory_format(out, channels_last)
    return out if joins or residual is None else add(out, residual)


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
