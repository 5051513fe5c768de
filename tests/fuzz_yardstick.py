"""What the fuzz compares with: plain modules in the dtype under test, and in float64, also with random rounding.

The promises are relative to the norm of the exact result. Where that is small beside the terms it is the difference of
(statistics of two values, a gradient that the normalisation nearly cancels), no computation in the dtype can keep them,
and the right measure is what rounding does to this very problem. Monte Carlo arithmetic (Parker, UCLA CSD-970002)
tells: the reference runs a few times with each value it reads, computes or stores off by a random part of the unit
roundoff, forward and backward.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from plain import Relu
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mobilenet_ext as mx
from mobilenet_ext.contract import Act, acc_dtype
from mobilenet_ext.fusion import FusedSequential


class Residual(mx.nn.DepthwiseSeparableConv):
    """A subclass that does not call its container as a whole."""

    def forward(self, input: Tensor) -> Tensor:
        return self[-1](self[0](input)) + input


class PlainResidual(nn.Sequential):
    forward = Residual.forward


class Normalise(nn.Module):
    """``(x - mean)*scale + shift`` by channel, in the accumulation dtype."""

    def __init__(self, mean: Tensor, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.mean, self.scale, self.shift = (nn.Parameter(v) for v in (mean, scale, shift))

    def forward(self, x: Tensor) -> Tensor:
        mean, scale, shift = (v.view(1, -1, 1, 1) for v in (self.mean, self.scale, self.shift))
        return ((x.to(self.mean.dtype) - mean) * scale + shift).to(x.dtype)


class Statistics(nn.Module):
    """``x``, and its mean and biased variance by channel."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        acc = x.to(acc_dtype(x.dtype))
        if not x.numel():
            return x, acc.sum((0, 2, 3)), acc.square().sum((0, 2, 3))
        return x, acc.mean((0, 2, 3)), acc.var((0, 2, 3), correction=0)


class Corner(Relu):
    """A ReLU that keeps its input; ``mask``: as in :class:`plain.Relu`. ``fuzz_judge.py`` checks the mask by what
    rounding does to the problem at hand, which may be far worse conditioned than those of the other tests."""

    z: Tensor | None = None

    def __init__(self) -> None:
        super().__init__(tolerance=None)

    def forward(self, x: Tensor) -> Tensor:
        self.z = x.detach()
        return super().forward(x)


def clone(module: nn.Module) -> nn.Module:
    """What ``copy.deepcopy`` makes of a module without shared tensors, in a tenth of the time; hooks are the same."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    twin._parameters = {
        name: None if p is None else nn.Parameter(p.detach().clone(), p.requires_grad)
        for name, p in module._parameters.items()
    }
    twin._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    twin._modules = {name: clone(child) for name, child in module._modules.items()}
    return twin


def plain_twin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which nothing can be fused."""
    twin = clone(model)
    for name, module in list(twin.named_modules()):
        if type(module) is Residual:
            module.__class__ = PlainResidual
        elif type(module).forward is FusedSequential.forward:
            module.__class__ = nn.Sequential
        elif type(module) is nn.ReLU:
            twin.set_submodule(name, Corner())
    return twin


def corners(model: nn.Module) -> list[Corner]:
    return [module for module in model.modules() if isinstance(module, Corner)]


def impose(model: nn.Module, masks: list[Tensor | None] | None) -> None:
    if masks is not None:
        for corner, mask in zip(corners(model), masks, strict=True):
            corner.mask = mask


class Signs(TorchDispatchMode):
    """Records where the ReLUs of a run let their input pass, and whether all of it ran on the kernels.

    A mask is None where a kernel keeps it to itself, which only inference kernels do: nothing in them needs a gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor | None] = []
        self.all_fused = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace == "mobilenet_ext":
            forward = torch.ops.mobilenet_ext.norm_act_forward
            if name in ("depthwise_forward", "pointwise_forward", "norm_act_forward") and args[2] == Act.RELU:
                self._add(forward(args[0], args[1], Act.RELU, False))
            elif name in ("depthwise", "pointwise") and args[1] is not None:
                self._add(torch.ops.mobilenet_ext.norm_act(*args[:4], Act.RELU))
            elif name == "norm_act" and args[4] == Act.RELU:
                self._add(out)
            elif name == "block_inference":
                if args[2] == Act.RELU:
                    self.masks.append(None)
                if args[7] == Act.RELU:
                    self._add(out)
            elif name.endswith("_inference") and args[3 if name.startswith("gated") else 2] == Act.RELU:
                self._add(out)
        elif name in ("relu", "relu_"):
            self._add(out)
        elif name in ("convolution", "conv2d", "native_batch_norm", "batch_norm", "addmm", "linear", "silu"):
            self.all_fused = False  # other bits on another number of threads; silu's where a thread's share ends
        return out

    def _add(self, rectified: Tensor) -> None:
        self.masks.append(~(rectified <= 0))  # PyTorch's ReLU passes the gradient of a NaN


@contextlib.contextmanager
def memory_of(byte: int) -> Iterator[None]:
    """Every byte of new memory is this one (not 255), where the C library can do that."""
    mallopt, perturb = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0), -6  # M_PERTURB of malloc.h
    mallopt(perturb, 255 - byte)
    try:
        yield
    finally:
        mallopt(perturb, 0)


class _Perturbed(torch.autograd.Function):
    """``x`` with each element rounded to one dtype, its gradient to another: terms of the sums that backward is."""

    @staticmethod
    def forward(ctx, x: Tensor, rounding: Rounding, forward: torch.dtype, backward: torch.dtype) -> Tensor:
        ctx.rounding, ctx.dtype = rounding, backward
        return rounding.off(x, forward)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rounding.added(ctx.rounding.off(grad, ctx.dtype)), None, None, None


class _Spread(torch.autograd.Function):
    """A vector of channels for every pixel of images; its gradient is their sum."""

    @staticmethod
    def forward(ctx, vector: Tensor, shape: torch.Size, rounding: Rounding) -> Tensor:
        ctx.rounding = rounding
        return _channel(vector).expand(shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rounding.summed(grad), None, None


class Rounding:
    """Random rounding of a computation that stores activations and their gradients in ``dtype``."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.acc = dtype, acc_dtype(dtype)
        self.generator = torch.Generator().manual_seed(seed)

    def off(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x`` on a grid of the spacing of ``dtype``, which lies at random. As with rounding, equal values are off by
        the same, values close to each other become equal, which may leave a channel without variance, and what is too
        large becomes Inf."""
        info = torch.finfo(dtype)
        power = (x / x.frexp().mantissa).nan_to_num(1)  # of two: exact
        spacing = (power * (info.eps / 2)).clamp(min=info.smallest_normal * info.eps)
        # float64 has no bits for places between its own numbers: there it is a wider grid's, and no two become equal.
        width, amplitude = (2.0**27, 2) if dtype == torch.float64 else (1, 1)
        place = x.abs() / spacing / width + torch.rand((), dtype=x.dtype, generator=self.generator)
        error = (amplitude * spacing * (place.floor() + 0.5 - place)).nan_to_num(0)  # Inf stays Inf
        rounded = x + error * x.sign()
        return torch.where(rounded.abs() > info.max, rounded.sign() * torch.inf, rounded)

    def added(self, x: Tensor) -> Tensor:
        """The terms of sums, each off by its own part of the accumulation dtype's roundoff, however equal they are:
        a sum rounds at each of its steps, and terms that cancel exactly leave the roundoff of the partial sums."""
        half = torch.finfo(self.acc).eps / 2
        return torch.empty_like(x).uniform_(-half, half, generator=self.generator).add_(1).mul_(x)

    def summed(self, x: Tensor) -> Tensor:
        """By channel, in the accumulation dtype: along each row, then row by row of each image, from any place on.

        Each step rounds by the size of the sum so far, not of its term, and equal terms round alike: over a flat image
        the errors grow with the number of terms, not with its root as those of ``added``.
        """
        if x.numel() == 0:
            return x.sum((0, 2, 3))
        total = x.to(self.acc)
        for dim in (3, 2):
            first = int(torch.randint(total.shape[dim], (), generator=self.generator))
            total = functools.reduce(torch.add, total.roll(first, dim).unbind(dim))
        return total.double().sum(0)

    def some_of(self, weight: Tensor) -> Tensor:
        """The first taps, and 0 for the others: with them a convolution gives one of its partial sums."""
        taps = weight[0].numel()
        first = torch.arange(taps) < torch.randint(1, taps + 1, (), generator=self.generator)
        return weight.where(first.view(weight[0].shape), 0)

    def error(self, x: Tensor) -> Tensor:
        """What the accumulation dtype loses of a partial sum: all of its bits where the terms after it cancel it."""
        return (self.off(x, self.acc) - x).nan_to_num(0, 0, 0)

    def spread(self, vector: Tensor, x: Tensor) -> Tensor:
        """A vector of channels for the pixels of ``x``."""
        return _Spread.apply(vector, x.shape, self)

    def computed(self, x: Tensor) -> Tensor:
        """One use of a value that is kept in the accumulation dtype."""
        return _Perturbed.apply(x, self, self.acc, self.acc)

    def stored(self, x: Tensor) -> Tensor:
        return _Perturbed.apply(x, self, self.dtype, self.acc)

    def read(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What a module takes, whose gradient is stored in ``dtype``."""
        return _Perturbed.apply(x, self, self.acc, dtype or self.dtype)


class Rounded(nn.Module):
    """A module of the float64 reference, and with a ``rounding`` the same with random rounding.

    ``twin``: the same in the dtype under test.
    """

    rounding: Rounding | None = None
    by_taps = False  # convolutions leave out the taps outside the image

    def __init__(self, module: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        self.module, self.dtypes = module, {name: tensor.dtype for name, tensor in twin.state_dict().items()}

    def forward(self, x: Tensor) -> Any:
        module, r = self.module, self.rounding
        if self.by_taps and isinstance(module, nn.Conv2d):
            return conv_by_taps(module, x)
        if r is None:
            return module(x)
        if isinstance(module, nn.Conv2d):
            bias = None if module.bias is None else self.parameter("bias")
            x, weight = r.read(x), self.parameter("weight")
            with torch.no_grad():
                partial = module._conv_forward(x, r.some_of(weight), None)
            return r.stored(module._conv_forward(x, weight, bias) + r.error(partial))
        if isinstance(module, nn.Linear):
            y = F.linear(r.read(x), self.parameter("weight"))
            return r.stored(y if module.bias is None else y + self.parameter("bias"))
        if isinstance(module, nn.BatchNorm2d):
            return self.batch_norm(x)
        if isinstance(module, Normalise):
            y, vectors = r.read(x), [r.spread(self.parameter(name), x) for name in ("mean", "scale", "shift")]
            return r.stored(r.computed(r.computed(y - vectors[0]) * vectors[1]) + vectors[2])
        if isinstance(module, Statistics):
            mean, _, var = self.statistics(r.read(x))
            return x, mean, var
        return r.stored(module(r.read(x)))

    def parameter(self, name: str) -> Tensor:
        return self.rounding.read(getattr(self.module, name), self.dtypes[name])

    def statistics(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, deviations and biased variance. Each use of a value is rounded apart, or a cancellation would cancel
        the errors too."""
        r = self.rounding
        mean = r.computed(r.computed(y).mean((0, 2, 3)))
        # The variance's derivative by the mean is zero, as everybody's formula has it, for an exact mean alone.
        var = r.computed(r.computed(r.computed(y) - _channel(mean.detach())).square().mean((0, 2, 3)))
        return mean, r.computed(y) - r.spread(mean, y), var

    def batch_norm(self, x: Tensor) -> Tensor:
        bn, r, y = self.module, self.rounding, self.rounding.read(x)
        if bn.training or bn.running_mean is None:
            mean, deviation, var = self.statistics(y)
            if bn.training and bn.running_mean is not None and bn.track_running_stats:
                self.track(mean.detach(), var.detach(), y.numel() // y.shape[1])
        else:
            mean, var = bn.running_mean, r.computed(bn.running_var)
            deviation = y - r.computed(_channel(mean))
        z = r.computed(r.computed(deviation) * r.spread(r.computed((var + bn.eps).rsqrt()), y))
        if bn.weight is not None:
            z = r.computed(z * r.spread(self.parameter("weight"), y))
        return r.stored(z if bn.bias is None else z + r.spread(self.parameter("bias"), y))

    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        bn, r = self.module, self.rounding
        bn.num_batches_tracked += 1
        momentum = bn.momentum if bn.momentum is not None else 1 / bn.num_batches_tracked.item()
        for name, batch in (("running_mean", mean), ("running_var", var * count / max(count - 1, 1))):
            running = getattr(bn, name)
            updated = r.computed((1 - momentum) * running) + momentum * batch
            setattr(bn, name, r.off(updated, self.dtypes[name]))


def conv_by_taps(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What a convolution gives, without products of the padding: 0*Inf is a NaN.

    Which of its algorithms leave those out PyTorch decides by dtype, size, padding and layout.
    """
    weight, (stride, _) = conv.weight, conv.stride
    kernel = weight.shape[-1]
    if kernel == 1:
        return conv(x)
    rows, columns = conv.padding if isinstance(conv.padding, tuple) else [(kernel - 1) // 2] * 2
    size = [(x.shape[2] + 2 * rows - kernel) // stride + 1, (x.shape[3] + 2 * columns - kernel) // stride + 1]
    out = x.new_zeros(x.shape[0], weight.shape[0], *size)
    for i in range(kernel):
        for j in range(kernel):
            (to_y, from_y), (to_x, from_x) = (
                _inside(tap - padding, stride, *lengths)
                for tap, padding, *lengths in ((i, rows, size[0], x.shape[2]), (j, columns, size[1], x.shape[3]))
            )
            seen = x[:, :, from_y, from_x]
            if seen.numel():
                product = F.conv2d(seen, weight[:, :, i : i + 1, j : j + 1], groups=conv.groups)
                out[:, :, to_y, to_x] += product
    return out if conv.bias is None else out + _channel(conv.bias)


def _inside(offset: int, stride: int, outputs: int, inputs: int) -> tuple[slice, slice]:
    """The outputs that a tap takes from inside the image, along one side, and what it takes."""
    first = max(-(offset // stride), 0)
    last = min((inputs - 1 - offset) // stride + 1, outputs)
    count = max(last - first, 0)
    return slice(first, first + count), slice(first * stride + offset, first * stride + offset + count * stride, stride)


def _channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


class Reference:
    """A model in float64, which may be run more than once from the same state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = plain_twin(model).double()
        twins = dict(model.named_modules())
        self.corners = corners(self.model)
        names = [name for name, _ in self.model.named_parameters()] + [name for name, _ in self.model.named_buffers()]
        owners = [self.model.get_submodule(name.rpartition(".")[0]) for name in names]
        self.slots = [(name, owner, name.rpartition(".")[2]) for name, owner in zip(names, owners, strict=True)]
        self.state = [getattr(owner, key).detach().clone() for _, owner, key in self.slots]
        for name, module in list(self.model.named_modules()):
            if not list(module.children()) and not isinstance(module, (Relu, nn.Flatten, nn.Identity, nn.Dropout)):
                self.model.set_submodule(name, Rounded(module, twins[name]))

    def start(self, masks: list[Tensor | None] | None, rounding: Rounding | None, by_taps: bool = False) -> None:
        """Be as at first, with the masks of another run for the ReLUs."""
        for corner, mask in zip(self.corners, masks or [None] * len(self.corners), strict=True):
            corner.mask = mask
        for module in self.model.modules():
            if isinstance(module, Rounded):
                module.rounding, module.by_taps = rounding, by_taps
        for (_, owner, key), tensor in zip(self.slots, self.state, strict=True):
            if isinstance(value := getattr(owner, key), nn.Parameter):
                value.grad = None
                value.data.copy_(tensor)
            else:
                setattr(owner, key, tensor.clone())
