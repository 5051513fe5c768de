"""Zeros around an image that no setting of a Conv2d says: those of a layer in front, and of libraries' convolutions."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_networks import assert_close, assert_same_step
from plain import randomise_
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mobilenet_ext as mx
from mobilenet_ext import fusing, plans
from mobilenet_ext.contract import Padding
from mobilenet_ext.convolutions import leading_convolution


class Ops(TorchDispatchMode):
    """Counts PyTorch's convolutions and paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in ("convolution", "constant_pad_nd"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Padded(nn.Module):
    """A unit, something that pads, a unit with a convolution of ``kernel``, and a unit."""

    def __init__(self, pad: Callable[[Tensor], Tensor] | nn.Module, kernel: int = 3, groups: int = 8, **settings: Any):
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.pad = pad
        self.conv = nn.Conv2d(8, 8, kernel, groups=groups, bias=False, **settings)
        self.bn, self.act = nn.BatchNorm2d(8), nn.ReLU()
        self.after = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        randomise_(self.double())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.act(self.bn(self.conv(self.pad(self.before(x))))))


def assert_same(network: nn.Module, sizes: list[tuple[int, int]]) -> None:
    """Fused and frozen, in training and in eval mode."""
    fused, frozen = mx.fuse(copy.deepcopy(network)), mx.freeze(network)
    for size in sizes:
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        network.train(), fused.train()
        assert_same_step(fused, network, x)
        frozen_now = mx.freeze(network)
        network.eval(), fused.eval()
        with torch.no_grad():
            assert_close(fused(x), network(x))
            assert_close(frozen_now(x), network(x))
    frozen.load_state_dict(network.state_dict())
    for size in sizes[::-1]:
        x = torch.randn(1, 3, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            expected = network(x)
            assert_close(frozen(x), expected)
            assert frozen(x).stride() == fused(x).stride() == expected.stride()


def operations(network: nn.Module) -> Counter[str]:
    """PyTorch's, in a forward of the fused network."""
    with Ops() as ops:
        mx.fuse(copy.deepcopy(network)).train()(torch.randn(2, 3, 35, 46, dtype=torch.float64))
    return ops.counts


def assert_all_in(chains: int, network: nn.Module) -> None:
    """Fused and frozen, all convolutions and paddings run in so many chains."""
    for runs in (mx.fuse(copy.deepcopy(network)).train(), mx.freeze(network)):
        assert {row.chain for row in mx.fusion_report(runs)} == set(range(chains))
    assert operations(network) == Counter()


def by_keywords(x: Tensor) -> Tensor:
    return F.pad(input=x, pad=[0, 1, 0, 1], mode="constant", value=0.0)


PADS = {
    "ZeroPad2d": nn.ZeroPad2d((0, 1, 0, 1)),
    "of one number": nn.ZeroPad2d(1),
    "ConstantPad2d": nn.ConstantPad2d((2, 0, 1, 2), 0),
    "in a Sequential": nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1))),
    "nothing": nn.ZeroPad2d(0),
    "F.pad": lambda x: F.pad(x, (0, 1, 0, 1)),
    "F.pad of a list": lambda x: F.pad(x, [2, 1, 0, 1], "constant", 0),
    "F.pad: no value": lambda x: F.pad(x, (1, 1, 1, 1), value=None),
}


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2}, {"kernel": 5}, {"kernel": 5, "stride": 2}, {"groups": 1}], ids=str
)
@pytest.mark.parametrize("pad", PADS)
def test_zeros_in_front_are_the_kernels(pad: str, settings: dict[str, int]) -> None:
    network = Padded(copy.deepcopy(PADS[pad]), **settings)
    assert_all_in(2 if settings == {"groups": 1} else 1, network)  # a dense 3x3 begins a chain
    assert_same(network, [(9, 8)])


def test_zeros_in_front_add_to_the_convolutions_own() -> None:
    network = Padded(nn.ZeroPad2d((0, 1, 1, 0)), padding=1)
    assert_all_in(1, network)
    assert_same(network, [(9, 8)])


def test_zeros_in_front_in_a_sequence_of_ours() -> None:
    network = Padded(nn.ZeroPad2d((0, 1, 0, 1)), stride=2)
    layers = [*network.before, network.pad, network.conv, network.bn, network.act, *network.after]
    ours, plain = mx.nn.FusedSequential(*layers), nn.Sequential(*copy.deepcopy(layers))
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    assert_same_step(ours.train(), plain.train(), x)
    assert_all_in(1, ours)


def twice(x: Tensor) -> Tensor:
    y = F.pad(x, (0, 1, 0, 1))
    return y + y.mean()


NOT_OURS = {
    "takes something away": (lambda x: F.pad(x, (-1, 1, 0, 1)), {"padding": 1}),
    "a layer that takes something away": (nn.ZeroPad2d((-1, 1, 0, 1)), {"padding": 1}),
    "ones": (nn.ConstantPad2d(1, 1.0), {}),
    "ones, as a function": (lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), {}),
    "reflected": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), {}),
    "a reflecting layer": (nn.ReflectionPad2d(1), {}),
    "too many": (nn.ZeroPad2d(3), {}),
    "too many with its own": (nn.ZeroPad2d(1), {"padding": 2}),
    "of columns alone": (lambda x: F.pad(x, (1, 1)), {}),
    "of channels": (lambda x: F.pad(x[:, 1:], (0, 0, 0, 0, 0, 1)), {}),
    "read twice": (twice, {}),
    "before a pointwise convolution": (nn.ZeroPad2d(1), {"kernel": 1, "groups": 1}),
    "with a dilation": (nn.ZeroPad2d(1), {"dilation": 2}),
    "with reflecting padding of its own": (nn.ZeroPad2d(1), {"padding": 1, "padding_mode": "reflect"}),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_else_stands_in_front_is_pytorchs(name: str) -> None:
    pad, settings = NOT_OURS[name]
    network = Padded(copy.deepcopy(pad), **settings)
    assert_same(network, [(9, 8)])
    counts = operations(network)
    assert name == "reflected" or "reflecting" in name or name == "with a dilation" or counts["constant_pad_nd"]


@pytest.mark.parametrize("change", ["hook", "forward", "value", "padding", "another module"])
def test_what_changes_in_a_layer_that_pads_is_noticed(change: str) -> None:
    network = Padded(nn.ConstantPad2d((0, 1, 0, 1), 0)).eval()
    fused = mx.fuse(copy.deepcopy(network))
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    fused(x)
    for each in (network, fused):
        if change == "hook":
            each.pad.register_forward_hook(lambda module, args, out: out + 1)
        elif change == "forward":
            each.pad.forward = lambda x: F.pad(x, (1, 1, 1, 1))
        elif change == "value":
            each.pad.value = 2
        elif change == "padding":
            each.pad.padding = (1, 1, 2, 2)
        else:
            each.pad = nn.ReplicationPad2d(1)
    with torch.no_grad():
        assert_close(fused(x), network(x))


# What libraries compute, from the description of TensorFlow's "same", for those that are not installed here.
def tensorflow_padding(x: Tensor, kernel: int, stride: int) -> list[int]:
    padding = []
    for size in (x.shape[3], x.shape[2]):
        out = -(-size // stride)
        zeros = max((out - 1) * stride + kernel - size, 0)
        padding += [zeros // 2, zeros - zeros // 2]
    return padding


class SamePadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, tensorflow_padding(x, self.kernel_size[0], self.stride[0]))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class InFront(nn.Conv2d):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        behind = self.kernel_size[0] // 2
        before = behind if self.stride[0] == 1 else behind - 1
        self.static_padding = nn.ZeroPad2d((before, behind, before, behind)) if behind else nn.Identity()
        self.stride = list(self.stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def of_library(kind: type[nn.Module], module: str, name: str) -> type[nn.Module]:
    """The class, as a library has it."""
    return type(name, (kind,), {"__module__": module, "__qualname__": name, "forward": kind.forward})


def same_of_timm() -> type[nn.Module]:
    return pytest.importorskip("timm.layers", reason="timm is not installed").Conv2dSame


LIBRARIES: dict[str, Callable[[], type[nn.Module]]] = {
    "timm": same_of_timm,
    "efficientnet_pytorch": lambda: of_library(SamePadding, "efficientnet_pytorch.utils", "Conv2dDynamicSamePadding"),
    "segmentation_models_pytorch": lambda: of_library(
        SamePadding, "segmentation_models_pytorch.encoders._efficientnet", "Conv2dDynamicSamePadding"
    ),
    "torch_vggish_yamnet": lambda: of_library(SamePadding, "torch_vggish_yamnet.yamnet.model", "Conv2d_tf"),
    "efficientnet_pytorch, padding in front": lambda: of_library(
        InFront, "efficientnet_pytorch.utils", "Conv2dStaticSamePadding"
    ),
    "segmentation_models_pytorch, padding in front": lambda: of_library(
        InFront, "segmentation_models_pytorch.encoders._efficientnet", "Conv2dStaticSamePadding"
    ),
}


class OfLibrary(nn.Module):
    """A small network of such convolutions: 3x3 from three channels, depthwise 3x3 and 5x5, pointwise."""

    def __init__(self, conv: type[nn.Module]) -> None:
        super().__init__()
        self.units = nn.Sequential()
        for c, k, kernel, stride in (
            (3, 8, 3, 2),
            (8, 8, 3, 1),
            (8, 8, 5, 2),
            (8, 8, 1, 1),
            (8, 8, 3, 2),
            (8, 8, 5, 1),
        ):
            groups = c if c == k and kernel > 1 else 1
            layers = conv(c, k, kernel, stride=stride, groups=groups, bias=False), nn.BatchNorm2d(k), nn.SiLU()
            self.units.extend(layers)
        randomise_(self.double())

    def forward(self, x: Tensor) -> Tensor:
        return self.units(x)


@pytest.mark.parametrize("library", LIBRARIES)
def test_convolutions_of_libraries(library: str) -> None:
    network = OfLibrary(LIBRARIES[library]())
    assert_all_in(1, network)
    assert_same(network, [(9, 9), (10, 11)] if "front" in library else [(1, 9), (2, 5), (3, 3), (7, 8)])


def test_a_library_convolution_with_more_in_front_is_its_own() -> None:
    network = Padded(nn.ZeroPad2d((0, 1, 0, 1)))
    network.conv = of_library(SamePadding, "efficientnet_pytorch.utils", "Conv2dDynamicSamePadding")(
        8, 8, 3, 2, groups=8
    )
    assert_same(network.double(), [(9, 8), (8, 9)])
    assert operations(network) == Counter(constant_pad_nd=1)
    assert [row.chain for row in mx.fusion_report(mx.fuse(network))] == [0, 1, 1]


def test_a_class_that_only_has_such_a_name_and_inherits_its_forward_is_its_own() -> None:
    class Conv2dDynamicSamePadding(SamePadding):
        pass

    Conv2dDynamicSamePadding.__module__ = "efficientnet_pytorch.utils"
    Conv2dDynamicSamePadding.__qualname__ = "Conv2dDynamicSamePadding"
    network = Padded(nn.Identity())
    network.conv = Conv2dDynamicSamePadding(8, 8, 3, groups=8).double()
    assert mx.fusion_report(mx.fuse(network)).fused == 2


def test_images_of_any_size_leave_few_plans() -> None:
    """Of each arrangement of zeros a frozen network has packed weights."""
    same = of_library(SamePadding, "efficientnet_pytorch.utils", "Conv2dDynamicSamePadding")
    network = OfLibrary(same).eval()
    frozen = mx.freeze(network)
    with torch.no_grad():
        for h in range(16, 32):
            x = torch.randn(1, 3, h, 48 - h, dtype=torch.float64)
            assert_close(frozen(x), network(x))
        chains = [c for module in (frozen, frozen.units) for c in fusing.plans_of(module).of(module).chains]
    kept = [chain.prepared.plans for chain in chains if chain.prepared is not None]
    assert kept and all(len(made) <= plans._KEPT for made in kept)


def test_padding_of_the_contract() -> None:
    """Left, right, top, bottom, as F.pad has them."""
    same = of_library(SamePadding, "efficientnet_pytorch.utils", "Conv2dDynamicSamePadding")
    expected: dict[tuple[int, int, int, int], Padding] = {
        (3, 2, 8, 7): (1, 1, 0, 1), (3, 2, 7, 8): (0, 1, 1, 1), (5, 2, 8, 8): (1, 2, 1, 2), (5, 2, 7, 7): (2, 2, 2, 2),
        (3, 1, 7, 8): (1, 1, 1, 1), (5, 1, 1, 1): (2, 2, 2, 2), (5, 2, 1, 2): (1, 2, 2, 2),
    }  # fmt: skip
    for (kernel, stride, h, w), padding in expected.items():
        found = leading_convolution([same(8, 8, kernel, stride, groups=8)])
        assert found is not None and found.padding_of(h, w) == padding
