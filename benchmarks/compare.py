"""What changed between two results beyond noise."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy

from benchmarks.peers import is_ours
from benchmarks.timing import summary

CONFIDENCE = 0.99
RESAMPLES = 4000
SMALLEST = 0.05  # a smaller change is not worth a line, however sure


class Change(NamedTuple):
    workload: str
    runner: str
    before: float  # seconds, medians
    after: float
    low: float  # the interval of after / before
    high: float

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def beyond_noise(self) -> bool:
        return (self.low > 1 or self.high < 1) and abs(self.ratio - 1) >= SMALLEST


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Of the rows that both results timed. The interval is a percentile bootstrap of the ratio of medians, from a fixed
    seed (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13)."""
    old, new = _samples(before), _samples(after)
    return [_change(key, old[key], new[key]) for key in old if key in new]


def _samples(report: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    return {
        (json.dumps(result["workload"]), row["runner"]): row["seconds"]
        for result in report["results"]
        for row in result["rows"]
        if row.get("seconds")
    }


def _change(key: tuple[str, str], old: list[float], new: list[float]) -> Change:
    generator = numpy.random.default_rng(0)

    def medians(samples: list[float]) -> numpy.ndarray:
        drawn = generator.choice(numpy.array(samples), (RESAMPLES, len(samples)))
        return numpy.median(drawn, axis=1)

    low, high = numpy.quantile(medians(new) / medians(old), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Change(*key, summary(old).median, summary(new).median, float(low), float(high))


def report(before: dict[str, Any], after: dict[str, Any]) -> str:
    """For people. Peers are the control: where they change too, it is the machine and not our code."""
    rows = changes(before, after)
    if not rows:
        return "nothing in common: no workload and runner is in both files"
    lines = [f"{len(rows)} measurements in both"]
    if before["about"]["device"] != after["about"]["device"]:
        lines.append(f"different machines: {before['about']['device']} and {after['about']['device']}")
    peers = [row.ratio for row in rows if not is_ours(row.runner)]
    if peers:
        lines.append(f"the peers, as a control: after / before {summary(peers).median:.2f} (median)")
    found = sorted((row for row in rows if row.beyond_noise), key=lambda row: -abs(row.ratio - 1))
    for row in found:
        work = " ".join(str(value) for value in json.loads(row.workload).values())
        word = "slower" if row.ratio > 1 else "faster"
        lines.append(
            f"{abs(row.ratio - 1):5.0%} {word}  {row.runner}: {work}: {1e3 * row.before:.4g} to "
            f"{1e3 * row.after:.4g} ms ({CONFIDENCE:.0%} interval of the ratio {row.low:.2f} to {row.high:.2f})"
        )
    if not found:
        lines.append(f"no change of {SMALLEST:.0%} or more beyond noise")
    return "\n".join(lines)
