"""MobileNetV1 (Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
arXiv:1704.04861, table 1), on the fused kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilenet_ext.fusion import Staged, is_observed
from mobilenet_ext.nn import DepthwiseConvBNReLU, FusedSequential, PointwiseConvBNReLU, StemConvBNReLU

# (output channels, stride) of the 13 depthwise-separable blocks.
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
STEM_CHANNELS = 32


class MobileNetV1(Staged):
    """MobileNetV1 for image classification; a drop-in for the network of plain modules.

    The module tree is that of the plain network, so its checkpoints load with ``strict=True``, and the same seed gives
    the same initial weights: ``feature`` is 27 units of ``(0) Conv2d, (1) BatchNorm2d, (2) ReLU`` and the global
    average pooling, ``classifier`` is ``Flatten, Linear``. The forward of ``feature`` runs every unit whose modules are
    untouched through the fused kernels, and any other (hooked, pruned, swapped) as the modules it is made of.

    Args:
        num_classes: classes, at least 1.
        width_multiplier: factor of every channel count, ``int(channels * width_multiplier)``, at least one channel.
        conv_bias: whether the convolutions have a bias. In front of batch statistics it changes the running means only.
        dropout: probability of zeroing a pooled feature in training, in [0, 1).

    Shapes:
        input ``[N, 3, H, W]`` (any memory format, any size; 224x224 in the paper), output ``[N, num_classes]``.

    Raises:
        ValueError: an argument outside its range. TypeError: an argument of another type.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_multiplier: float = 1.0,
        *,
        conv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if type(num_classes) is not int:
            raise TypeError(f"num_classes: got {num_classes!r}, an int is accepted")
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, at least 1 is accepted")
        for name, number in (("width_multiplier", width_multiplier), ("dropout", dropout)):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name}: got {number!r}, a float is accepted")
        if not isinstance(conv_bias, bool):
            raise TypeError(f"conv_bias: got {conv_bias!r}, a bool is accepted")
        if not 1 / STEM_CHANNELS <= width_multiplier < float("inf"):
            raise ValueError(
                f"width_multiplier: got {width_multiplier}, accepted are finite values of at least 1/{STEM_CHANNELS}, "
                "which leaves the first convolution one channel"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, accepted are values in [0, 1)")
        self.dropout = dropout

        channels = int(STEM_CHANNELS * width_multiplier)
        units: list[nn.Module] = [StemConvBNReLU(3, channels, stride=2, bias=conv_bias)]
        for out_channels, stride in BLOCKS:
            out_channels = int(out_channels * width_multiplier)
            units.append(DepthwiseConvBNReLU(channels, stride=stride, bias=conv_bias))
            units.append(PointwiseConvBNReLU(channels, out_channels, bias=conv_bias))
            channels = out_channels
        self.feature = FusedSequential(*units, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(channels, num_classes))

    def stages(self) -> Iterable[nn.Module]:
        return self.feature, self.classifier  # anybody's, where they were swapped

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # as in FusedSequential
            if self.plans is not None and not is_observed():
                return self.plans.run(self, x)
        x = self.feature(x)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return self.classifier(x)
