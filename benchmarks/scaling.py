"""How time and memory grow with the batch, the resolution and the width."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.comparison import Effort, compare_runners
from benchmarks.network import Workload
from benchmarks.peers import OURS
from benchmarks.timing import summary

RUNNERS = (OURS, "eager channels_last")
POINTS: dict[str, tuple[float, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "resolution": (96, 128, 160, 192, 224, 288),
    "width": (0.25, 0.5, 0.75, 1.0),
}


def measure_scaling(work: Workload, effort: Effort) -> Iterator[dict[str, Any]]:
    """A result as of ``comparison.compare_runners`` for each point, one setting of ``work`` changed at a time; ``axis``
    names it."""
    for axis, values in POINTS.items():
        for value in values:
            point = work._replace(**{axis: value})
            print(point, file=sys.stderr, flush=True)
            yield {"axis": axis, **compare_runners(point, RUNNERS, effort)}


def scaling_lines(results: list[dict[str, Any]]) -> list[list[str]]:
    """Time for the work: nanoseconds a thousand operations, and bytes of peak memory a byte that is moved."""
    lines = [["", "GFLOP", *(f"{name}: ms" for name in RUNNERS), *(f"{name}: GFLOP/s" for name in RUNNERS)]]
    lines[0] += [f"{name}: peak MiB" for name in RUNNERS]
    for result in results:
        rows = {row["runner"]: row for row in result["rows"]}
        times = [summary(rows[name]["seconds"]).median if "seconds" in rows[name] else None for name in RUNNERS]
        peaks = [rows[name].get("peak_bytes") for name in RUNNERS]
        operations = result["operations"]
        lines.append(
            [
                f"{result['axis']} {result['workload'][result['axis']]:g}",
                f"{operations / 1e9:.2f}",
                *("" if t is None else f"{1e3 * t:.4g}" for t in times),
                *("" if t is None else f"{operations / t / 1e9:.0f}" for t in times),
                *("" if p is None else f"{p / 2**20:.0f}" for p in peaks),
            ]
        )
    return lines
