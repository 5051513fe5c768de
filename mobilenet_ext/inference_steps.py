"""Chains in inference: units whose BatchNorm is folded, as the kernel ops that run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mobilenet_ext import ops, storage
from mobilenet_ext.contract import Act, acc_dtype
from mobilenet_ext.unit_tensors import InferenceUnit, as_parameter, bias_bn

Pack = Callable[[Tensor | None, Tensor | None, Tensor], Tensor]


class Step(NamedTuple):
    """An op, and its arguments: after the activation, and the gate if it is ``gated``, come ``before``, a residual or
    None, and ``after``."""

    op: Callable[..., Tensor]
    before: tuple[object, ...]
    after: tuple[object, ...]
    gated: bool = False


def steps_of(
    units: list[InferenceUnit], dtype: torch.dtype, pack: Pack | None = None, gated: bool = False
) -> list[Step]:
    """The ops that run folded units in ``dtype``: a depthwise and a pointwise unit in one.

    ``pack`` makes what an op takes as ``packed`` of depthwise_bn, depthwise_weight and pointwise_weight, the first two
    None for a pointwise convolution alone. ``gated``: the first unit, a pointwise one, has a gate.
    """
    steps: list[Step] = []
    i = 0
    while i < len(units):
        kind, stride, padding, weight, bn, act, slope = units[i]
        weight = as_parameter(weight, dtype)
        i += 1
        if kind == "depthwise" and _is_block(*units[i - 1 : i + 1]):
            then = units[i]
            pointwise = as_parameter(then.weight, dtype)
            packed = pack and pack(bn, weight, pointwise)
            depthwise = (bn, act, weight, stride, padding)
            before = (*depthwise, then.bn, then.act, pointwise, packed)
            steps.append(Step(ops.block_inference, before, (slope, then.slope)))
            i += 1
            continue
        packed = pack(None, None, weight) if pack and kind == "pointwise" else None
        if gated and not steps:
            steps.append(Step(ops.gated_pointwise_inference, (bn, act, weight, packed), (slope,), True))
        else:
            steps.append(Step(ops.INFERENCE[kind], (bn, act, weight, stride, padding, packed), (slope,)))
    return steps


def _is_block(depthwise: InferenceUnit, pointwise: InferenceUnit | None = None) -> bool:
    """Whether ``block_inference`` takes these two units."""
    return (
        pointwise is not None
        and pointwise.kind == "pointwise"
        and depthwise.weight.shape[2] == 3
        and max(depthwise.padding) <= 1
    )


def pooling(unit: InferenceUnit, dtype: torch.dtype) -> Step:
    """The mean over each image of what ``unit`` has given."""
    identity = bias_bn(unit.weight, None).to(acc_dtype(dtype))
    return Step(ops.norm_act_forward, (identity, Act.LINEAR.value, True), (0.0,))


def execute(x: Tensor, steps: list[Step], gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Run steps over ``x``, which :func:`as_input` gave; the residual is added to what the last one gives."""
    last = len(steps) - 1
    for i, (op, before, after, gated) in enumerate(steps):
        x = op(x, *((gate,) if gated else ()), *before, residual if i == last else None, *after)
    return x


def is_as_input(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether an activation is as the first op takes it."""
    return x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last)


def as_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An activation as the first op takes it."""
    if not is_as_input(x, dtype):
        storage.check(x)  # before a copy
    return x.detach().to(dtype).contiguous(memory_format=torch.channels_last)
