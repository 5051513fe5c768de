"""Results as tables for people."""

from __future__ import annotations

from typing import Any

from benchmarks.curves import curves_lines
from benchmarks.limits import Limits, limits_of
from benchmarks.network import Workload
from benchmarks.peers import OURS, is_ours
from benchmarks.scaling import scaling_lines
from benchmarks.timing import Summary, summary


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 1 else f"{1e3 * seconds:.4g}"


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
    """One workload: time, spread, ratio to the fastest peer (above 1: faster than it), share of the limit, memory."""
    rows, best = result["rows"], best_peer(result["rows"])
    lines = [["", "ms", "quartiles", "best peer / it", "of limit", "peak MiB", "error"]]
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
                f"{limits.share(result, time.median):.0%}",
                f"{peak / 2**20:.0f}" if peak is not None else "",
                f"{row['error']:.0e}",
            ]
        )
    return "\n".join([str(Workload(**result["workload"])), aligned(lines), *notes])


def kernels_table(report: dict[str, Any]) -> str:
    """A line a layer: our time and its share of the pass, our rates, and how much longer each peer takes."""
    passes: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for result in report["results"]:
        work = result["workload"]
        passes.setdefault((work["pass"], work["dtype"], work["batch"]), []).append(result)
    blocks, limits_by_dtype = [], limits_of(report)
    for (pass_, dtype, batch), found in passes.items():
        limits = limits_by_dtype[dtype]
        peers = [row["runner"] for row in found[0]["rows"] if row["runner"] != OURS]
        ours = [summary(_row(result, OURS)["seconds"]).median for result in found]
        total = sum(time * result["count"] for time, result in zip(ours, found, strict=True))
        lines = [["", "n", "ms", "of pass", "GB/s", "GFLOP/s", "of limit", *(f"{peer} / it" for peer in peers)]]
        for time, result in zip(ours, found, strict=True):
            ratios = []
            for peer in peers:
                row = _row(result, peer)
                own = _row(result, OURS)["seconds"]
                ratios.append(f"{paired_ratio(row['seconds'], own).median:.2f}" if row.get("seconds") else "refused")
            lines.append(
                [
                    result["workload"]["layer"],
                    str(result["count"]),
                    milliseconds(time),
                    f"{time * result['count'] / total:.1%}",
                    f"{result['bytes'] / time / 1e9:.1f}",
                    f"{result['operations'] / time / 1e9:.0f}",
                    f"{limits.share(result, time):.0%}",
                    *ratios,
                ]
            )
        limit = sum(limits.seconds(result["bytes"], result["operations"]) * result["count"] for result in found)
        title = f"{pass_}, {dtype}, batch {batch}: {milliseconds(total)} ms, {limit / total:.0%} of the limit"
        blocks.append(f"{title}\n{aligned(lines)}")
    return "\n\n".join(blocks)


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
