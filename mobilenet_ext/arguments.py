"""What :mod:`mobilenet_ext.functional` accepts. A refusal names the argument, and comes before anything is computed."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from mobilenet_ext.contract import DTYPES, KERNEL_SIZES, NO_PADDING, PADDINGS, STRIDES, Padding, conv_output_size
from mobilenet_ext.running_stats import overlap, why_unusable
from mobilenet_ext.unit_tensors import compute_dtype, is_autocast


def as_padding(padding: object) -> Padding:
    """The four sides of what a convolution may be given as its padding."""
    sides = [padding] * 4 if _is_integer(padding) else padding
    if isinstance(sides, (tuple, list)):
        if len(sides) == 2:
            rows, columns = sides
            sides = [columns, columns, rows, rows]
        if len(sides) == 4 and all(_is_integer(side) and side in PADDINGS for side in sides):
            left, right, top, bottom = map(int, sides)
            return left, right, top, bottom
    raise ValueError(
        f"padding: got {padding!r}, accepted are 0, 1 and 2, alone or in (vertical, horizontal) or "
        "(left, right, top, bottom)"
    )


def check_conv(input, weight, bias, *, depthwise, stride=1, padding=NO_PADDING):
    _check_activation("input", input)
    _check_tensor("weight", weight, input.device)
    if bias is not None:
        _check_tensor("bias", bias, input.device)
    channels = input.shape[1]
    if depthwise:
        accepted = [(channels, 1, size, size) for size in KERNEL_SIZES["depthwise"]]
        if tuple(weight.shape) not in accepted:
            shapes = " and ".join(str(list(shape)) for shape in accepted)
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, accepted are {shapes}")
    elif weight.ndim != 4 or tuple(weight.shape[1:]) != (channels, 1, 1) or weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, accepted is [C, {channels}, 1, 1] with C > 0")
    _check_vector("bias", bias, weight.shape[0])
    if not _is_integer(stride) or stride not in STRIDES:
        raise ValueError(f"stride: got {stride!r}, accepted are 1 and 2")
    if min(*input.shape[2:], *conv_output_size(*input.shape[2:], weight.shape[2], 1, padding)) < 1:
        left, right, top, bottom = padding
        smallest = [max(weight.shape[2] - sides, 1) for sides in (top + bottom, left + right)]
        raise ValueError(f"input: got an image of {tuple(input.shape[2:])}, accepted are {smallest} and more")

    accepted = [d for d in DTYPES if d != torch.float64] if is_autocast(input) else [input.dtype]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in accepted:
            raise TypeError(
                f"{name}: got {tensor.dtype}, accepted beside an input of {input.dtype}: {_names(accepted)}"
            )


def check_batch_norm(
    input, weight, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, relu
):  # fmt: skip
    for name, switch in (("training", training), ("relu", relu)):
        if not isinstance(switch, bool):
            raise TypeError(f"{name}: got {type(switch).__name__}, a bool is accepted")
    vectors = {"running_mean": running_mean, "running_var": running_var, "bn_weight": bn_weight, "bn_bias": bn_bias}
    dtype = compute_dtype(input)
    accepted = [dtype] if dtype.itemsize > 2 else [dtype, torch.float32]
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    for name, vector in given.items():
        _check_tensor(name, vector, input.device)
        _check_vector(name, vector, weight.shape[0])
        if vector.dtype not in accepted:
            raise TypeError(f"{name}: got {vector.dtype}, accepted beside activations of {dtype}: {_names(accepted)}")
        first = next(iter(given))
        if vector.dtype != given[first].dtype:
            raise TypeError(f"{name}: got {vector.dtype}, accepted is the dtype of {first}, {given[first].dtype}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: got only one of them, accepted are both or none")
    if not training and running_mean is None:
        raise ValueError("running_mean: got None, which is accepted only with training=True")
    for name, number in (("momentum", momentum), ("eps", eps)):
        if isinstance(number, bool) or not isinstance(number, (int, float, numbers.Real)):
            raise TypeError(f"{name}: got {type(number).__name__}, a float is accepted")
        try:
            finite = math.isfinite(number)
        except OverflowError:  # of which Python does not print more than 4300 digits
            raise ValueError(f"{name}: expected a number in the range of a float, got a larger integer") from None
        if not finite:
            raise ValueError(f"{name}: got {number}, finite values are accepted")
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"eps: got {eps}, accepted are values above 0, and 0 with training=False")


def check_running_stats(
    running_mean: Tensor | None, running_var: Tensor | None, others: dict[str, Tensor | None], training: bool
) -> None:
    """That they need no gradient and, where ``training`` updates them, can be updated without changing ``others``."""
    if running_mean is None:
        return
    others = {name: tensor for name, tensor in others.items() if tensor is not None}
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if (reason := why_unusable(buffer, training)) is not None:
            raise ValueError(f"{name}: expected a tensor that needs no gradient and can be updated, got {reason}")
        if training and not torch.compiler.is_compiling():  # the tensors of a traced graph have no memory
            for other, tensor in others.items():
                if overlap(buffer, tensor):
                    raise ValueError(f"{name}: expected memory of its own, got a tensor that overlaps {other}")
        others = {"running_mean": running_mean, **others}


def _check_activation(name: str, x: Tensor) -> None:
    _check_tensor(name, x, None)
    if x.ndim != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, accepted is [N, C, H, W]")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: got {x.dtype}, accepted are {_names(DTYPES)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, at least one channel is accepted")


def _check_tensor(name: str, x: Tensor, device: torch.device | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, a torch.Tensor is accepted")
    if x.is_nested:
        raise TypeError(f"{name}: expected a tensor of one shape, got a nested tensor")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {x.layout}, accepted is torch.strided")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: is on {x.device}, accepted is the device of the input, {device}")


def _check_vector(name: str, x: Tensor | None, channels: int) -> None:
    if x is not None and tuple(x.shape) != (channels,):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, accepted is [{channels}]")


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _is_integer(x: object) -> bool:
    return type(x) is int or (isinstance(x, numbers.Integral) and not isinstance(x, bool))
