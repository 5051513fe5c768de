"""The network's chain: convolution, BatchNorm and activation units in a row, as one autograd node over the kernel ops.

Between two convolutions of a chain nothing but the raw convolution output is stored: the next convolution normalises
and activates it on load, in the backward pass too. One node for the whole chain, because an autograd node a layer
costs more host time than the kernels of the small layers take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mobilenet_ext import ops, storage
from mobilenet_ext.autograd import as_gradient_of, first_order
from mobilenet_ext.contract import (
    BN_MEAN,
    BN_ROWS,
    BN_SCALE,
    BN_SHIFT,
    BN_VAR,
    GRAD_BETA,
    GRAD_DZ_COEFFICIENT,
    GRAD_GAMMA,
    Act,
    Padding,
    acc_dtype,
    conv_output_size,
)
from mobilenet_ext.running_stats import update_running_stats_

Kind = Literal["dense", "depthwise", "pointwise"]
Pack = Callable[[Tensor | None, Tensor | None, Tensor], Tensor]


class Unit(NamedTuple):
    """A convolution, BatchNorm and activation, as tensors and settings."""

    kind: Kind
    stride: int
    padding: Padding
    weight: Tensor
    conv_bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch_stats: bool  # normalise by the batch's statistics, otherwise by the running ones
    momentum: float | None  # the share of the batch's statistics in the new running ones; None: leave them
    eps: float
    act: int = Act.RELU.value
    slope: float = 0.0  # of a leaky ReLU

    def output_size(self, n: int, h: int, w: int) -> tuple[int, int, int, int]:
        h, w = conv_output_size(h, w, self.weight.shape[2], self.stride, self.padding)
        return n, self.weight.shape[0], h, w


class InferenceUnit(NamedTuple):
    """A unit with its BatchNorm folded into ``bn``, acc [5, C] (``csrc/ops.h``)."""

    kind: Kind
    stride: int
    padding: Padding
    weight: Tensor
    bn: Tensor
    act: int = Act.RELU.value
    slope: float = 0.0

    output_size = Unit.output_size


class _Settings(NamedTuple):
    kind: Kind
    stride: int
    padding: Padding
    batch_stats: bool
    eps: float
    act: int
    slope: float


def run(x: Tensor, units: list[Unit], pool: bool) -> Tensor:
    """Run a chain of units over ``x``, as the plain modules would, statistics and all.

    Args:
        x: activation ``[N, C, H, W]``, any memory format, not empty.
        units: at least one; a dense convolution only as the first.
        pool: give the mean of the last unit's activation over each image, ``[N, C, 1, 1]``.

    Returns:
        A channels_last tensor in the dtype of ``x``, or autocast's where that is on.

    Raises:
        ValueError: batch statistics over one value a channel.
    """
    dtype = compute_dtype(x)
    counts = _values_per_channel(x, units)
    inferred = _leading_inference_units(x, units)
    if inferred == len(units):
        return infer(x, [fold(unit) for unit in units], pool, dtype)
    if inferred:
        x = infer(x, [fold(unit) for unit in units[:inferred]], False, dtype)
        units = units[inferred:]

    storage.check(x, *(t for u in units for t in (u.running_mean, u.running_var)))
    settings = tuple(_Settings(u.kind, u.stride, u.padding, u.batch_stats, u.eps, u.act, u.slope) for u in units)
    params: list[Tensor | None] = []
    for unit in units:
        running_bn = None if unit.batch_stats else _running_bn(unit, None)
        params += [unit.weight, unit.conv_bias, unit.gamma, unit.beta, running_bn]
    # Converted in front of the node, so that what it saves is its own input: through it a second derivative finds it.
    if x.dtype != dtype or not x.is_contiguous(memory_format=torch.channels_last):
        x = _AsInput.apply(x, dtype)
    out, *bns = _Chain.apply(settings, pool, dtype, _first_to_learn(x, units), x, *params)

    batch_units = [unit for unit in units if unit.batch_stats]
    tracked = [row for row in zip(batch_units, bns, counts, strict=True) if row[0].momentum is not None]
    if tracked:
        update_running_stats_(
            [unit.running_mean for unit, _, _ in tracked],
            [unit.running_var for unit, _, _ in tracked],
            [bn[BN_MEAN] for _, bn, _ in tracked],
            [bn[BN_VAR] for _, bn, _ in tracked],
            [count for _, _, count in tracked],
            [unit.momentum for unit, _, _ in tracked],
        )
    return out


def is_autocast(x: Tensor) -> bool:
    """Whether autocast casts ``x`` for a convolution; it leaves float64 alone."""
    device = x.device.type
    # Dynamo of torch 2.11 cannot trace torch.amp.is_autocast_available; meta is the device that has no autocast.
    return device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a convolution of ``x`` runs in: its own, or autocast's."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def fold(unit: Unit) -> InferenceUnit:
    """The unit with its running statistics, BatchNorm parameters and convolution bias in one normalisation."""
    bn = _running_bn(unit, unit.conv_bias)
    return InferenceUnit(unit.kind, unit.stride, unit.padding, unit.weight.detach(), bn, unit.act, unit.slope)


class Step(NamedTuple):
    """A kernel op of an inference plan, and its arguments after the activation."""

    op: Callable[..., Tensor]
    args: tuple[object, ...]


def infer(x: Tensor, units: list[InferenceUnit], pool: bool, dtype: torch.dtype) -> Tensor:
    """Run folded units over ``x`` in ``dtype``, without autograd."""
    return execute(as_input(x, dtype), plan(units, pool, dtype))


def plan(units: list[InferenceUnit], pool: bool, dtype: torch.dtype, pack: Pack | None = None) -> list[Step]:
    """The ops that run folded units in ``dtype``: a depthwise and a pointwise unit in one.

    ``pack`` makes what an op takes as ``packed`` of depthwise_bn, depthwise_weight and pointwise_weight, the first two
    None for a pointwise convolution alone.
    """
    steps = []
    i = 0
    while i < len(units):
        kind, stride, padding, weight, bn, act, slope = units[i]
        weight = _as_parameter(weight, dtype)
        i += 1
        if kind == "depthwise" and _is_block(*units[i - 1 : i + 1]):
            then = units[i]
            pointwise = _as_parameter(then.weight, dtype)
            packed = pack and pack(bn, weight, pointwise)
            depthwise = (bn, act, weight, stride, padding)
            args = (*depthwise, then.bn, then.act, pointwise, packed, None, slope, then.slope)
            steps.append(Step(ops.block_inference, args))
            i += 1
        else:
            packed = pack(None, None, weight) if pack and kind == "pointwise" else None
            steps.append(Step(ops.INFERENCE[kind], (bn, act, weight, stride, padding, packed, None, slope)))
    if pool:
        steps.append(
            Step(
                ops.norm_act_forward,
                (bias_bn(units[-1].weight, None).to(acc_dtype(dtype)), Act.LINEAR.value, True, None, 0.0),
            )
        )
    return steps


def _is_block(depthwise: InferenceUnit, pointwise: InferenceUnit | None = None) -> bool:
    """Whether ``block_inference`` takes these two units."""
    return (
        pointwise is not None
        and pointwise.kind == "pointwise"
        and depthwise.weight.shape[2] == 3
        and max(depthwise.padding) <= 1
    )


def execute(x: Tensor, steps: list[Step]) -> Tensor:
    """Run a plan over ``x``, which :func:`as_input` gave."""
    for op, args in steps:
        x = op(x, *args)
    return x


def as_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as the first op of a plan takes it."""
    if x.dtype != dtype or not x.is_contiguous(memory_format=torch.channels_last):
        storage.check(x)  # before a copy
    return x.detach().to(dtype).contiguous(memory_format=torch.channels_last)


def _as_parameter(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight or vector as the kernels take it."""
    if tensor.dtype != dtype or not tensor.is_contiguous():
        storage.check(tensor)  # before a copy
    return tensor.to(dtype).contiguous()


def bias_bn(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The normalisation that does nothing but add ``bias`` to what a layer with ``weight`` gives."""
    bn = torch.zeros((BN_ROWS, len(weight)), dtype=acc_dtype(weight.dtype), device=weight.device)
    bn[BN_SCALE] = 1
    if bias is not None:
        bn[BN_SHIFT] = bias.detach()
    return bn


def _parameters(unit: Unit) -> tuple[Tensor | None, ...]:
    return unit.weight, unit.conv_bias, unit.gamma, unit.beta


def _first_to_learn(x: Tensor, units: list[Unit]) -> int | None:
    """The unit where backward ends: the first one that gives a gradient, be it to ``x``. None: no unit does."""
    if not torch.is_grad_enabled():
        return None
    if x.requires_grad:
        return 0
    learns = (any(p is not None and p.requires_grad for p in _parameters(unit)) for unit in units)
    return next((i for i, learning in enumerate(learns) if learning), None)


def _leading_inference_units(x: Tensor, units: list[Unit]) -> int:
    """How many units in front have no batch statistics to take and no gradient to give."""
    first = _first_to_learn(x, units)
    units = units[:first]
    return next((i for i, unit in enumerate(units) if unit.batch_stats), len(units))


def _values_per_channel(x: Tensor, units: list[Unit]) -> list[int]:
    """How many values the statistics of each unit with batch statistics are taken over."""
    n, _, h, w = x.shape
    counts = []
    for unit in units:
        size = unit.output_size(n, h, w)
        _, _, h, w = size
        if unit.batch_stats:
            counts.append(n * h * w)
            if counts[-1] == 1:
                raise ValueError(
                    f"Expected more than 1 value per channel when training, got input size {torch.Size(size)}"
                )
    return counts


def _acc(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if vector is None else _as_parameter(vector, acc_dtype(dtype))


def _running_bn(unit: Unit, conv_bias: Tensor | None) -> Tensor:
    """The normalisation by running statistics, if there are any, of a convolution that has left out ``conv_bias``."""
    if unit.running_mean is None:
        return bias_bn(unit.weight, conv_bias)
    vectors = (unit.running_mean, unit.running_var, unit.gamma, unit.beta, conv_bias)
    with torch.no_grad():
        mean, *rest = (_acc(v, unit.running_mean.dtype) for v in vectors)
        return ops.bn_from_running(mean, *rest, unit.eps)


_NAME = "mobilenet_ext: chain of convolution, BatchNorm and ReLU"


class _AsInput(torch.autograd.Function):
    """``apply(x, dtype)``: ``x`` in ``dtype`` and channels_last; its gradient has the dtype and strides of ``x``."""

    @staticmethod
    def forward(ctx, x, dtype):
        # Without values: the strides, also where they are symbols of a traced graph.
        ctx.like = x.detach().to("meta")
        return x.to(dtype).contiguous(memory_format=torch.channels_last)

    @staticmethod
    @first_order(_NAME)
    def backward(ctx, saved, grad):
        return as_gradient_of(ctx.like, grad), None


class _Chain(torch.autograd.Function):
    """``apply(settings, pool, dtype, first, x, *params)`` with ``x`` channels_last in ``dtype`` and (weight, conv_bias,
    gamma, beta, running_bn) a unit in ``params``, ``running_bn`` None where batch statistics are wanted. Backward ends
    at the unit ``first``, and nothing is kept of those before it. Returns the output and the ``bn`` of every unit with
    batch statistics."""

    @staticmethod
    def forward(ctx, settings, pool, dtype, first, x, *params):
        u, bn, act, slope = x, None, Act.LINEAR.value, 0.0
        inputs, weights, bns, batch_bns = [], [], [], []
        for i, (kind, stride, padding, batch_stats, eps, *act_y) in enumerate(settings):
            weight, conv_bias, gamma, beta, running_bn = params[5 * i : 5 * i + 5]
            weight = _as_parameter(weight, dtype)
            vectors = (_acc(gamma, dtype), _acc(beta, dtype), eps, batch_stats, _acc(conv_bias, dtype))
            if first is not None and i >= first:
                # Of the first unit, what it computes from is kept only for a gradient that depends on it.
                used = i > first or ctx.needs_input_grad[4] or ctx.needs_input_grad[5 + 5 * i]
                inputs.append(u if used else None)
                weights.append(weight if used else None)
                bns.append(bn if used else None)
            u, batch_bn = ops.FORWARD[kind](u, bn, act, weight, stride, padding, *vectors, slope)
            bn, (act, slope) = running_bn, act_y
            if batch_stats:
                bn = batch_bn
                batch_bns.append(batch_bn)
        out = ops.norm_act_forward(u, bn, act, pool, None, slope)

        if first is not None:
            ctx.save_for_backward(*inputs, u, *weights, *bns, bn)
            ctx.settings, ctx.pool, ctx.first, ctx.parameters = settings[first:], pool, first, params
            # Of the first input that is kept.
            ctx.act = settings[first - 1][-2:] if first else (Act.LINEAR.value, 0.0)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*batch_bns)
        return out, *batch_bns

    @staticmethod
    @first_order(_NAME)
    def backward(ctx, saved, grad, *_):
        settings, needs_x, needs = ctx.settings, ctx.needs_input_grad[4], ctx.needs_input_grad[5 + 5 * ctx.first :]
        grads: list[Tensor | None] = [None] * len(needs)
        before = (None,) * (5 + 5 * ctx.first)
        if grad is None:
            return *before, *grads
        n = len(settings)
        rows: dict[int, Tensor] = {}
        # activations[i] and bns[i] are the input of unit i and how it is normalised, those at i + 1 its output.
        activations, weights, bns = saved[: n + 1], saved[n + 1 : 2 * n + 1], saved[2 * n + 1 :]

        grad = grad.to(activations[n].dtype).contiguous(memory_format=torch.channels_last)
        acts = [ctx.act, *((each.act, each.slope) for each in settings)]  # like bns
        act, slope = acts[n]
        dz, grad_bn = ops.norm_act_backward(
            grad, activations[n], bns[n], act, settings[-1].batch_stats, ctx.pool, None, True, slope
        )
        for i in range(n - 1, -1, -1):
            kind, stride, padding, batch_stats, *_ = settings[i]
            weight_grad, bias_grad, gamma_grad, beta_grad = range(5 * i, 5 * i + 4)
            for which, row in ((gamma_grad, GRAD_GAMMA), (beta_grad, GRAD_BETA)):
                if needs[which]:
                    rows[which] = grad_bn[row]
            if needs[bias_grad]:
                # DistributedDataParallel waits for a gradient, so it is zero and not None under batch statistics.
                grads[bias_grad] = (
                    torch.zeros_like(grad_bn[GRAD_BETA])
                    if batch_stats
                    else grad_bn[GRAD_DZ_COEFFICIENT] * grad_bn[GRAD_BETA]
                )
            need_input = i > 0 or needs_x
            if not (need_input or needs[weight_grad]):
                break
            act, slope = acts[i]
            dz, grad_weight, grad_bn = ops.BACKWARD[kind](
                dz, activations[i + 1] if batch_stats else None, grad_bn,
                activations[i], bns[i], act, i > 0 and settings[i - 1].batch_stats, weights[i], stride, padding,
                need_input, needs[weight_grad], slope,
            )  # fmt: skip
            if needs[weight_grad]:
                grads[weight_grad] = grad_weight
        if rows:
            # Tensors of their own, as every other gradient, in as few kernels as there can be.
            for which, grad in zip(rows, torch._foreach_mul(list(rows.values()), 1.0), strict=True):
                grads[which] = grad
        params = ctx.parameters[5 * ctx.first :]
        grads = [None if g is None else as_gradient_of(p, g) for p, g in zip(params, grads, strict=True)]
        grad_x = as_gradient_of(activations[0], dz) if needs_x else None
        return *before[:4], grad_x, *before[5:], *grads
