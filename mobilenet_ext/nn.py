"""Modules: the units of depthwise-separable networks on the fused kernels, made of plain children.

Each is a ``Sequential`` of plain ``nn`` modules, so parameters, ``state_dict`` keys, initialisation and results are
those of the plain modules; the forward runs them through the fused kernels where nothing (a hook, a swapped child, a
parametrisation) asks for the plain ones. A module on its own takes and returns ordinary activations.
"""

from __future__ import annotations

from torch import nn

from mobilenet_ext.contract import STRIDES
from mobilenet_ext.fusion import FusedSequential

__all__ = [
    "DepthwiseConvBNReLU",
    "DepthwiseSeparableConv",
    "FusedSequential",
    "PointwiseConvBNReLU",
    "StemConvBNReLU",
]


class StemConvBNReLU(FusedSequential):
    """3x3 convolution over a few input channels with padding 1, BatchNorm and ReLU.

    Args:
        in_channels, out_channels: channel counts.
        stride: 1 or 2.
        bias: whether the convolution has a bias.

    Shapes: input ``[N, in_channels, H, W]``, output ``[N, out_channels, ceil(H/stride), ceil(W/stride)]``.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> None:
        _check_positive(in_channels=in_channels, out_channels=out_channels)
        _check_bool(bias=bias)
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, _stride(stride), padding=1, bias=bias),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class DepthwiseConvBNReLU(FusedSequential):
    """Depthwise 3x3 convolution with padding 1, BatchNorm and ReLU.

    Args:
        channels: input and output channels.
        stride: 1 or 2.
        bias: whether the convolution has a bias.

    Shapes: input ``[N, channels, H, W]``, output ``[N, channels, ceil(H/stride), ceil(W/stride)]``.
    """

    def __init__(self, channels: int, *, stride: int = 1, bias: bool = True) -> None:
        _check_positive(channels=channels)
        _check_bool(bias=bias)
        super().__init__(
            nn.Conv2d(channels, channels, 3, _stride(stride), padding=1, groups=channels, bias=bias),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )


class PointwiseConvBNReLU(FusedSequential):
    """1x1 convolution, BatchNorm and ReLU.

    Args:
        in_channels, out_channels: channel counts.
        bias: whether the convolution has a bias.

    Shapes: input ``[N, in_channels, H, W]``, output ``[N, out_channels, H, W]``.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        _check_positive(in_channels=in_channels, out_channels=out_channels)
        _check_bool(bias=bias)
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, bias=bias),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class DepthwiseSeparableConv(FusedSequential):
    """A :class:`DepthwiseConvBNReLU` and a :class:`PointwiseConvBNReLU`: the block of MobileNetV1 (arXiv:1704.04861).

    Args:
        in_channels, out_channels: channel counts.
        stride: of the depthwise convolution, 1 or 2.
        bias: whether the convolutions have biases.

    Shapes: input ``[N, in_channels, H, W]``, output ``[N, out_channels, ceil(H/stride), ceil(W/stride)]``.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> None:
        _check_positive(in_channels=in_channels, out_channels=out_channels)
        _check_bool(bias=bias)
        super().__init__(
            DepthwiseConvBNReLU(in_channels, stride=stride, bias=bias),
            PointwiseConvBNReLU(in_channels, out_channels, bias=bias),
        )


def _stride(stride: int) -> int:
    if type(stride) is not int or stride not in STRIDES:
        raise ValueError(f"stride: got {stride!r}, accepted are 1 and 2")
    return stride


def _check_positive(**counts: int) -> None:
    for name, count in counts.items():
        if type(count) is not int:
            raise TypeError(f"{name}: got {count!r}, an int is accepted")
        if count < 1:
            raise ValueError(f"{name}: got {count}, at least 1 is accepted")


def _check_bool(**flags: bool) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {flag!r}, a bool is accepted")
