"""Which convolutions the kernels support, and the zeros around their images: their own padding's, those of a layer in
front that pads, and those of TensorFlow's "same"."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn

from mobilenet_ext.contract import KERNEL_SIZES, NO_PADDING, PADDINGS, STRIDES, Padding
from mobilenet_ext.unit_tensors import Kind
from mobilenet_ext.untouched import CONV_FORWARD, is_exactly, is_of_library, library_name

# Of a dense 3x3 unit's input: the kernels are made for the first layers of a network, and PyTorch's are faster from 64
# channels on (benchmarks/NOTES.md).
MOST_DENSE_CHANNELS = 32

# As many zeros as give ceil(size / stride) rows and columns, the larger half of what is odd behind: how many depends on
# the image (https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2).
SAME = "same"
Zeros = Padding | Literal["same"]

# Subclasses of Conv2d in libraries that differ in their padding alone, by the names of their classes: it is SAME, or
# that of a layer that they have in front.
_IN_FRONT = "static_padding"
_LIBRARY_CONVOLUTIONS = {
    ("timm.layers.conv2d_same", "Conv2dSame"): SAME,
    ("torch_vggish_yamnet.yamnet.model", "Conv2d_tf"): SAME,
    ("efficientnet_pytorch.utils", "Conv2dDynamicSamePadding"): SAME,
    ("efficientnet_pytorch.utils", "Conv2dStaticSamePadding"): _IN_FRONT,
    ("segmentation_models_pytorch.encoders._efficientnet", "Conv2dDynamicSamePadding"): SAME,
    ("segmentation_models_pytorch.encoders._efficientnet", "Conv2dStaticSamePadding"): _IN_FRONT,
}


class Convolution(NamedTuple):
    """A convolution that the kernels support."""

    kind: Kind
    layer: nn.Conv2d
    padding: Zeros
    size: int  # how many modules: one in front may pad

    def padding_of(self, h: int, w: int) -> Padding:
        """The zeros around an image of so many rows and columns."""
        if self.padding != SAME:
            return self.padding
        kernel, stride = self.layer.kernel_size[0], self.layer.stride[0]
        return *_same(w, kernel, stride), *_same(h, kernel, stride)


def _same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    zeros = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return zeros // 2, zeros - zeros // 2


def leading_convolution(modules: list[nn.Module]) -> Convolution | None:
    """The convolution that these modules begin with, which may have a layer in front that pads with zeros."""
    front = zeros_of(modules[0]) if modules else None
    size = 1 if front is None else 2
    conv = modules[size - 1] if len(modules) >= size else None
    return _supported(conv, front or NO_PADDING, size) if is_convolution(conv) else None


def is_convolution(module: nn.Module | None) -> bool:
    """Whether calling ``module`` does what Conv2d does, with more padding perhaps, and nothing else."""
    known = is_exactly(module, nn.Conv2d) or is_of_library(module, _LIBRARY_CONVOLUTIONS)
    return known and "_conv_forward" not in module.__dict__ and nn.Conv2d._conv_forward is CONV_FORWARD


def is_class_of_convolutions(kind: type[nn.Module]) -> bool:
    """Whether a module of this class is a convolution as :func:`is_convolution` says, if it is untouched."""
    return kind is nn.Conv2d or library_name(kind) in _LIBRARY_CONVOLUTIONS


def is_supported(conv: nn.Conv2d) -> bool:
    """Whether the kernels have a convolution with these settings."""
    return _supported(conv, NO_PADDING, 1) is not None


def zeros_of(module: nn.Module) -> Padding | None:
    """The zeros that ``module`` puts around an image, where it does nothing else."""
    if not (is_exactly(module, nn.ZeroPad2d) or (is_exactly(module, nn.ConstantPad2d) and module.value == 0)):
        return None
    padding = module.padding
    # A negative number takes something away.
    return tuple(padding) if _are_integers(padding, 4) and min(padding) >= 0 else None


def padding_of(conv: nn.Conv2d) -> Zeros | None:
    """The zeros that a convolution of dilation 1 puts around an image; None where the kernels do not take them."""
    pads = _LIBRARY_CONVOLUTIONS.get(library_name(type(conv)))
    if pads == SAME:
        return NO_PADDING if set(conv.kernel_size) == {1} and set(conv.stride) == {1} else SAME
    if conv.padding == "valid":
        own = NO_PADDING
    elif conv.padding == "same":  # the larger half of what is odd comes last
        rows, columns = (size - 1 for size in conv.kernel_size)
        own = columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
    elif _are_integers(conv.padding, 2):
        rows, columns = conv.padding
        own = columns, columns, rows, rows
    else:
        return None
    if pads is None or is_exactly(conv.static_padding, nn.Identity):
        return own
    front = zeros_of(conv.static_padding)
    return None if front is None else _sum(front, own)


def _supported(conv: nn.Conv2d, front: Padding, size: int) -> Convolution | None:
    """The convolution, with so many zeros put in front of its own and that many modules."""
    if not all(_are_integers(pair, 2) for pair in (conv.kernel_size, conv.stride, conv.dilation)):
        return None  # F.conv2d takes more than that, and says what is wrong
    (kernel, other), (stride, along) = conv.kernel_size, conv.stride
    if (kernel, stride) != (other, along) or tuple(conv.dilation) != (1, 1) or conv.padding_mode != "zeros":
        return None
    padding = padding_of(conv)
    if padding == SAME and front == NO_PADDING:
        is_padded = True
    elif padding is None or padding == SAME:
        return None
    else:
        padding = _sum(front, padding)
        is_padded = all(side in PADDINGS for side in padding)
    if conv.groups == 1 and kernel == 1:
        return Convolution("pointwise", conv, padding, size) if (stride, padding) == (1, NO_PADDING) else None
    if conv.groups == conv.in_channels == conv.out_channels:
        kind = "depthwise"
    elif conv.groups == 1 and conv.in_channels <= MOST_DENSE_CHANNELS:
        kind = "dense"
    else:
        return None
    known = kernel in KERNEL_SIZES[kind] and stride in STRIDES and is_padded
    return Convolution(kind, conv, padding, size) if known else None


def _sum(front: Padding, own: Padding) -> Padding:
    return tuple(one + other for one, other in zip(front, own, strict=True))


def _are_integers(setting: object, count: int) -> bool:
    return type(setting) in (tuple, list) and [type(number) for number in setting] == [int] * count
