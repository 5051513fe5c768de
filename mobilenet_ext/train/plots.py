"""Pictures of training curves, and what makes any picture's axes readable. Needs matplotlib."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from mobilenet_ext.files import write_atomically
from mobilenet_ext.train.errors import require

CURVES = {
    "train_loss": "train loss",
    "val_loss": "validation loss",
    "train_accuracy": "train accuracy",
    "val_accuracy": "validation accuracy",
}
SPLITS = {"train": "train", "val": "validation"}
# matplotlib's own logarithmic ticks are powers of ten, and over less than a decade 2 x 10^1, 3 x 10^1 side by side.
STEPS = ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))  # of a decade
MOST_TICKS = 7


def plot_curves(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str) -> None:
    """Draws train and validation loss side by side with train and validation accuracy.

    Args:
        history: a row per epoch with ``epoch`` and the keys of ``CURVES``.
        path: PNG file to write, atomically.
        title: over the picture.

    Raises:
        TrainError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    figure, axes = _figure(1, 2, (10, 4), title)
    for axis, quantity in zip(axes.flat, ("loss", "accuracy"), strict=True):
        lines = [_draw(axis, history, f"{split}_{quantity}", name) for split, name in SPLITS.items()]
        _label(axis, quantity)
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def plot_sweep(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str], title: str) -> None:
    """Draws the four curves of several runs, a panel per quantity and a line per run.

    Args:
        histories: by the name of the run, as in ``plot_curves``.
        path, title: as in ``plot_curves``.

    Raises:
        As ``plot_curves``.
    """
    figure, axes = _figure(2, 2, (11, 8), title)
    colours = require("matplotlib", "drawing the curves").colormaps["viridis"]
    for axis, (key, quantity) in zip(axes.T.flat, CURVES.items(), strict=True):
        lines = [
            _draw(axis, history, key, run, color=colours(0.9 * i / max(1, len(histories) - 1)))
            for i, (run, history) in enumerate(histories.items())
        ]
        _label(axis, quantity)
    figure.legend(handles=lines, loc="outside right center", ncols=math.ceil(len(lines) / 30), frameon=False)
    _save(figure, path)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    strides = [(steps, 1) for steps in STEPS] + [((1,), stride) for stride in range(2, len(decades) + 1)]
    for steps, stride in strides:
        values = (step * 10.0**decade for decade in decades if decade % stride == 0 for step in steps)
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) <= MOST_TICKS:
            break
    if len(ticks) >= 2:
        return ticks
    # So short a piece of the axis is nearly a linear one.
    linear = require("matplotlib.ticker", "drawing the curves", "matplotlib").MaxNLocator(4, steps=[1, 2, 5, 10])
    return [float(value) for value in linear.tick_values(low, high) if low <= value <= high]


def label_log_axis(axis: Any, ticks: Sequence[float] = ()) -> None:
    """Plain numbers, at ``ticks`` or else at round ones, on a logarithmic ``axis.xaxis`` or ``axis.yaxis`` whose panel
    holds its curves already."""
    ticks = ticks or log_ticks(*axis.get_view_interval())
    axis.set_ticks(ticks, [f"{tick:,.9g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def wrapped(text: str, inches: float, points: float) -> str:
    """In lines that are not longer than ``inches`` in a font of so many points."""
    return textwrap.fill(text, int(inches * 72 / (0.6 * points)))


def _figure(rows: int, columns: int, inches: tuple[float, float], title: str) -> tuple[Any, Any]:
    # Figure, not pyplot: no window system, no global state, nothing to close.
    figure = require("matplotlib.figure", "drawing the curves", "matplotlib").Figure(
        figsize=inches, layout="constrained"
    )
    figure.suptitle(wrapped(title, inches[0], 12))
    return figure, figure.subplots(rows, columns)


def _draw(axis: Any, history: Sequence[Mapping[str, Any]], key: str, label: str, **style: Any) -> Any:
    epochs, values = ([row[name] for row in history] for name in ("epoch", key))
    (line,) = axis.plot(epochs, values, ".-", label=label, markevery=math.ceil(len(history) / 50), **style)
    return line


def _label(axis: Any, quantity: str) -> None:
    axis.set(xlabel="epoch", ylabel=quantity)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if axis.get_xlim()[1] - axis.get_xlim()[0] < 1:  # a single epoch
        axis.margins(x=0.5)
    heights = [y for line in axis.lines for y in line.get_ydata() if 0 < y < float("inf")]
    if quantity.endswith("loss") and heights and max(heights) > 10 * min(heights):
        # The validation loss of the first epoch, on young running statistics, would flatten everything after it.
        axis.set_yscale("log", nonpositive="mask")
        label_log_axis(axis.yaxis)
    axis.grid(alpha=0.3)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
