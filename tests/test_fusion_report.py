"""``mx.fusion_report``: what runs on the kernels, and why the rest does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fuse_networks import Network, control_flow, first, functions, shared_activation, tap, twice, unit
from torch import nn

import mobilenet_ext as mx

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")


def test_report() -> None:
    fused = mx.fuse(torchvision.models.mobilenet_v2(width_mult=0.35))
    report = mx.fusion_report(fused)
    names = {name for name, module in fused.named_modules() if isinstance(module, nn.Conv2d)}
    assert {row.name for row in report} == names and report.fused == 52 == len(report)
    assert str(report).startswith("52 of 52 convolutions run on the kernels, in 16 chains")
    first(fused, nn.Conv2d).register_forward_hook(lambda *_: None)
    row = next(row for row in mx.fusion_report(fused) if row.why_not)
    assert row.chain is None and row.why_not == "a hook, or a forward of its own"


REASONS = {
    tap: "its output is read 2 times",
    twice: "called 2 times in a forward",
    functions: "not called",
    shared_activation: "its output is read by ReLU, not by a BatchNorm",
}


@pytest.mark.parametrize("calls", REASONS, ids=lambda calls: calls.__name__)
def test_report_says_why(calls: Callable) -> None:
    report = mx.fusion_report(mx.fuse(Network(calls)))
    assert next(row for row in report if row.name == "conv").why_not == REASONS[calls]


def test_report_of_what_is_not_known() -> None:
    reasons = {row.name: row.why_not for row in mx.fusion_report(mx.fuse(Network(control_flow)))}
    assert reasons["a.0"] is reasons["b.0"] is None and "Network" in reasons["conv"]
    assert mx.fusion_report(unit(8, 8))[0].why_not == "not in a module that fuse() was given"
    assert mx.fusion_report(mx.MobileNetV1(10, 0.25)).fused == 27
    with pytest.raises(TypeError, match="expected an nn.Module"):
        mx.fusion_report(None)
