"""The pictures of a training and of a sweep, looked at by their geometry."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mobilenet_ext.train.plots import log_ticks, plot_curves, plot_sweep

pytest.importorskip("matplotlib", reason="draws the picture")

from geometry import assert_readable, drawn, tick_labels

TITLE = "MobileNetV1 0.25 on digits, 64x64"


def history(epochs: int, first: float = 70.0, scale: float = 1.0) -> list[dict[str, Any]]:
    """Losses that fall, with a validation loss that starts high."""
    return [
        {
            "epoch": epoch,
            "train_loss": 2.3 * scale / epoch,
            "val_loss": first if epoch == 1 else 2.5 * scale / epoch,
            "train_accuracy": 1 - 1 / (epoch + 1),
            "val_accuracy": 1 - 1.2 / (epoch + 1),
        }
        for epoch in range(1, epochs + 1)
    ]


def replaced(epoch: int, loss: float) -> list[dict[str, Any]]:
    rows = history(8)
    rows[epoch]["train_loss"] = rows[epoch]["val_loss"] = loss
    return rows


CURVES = {
    "ten epochs": history(10),
    "less than a decade": history(5, first=3.0),
    "a little more than a decade": history(3, first=10.0),
    "one epoch": history(1),
    "hundreds of epochs over many decades": history(300, first=5e6),
    "a loss of zero": replaced(4, 0.0),
    "only zeros": [{**row, "train_loss": 0.0, "val_loss": 0.0} for row in history(3)],
    "not a number": replaced(4, math.nan),
    "infinite": replaced(0, math.inf),
}


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_readable(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = drawn(monkeypatch, lambda: plot_curves(CURVES[name], tmp_path / "x.png", TITLE))
    assert_readable(figure)
    for axes in figure.axes:
        assert all(label.get_text().lstrip("\N{MINUS SIGN}").isdecimal() for label in tick_labels(axes.xaxis)), "epochs"


def test_a_long_title_is_wrapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    title = f"MobileNetV1 0.25 on {'a-folder-with-a-long-name-' * 8}, 224x224"
    assert_readable(drawn(monkeypatch, lambda: plot_curves(history(5), tmp_path / "x.png", title)))


@pytest.mark.parametrize("runs", [1, 4, 14, 35])
def test_a_sweep_is_readable_and_its_runs_differ(runs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    histories = {f"width {width / runs:g}": history(12, scale=width) for width in range(1, runs + 1)}
    figure = drawn(monkeypatch, lambda: plot_sweep(histories, tmp_path / "x.png", "MobileNetV1 at several widths"))
    assert_readable(figure)
    for axes in figure.axes:
        assert len({line.get_color() for line in axes.lines}) == runs


def test_a_loss_of_zero_is_left_out_of_a_logarithmic_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = drawn(monkeypatch, lambda: plot_curves(replaced(4, 0.0), tmp_path / "x.png", TITLE))
    (line, _), axes = figure.axes[0].lines, figure.axes[0]
    assert axes.get_yscale() == "log"
    shown = line.get_transform().transform_path(line.get_path()).vertices[:, 1]
    assert not math.isfinite(shown[4]) and all(axes.bbox.y0 <= y <= axes.bbox.y1 for y in [*shown[:4], *shown[5:]])


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.8, 12, [1, 1.5, 2, 3, 5, 7, 10]),
        (1, 1000, [1, 3, 10, 30, 100, 300, 1000]),
        (165, 445, [200, 250, 300, 400]),
        (390, 415, [390, 400, 410]),
        (1e-6, 1e6, [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


def test_ticks_of_any_interval_are_few_and_inside_of_it() -> None:
    for i in range(-40, 40):
        for width in (1.01, 1.1, 1.5, 2, 3, 5, 9, 11, 30, 99, 500, 2e3, 1e5, 1e7, 1e12, 1e25):
            low = 1.37**i
            ticks = log_ticks(low, low * width)
            assert 2 <= len(ticks) <= 7 and all(low <= tick <= low * width for tick in ticks), (low, width, ticks)
