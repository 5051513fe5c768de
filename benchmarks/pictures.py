"""Results as pictures: bars against peers, a roofline with a dot for each layer, growth with the work, losses."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.network import Workload
from benchmarks.peers import OURS, is_ours
from benchmarks.scaling import POINTS, RUNNERS
from benchmarks.table import milliseconds
from benchmarks.timing import summary

OUR_COLOUR, PEER_COLOUR = "#c2410c", "#94a3b8"
PASS_COLOURS = {"forward": "#2563eb", "backward": "#7c3aed", "inference": "#059669"}
MARKERS = {"stem": "s", "depthwise": "o", "pointwise": "^", "block": "D", "pool": "v"}


def draw(report: dict[str, Any], json_file: Path) -> list[Path]:
    """Writes the pictures of a result beside its JSON file, and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mobilenet_ext"  # the same result gives the same file
    draw_one = {"kernels": _roofline, "scaling": _growth, "curves": _losses}.get(report["bench"], _bars)
    figure = draw_one(report)
    path = json_file.with_suffix(".svg")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    return [path]


def _figure(columns: int, width: float, height: float):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    plt.close(figure)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _bars(report: dict[str, Any]):
    figure, axes = _figure(len(report["results"]), 4.2, 3.2)
    for axis, result in zip(axes, report["results"], strict=True):
        rows = [row for row in result["rows"] if row.get("seconds")]
        times = [summary(row["seconds"]) for row in rows]
        rows = sorted(zip(times, rows, strict=True), key=lambda pair: -pair[0].median)
        # A runner many times slower than the others would leave them no room: its bar is cut off.
        middle = statistics.median(time.median for time, _ in rows)
        end = 1e3 * max(time.high for time, _ in rows if time.median <= 4 * middle)
        for i, (time, row) in enumerate(rows):
            spread = [[1e3 * (time.median - time.low)], [1e3 * (time.high - time.median)]]
            colour = OUR_COLOUR if is_ours(row["runner"]) else PEER_COLOUR
            axis.barh(i, 1e3 * time.median, xerr=spread, color=colour, ecolor="#475569")
            axis.text(min(1e3 * time.high, end), i, f"  {milliseconds(time.median)}", va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), [row["runner"] for _, row in rows], fontsize=8)
        axis.set_xlabel("ms, median and quartiles")
        axis.set_xlim(0, 1.2 * end)
        work = Workload(**result["workload"])
        axis.set_title(f"{work.task}, batch {work.batch}, {work.dtype}", fontsize=10)
    figure.suptitle(report["about"]["device"], fontsize=9)
    figure.tight_layout()
    return figure


def _roofline(report: dict[str, Any]):
    dtypes = list(report["limits"])
    figure, axes = _figure(len(dtypes), 5.5, 4)
    for axis, dtype in zip(axes, dtypes, strict=True):
        limits = report["limits"][dtype]
        copy, product = limits["bytes_per_second"], limits["operations_per_second"]
        found = [result for result in report["results"] if result["workload"]["dtype"] == dtype]
        intensities = []
        for result in found:
            kind, pass_ = result["workload"]["layer"].split()[0], result["workload"]["pass"]
            row = next(row for row in result["rows"] if row["runner"] == OURS)
            intensity = result["operations"] / result["bytes"]
            if intensity:
                rate = result["operations"] / summary(row["seconds"]).median
                axis.loglog(intensity, rate / 1e9, MARKERS[kind], color=PASS_COLOURS[pass_], markersize=5, alpha=0.8)
                intensities.append(intensity)
        ends = [min(intensities) / 1.5, max(*intensities, product / copy) * 1.5]
        corner = product / copy
        axis.loglog([ends[0], corner, ends[1]], [ends[0] * copy / 1e9, product / 1e9, product / 1e9], "k-", lw=1)
        axis.set_xlabel("operations a byte")
        axis.set_ylabel("GFLOP/s")
        axis.set_title(f"{dtype}: copy {copy / 1e9:.0f} GB/s, product {product / 1e9:.0f} GFLOP/s", fontsize=10)
        handles = [axis.plot([], [], "o", color=c, label=name)[0] for name, c in PASS_COLOURS.items()]
        handles += [axis.plot([], [], m, color="k", label=name)[0] for name, m in MARKERS.items() if name != "pool"]
        axis.legend(handles=handles, fontsize=7, frameon=False, loc="lower right")
    figure.suptitle(f"each layer's kernel under the machine's limits; {report['about']['device']}", fontsize=9)
    figure.tight_layout()
    return figure


def _growth(report: dict[str, Any]):
    figure, axes = _figure(len(POINTS), 3.8, 3)
    for axis, name in zip(axes, POINTS, strict=True):
        for dtype in report["limits"]:
            found = [r for r in report["results"] if r["axis"] == name and r["workload"]["dtype"] == dtype]
            for runner in RUNNERS:
                points = [
                    (result["operations"] / 1e9, 1e3 * summary(row["seconds"]).median)
                    for result in found
                    for row in result["rows"]
                    if row["runner"] == runner and row.get("seconds")
                ]
                style = "o-" if dtype == "float32" else "s--"
                colour = OUR_COLOUR if runner == OURS else PEER_COLOUR
                axis.loglog(*zip(*points, strict=True), style, color=colour, label=f"{runner}, {dtype}", ms=4, lw=1)
        axis.set_xlabel(f"GFLOP, by {name}")
        axis.set_ylabel("ms")
    axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(report["about"]["device"], fontsize=9)
    figure.tight_layout()
    return figure


def _losses(report: dict[str, Any]):
    figure, axes = _figure(len(report["results"]), 5, 3.4)
    for axis, result in zip(axes, report["results"], strict=True):
        for row in result["rows"]:
            epochs = [epoch["epoch"] for epoch in row["history"]]
            colour = OUR_COLOUR if is_ours(row["runner"]) else PEER_COLOUR
            for key, style, name in (("train_loss", "o-", "training"), ("val_loss", "s--", "validation")):
                losses = [epoch[key] for epoch in row["history"]]
                axis.semilogy(epochs, losses, style, color=colour, label=f"{row['runner']}, {name}", ms=4, lw=1)
        work = Workload(**result["workload"])
        axis.set_xlabel("epoch")
        axis.set_ylabel("loss")
        axis.set_title(f"digits, {work.resolution}x{work.resolution}, batch {work.batch}, {work.dtype}", fontsize=10)
        axis.legend(fontsize=7, frameon=False)
    figure.suptitle(report["about"]["device"], fontsize=9)
    figure.tight_layout()
    return figure
