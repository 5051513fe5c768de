"""Pictures of training curves. Needs matplotlib."""

from __future__ import annotations

import io
import os
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
    figure, axes = _figure(1, 2, (10, 4))
    for axis, quantity in zip(axes.flat, ("loss", "accuracy"), strict=True):
        for split in ("train", "val"):
            key = f"{split}_{quantity}"
            axis.plot([row["epoch"] for row in history], [row[key] for row in history], ".-", label=CURVES[key])
        _label(axis, quantity)
    figure.suptitle(title)
    _save(figure, path)


def plot_sweep(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str], title: str) -> None:
    """Draws the four curves of several runs, a panel per quantity and a line per run.

    Args:
        histories: by the name of the run, as in ``plot_curves``.
        path, title: as in ``plot_curves``.

    Raises:
        As ``plot_curves``.
    """
    figure, axes = _figure(2, 2, (11, 8))
    for axis, (key, name) in zip(axes.T.flat, CURVES.items(), strict=True):
        for run, history in histories.items():
            axis.plot([row["epoch"] for row in history], [row[key] for row in history], ".-", label=run)
        _label(axis, name)
    figure.suptitle(title)
    _save(figure, path)


def _figure(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, Any]:
    # Figure, not pyplot: no window system, no global state, nothing to close.
    figure = require("matplotlib.figure", "drawing the curves", "matplotlib").Figure(
        figsize=inches, layout="constrained"
    )
    return figure, figure.subplots(rows, columns)


def _label(axis: Any, quantity: str) -> None:
    axis.set(xlabel="epoch", ylabel=quantity)
    axis.xaxis.get_major_locator().set_params(integer=True)
    heights = [y for line in axis.lines for y in line.get_ydata() if 0 < y < float("inf")]
    if quantity.endswith("loss") and heights and max(heights) > 10 * min(heights):
        # The validation loss of the first epoch, on young running statistics, would flatten everything after it.
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend()


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
