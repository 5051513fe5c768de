"""What the fuzz draws its problems from: inputs in any layout, units, chains of them, modes, dtypes, NaN and Inf."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext.contract import KERNEL_SIZES, PADDINGS

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAN, INF = float("nan"), float("inf")
CHANNELS = [1, 1, 2, 3, 3, 4, 5, 7, 8, 8, 9, 12, 15, 16, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 100, 130]
SIDES = [1, 1, 2, 3, 4, 5, 5, 6, 7, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 19, 20, 28, 33, 57]
ELEMENTS = 40_000  # at most, in an activation


class Draw(random.Random):
    """Random choices that are remembered by name, to describe a problem."""

    def __init__(self, seed: int, kind: str, index: int) -> None:
        super().__init__(f"{seed} {kind} {index}")
        self.settings: dict[str, Any] = {}

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, name: str, choices: list[Any]) -> Any:
        value = self.settings[name] = self.choice(choices)
        return value

    def maybe(self, name: str, probability: float) -> bool:
        """A switch, which the description mentions where it is on."""
        if on := self.chance(probability):
            self.settings[name] = True
        return on

    def power(self, low: float, high: float) -> float:
        return 10 ** self.uniform(low, high)


def draw_dtype(draw: Draw) -> torch.dtype:
    return DTYPES[draw.pick("dtype", ["float32"] * 4 + ["float64"] * 2 + ["bfloat16"] * 2 + ["float16"])]


def draw_values(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, float]:
    """Values of a random distribution, and about their size."""
    constant = ["constant"] if dtype != torch.float16 else []  # whose gradients overflow
    how = draw.pick("values", ["normal"] * 5 + ["large mean", "scaled", "scaled", *constant, "images"])
    x = torch.randn(shape, dtype=torch.float64)
    if how == "large mean":
        x = x + draw.power(0, 1.5 if dtype.itemsize == 2 else 4)
    elif how == "scaled":
        x = x * draw.power(*((-2, 1) if dtype == torch.float16 else (-10, 10)))
    elif how == "constant":
        x = x[:, :, :1, :1].expand(shape)
    elif how == "images":
        x = torch.randint(256, shape).double()
    x = x.to(dtype)
    return x, max(x.double().square().mean().sqrt().item(), 1e-6) if x.numel() else 1.0


def draw_layout(draw: Draw, x: Tensor) -> Tensor:
    """The same values, or some of them repeated, in one of the memory formats that people pass."""
    n, c, h, w = x.shape
    layout = draw.pick("layout", [*["contiguous", "channels_last"] * 3, *LAYOUTS])
    if layout == "channels_last":
        return torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last).copy_(x)
    return LAYOUTS[layout](x) if layout in LAYOUTS else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other pixel": lambda x: torch.stack([x, -x], 4)[..., 0],
    "every other channel": lambda x: torch.stack([x, -x], 2).flatten(1, 2)[:, ::2],
    "inner": lambda x: nn.functional.pad(x, (1, 2, 2, 1))[:, :, 2:-1, 1:-2],
    "inner of channels_last": lambda x: nn.functional.pad(x, (1, 2, 2, 1)).contiguous(
        memory_format=torch.channels_last
    )[:, :, 2:-1, 1:-2],
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) if x.numel() else x,
    "expanded batch": lambda x: x[:1].expand(x.shape) if len(x) else x,
    "expanded channels": lambda x: x[:, :1].expand(x.shape),
    "expanded pixels": lambda x: x[:, :, :1, :1].expand(x.shape),
}


def sprinkle(draw: Draw, x: Tensor) -> None:
    """Put NaN or Inf into a few elements, in place."""
    base = x if x._base is None else x._base
    for _ in range(draw.choice([1, 1, 2, 5])):
        if base.numel():
            index = tuple(draw.randrange(size) for size in base.shape)
            base[index] = draw.choice([NAN, INF, -INF])


def draw_input(draw: Draw, channels: int, dtype: torch.dtype, smallest: int = 1) -> tuple[Tensor, float]:
    """An activation, and about the size of its values."""
    n = 0 if draw.chance(0.02) else draw.choice([1, 1, 2, 2, 3, 4, 7])
    h, w = (max(draw.choice(SIDES), smallest) for _ in range(2))
    if draw.chance(0.05):
        h = w = smallest
    while n * channels * h * w > ELEMENTS:
        h, w = max(h // 2, smallest), max(w // 2, smallest)
        if h == w == smallest:
            break
    draw.settings["input"] = (n, channels, h, w)
    x, size = draw_values(draw, (n, channels, h, w), dtype)
    return draw_layout(draw, x), size


def draw_upstream(draw: Draw, finite: bool = True) -> Callable[[int, Tensor], Tensor]:
    """The gradient of each output, which depends on its shape and dtype alone."""
    seed, layout = draw.getrandbits(40), draw.choice(["like", "like", "contiguous", "channels_last", "expanded"])
    poison = None if finite else draw.choice([NAN, INF, -INF])

    def upstream(i: int, out: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed + i)
        # Of few digits, so that it is the same gradient in every dtype.
        grad = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
        if poison is not None and grad.numel():
            grad.view(-1)[int(torch.randint(grad.numel(), (), generator=generator))] = poison
        if layout == "expanded" and out.ndim == 4:
            return grad[:, :, :1, :1].expand(out.shape)
        if layout == "channels_last" and out.ndim == 4:
            return grad.contiguous(memory_format=torch.channels_last)
        return grad

    draw.settings["upstream"] = layout if poison is None else f"{layout}, {poison}"
    return upstream


def set_conv(draw: Draw, conv: nn.Conv2d) -> None:
    fan_in = conv.weight[0].numel()
    with torch.no_grad():
        conv.weight.normal_().mul_(math.sqrt(2 / fan_in))  # passes on the scale (He et al. 2015, eq. 10)
        if conv.bias is not None:
            conv.bias.normal_()


def set_bn(draw: Draw, bn: nn.BatchNorm2d, size: float) -> None:
    with torch.no_grad():
        if bn.affine:
            bn.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(len(bn.weight)) < 0.1, -1.0, 1.0))
            bn.bias.uniform_(-0.5, 0.5)
            if draw.chance(0.1):
                bn.weight[draw.randrange(len(bn.weight))] = 0
        if bn.track_running_stats:
            bn.running_mean.uniform_(-0.5, 0.5).mul_(size)
            bn.running_var.uniform_(0.5, 1.5).mul_(size * size)
            if draw.chance(0.1):
                bn.running_var[draw.randrange(len(bn.running_var))] = draw.choice([0.0, 1e-30, 1e-8])
            bn.num_batches_tracked.fill_(draw.choice([0, 0, 1, 5]))


def draw_unit(draw: Draw, kind: str, c_in: int, c_out: int, size: float) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Module]:
    """A unit with random settings that the kernels support."""
    bias = draw.chance(0.5)
    if kind == "pointwise":
        conv = nn.Conv2d(c_in, c_out, 1, bias=bias)
    else:
        groups = c_in if kind == "depthwise" else 1
        kernel, stride = draw.choice(KERNEL_SIZES[kind]), draw.choice([1, 1, 2])
        padding = draw.choice([kernel // 2, kernel // 2, (draw.choice(PADDINGS), draw.choice(PADDINGS))])
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=bias)
    bn = nn.BatchNorm2d(
        c_out,
        eps=draw.choice([1e-5, 1e-5, 1e-3, 0.1, 1e-12]),
        momentum=draw.choice([0.1, 0.1, 0.5, 1.0, 0.0, None]),
        affine=draw.chance(0.85),
        track_running_stats=draw.chance(0.85),
    )
    set_conv(draw, conv)
    set_bn(draw, bn, size)
    # The others have corners in their derivative, of whose sides the judge knows only the ReLU's.
    act = nn.SiLU if draw.chance(0.15) else nn.ReLU
    return conv, bn, act(inplace=draw.chance(0.3))


def smallest_image(conv: nn.Conv2d) -> int:
    """The side of the smallest square image that the convolution takes."""
    return max(conv.kernel_size[0] - 2 * min(conv.padding), 1)


def describe(model: nn.Module) -> str:
    """The leaves of a chain, short."""
    words = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            groups = {1: "", module.in_channels: "dw"}.get(module.groups, f"g{module.groups}")
            words.append(
                f"{module.in_channels}-{module.out_channels} {module.kernel_size[0]}x{module.kernel_size[1]}{groups}"
                f" s{module.stride[0]} p{module.padding[0]},{module.padding[1]}"
                + (" bias" if module.bias is not None else "")
            )
        elif isinstance(module, nn.BatchNorm2d):
            changes = [
                "train" if module.training else "eval",
                *([f"eps={module.eps:g}"] if module.eps != 1e-5 else []),
                *([f"momentum={module.momentum}"] if module.momentum != 0.1 else []),
                *(["plain"] if not module.affine else []),
                *(["untracked"] if not module.track_running_stats else []),
            ]
            words.append(f"bn({' '.join(changes)})")
        elif not list(module.children()) and not isinstance(module, nn.ReLU):
            words.append(type(module).__name__)
    return " ".join(words)


def draw_modes(draw: Draw, model: nn.Module) -> None:
    """Training, eval, or each BatchNorm its own."""
    model.train(draw.pick("training", [True, True, False]))
    if draw.maybe("mixed modes", 0.25):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(draw.chance(0.5))


def draw_frozen_parameters(draw: Draw, model: nn.Module) -> None:
    how = draw.choice(["none"] * 4 + ["some", "leading", "all"])
    if how == "none":
        return
    draw.settings["without gradients"] = how
    modules = [module for module in model.modules() if list(module.parameters(recurse=False))]
    for module in modules[: draw.randrange(len(modules) + 1)] if how == "leading" else modules:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(how == "some" and draw.chance(0.5))


def draw_precision(draw: Draw, model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, torch.dtype | None]:
    """``model`` and ``x`` in the dtype of ``x``, for 16 bits also with float32 vectors or as autocast has them."""
    dtype = x.dtype
    if dtype.itemsize > 2:
        return model.to(dtype), x, None
    if dtype == torch.float16:
        tame(model)
    if draw.maybe("autocast", 0.3):
        return representable(model, dtype), x.float() if draw.chance(0.7) else x, dtype
    model = model.to(dtype)
    if draw.maybe("float32 vectors", 0.5):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
    return model, x, None


def tame(model: nn.Module) -> None:
    """Keep scales so that float16 does not overflow, where PyTorch's way and the kernels' do it in different places."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = max(module.eps, 1e-3)
            if module.track_running_stats:
                module.running_var.clamp_(min=module.running_var.median().item())


def representable(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round what autocast rounds, so that float64 starts from the same values."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            for parameter in module.parameters():
                parameter.data.copy_(parameter.to(dtype))
    return model


def poison(draw: Draw, model: nn.Module, x: Tensor) -> bool:
    """Perhaps put NaN or Inf somewhere; whether all that is left is finite."""
    if not draw.chance(0.12):
        return True
    where = draw.pick("not finite", ["input", "input", "weight", "vector", "upstream"])
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    bns = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if where == "input":
        sprinkle(draw, x)
    elif where == "weight" and convs:
        weight = draw.choice(convs).weight.data
        # The centre never meets the padding, where PyTorch's own algorithms disagree about 0 * Inf.
        centre = (weight.shape[2] // 2, weight.shape[3] // 2)
        weight[(draw.randrange(weight.shape[0]), draw.randrange(weight.shape[1]), *centre)] = draw.choice(
            [NAN, INF, -INF]
        )
    elif where == "vector" and bns:
        bn = draw.choice(bns)
        vectors = [
            ("weight", [NAN]),
            ("bias", [NAN, INF]),
            ("running_mean", [NAN, INF]),
            ("running_var", [NAN, INF, -1.0]),
        ]
        name, values = draw.choice([(n, v) for n, v in vectors if getattr(bn, n) is not None] or [(None, [NAN])])
        if name:
            # An infinite scale: PyTorch folds y*scale - mean*scale, Inf - Inf, where the contract has (y - mean)*scale.
            vector = getattr(bn, name).data
            vector[draw.randrange(len(vector))] = draw.choice(values)
    return False


def draw_chain(draw: Draw, dtype: torch.dtype, plain: float) -> tuple[nn.Module, Tensor]:
    """Units in a row, some in containers, and with a probability of ``plain`` each a module that cannot be fused."""
    c = draw.choice(CHANNELS)
    x, size = draw_input(draw, c, dtype)
    _, _, h, w = draw.settings["input"]
    modules: list[nn.Module] = []
    for _ in range(draw.choice([1, 2, 2, 3, 4, 6])):
        kind = draw.choice(["depthwise", "depthwise", "pointwise", "pointwise", "dense"])
        c_out = c if kind == "depthwise" else draw.choice(CHANNELS[:20] if kind == "dense" else CHANNELS)
        unit = list(draw_unit(draw, kind, c, c_out, size))
        if draw.chance(plain):
            alter(draw, unit)
        conv = unit[0]
        sides = [
            (s + 2 * p - conv.kernel_size[0]) // conv.stride[0] + 1 for s, p in zip((h, w), conv.padding, strict=True)
        ]
        if min(sides) < 1:
            break
        (h, w), c, size = sides, c_out, 1.0
        container = draw.choice([None, nn.Sequential, mx.nn.FusedSequential])
        modules += unit if container is None else [container(*unit)]
        if draw.chance(plain):
            modules.append(draw.choice([nn.Identity, nn.SiLU, lambda: nn.Dropout(0.0), lambda: nn.AvgPool2d(1)])())
    if draw.chance(0.3) or not modules:
        modules.append(nn.AdaptiveAvgPool2d(1))
    return mx.nn.FusedSequential(*modules), x


def alter(draw: Draw, unit: list[nn.Module]) -> None:
    """Make a unit one that the kernels do not support, or that somebody watches."""
    conv, bn, relu = unit
    how = draw.choice(["7x7", "dilation", "stride 3", "groups", "hook", "no relu"])
    if how == "hook":
        draw.choice(unit).register_forward_hook(_watch)
    elif how == "no relu":
        del unit[2]
    elif conv.kernel_size == (3, 3):
        settings = {
            "7x7": {"kernel_size": 7, "padding": 3},
            "dilation": {"dilation": 2, "padding": 2},
            "stride 3": {"stride": 3},
        }
        given = {"kernel_size": 3, "stride": conv.stride, "padding": conv.padding, **settings.get(how, {})}
        groups = math.gcd(conv.in_channels, conv.out_channels) if how == "groups" else conv.groups
        unit[0] = nn.Conv2d(conv.in_channels, conv.out_channels, **given, groups=groups, bias=conv.bias is not None)
        set_conv(draw, unit[0])


def _watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """A hook that only looks."""


def draw_network(draw: Draw) -> mx.MobileNetV1:
    width = draw.choice([1 / 32, 1 / 16, 0.1, 0.125, 0.2])
    model = mx.MobileNetV1(draw.choice([1, 2, 5, 10]), width, conv_bias=draw.chance(0.5))
    draw.settings["width"] = width
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            set_conv(draw, module)
        elif isinstance(module, nn.BatchNorm2d):
            set_bn(draw, module, 1.0)
    return model


def draw_pictures(draw: Draw, dtype: torch.dtype) -> Tensor:
    n, h, w = draw.choice([1, 2, 3, 4]), draw.randint(20, 75), draw.randint(20, 75)
    draw.settings["input"] = (n, 3, h, w)
    return draw_layout(draw, draw_values(draw, (n, 3, h, w), dtype)[0])
