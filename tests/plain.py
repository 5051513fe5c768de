"""The independent reference: the network and its units from ``nn.Conv2d``, ``nn.BatchNorm2d`` and ``nn.ReLU`` alone.

Nothing here calls a kernel of the project, except to read off the ReLU masks of a run (``ReluMasks``): a network in
training is chaotic at ReLU signs, so its float64 reference takes the signs of the run it is compared with, and asserts
that they are its own but for rounding (``assert_signs``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mobilenet_ext.contract import Act

MODULES = {
    Act.LINEAR: nn.Identity,
    Act.RELU: nn.ReLU,
    Act.RELU6: nn.ReLU6,
    Act.HARDSWISH: nn.Hardswish,
    Act.SILU: nn.SiLU,
    Act.LEAKY_RELU: nn.LeakyReLU,
}
WIDTHS = (1.0, 0.75, 0.5, 0.25)
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

# The tolerances of the contract, for float32 against float64.
FORWARD, GRADIENT = 1e-5, 1e-4
TRAINING_FORWARD = 5e-5  # of the whole network in training mode
SIXTEEN_BITS = 1.5  # times the error of PyTorch's own path
FLOAT32_UNIT = 2.0**-23  # float32 vectors beside 16-bit activations: errors below their own rounding are all the same


def activate(act: Act, z: Tensor, slope: float = 0.0) -> Tensor:
    return nn.LeakyReLU(slope)(z) if act == Act.LEAKY_RELU else MODULES[act]()(z)


def normalise(y: Tensor, bn: Tensor) -> Tensor:
    """``y`` normalised by a ``bn`` of the kernel ops, [5, C]."""
    mean, scale, shift, *_ = (row.view(1, -1, 1, 1) for row in bn)
    return (y - mean) * scale + shift


class Shape(NamedTuple):
    """A convolution of the network: its channels, stride, and the height and width of its input."""

    kind: str
    in_channels: int
    out_channels: int
    stride: int
    size: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.in_channels}-{self.out_channels}-s{self.stride}-{self.size}"


# How often a sign may differ. 16 bits were measured at 4e-4 of a large tensor at most, float32 at 1e-6 and two elements
# of a small one: in a small tensor a few are luck.
FLIPPED_SHARE, FLIPPED_IN_ANY = 1e-3, 3


def corner(dtype: torch.dtype) -> float:
    """The ``tolerance`` of :func:`assert_signs` for a unit in this dtype.

    float32 decides a sign from a value that it promises to ``FORWARD``. 16 bits decide it from a convolution output
    that was rounded once, by up to half of eps, and that PyTorch's own path rounds again at the BatchNorm: eps.
    Measured are a third of each: 3.4e-6 in float32, 0.33 eps in bfloat16, 0.27 eps in float16, of our kernels as of
    PyTorch's.
    """
    return torch.finfo(dtype).eps if dtype.itemsize == 2 else FORWARD


def assert_signs(z: Tensor, mask: Tensor, tolerance: float) -> None:
    """That ``mask``, where another run lets its ReLU pass, is where ``z``, the ReLU's exact input, is positive: but for
    few elements within rounding of the corner, by ``tolerance`` of their channel's root mean square.

    Without that a reference which takes the mask would call every wrong zero right.
    """
    z = z.detach()
    flipped = mask != (z > 0)
    count = int(flipped.sum())
    if not count:
        return
    scale = z.square().mean((0, 2, 3), keepdim=True).sqrt()
    # NaN, which no tolerance takes, where a channel is zero or NaN.
    distance = (z.abs() / scale)[flipped].max().item()
    assert distance <= tolerance, (
        f"ReLU: wrong side of the corner by {distance:.1e} of the channel's scale, rounding is {tolerance:.1e}; "
        f"{count} of {z.numel()} signs differ"
    )
    assert count <= FLIPPED_IN_ANY + FLIPPED_SHARE * z.numel(), f"ReLU: {count} of {z.numel()} signs differ"


class Relu(nn.Module):
    """``nn.ReLU``, or with a ``mask``, the same with the signs of another run, which are checked to ``tolerance``.

    A ``tolerance`` of None: whoever gives the mask checks it.
    """

    def __init__(self, mask: Tensor | None = None, tolerance: float | None = FORWARD) -> None:
        super().__init__()
        self.mask, self.tolerance = mask, tolerance

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            return torch.relu(x)
        if self.tolerance is not None:
            assert_signs(x, self.mask, self.tolerance)
        return torch.where(self.mask, x, torch.zeros((), dtype=x.dtype))


def unit(kind: str, in_channels: int, out_channels: int, stride: int = 1, bias: bool = True) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU; ``kind`` is ``"stem"``, ``"depthwise"`` or ``"pointwise"``."""
    kernel, padding = (1, 0) if kind == "pointwise" else (3, 1)
    groups = in_channels if kind == "depthwise" else 1
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class Network(nn.Module):
    """MobileNetV1 of plain modules."""

    def __init__(self, num_classes: int = 10, width: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        channels = int(32 * width)
        units = [unit("stem", 3, channels, 2, bias)]
        for out_channels, stride in BLOCKS:
            out_channels = int(out_channels * width)
            units += [unit("depthwise", channels, channels, stride, bias)]
            units += [unit("pointwise", channels, out_channels, 1, bias)]
            channels = out_channels
        self.feature = nn.Sequential(*units, nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.feature(x))


def layer_shapes(widths: Iterable[float] = WIDTHS, size: int = 224) -> list[Shape]:
    """The different convolutions of the network at these widths, with the sizes they see for an image of ``size``."""
    shapes = []
    for width in widths:
        channels, side = int(32 * width), size // 2
        shapes.append(Shape("stem", 3, channels, 2, size))
        for out_channels, stride in BLOCKS:
            out_channels = int(out_channels * width)
            shapes.append(Shape("depthwise", channels, channels, stride, side))
            side //= stride
            shapes.append(Shape("pointwise", channels, out_channels, 1, side))
            channels = out_channels
    return list(dict.fromkeys(shapes))


def channel_shapes(kinds: Iterable[str], widths: Iterable[float] = WIDTHS) -> list[Shape]:
    """The different (kind, channels, stride) of the network, each with an image of 8 rows."""
    shapes = [shape._replace(size=8) for shape in layer_shapes(widths) if shape.kind in kinds]
    return list(dict.fromkeys(shapes))


def randomise_(module: nn.Module) -> nn.Module:
    """Give every BatchNorm in ``module`` affine parameters and running statistics unlike the initial ones, and every
    convolution weights that pass on the scale of their input (He et al. 2015, eq. 10): with PyTorch's initial ones, a
    third of that in variance, MobileNetV1 in eval mode computes the same whatever its input and first layers are."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
        if isinstance(child, nn.BatchNorm2d):
            with torch.no_grad():
                if child.affine:
                    child.weight.uniform_(0.5, 1.5)
                    child.bias.uniform_(-0.5, 0.5)
                if child.track_running_stats:
                    child.running_mean.uniform_(-0.5, 0.5)
                    child.running_var.uniform_(0.5, 1.5)
    return module


def in_float64(module: nn.Module, plain: nn.Module) -> nn.Module:
    """``plain`` in float64 on the CPU with the state, the mode and the BatchNorm settings of ``module``."""
    plain = plain.double()
    plain.load_state_dict({name: tensor.cpu() for name, tensor in module.state_dict().items()})
    for source, target in zip(batch_norms(module), batch_norms(plain), strict=True):
        target.training, target.momentum, target.eps = source.training, source.momentum, source.eps
    for name, child in list(plain.named_modules()):
        if type(child) is nn.ReLU:
            plain.set_submodule(name, Relu())
    return plain


def batch_norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]


def impose(plain: nn.Module, masks: list[Tensor], tolerance: float) -> None:
    """Make the ReLUs of a float64 reference take these masks, in order; ``tolerance`` is that of ``assert_signs``."""
    relus = [child for child in plain.modules() if isinstance(child, Relu)]
    for relu, mask in zip(relus, masks, strict=True):
        relu.mask, relu.tolerance = mask, tolerance


class ReluMasks(TorchDispatchMode):
    """Records, while a fused module runs forward, where each ReLU's input is positive: what the kernels normalise on
    load, rectified by the same backend."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "mobilenet_ext":
            if name in ("depthwise_forward", "pointwise_forward", "norm_act_forward") and args[2] == Act.RELU:
                rectified = torch.ops.mobilenet_ext.norm_act_forward(args[0], args[1], Act.RELU, False)
                self.masks.append((rectified > 0).cpu())
        return func(*args, **(kwargs or {}))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the expected; shapes must be equal."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    expected = expected.detach().cpu().double()
    difference = torch.linalg.vector_norm(actual.detach().cpu().double() - expected).item()
    norm = torch.linalg.vector_norm(expected).item()
    if difference == 0:
        return 0.0
    return difference / norm if norm else float("inf")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, at most {tolerance:.0e} is promised"


def assert_no_worse(actual: Tensor, own: Tensor, expected: Tensor, what: str = "") -> None:
    """16 bits: ``actual`` is at most 1.5 times as far from ``expected`` as ``own``, PyTorch's own result."""
    assert actual.dtype == own.dtype, (what, actual.dtype, own.dtype)
    check_errors(relative_error(actual, expected), relative_error(own, expected), what)


def check_errors(ours: float, theirs: float, what: str) -> None:
    limit = max(SIXTEEN_BITS * theirs, FLOAT32_UNIT)
    assert ours <= limit, f"{what}: relative error {ours:.2e}, PyTorch's own path has {theirs:.2e}"


def leaf(x: Tensor) -> Tensor:
    """A copy of ``x`` that collects a gradient."""
    return x.detach().clone().requires_grad_()


def as_leaf64(x: Tensor) -> Tensor:
    """A float64 copy of ``x`` on the CPU that collects a gradient."""
    return x.detach().cpu().double().requires_grad_()


def is_conv_bias(name: str) -> bool:
    """Whether a parameter of a unit or a network is the bias of a convolution (child 0 of its unit)."""
    return name == "0.bias" or name.endswith(".0.bias")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For float64 references: PyTorch runs a depthwise convolution in float64 as one small convolution a channel, each
    of which would wake every thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
