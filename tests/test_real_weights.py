"""Published networks with their trained weights: plain, fused and frozen they agree.

Trained weights have what random ones have not: channels that died (running variances down to 5.6e-45, half of all
channels below eps in one of these), scales of 186, inputs of 0 to 255. ``MOBILENET_EXT_WEIGHTS`` names a folder with

* ``retinaface-mobilenet0.25.pth``: biubug6/Face-Detector-1MB-with-landmark, MIT;
* ``3ddfa-v2-mobilenetv1-0.5.pth``: cleardusk/3DDFA_V2, MIT.

The networks are written here from their descriptions.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from plain import FORWARD, GRADIENT, SIXTEEN_BITS, TRAINING_FORWARD, relative_error
from torch import Tensor, nn

import mobilenet_ext as mx

FOLDER = os.environ.get("MOBILENET_EXT_WEIGHTS")


def conv_bn(c: int, k: int, size: int = 3, stride: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    conv = nn.Conv2d(c, k, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(k), *([act] if act is not None else []))


# --- RetinaFace -------------------------------------------------------------------------------------------------------


def leaky() -> nn.Module:
    return nn.LeakyReLU(0.1, inplace=True)


def separable(c: int, k: int, stride: int) -> nn.Sequential:
    depthwise = nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False)
    pointwise = nn.Conv2d(c, k, 1, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(c), leaky(), pointwise, nn.BatchNorm2d(k), leaky())


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first = ((8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
        self.stage1 = nn.Sequential(conv_bn(3, 8, stride=2, act=leaky()), *(separable(*block) for block in first))
        self.stage2 = nn.Sequential(separable(64, 128, 2), *(separable(128, 128, 1) for _ in range(5)))
        self.stage3 = nn.Sequential(separable(128, 256, 2), separable(256, 256, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x1 = self.stage1(x)
        x2 = self.stage2(x1)
        return [x1, x2, self.stage3(x2)]


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output1, self.output2, self.output3 = (conv_bn(c, 64, 1, act=leaky()) for c in (64, 128, 256))
        self.merge1, self.merge2 = conv_bn(64, 64, act=leaky()), conv_bn(64, 64, act=leaky())

    def forward(self, taps: list[Tensor]) -> list[Tensor]:
        first, second, third = self.output1(taps[0]), self.output2(taps[1]), self.output3(taps[2])
        second = self.merge2(second + F.interpolate(third, size=second.shape[2:], mode="nearest"))
        first = self.merge1(first + F.interpolate(second, size=first.shape[2:], mode="nearest"))
        return [first, second, third]


class Context(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv3X3, self.conv5X5_1, self.conv5X5_2 = conv_bn(64, 32), conv_bn(64, 16, act=leaky()), conv_bn(16, 16)
        self.conv7X7_2, self.conv7x7_3 = conv_bn(16, 16, act=leaky()), conv_bn(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv5X5_1(x)
        return F.relu(torch.cat([self.conv3X3(x), self.conv5X5_2(inner), self.conv7x7_3(self.conv7X7_2(inner))], 1))


class Head(nn.Module):
    def __init__(self, values: int) -> None:
        super().__init__()
        self.values, self.conv1x1 = values, nn.Conv2d(64, 2 * values, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, self.values))


class RetinaFace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fpn = Body(), Pyramid()
        self.ssh1, self.ssh2, self.ssh3 = (Context() for _ in range(3))
        for name, values in (("ClassHead", 2), ("BboxHead", 4), ("LandmarkHead", 10)):
            self.add_module(name, nn.ModuleList(Head(values) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.fpn(self.body(x))
        features = [self.ssh1(first), self.ssh2(second), self.ssh3(third)]
        heads = (self.ClassHead, self.BboxHead, self.LandmarkHead)
        found = [torch.cat([head(x) for head, x in zip(each, features, strict=True)], 1) for each in heads]
        return torch.cat(found, 2)


# --- 3DDFA ------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Its activation is one module, called twice."""

    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        self.conv_dw, self.bn_dw = nn.Conv2d(c, c, 3, stride, 1, groups=c, bias=False), nn.BatchNorm2d(c)
        self.conv_sep, self.bn_sep = nn.Conv2d(c, k, 1, bias=False), nn.BatchNorm2d(k)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn_sep(self.conv_sep(self.relu(self.bn_dw(self.conv_dw(x))))))


BLOCKS = {
    "dw2_1": (16, 32, 1), "dw2_2": (32, 64, 2), "dw3_1": (64, 64, 1), "dw3_2": (64, 128, 2), "dw4_1": (128, 128, 1),
    "dw4_2": (128, 256, 2), "dw5_1": (256, 256, 1), "dw5_2": (256, 256, 1), "dw5_3": (256, 256, 1),
    "dw5_4": (256, 256, 1), "dw5_5": (256, 256, 1), "dw5_6": (256, 512, 2), "dw6": (512, 512, 1),
}  # fmt: skip


class FaceModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True)
        for name, block in BLOCKS.items():
            self.add_module(name, Block(*block))
        self.fc_param, self.fc_lm = nn.Linear(512, 62), nn.Linear(512, 136)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for name in BLOCKS:
            x = getattr(self, name)(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return torch.cat([self.fc_param(x), self.fc_lm(x)], 1)


# ----------------------------------------------------------------------------------------------------------------------


class Published(NamedTuple):
    file: str
    make: Callable[[], nn.Module]
    size: tuple[int, int]
    image: Callable[[Tensor], Tensor]  # of values from 0 to 255
    fused: int  # convolutions, in training


PUBLISHED = [
    Published(
        "retinaface-mobilenet0.25", RetinaFace, (96, 128), lambda x: x - 110, 39
    ),  # dense ones of 64 channels are not
    Published("3ddfa-v2-mobilenetv1-0.5", FaceModel, (120, 120), lambda x: (x - 127.5) / 128, 27),
]


@pytest.fixture(params=PUBLISHED, ids=lambda published: published.file)
def published(request: pytest.FixtureRequest) -> Published:
    if FOLDER is None:
        pytest.skip("MOBILENET_EXT_WEIGHTS names no folder with the weights")
    return request.param


@pytest.fixture
def network(published: Published) -> nn.Module:
    """In float64 and eval mode."""
    state = torch.load(Path(FOLDER) / f"{published.file}.pth", map_location="cpu", weights_only=True)
    state = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
    network = published.make().double().eval()
    network.load_state_dict(state)
    return network


def images(published: Published) -> Tensor:
    smooth = F.interpolate(255 * torch.rand(2, 3, 12, 12, dtype=torch.float64), published.size, mode="bilinear")
    return published.image(smooth)


@pytest.fixture
def x(published: Published) -> Tensor:
    return images(published)


def test_inference(network: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = network(x)
        assert expected.isfinite().all()
        for make in (mx.fuse, mx.freeze):
            assert relative_error(make(copy.deepcopy(network))(x), expected) <= 1e-9
            assert relative_error(make(copy.deepcopy(network).float())(x.float()), expected) <= FORWARD


def test_inference_in_bfloat16(network: nn.Module, x: Tensor) -> None:
    x = x.bfloat16()
    with torch.no_grad():
        plain = network.bfloat16()
        expected = copy.deepcopy(plain).double()(x.double())
        own = relative_error(plain(x), expected)
        for make in (mx.fuse, mx.freeze):
            assert relative_error(make(copy.deepcopy(plain))(x), expected) <= SIXTEEN_BITS * own


def test_training(published: Published, network: nn.Module, x: Tensor) -> None:
    plain, fused = network.train(), mx.fuse(copy.deepcopy(network))
    assert mx.fusion_report(fused).fused == published.fused
    outputs = []
    for each in (plain, fused):
        outputs.append(each(x))
        outputs[-1].square().mean().backward()
    assert relative_error(outputs[1], outputs[0]) <= 1e-9
    largest = max(p.grad.norm() for p in plain.parameters() if p.grad is not None).item()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9 * largest, msg=name)
    for (name, ours), theirs in zip(fused.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs[1], msg=name)


def test_training_in_float32(published: Published, network: nn.Module) -> None:
    """The median of some images: where a value lies within rounding of an activation's corner, its gradient goes either
    way, also in PyTorch's own float32."""
    networks = [network.train(), mx.fuse(copy.deepcopy(network).float()), copy.deepcopy(network).float()]
    errors = []
    for _ in range(5):
        outputs, gradients, x = [], [], images(published)
        for each in networks:
            each.zero_grad()
            outputs.append(each(x.to(next(each.parameters()).dtype)))
            outputs[-1].square().mean().backward()
            gradients.append(torch.cat([p.grad.double().flatten() for p in each.parameters()]))
        errors.append([relative_error(each, found[0]) for found in (outputs, gradients) for each in found[1:]])
    forward, own_forward, gradient, own_gradient = torch.tensor(errors).median(0).values.tolist()
    assert forward <= TRAINING_FORWARD, own_forward
    assert gradient <= GRADIENT, own_gradient
