"""Where things stand in a picture: texts that lie over one another, outside of the figure or over what is drawn."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Any) -> Any:
    """The one matplotlib figure that ``draw()`` saves, as it was drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw))[1])
    draw()
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    return figure


def texts(figure: Any) -> list[Any]:
    """All that is shown."""
    found = [text for text in (figure._suptitle, *figure.texts) if text is not None]
    for legend in figure.legends:
        found += legend.get_texts()
    for axes in figure.axes:
        found += [axes.title, *axes.texts]
        if axes.get_legend():
            found += axes.get_legend().get_texts()
        if axes.axison:
            for axis in (axes.xaxis, axes.yaxis):
                found += [axis.label, axis.offsetText, *tick_labels(axis)]
    return [text for text in dict.fromkeys(found) if text.get_text().strip()]


def tick_labels(axis: Any) -> list[Any]:
    """Of an ``axes.xaxis`` or ``axes.yaxis``: those within its ends, without which there is none to see."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]


def assert_readable(figure: Any) -> None:
    """No text is over another or outside of the figure; no legend and no text in a panel is over what is drawn; each
    axis has plain numbers, and two at least for two points where it is logarithmic."""
    shown = texts(figure)
    boxes = {text: text.get_window_extent().padded(-0.5) for text in shown}
    for one, other in combinations(shown, 2):
        assert not boxes[one].overlaps(boxes[other]), f"{one} over {other}"
    for text, box in boxes.items():
        inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert inside and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, f"{text} is outside of {figure.bbox}"
        assert "mathdefault" not in text.get_text(), text
    for axes in figure.axes:
        legends = [*figure.legends, *([axes.get_legend()] if axes.get_legend() else [])]
        assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for legend in legends)
        for text in axes.texts:
            assert not any(boxes[text].overlaps(bar.get_window_extent()) for bar in axes.patches), f"{text} over a bar"
        for i, axis in enumerate((axes.xaxis, axes.yaxis)):
            if axes.axison and axis.get_scale() == "log":
                points = {point[i] for line in axes.lines for point in line.get_xydata()}
                assert len(tick_labels(axis)) >= min(2, len(points)), f"{axis} has too few numbers"
        assert axes.get_window_extent().width > 50 and axes.get_window_extent().height > 50, "squeezed"
