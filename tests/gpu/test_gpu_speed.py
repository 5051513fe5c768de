"""Faster than PyTorch's own modules, as a user runs them: without a CUDA graph, host time included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import plain
import pytest
import torch
import torch.nn.functional as F
from behaviour import Plain
from torch import nn

import mobilenet_ext as mx

BATCH, ROUNDS, STEPS = 128, 7, 5


def make_step(model: nn.Module, network: nn.Module, device: str) -> Callable[[], None]:
    """A training step of ``model``, which runs the modules of ``network``."""
    x = torch.randn(BATCH, 3, 224, 224).to(device, memory_format=torch.channels_last)
    labels = torch.randint(1000, (BATCH,)).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimiser.step()

    return step


def seconds(step: Callable[[], None]) -> tuple[float, float]:
    """A step's time, and the host's share: until the last of ``STEPS`` is launched."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS, (launched - start) / STEPS


@pytest.mark.parametrize("width", plain.WIDTHS)
def test_training_is_faster_than_eager(
    backend: str, device: str, width: float, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    fused = mx.MobileNetV1(1000, width).to(device, memory_format=torch.channels_last)
    eager = Plain(fused)
    steps = {"fused": make_step(fused, fused, device), "eager": make_step(eager, eager.module, device)}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for round_ in range(ROUNDS + 1):
        for name, step in steps.items():
            measured = seconds(step)
            if round_:  # the first compiles and warms up
                times[name].append(measured)
    ratio = statistics.median(e[0] / f[0] for e, f in zip(times["eager"], times["fused"], strict=True))
    report = ", ".join(
        f"{name} {1e3 * statistics.median(t for t, _ in values):.2f} ms"
        f" (host {1e3 * statistics.median(h for _, h in values):.2f})"
        for name, values in times.items()
    )
    with capsys.disabled():
        print(f"\ntraining step, {backend}, width {width}, batch {BATCH}, bf16: {report}, eager / fused {ratio:.2f}")
    assert ratio > 1
