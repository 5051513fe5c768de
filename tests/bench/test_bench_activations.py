"""``mobilenet-ext bench activations``."""

from __future__ import annotations

import pytest
import torch

from benchmarks import activations, cli
from mobilenet_ext import backends
from mobilenet_ext.contract import Act

SMALL = (activations.Layer("depthwise", 5, 8, 8, 6), activations.Layer("pointwise", 1, 8, 4, 6))


@pytest.mark.slow
def test_a_row_for_each_layer_and_pass(monkeypatch, capsys) -> None:
    monkeypatch.setattr(activations, "LAYERS", SMALL)
    words = ["--device", "cpu", "--rounds", "2", "--burst", "0.001", "--batch", "2", "--dtype", "float32"]
    assert cli.main(["activations", *words]) == 0
    title, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == len(SMALL) * len(activations.PASSES)
    cells = [row.strip("|").split("|") for row in (title, *rows)]
    assert len({len(row) for row in cells}) == 1
    assert all(float(cell) > 0 for cell in cells[1][4:])  # a forward pass has each activation, stored ones too


@pytest.mark.parametrize("layer", SMALL, ids=str)
@pytest.mark.parametrize("pass_", activations.PASSES)
def test_what_is_timed_is_what_the_reference_computes(layer, pass_) -> None:
    calls = activations.calls_of(layer, pass_, 2, torch.float32, "cpu")
    assert {act.name for act in Act} <= set(calls)
    outputs = {name: call() for name, call in calls.items()}
    with backends.use("reference"):
        for name, call in calls.items():
            expected = call()
            pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (outputs[name], expected)), strict=True)
            for actual, wanted in pairs:
                torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
