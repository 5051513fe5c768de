"""The memory format that the plain modules' output has, which the fused ones give too."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from mobilenet_ext.contract import Act
from mobilenet_ext.unit_tensors import Unit


def gives_channels_last(size: tuple[int, ...], channels_last: bool, units: Iterable[Unit]) -> bool:
    """Whether the plain modules' output is channels_last, given their input's size and whether that is: a
    convolution's is if its input or weight is.

    A tensor of one channel or one pixel is contiguous in both formats, and PyTorch goes by its strides: those that a
    convolution writes are channels_last, those that BatchNorm or an activation writes are not.
    """
    _, _, h, w = size
    for unit in units:
        _, c, h, w = unit.output_size(1, h, w)
        bare = not unit.batch_stats and unit.running_mean is None and unit.act == Act.LINEAR
        channels_last = (channels_last or is_channels_last(unit.weight)) and (bare or 1 not in (c, h * w))
    return channels_last


def is_channels_last(x: Tensor) -> bool:
    """Whether PyTorch takes ``x`` (4-D) for a channels_last tensor, which it tells from the strides.

    As ``is_channels_last_strides_2d`` in c10/core/MemoryFormat.h. PyTorch's Python version of it imports sympy at its
    first call: a second under a lock that the child of a fork would wait for for ever.
    """
    sizes, strides = x.shape, x.stride()
    if strides[1] == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * sizes[dim]
    return True


def match_memory_format(out: Tensor, channels_last: bool) -> Tensor:
    """``out``, which is channels_last, with the strides of that format or of the contiguous one."""
    if channels_last:
        return out
    shape = out.shape
    out = out.contiguous()
    # One channel or one pixel is contiguous in both formats; the views settle the strides.
    return out.view(-1).view(shape) if 1 in (shape[1], shape[2] * shape[3]) else out
