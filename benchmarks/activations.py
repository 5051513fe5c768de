"""What each activation costs beside ReLU, a 5x5 kernel beside a 3x3 one, and an activation that is stored once beside
one that is computed on load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.comparison import Effort
from benchmarks.limits import Limits
from benchmarks.table import milliseconds, paired_ratio
from benchmarks.timing import KERNEL_CLEARS, interleave, summary
from mobilenet_ext import ops
from mobilenet_ext.contract import Act, Padding

SLOPE = 0.1  # of leaky ReLU
ACTS = (Act.LINEAR, Act.RELU6, Act.LEAKY_RELU, Act.HARDSWISH, Act.SILU)  # beside ReLU
STORED = "stored"  # ReLU and SiLU, by a pass of its own in front of a convolution of a plain input


class Layer(NamedTuple):
    """A convolution in the middle of a network: MobileNetV3's and EfficientNet's have such."""

    kind: str
    kernel: int
    in_channels: int
    out_channels: int
    size: int  # of the image, in and out

    def __str__(self) -> str:
        return f"{self.kind} {self.kernel}x{self.kernel} {self.in_channels}-{self.out_channels} {self.size}x{self.size}"

    def bytes_moved(self, pass_: str, batch: int, itemsize: int) -> int:
        """Activations read and written once: u and y, backward u, dz, y and dz_u."""
        pixels = batch * self.size**2
        inputs, outputs = pixels * self.in_channels, pixels * self.out_channels
        return (2 * (inputs + outputs) if pass_ == "backward" else inputs + outputs) * itemsize

    def operations(self, pass_: str, batch: int) -> int:
        each = self.kernel**2 * (1 if self.kind == "depthwise" else self.in_channels)
        return (4 if pass_ == "backward" else 2) * batch * self.size**2 * self.out_channels * each


LAYERS = (
    Layer("depthwise", 3, 96, 96, 56),
    Layer("depthwise", 5, 96, 96, 56),
    Layer("depthwise", 3, 480, 480, 14),
    Layer("depthwise", 5, 480, 480, 14),
    Layer("pointwise", 1, 96, 24, 56),
    Layer("pointwise", 1, 480, 112, 14),
)
PASSES = ("forward", "backward", "inference")


def calls_of(layer: Layer, pass_: str, batch: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Any]]:
    """By name: an activation, or one that is stored."""
    source = {"generator": torch.Generator(device).manual_seed(0), "device": device}

    def image(channels: int) -> Tensor:
        return torch.randn(batch, layer.size, layer.size, channels, dtype=dtype, **source).permute(0, 3, 1, 2)

    def vectors(rows: int, channels: int) -> Tensor:
        return torch.rand(rows, channels, **source) + 0.5

    depthwise = layer.kind == "depthwise"
    shape = (layer.out_channels, 1 if depthwise else layer.in_channels, layer.kernel, layer.kernel)
    padding: Padding = (layer.kernel // 2,) * 4
    convolution = ((torch.randn(shape, **source) / shape[1] ** 0.5).to(dtype), 1, padding)
    u, bn_u, bn_y = image(layer.in_channels), vectors(5, layer.in_channels), vectors(5, layer.out_channels)
    if pass_ == "inference":
        op = ops.INFERENCE[layer.kind]
        return {act.name: partial(op, u, bn_y, act, *convolution, None, None, SLOPE) for act in (Act.RELU, *ACTS)}
    if pass_ == "backward":
        output = (image(layer.out_channels), image(layer.out_channels), vectors(6, layer.out_channels))
        op = ops.BACKWARD[layer.kind]
        return {
            act.name: partial(op, *output, u, bn_u, act, True, *convolution, True, True, SLOPE)
            for act in (Act.RELU, *ACTS)
        }
    forward = ops.FORWARD[layer.kind]
    rest = (*convolution, None, None, 1e-5, True, None, SLOPE)
    calls = {act.name: partial(forward, u, bn_u, act, *rest) for act in (Act.RELU, *ACTS)}
    for act in (Act.RELU, Act.SILU):
        calls[f"{act.name} {STORED}"] = lambda act=act: forward(
            ops.norm_act_forward(u, bn_u, act, False), None, Act.LINEAR, *rest
        )
    return calls


def measure(batch: int, dtype: str, device: str, limits: Limits, effort: Effort) -> Iterator[str]:
    """The lines of a table in Markdown."""
    names = [act.name for act in ACTS] + [f"{act.name} {STORED}" for act in (Act.RELU, Act.SILU)]
    titles = [name.lower().replace("_", " ") for name in names]
    yield f"| {dtype}, batch {batch} | relu, ms | of the limit | ns per output | {' | '.join(titles)} |"
    yield "|" + "---|" * (4 + len(names))
    kind = getattr(torch, dtype)
    for pass_ in PASSES:
        for layer in LAYERS:
            calls = calls_of(layer, pass_, batch, kind, device)
            samples = interleave(calls, device, effort.rounds, effort.burst_s, pause_s=0.1, clears=KERNEL_CLEARS)
            relu = samples[Act.RELU.name]
            seconds = summary(relu).median
            least = limits.seconds(layer.bytes_moved(pass_, batch, kind.itemsize), layer.operations(pass_, batch))
            outputs = batch * layer.size**2 * layer.out_channels
            cells = [milliseconds(seconds), f"{least / seconds:.0%}", f"{1e9 * seconds / outputs:.3g}"]
            cells += [f"{paired_ratio(samples[name], relu).median:.2f}" if name in samples else "" for name in names]
            yield f"| {pass_} {layer} | {' | '.join(cells)} |"
