"""Results as tables for people."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.curves import curves_lines
from benchmarks.limits import Limits, limits_of
from benchmarks.network import Workload
from benchmarks.peers import OURS, is_ours
from benchmarks.scaling import scaling_lines
from benchmarks.timing import Summary, summary


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 1 else f"{1e3 * seconds:.4g}"


def one_line(rows: list[dict[str, Any]]) -> str:
    """The times of a result while it is not yet a table."""
    found = []
    for row in rows:
        time = f"{milliseconds(summary(row['seconds']).median)} ms" if row.get("seconds") else row.get("refused")
        found.append(f"{row['runner']}: {time or 'skipped'}")
    return "; ".join(found)


def best_peer(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest row that is not ours."""
    timed = [row for row in rows if "seconds" in row and not is_ours(row["runner"])]
    return min(timed, key=lambda row: summary(row["seconds"]).median, default=None)


def paired_ratio(slower: list[float], faster: list[float]) -> Summary:
    """Of samples that were taken in the same rounds."""
    return summary([a / b for a, b in zip(slower, faster, strict=True)])


def aligned(lines: list[list[str]]) -> str:
    """Columns side by side, the first to the left and the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)


def heading(report: dict[str, Any]) -> str:
    about = report["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"{about['device']}; {versions}; commit {about['commit']}; {about['date']}"]
    for dtype, limits in limits_of(report).items():
        first, *others = (amount for amount, _ in limits.bytes_per_second)
        moving = [f"data {limits.moving(first) / 1e9:.1f} GB/s"]
        moving += [f"from {amount / 2**20:g} MiB on {limits.moving(amount) / 1e9:.1f}" for amount in others]
        lines.append(f"limits: {dtype} {limits.operations_per_second / 1e9:.0f} GFLOP/s; {', '.join(moving)}")
    return "\n".join(lines)


def comparison_table(result: dict[str, Any], limits: Limits) -> str:
    """One workload: time, spread, ratio to the fastest peer (above 1: faster than it), share of the limit, memory; on a
    GPU also a call's time alone, and until the host has launched it."""
    rows, best = result["rows"], best_peer(result["rows"])
    lines = [["", "ms", "quartiles", "best peer / it", "of limit", "peak MiB", "error"]]
    on_gpu = any("host_seconds" in row for row in rows)
    lines[0] += ["alone ms", "host ms"] if on_gpu else []
    notes = []
    for row in rows:
        if "seconds" not in row:
            notes.append(f"{row['runner']}: {'skipped, ' + row['skipped'] if 'skipped' in row else row['refused']}")
            continue
        time = summary(row["seconds"])
        ratio = f"{paired_ratio(best['seconds'], row['seconds']).median:.2f}" if best else ""
        peak = row.get("peak_bytes")
        lines.append(
            [
                row["runner"],
                milliseconds(time.median),
                f"{milliseconds(time.low)} to {milliseconds(time.high)}",
                ratio,
                f"{limits.share(result, time.median):.0%}" if result["bytes"] else "",
                f"{peak / 2**20:.0f}" if peak is not None else "",
                f"{row['error']:.0e}",
            ]
        )
        if on_gpu:
            lines[-1] += [milliseconds(summary(row[key]).median) for key in ("alone_seconds", "host_seconds")]
    return "\n".join([str(Workload(**result["workload"])), aligned(lines), *notes])


def kernels_table(report: dict[str, Any]) -> str:
    """A line a layer: our time and its share of the pass, our rates, our time on other backends, how much longer each
    peer takes, and what was predicted."""
    passes: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for result in report["results"]:
        work = result["workload"]
        passes.setdefault((work["pass"], work["dtype"], work["batch"]), []).append(result)
    blocks, limits_by_dtype = [], limits_of(report)
    for (pass_, dtype, batch), found in passes.items():
        limits = limits_by_dtype[dtype]
        names = [row["runner"] for row in found[0]["rows"] if row["runner"] != OURS]
        others, peers = ([name for name in names if is_ours(name) == own] for own in (True, False))
        model = [predicted(result["workload"]) for result in found]
        timed = [result for result in found if _row(result, OURS)["seconds"]]
        times = [summary(_row(result, OURS)["seconds"]).median for result in timed]
        total = sum(time * result["count"] for time, result in zip(times, timed, strict=True))
        lines = [["", "n", "ms", "of pass", "MB", "GB/s", "GFLOP/s", "of limit"]]
        lines[0] += [f"{name}: ms" for name in others] + [f"{peer} / it" for peer in peers]
        lines[0] += ["predicted for an H100: ms"] if any(model) else []
        notes = []
        for result, seconds in zip(found, model, strict=True):
            own = _row(result, OURS)["seconds"]
            rates = ["refused", "", f"{result['bytes'] / 1e6:.0f}", "", "", ""]
            if own:
                time = summary(own).median
                rates = [
                    milliseconds(time),
                    f"{time * result['count'] / total:.1%}",
                    f"{result['bytes'] / 1e6:.0f}",
                    f"{result['bytes'] / time / 1e9:.1f}",
                    f"{result['operations'] / time / 1e9:.0f}",
                    f"{limits.share(result, time):.0%}",
                ]
            line = [result["workload"]["layer"], str(result["count"]), *rates]
            for name in (*others, *peers):
                theirs = _row(result, name).get("seconds")
                if not theirs:
                    line.append("refused")
                elif name in others:
                    line.append(milliseconds(summary(theirs).median))
                else:
                    line.append(f"{paired_ratio(theirs, own).median:.2f}" if own else "")
            if any(model):
                line.append(milliseconds(seconds) if seconds else "")
            lines.append(line)
            refused = [row for row in result["rows"] if "refused" in row]
            notes += [f"{result['workload']['layer']}, {row['runner']}: {row['refused']}" for row in refused]
        limit = sum(limits.seconds(result["bytes"], result["operations"]) * result["count"] for result in timed)
        share = f"{milliseconds(total)} ms, {limit / total:.0%} of the limit" if timed else "refused"
        blocks.append("\n".join([f"{pass_}, {dtype}, batch {batch}: {share}", aligned(lines), *notes]))
    return "\n\n".join(blocks)


@cache
def _prediction() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("predicted.json").read_text())


def predicted(workload: dict[str, Any]) -> float | None:
    """Seconds that a model of the kernels gives for a layer's pass, where it was asked for such a workload."""
    model = _prediction()
    if any(workload[key] != value for key, value in model["workload"].items()):
        return None
    microseconds = model["microseconds"][workload["pass"]].get(workload["layer"])
    return None if microseconds is None else 1e-6 * microseconds


def _row(result: dict[str, Any], runner: str) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["runner"] == runner)


def tables(report: dict[str, Any]) -> str:
    """All of a result."""
    if report["bench"] == "kernels":
        return "\n" + kernels_table(report)
    if report["bench"] == "scaling":
        return "\n" + aligned(scaling_lines(report["results"]))
    if report["bench"] == "curves":
        return "\n" + aligned(curves_lines(report["results"]))
    limits = limits_of(report)
    parts = (comparison_table(result, limits[result["workload"]["dtype"]]) for result in report["results"])
    return "\n" + "\n\n".join(parts)
