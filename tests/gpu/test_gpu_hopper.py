"""The pointwise kernels for Hopper, which neither the interpreter nor the emulator can run, beside the other ones.

Both read the same rounded operands and round each result once: only the order of a product's terms may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from plain import assert_close
from torch import Tensor

from mobilenet_ext.contract import NO_PADDING, Act
from mobilenet_ext.triton import autotune
from mobilenet_ext.triton.pointwise_backward import pointwise_backward
from mobilenet_ext.triton.pointwise_forward import pointwise_forward, pointwise_inference

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")

ROUNDED, SUMMED = 2e-4, 1e-5  # a few values that round the other way; float32 sums
# Input channels, output channels: full blocks, and rests of every block; one pass or two; stored operands or not.
SIZES = [(64, 64), (32, 64), (40, 72), (96, 128), (128, 104), (128, 264), (200, 64), (256, 384), (264, 512), (520, 200)]
ROWS = (9, 43, 45)  # 17415 rows: enough for the heuristics to take these kernels, and no multiple of a block


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", generator=generator)


def activation(generator: torch.Generator, channels: int, dtype: torch.dtype) -> Tensor:
    return random(generator, *ROWS, channels).to(dtype).permute(0, 3, 1, 2)


def bn(generator: torch.Generator, channels: int) -> Tensor:
    mean, scale, shift, rstd, var = random(generator, 5, channels)
    return torch.stack([10 + mean, scale, shift, 1 + rstd.abs(), 1 + var.abs()])


def takes_tma(config: dict[str, Any]) -> bool:
    return (config if "TMA" in config else config["input"])["TMA"]


def with_each(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Sequence[Tensor]]) -> tuple[list, list]:
    """What the call gives with each candidate for Hopper, and with the first of the others."""
    found: dict[bool, list] = {True: [], False: []}

    def run(op: str, problem: tuple, candidates: Sequence[dict], launch: Callable[[dict], Any]) -> Any:
        if not op.startswith("pointwise_"):
            return launch(candidates[0])
        for tma in (True, False):
            found[tma] += [launch(c) for c in candidates if takes_tma(c) == tma][: None if tma else 1]
        return found[False][0]

    monkeypatch.setattr(autotune, "run", run)
    call()
    assert found[True] and found[False]
    return found[True], found[False][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [size for size in SIZES if size[0] >= 64], ids=str)
@pytest.mark.parametrize("act", [Act.RELU, Act.SILU], ids=lambda act: act.name)
def test_forward(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], dtype: torch.dtype, act: Act) -> None:
    g = torch.Generator("cuda").manual_seed(1)
    k, n = size
    u, bn_u, bn_y = activation(g, k, dtype), bn(g, k), bn(g, n)
    u = u + 10
    weight, bias = random(g, n, k, 1, 1).to(dtype) / k**0.5, random(g, n)
    for norm, conv_bias in ((bn_u, bias), (bn_u, None), (None, None)):
        args = (
            u,
            norm,
            act if norm is not None else Act.LINEAR,
            weight,
            1,
            NO_PADDING,
            None,
            None,
            1e-5,
            True,
            conv_bias,
        )
        tma, (y, partial) = with_each(monkeypatch, lambda args=args: pointwise_forward(*args))
        expected = statistics(partial)
        for y_tma, partial_tma in tma:
            assert_close(y_tma, y, ROUNDED, "y")
            for actual, wanted in zip(statistics(partial_tma), expected, strict=True):
                assert_close(actual, wanted, SUMMED, "statistics")
    tma, (y, _) = with_each(monkeypatch, lambda: [pointwise_inference(u, bn_y, act, weight, 1, NO_PADDING)])
    for y_tma, _ in tma:
        assert_close(y_tma, y, ROUNDED, "inference")


def statistics(partial: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance in float64."""
    count, mean, rest, m2 = partial.double().unbind(1)
    all_mean = (count * (mean + rest)).sum(0) / count.sum(0)
    return all_mean, (m2 + count * (mean + rest - all_mean) ** 2).sum(0) / count.sum(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("act", [Act.RELU, Act.RELU6], ids=lambda act: act.name)
def test_backward(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], dtype: torch.dtype, act: Act) -> None:
    g = torch.Generator("cuda").manual_seed(2)
    k, n = size
    u, bn_u, dz, y = activation(g, k, dtype), bn(g, k), activation(g, n, dtype), activation(g, n, dtype)
    u = u + 10
    grad_bn_y = random(g, 6, n)
    weight = random(g, n, k, 1, 1).to(dtype) / k**0.5
    cases = [(grad_bn_y, bn_u, True), (None, None, True)]
    if k >= 64:  # with fewer channels only one pass is faster
        cases.append((grad_bn_y, bn_u, False))
    for grad_bn, norm, need_weight in cases:
        args = (
            dz, y if grad_bn is not None else None, grad_bn, u, norm, act if norm is not None else Act.LINEAR, True,
            weight, 1, NO_PADDING, True, need_weight,
        )  # fmt: skip
        tma, expected = with_each(monkeypatch, lambda args=args: pointwise_backward(*args))
        for outputs in tma:
            for name, actual, wanted in zip(("dz_u", "grad_weight", "grad_bn_u"), outputs, expected, strict=True):
                if wanted.numel():
                    assert_close(actual, wanted, ROUNDED if name == "dz_u" else SUMMED, name)
