"""The random problems of the fuzz: each a function of (seed, kind, index).

Kinds: ``ops`` (``mx.functional`` and the kernel ops through ``mobilenet_ext.layers``), ``modules`` (``mx.nn``),
``chains`` (``FusedSequential`` of anything), ``fused`` (training steps of ``MobileNetV1``) and ``frozen``
(``mx.freeze``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fuzz_blocks import draw_blocks
from fuzz_draw import (
    CHANNELS,
    Draw,
    describe,
    draw_chain,
    draw_dtype,
    draw_frozen_parameters,
    draw_input,
    draw_modes,
    draw_network,
    draw_pictures,
    draw_precision,
    draw_unit,
    draw_upstream,
    poison,
    set_bn,
    set_conv,
    smallest_image,
)
from fuzz_frozen import draw_frozen
from fuzz_judge import Problem
from fuzz_yardstick import Normalise, Statistics
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext import layers
from mobilenet_ext.contract import Act
from mobilenet_ext.convolutions import padding_of


def problem(seed: int, kind: str, index: int) -> Problem:
    draw = Draw(seed, kind, index)
    torch.manual_seed(draw.getrandbits(60))
    made = KINDS[kind](draw)
    made.threads = (draw.choice([1, 2]), draw.choice([1, 2]))
    return made


def draw_ops(draw: Draw) -> Problem:
    name = draw.pick(
        "op", ["depthwise_conv2d", "pointwise_conv2d", "depthwise_bn_relu", "pointwise_bn_relu"] + list(LAYERS)
    )
    return draw_layer(draw, name) if name in LAYERS else draw_function(draw, name)


def draw_function(draw: Draw, name: str) -> Problem:
    kind, bn_relu = name.split("_")[0], name.endswith("bn_relu")
    dtype, c_in = draw_dtype(draw), draw.choice(CHANNELS)
    c_out = c_in if kind == "depthwise" else draw.choice(CHANNELS)
    conv, bn, _ = draw_unit(draw, kind, c_in, c_out, 1.0)
    bn.momentum = draw.choice([0.1, 1.0, 0.3])
    relu = bn_relu and draw.chance(0.8)
    x, size = draw_input(draw, c_in, dtype, smallest_image(conv))
    set_bn(draw, bn, size)
    model = nn.Sequential(conv, *([bn] if bn_relu else []), *([nn.ReLU()] if relu else []))
    model.train(not bn.track_running_stats or draw.pick("training", [True, False]))
    model, x, autocast = draw_precision(draw, model, x)
    finite = poison(draw, model, x)
    draw.settings["model"] = describe(model)

    def ours(model: nn.Module, x: Tensor) -> Tensor:
        conv = model[0]
        geometry = {} if kind == "pointwise" else {"stride": conv.stride[0], "padding": conv.padding}
        if not bn_relu:
            return getattr(mx.functional, name)(x, conv.weight, conv.bias, **geometry)
        bn = model[1]
        return getattr(mx.functional, name)(
            x, conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias,
            **geometry, training=bn.training, momentum=bn.momentum, eps=bn.eps, relu=relu,
        )  # fmt: skip

    return with_gradients(draw, Problem(draw.settings, model, x, ours, counts_batches=False), finite, autocast)


LAYERS = {
    "layers.depthwise": layers.depthwise,
    "layers.pointwise": layers.pointwise,
    "layers.norm_act": layers.norm_act,
}


def draw_layer(draw: Draw, name: str) -> Problem:
    """A layer op: normalised on load or not, its statistics differentiable outputs."""
    dtype, c_in = draw_dtype(draw), draw.choice(CHANNELS)
    kind = name.partition(".")[2]
    modules: list[nn.Module] = []
    if kind != "norm_act":
        c_out = c_in if kind == "depthwise" else draw.choice(CHANNELS)
        conv = draw_unit(draw, kind, c_in, c_out, 1.0)[0]
        conv.bias = None
        modules = [conv, Statistics()]
    x, size = draw_input(draw, c_in, dtype, 1 if kind == "norm_act" else smallest_image(conv))
    relu = kind != "norm_act" or draw.chance(0.7)
    normalised = kind == "norm_act" or draw.chance(0.7)
    if normalised:
        mean = torch.randn(c_in) * 0.3 * size + (x.float().mean((0, 2, 3)) if x.numel() else 0)
        normalise = Normalise(mean, (torch.rand(c_in) + 0.5) / size, torch.randn(c_in) * 0.3)
        modules = [normalise, *([nn.ReLU()] if relu else []), *modules]
    model = nn.Sequential(*modules).to(dtype)
    if normalised and dtype.itemsize == 2:
        normalise.float()
    draw.settings["model"] = describe(model)

    def ours(model: nn.Module, x: Tensor) -> Any:
        vectors = (model[0].mean, model[0].scale, model[0].shift) if normalised else (None, None, None)
        if kind == "norm_act":
            return LAYERS[name](x, *vectors, Act(relu))
        conv = model[-2]
        geometry = (conv.stride[0], padding_of(conv)) if kind == "depthwise" else ()
        return LAYERS[name](x, *vectors, conv.weight, *geometry)

    made = with_gradients(draw, Problem(draw.settings, model, x, ours), finite=True, autocast=None)
    made.strides = False  # those of a layer op are channels_last
    return made


def with_gradients(draw: Draw, made: Problem, finite: bool, autocast: torch.dtype | None) -> Problem:
    """Who needs gradients, and what comes from above."""
    draw_frozen_parameters(draw, made.model)
    made.x.requires_grad_(draw.chance(0.6))
    made.gradients = made.x.requires_grad or any(p.requires_grad for p in made.model.parameters())
    if made.gradients and draw.maybe("no_grad", 0.1):
        made.gradients, made.mode = False, draw.choice([torch.no_grad, torch.inference_mode])
    made.finite, made.autocast = finite, autocast
    if made.gradients:
        made.upstream = draw_upstream(draw, draw.settings.get("not finite") != "upstream")
    return made


def draw_modules(draw: Draw) -> Problem:
    dtype, c_in, c_out, stride = draw_dtype(draw), draw.choice(CHANNELS), draw.choice(CHANNELS), draw.choice([1, 2])
    bias = draw.chance(0.5)
    kind = draw.pick("module", ["Stem", "Depthwise", "Pointwise", "Separable", "Separable"])
    if kind == "Stem":
        c_in = draw.choice([1, 2, 3, 3, 4, 8, 17])
        model = mx.nn.StemConvBNReLU(c_in, c_out, stride=stride, bias=bias)
    elif kind == "Depthwise":
        model = mx.nn.DepthwiseConvBNReLU(c_in, stride=stride, bias=bias)
    elif kind == "Pointwise":
        model = mx.nn.PointwiseConvBNReLU(c_in, c_out, bias=bias)
    else:
        model = mx.nn.DepthwiseSeparableConv(c_in, c_out, stride=stride, bias=bias)
    x, size = draw_input(draw, c_in, dtype)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            set_conv(draw, module)
        elif isinstance(module, nn.BatchNorm2d):
            set_bn(draw, module, size if module.num_features == c_in else 1.0)
    return finish(draw, model, x)


def draw_chains(draw: Draw) -> Problem:
    dtype = draw_dtype(draw)
    model, x = draw_chain(draw, dtype, plain=0.12)
    return finish(draw, model, x)


def finish(draw: Draw, model: nn.Module, x: Tensor) -> Problem:
    draw_modes(draw, model)
    model, x, autocast = draw_precision(draw, model, x)
    if draw.chance(0.2):
        model = model.to(memory_format=torch.channels_last)
    finite = poison(draw, model, x)
    draw.settings["model"] = describe(model)
    made = Problem(draw.settings, model, x, lambda model, x: model(x))
    made = with_gradients(draw, made, finite, autocast)
    return made


def draw_fused(draw: Draw) -> Problem:
    dtype = draw_dtype(draw)
    if draw.pick("of", ["network", "blocks"]) == "blocks":
        model, x = draw_blocks(draw, dtype)
        made = finish(draw, model, x)
        made.ours = lambda model, x: mx.fuse(model)(x)
        return made
    model, x = draw_network(draw), draw_pictures(draw, dtype)
    made = finish(draw, model, x)
    del draw.settings["model"]
    if dtype == torch.float16 and made.gradients:
        # They grow on their way through the network, and would overflow in other places than PyTorch's.
        upstream = made.upstream
        made.upstream = lambda i, out: upstream(i, out) / 256
    return made


KINDS: dict[str, Callable[[Draw], Problem]] = {
    "ops": draw_ops,
    "modules": draw_modules,
    "chains": draw_chains,
    "fused": draw_fused,
    "frozen": draw_frozen,
}
