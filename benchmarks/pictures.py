"""Results as pictures: bars against peers, a roofline with a dot for each layer, growth with the work, losses."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.limits import Limits, limits_of
from benchmarks.network import Workload
from benchmarks.peers import OURS, is_ours
from benchmarks.scaling import POINTS, RUNNERS
from benchmarks.timing import summary
from mobilenet_ext.train.plots import label_log_axis, wrapped

OUR_COLOUR, PEER_COLOUR = "#c2410c", "#94a3b8"
PASS_COLOURS = {"forward": "#2563eb", "backward": "#7c3aed", "inference": "#059669"}
MARKERS = {"dense": "s", "depthwise": "o", "pointwise": "^", "block": "D"}
STYLES = {"float32": "o-", "bfloat16": "s--", "float16": "^:"}
INCHES = 9  # the width of a picture, at which a README shows it unscaled
NAME = 26  # characters of a runner's name in a line


def draw(report: dict[str, Any], json_file: Path) -> list[Path]:
    """Writes the pictures of a result beside its JSON file, and returns their paths; of several networks there is none,
    which the README's table of networks says in less room."""
    if len({result["workload"].get("network") for result in report["results"]}) > 1:
        return []
    import matplotlib

    path = json_file.with_suffix(".svg")
    with matplotlib.rc_context({"svg.hashsalt": "mobilenet_ext"}):  # the same result gives the same file
        figure_of(report).savefig(path, metadata={"Date": None})
    return [path]


def figure_of(report: dict[str, Any]) -> Any:
    """A result as a matplotlib figure."""
    draw_one = {"kernels": _roofline, "scaling": _growth, "curves": _losses}.get(report["bench"], _bars)
    return draw_one(report)


def _figure(title: str, panels: int, height: float, columns: int = 2) -> tuple[Any, Sequence[Any]]:
    """The figure, and its panels in rows of so many columns; ``height``: of a row, in inches."""
    from matplotlib.figure import Figure

    columns, rows = min(columns, panels), math.ceil(panels / columns)
    width = max(0.6, columns / 2) * INCHES if columns < 3 else INCHES
    figure = Figure(figsize=(width, rows * height + 0.5), layout="constrained")
    figure.suptitle(wrapped(title, width, 9), fontsize=9)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes[:panels]


def _title(axis: Any, text: str) -> None:
    axis.set_title(wrapped(text, 0.4 * INCHES, 9), fontsize=9)


def _legend(figure: Any, handles: Sequence[Any], columns: int) -> None:
    """Below the panels, where it hides nothing."""
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _say_empty(axis: Any) -> None:
    axis.set_axis_off()
    axis.text(0.5, 0.5, "nothing was timed", transform=axis.transAxes, ha="center", fontsize=8)


def _bars(report: dict[str, Any]) -> Any:
    timed = [
        sorted(
            ((summary(row["seconds"]), row["runner"]) for row in result["rows"] if row.get("seconds")),
            key=lambda bar: -bar[0].median,
        )
        for result in report["results"]
    ]
    names = [[textwrap.fill(name, NAME) for _, name in bars] for bars in timed]
    lines = max(sum(1 + name.count("\n") for name in found) for found in names)
    first = Workload(**report["results"][0]["workload"])
    title = f"{first.title}; {report['about']['device']}"
    figure, axes = _figure(title, len(timed), 1 + 0.22 * max(lines, 4))
    for axis, result, bars, labels in zip(axes, report["results"], timed, names, strict=True):
        if bars:
            _draw_bars(axis, bars, labels)
        else:
            _say_empty(axis)
        work = Workload(**result["workload"])
        _title(axis, f"{work.task}, batch {work.batch}, {work.dtype}")
    return figure


def _draw_bars(axis: Any, bars: Sequence[tuple[Any, str]], names: Sequence[str]) -> None:
    # A runner many times slower than the others would leave them no room: its bar is cut off.
    middle = statistics.median(time.median for time, _ in bars)
    end = max(time.high for time, _ in bars if time.median <= 4 * middle) or 1.0
    unit, factor = ("s", 1) if end >= 10 else ("ms", 1e3) if end >= 1e-3 else ("µs", 1e6)
    for i, (time, runner) in enumerate(bars):
        cut = time.median > end
        spread = None if cut else [[factor * (time.median - time.low)], [factor * (time.high - time.median)]]
        colour = OUR_COLOUR if is_ours(runner) else PEER_COLOUR
        axis.barh(i, factor * min(time.median, end), xerr=spread, color=colour, ecolor="#475569")
        value = f"{factor * time.median:{'.0f' if factor * time.median >= 1000 else '.4g'}}"
        at = factor * min(max(time.high, time.median), end)
        axis.text(at, i, f" → {value}" if cut else f"  {value}", va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), names)
    axis.set_ylim(len(bars) - max(len(bars), 4) - 0.6, len(bars) - 0.4)
    axis.set_xlabel(f"{unit}, median and quartiles", fontsize=8)
    axis.set_xlim(0, 1.3 * factor * end)
    axis.xaxis.get_major_locator().set_params(nbins=5)


def _roofline(report: dict[str, Any]) -> Any:
    limits = limits_of(report)
    device = report["about"]["device"]
    figure, axes = _figure(f"each layer's kernel under the machine's limits; {device}", len(limits), 3.8)
    kinds, passes = set(), set()
    for axis, (dtype, roof) in zip(axes, limits.items(), strict=True):
        amounts, intensities = [], []
        for result in report["results"]:
            row = next((row for row in result["rows"] if row["runner"] == OURS and row.get("seconds")), None)
            if result["workload"]["dtype"] != dtype or row is None or not result["operations"]:
                continue
            kind, pass_ = result["workload"]["layer"].split()[0], result["workload"]["pass"]
            rate = result["operations"] / summary(row["seconds"]).median
            intensity = result["operations"] / result["bytes"]
            axis.loglog(intensity, rate / 1e9, MARKERS[kind], color=PASS_COLOURS[pass_], markersize=5, alpha=0.8)
            kinds.add(kind), passes.add(pass_)
            amounts.append(result["bytes"]), intensities.append(intensity)
        if not amounts:
            _say_empty(axis)
            _title(axis, dtype)
            continue
        moving = _draw_roofs(axis, roof, amounts, intensities)
        _title(axis, f"{dtype}: {_rate(roof.operations_per_second, 'FLOP/s')}; data {moving}")
        axis.set_xlabel("operations per byte", fontsize=8)
        axis.set_ylabel("GFLOP/s", fontsize=8)
        label_log_axis(axis.xaxis)
        label_log_axis(axis.yaxis)
    handles = [axes[0].plot([], [], "o", color=c, label=name)[0] for name, c in PASS_COLOURS.items() if name in passes]
    handles += [axes[0].plot([], [], m, color="k", label=name)[0] for name, m in MARKERS.items() if name in kinds]
    _legend(figure, handles, len(handles))
    return figure


def _rate(value: float, unit: str) -> str:
    return f"{value / 1e12:.3g} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"


def _draw_roofs(axis: Any, limits: Limits, amounts: Sequence[int], intensities: Sequence[float]) -> str:
    """A roof for each of the rates at which so much data moves; returns them in words."""
    product = limits.operations_per_second
    rates: list[float] = []
    words = []
    for amount, _ in [(min(amounts), None), *limits.bytes_per_second]:
        rate = limits.moving(amount)
        if amount <= max(amounts) and (not rates or rate < 0.9 * rates[-1]):  # nearer ones would be one line
            words.append(_rate(rate, "B/s") + (f" from {amount / 2**20:g} MiB on" if rates else ""))
            rates.append(rate)
    ends = [min(intensities) / 1.5, max(*intensities, product / rates[-1]) * 1.5]
    for i, rate in enumerate(rates):
        points = sorted([*ends, min(max(product / rate, ends[0]), ends[1])])
        axis.loglog(points, [min(x * rate, product) / 1e9 for x in points], "--" if i else "-", color="k", lw=1)
    return ", ".join(words)


def _growth(report: dict[str, Any]) -> Any:
    names = [name for name in POINTS if any(result["axis"] == name for result in report["results"])]
    rows = [row for result in report["results"] for row in result["rows"]]
    quantities = {"ms": lambda row: 1e3 * summary(row["seconds"]).median if row.get("seconds") else None}
    if any(row.get("peak_bytes") for row in rows):
        quantities["peak MiB"] = lambda row: row["peak_bytes"] / 2**20 if row.get("peak_bytes") else None
    figure, axes = _figure(report["about"]["device"], len(names) * len(quantities), 2.6, columns=len(names))
    lines: dict[str, Any] = {}
    for axis, (quantity, name) in zip(axes, ((q, name) for q in quantities for name in names), strict=True):
        found = [result for result in report["results"] if result["axis"] == name]
        for dtype in report["limits"]:
            for runner in RUNNERS:
                points = [
                    (result["workload"][name], quantities[quantity](row))
                    for result in found
                    for row in result["rows"]
                    if result["workload"]["dtype"] == dtype and row["runner"] == runner
                ]
                points = [(x, y) for x, y in points if y]
                colour, label = OUR_COLOUR if runner == OURS else PEER_COLOUR, f"{runner}, {dtype}"
                if points:
                    (lines[label],) = axis.loglog(
                        *zip(*points, strict=True), STYLES[dtype], color=colour, label=label, ms=4, lw=1
                    )
        if not axis.lines:
            _say_empty(axis)
            continue
        axis.set_xlabel(name, fontsize=8)
        axis.set_ylabel(quantity, fontsize=8)
        label_log_axis(axis.xaxis, sorted({result["workload"][name] for result in found}))
        label_log_axis(axis.yaxis)
    _legend(figure, list(lines.values()), 2)
    return figure


def _losses(report: dict[str, Any]) -> Any:
    figure, axes = _figure(report["about"]["device"], len(report["results"]), 3.2)
    lines: dict[str, Any] = {}
    for axis, result in zip(axes, report["results"], strict=True):
        for row in result["rows"]:
            epochs = [epoch["epoch"] for epoch in row["history"]]
            colour = OUR_COLOUR if is_ours(row["runner"]) else PEER_COLOUR
            for key, style, name in (("train_loss", "o-", "training"), ("val_loss", "s--", "validation")):
                label = f"{row['runner']}, {name}"
                losses = [epoch[key] for epoch in row["history"]]
                (lines[label],) = axis.plot(epochs, losses, style, color=colour, label=label, ms=4, lw=1,
                                            markevery=math.ceil(len(epochs) / 30))  # fmt: skip
        if any(loss > 0 for line in axis.lines for loss in line.get_ydata()):
            axis.set_yscale("log", nonpositive="mask")
            label_log_axis(axis.yaxis)
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        work = Workload(**result["workload"])
        axis.set_xlabel("epoch", fontsize=8)
        axis.set_ylabel("loss", fontsize=8)
        _title(axis, f"digits, {work.resolution}x{work.resolution}, batch {work.batch}, {work.dtype}")
    _legend(figure, list(lines.values()), 2)
    return figure
