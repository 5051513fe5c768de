"""A network as work: its model, images and labels, and of MobileNetV1 the layers with their bytes and operations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mobilenet_ext import MobileNetV1
from mobilenet_ext.models import libraries
from mobilenet_ext.models.mobilenet_v1 import BLOCKS
from mobilenet_ext.train.recipe import MOBILENET_V1

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = 1000
ONE_PASS = 128 * 128  # a pointwise weight up to this size: both gradients come from one pass over the data


class Workload(NamedTuple):
    """What every runner of a comparison is given."""

    task: str  # inference or training
    width: float
    resolution: int
    batch: int
    dtype: str
    device: str
    network: str = MOBILENET_V1  # or torchvision:NAME, timm:NAME

    def __str__(self) -> str:
        return f"{self.task}, {self.title}, batch {self.batch}, {self.dtype}, {self.device}"

    @property
    def title(self) -> str:
        """The network and the size of its images."""
        name = f"MobileNetV1 {self.width:g}" if self.is_mobilenet_v1 else self.network
        return f"{name}, {self.resolution}x{self.resolution}"

    @property
    def is_mobilenet_v1(self) -> bool:
        return self.network == MOBILENET_V1

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def model(self) -> nn.Module:
        """In float32 and channels_last, the same for the same work; its running statistics are those of images.

        A network of another library has nothing that draws random numbers, so that all peers compute the same: dropout
        and stochastic depth have a probability of 0.
        """
        generator_state = torch.get_rng_state()
        torch.manual_seed(0)
        if self.is_mobilenet_v1:
            model = MobileNetV1(CLASSES, self.width, conv_bias=False)
        else:
            model = libraries.create(self.network, CLASSES)
            for module in model.modules():
                if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
                    module.p = 0.0
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None  # the average: after one batch, its statistics
        with torch.no_grad():
            _plain(model)(torch.randn(8, 3, 64, 64))  # no kernel of ours: a GPU's backend may be chosen
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        torch.set_rng_state(generator_state)
        return model.to(device=self.device, memory_format=torch.channels_last).train(self.task == "training")

    def plain(self) -> nn.Module:
        """As :meth:`model`, without a fused kernel: what PyTorch alone does."""
        return _plain(self.model())

    def images(self) -> Tensor:
        """Random, float32 ``[batch, 3, resolution, resolution]``, channels_last."""
        generator = torch.Generator(self.device).manual_seed(1)
        shape = (self.batch, 3, self.resolution, self.resolution)
        images = torch.randn(shape, generator=generator, device=self.device)
        return images.contiguous(memory_format=torch.channels_last)

    def labels(self) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(2)
        return torch.randint(CLASSES, (self.batch,), generator=generator, device=self.device)

    def bytes_moved(self) -> int | None:
        """Of activations, by the design of the fused kernels: what bounds a network that is limited by memory. None
        where the layers are not known."""
        if not self.is_mobilenet_v1:
            return None
        passes = ("inference",) if self.task == "inference" else ("forward", "backward")
        itemsize = self.torch_dtype.itemsize
        layers = [(layer, p) for p in passes for layer in layers_of(self.width, self.resolution, p)]
        return sum(layer.bytes_moved(p, self.batch, itemsize) for layer, p in layers)

    def operations(self) -> int | None:
        """Multiplications and additions of the convolutions; a training step has three times those of inference, less
        the gradient of the images. None where the layers are not known."""
        if not self.is_mobilenet_v1:
            return None
        layers = layers_of(self.width, self.resolution, "forward")
        passes = ("forward",) if self.task == "inference" else ("forward", "backward")
        return sum(layer.operations(p, self.batch) for layer in layers for p in passes)


def _plain(model: nn.Module) -> nn.Module:
    return Plain(model) if isinstance(model, MobileNetV1) else model


class Plain(nn.Module):
    """The modules of a MobileNetV1 one by one."""

    def __init__(self, model: MobileNetV1) -> None:
        super().__init__()
        units = [nn.Sequential(*unit) for unit in model.feature[:-1]]
        self.feature = nn.Sequential(*units, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Sequential(*model.classifier)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.feature(x))


class Layer(NamedTuple):
    """A kernel op's place in the network. ``size``: height and width of its input; ``block``: a depthwise and a
    pointwise convolution in one kernel."""

    kind: str  # dense, depthwise, pointwise, block or pool
    in_channels: int
    out_channels: int
    stride: int
    size: int

    @property
    def name(self) -> str:
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{self.kind} {self.in_channels}-{self.out_channels}{stride} {self.size}x{self.size}"

    @property
    def out_size(self) -> int:
        return 1 if self.kind == "pool" else (self.size - 1) // self.stride + 1

    def elements(self, batch: int) -> tuple[int, int]:
        """Of the input and of the output."""
        inside, outside = self.in_channels * self.size**2, self.out_channels * self.out_size**2
        return batch * inside, batch * outside

    def bytes_moved(self, pass_: str, batch: int, itemsize: int) -> int:
        u, y = self.elements(batch)
        if pass_ != "backward":
            return (u + y) * itemsize
        if self.kind == "pool":
            return (y + 2 * u) * itemsize  # the gradient and u read, h written
        if self.kind == "dense":
            return (u + 2 * y) * itemsize  # x, h and y read
        apart = self.kind == "pointwise" and self.in_channels * self.out_channels > ONE_PASS
        reads = u + 2 * y  # u, h and y, again where the gradient of the weight has a pass of its own
        return ((2 if apart else 1) * reads + u) * itemsize

    def operations(self, pass_: str, batch: int) -> int:
        """Two for each multiplication with an addition; in backward, of both gradients (a dense one has only one)."""
        if self.kind == "pool":
            return 0
        pixels = batch * self.out_size**2
        depthwise, pointwise = 9 * self.in_channels, self.in_channels * self.out_channels
        taps = {
            "dense": 9 * pointwise,
            "depthwise": depthwise,
            "pointwise": pointwise,
            "block": depthwise + pointwise,
        }
        products = 2 if pass_ == "backward" and self.kind != "dense" else 1
        return 2 * products * pixels * taps[self.kind]


def layers_of(width: float, resolution: int, pass_: str) -> list[Layer]:
    """The layers of a pass (forward, backward or inference), in forward order."""
    channels, size = int(32 * width), (resolution - 1) // 2 + 1
    layers = [Layer("dense", 3, channels, 2, resolution)]
    for out_channels, stride in BLOCKS:
        out_channels = int(out_channels * width)
        if pass_ == "inference":
            layers.append(Layer("block", channels, out_channels, stride, size))
        else:
            layers.append(Layer("depthwise", channels, channels, stride, size))
        size = (size - 1) // stride + 1
        if pass_ != "inference":
            layers.append(Layer("pointwise", channels, out_channels, 1, size))
        channels = out_channels
    if pass_ != "inference":  # there the pooling is PyTorch's own
        layers.append(Layer("pool", channels, channels, 1, size))
    return layers
