"""The README's figures, from the results in ``benchmarks/results``: between two comments, and nowhere else by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import pictures, results
from benchmarks.network import DTYPES, Workload
from benchmarks.peers import OURS, is_ours
from benchmarks.table import best_peer, milliseconds, paired_ratio
from benchmarks.timing import summary

README = Path(__file__).parent.parent / "README.md"
PICTURES = {
    "each layer under the machine's limits": "kernels*.svg",
    "time and memory against batch, resolution and width": "scaling*.svg",
    "losses of a training": "curves*.svg",
}
BEGIN, END = "<!-- figures: mobilenet-ext bench readme -->", "<!-- end of figures -->"


def update(check: bool = False) -> int:
    """Draws the pictures and writes the section; 1 where ``check`` finds that it would change.

    Raises:
        ValueError: the README lacks the comments, or a result is none of ours.
    """
    text = README.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md lacks the lines {BEGIN} and {END}")
    if check:
        current = section_in(text) == text
        if not current:
            print("README.md: the figures are not those of benchmarks/results: run `mobilenet-ext bench readme`")
        return int(not current)
    for file in sorted(results.FOLDER.glob("*/*.json")):
        pictures.draw(results.read(file), file)
    README.write_text(section_in(text))  # with the links to the pictures just drawn
    print(f"written: {README}", file=sys.stderr)
    return 0


def section_in(text: str) -> str:
    """The README's text with the section of today."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section(results.FOLDER)}{END}{after}"


def section(folder: Path) -> str:
    """Markdown, a part for each device, benchmark and backend: what was measured in several runs (``training.json``,
    ``training-float32.json``) stands in one table."""
    parts = []
    for device in sorted(path for path in folder.iterdir() if path.is_dir()):
        for bench in ("training", "inference"):
            by_backend: dict[str, dict[Path, dict[str, Any]]] = {}
            for file in sorted(device.glob(f"{bench}*.json")):
                report = results.read(file)
                by_backend.setdefault(report["about"]["backend"], {})[file] = report
            for backend, reports in by_backend.items():
                parts.append(_part(reports, backend if len(by_backend) > 1 else None))
        for bench in ("training", "inference"):
            parts += [_networks(results.read(file), file) for file in device.glob(f"networks-{bench}.json")]
        for name, pattern in PICTURES.items():
            parts += [f"![{name}]({_link(file)})\n" for file in sorted(device.glob(pattern))]
    return "\n".join(parts)


def _link(path: Path) -> str:
    return path.relative_to(README.parent).as_posix()


def _part(reports: dict[Path, dict[str, Any]], backend: str | None) -> str:
    """Of reports of one benchmark by their files; ``backend`` is named where there are several."""
    report = next(iter(reports.values()))
    found = [result for each in reports.values() for result in each["results"]]
    found.sort(key=lambda result: (list(DTYPES).index(result["workload"]["dtype"]), result["workload"]["batch"]))
    works = [Workload(**result["workload"]) for result in found]
    timed_rows = (row for result in found for row in result["rows"] if row.get("seconds"))
    runners = dict.fromkeys(row["runner"] for row in timed_rows)
    versions = {row["runner"]: row.get("version") for result in found for row in result["rows"]}
    device = report["about"]["device"] + (f", backend {backend}" if backend else "")
    lines = [
        f"**{_what(report)}** of {works[0].title} on {device}: milliseconds, the median of {_rounds(found)} rounds "
        "taken in turn and the quartiles; lower is better.",
        "",
        "| | " + " | ".join(f"batch {work.batch}, {work.dtype}" for work in works) + " |",
        "|---|" + "---:|" * len(works),
    ]
    for runner in runners:
        name = f"**{runner}**" if is_ours(runner) else f"{runner} {versions[runner] or ''}".strip()
        lines.append(f"| {name} | " + " | ".join(_cell(result, runner) for result in found) + " |")
    ratios = []
    for result in found:
        best = best_peer(result["rows"])
        ours = next((row for row in result["rows"] if row["runner"] == OURS), {})
        timed = best is not None and ours.get("seconds")
        ratios.append(f"{paired_ratio(best['seconds'], ours['seconds']).median:.2f}" if timed else "")
    lines.append("| best peer / mobilenet_ext | " + " | ".join(ratios) + " |")
    for file, each in reports.items():
        picture = file.with_suffix(".svg")
        if picture.is_file():
            lines += ["", f"![{_what(report).lower()} beside the peers]({_link(picture)})"]
        lines += ["", _source(each, file)]
    return "\n".join(lines) + "\n"


def _what(report: dict[str, Any]) -> str:
    return "Training step" if report["bench"] == "training" else "Inference"


def _source(report: dict[str, Any], file: Path) -> str:
    about = report["about"]
    return f"`{report['command']}`, commit {about['commit']}, {about['date'][:10]}; raw: [{file.name}]({_link(file)})"


def _networks(report: dict[str, Any], file: Path) -> str:
    """A line for each network: the best peer's time over ours, the time and the peer."""
    found = {Workload(**result["workload"]): result for result in report["results"]}
    cells = sorted({(list(DTYPES).index(work.dtype), work.batch) for work in found})
    networks = dict.fromkeys(work.network for work in found)
    resolution = next(iter(found)).resolution
    lines = [
        f"**{_what(report)}** of networks of torchvision and timm at {resolution}x{resolution} on "
        f"{report['about']['device']}: how many times faster than the best peer, the milliseconds, and which peer that "
        "is. A peer whose output is wrong is not timed.",
        "",
        "| | " + " | ".join(f"batch {batch}, {list(DTYPES)[dtype]}" for dtype, batch in cells) + " |",
        "|---|" + "---:|" * len(cells),
    ]
    for network in networks:
        by_cell = {(list(DTYPES).index(w.dtype), w.batch): r for w, r in found.items() if w.network == network}
        lines.append(f"| `{network}` | " + " | ".join(_ratio(by_cell[cell]) for cell in cells) + " |")
    return "\n".join([*lines, "", _source(report, file)]) + "\n"


def _ratio(result: dict[str, Any]) -> str:
    best = best_peer(result["rows"])
    ours = next((row["seconds"] for row in result["rows"] if row["runner"] == OURS and "seconds" in row), None)
    if best is None or ours is None:
        return "-"
    time = milliseconds(summary(ours).median)
    return f"{paired_ratio(best['seconds'], ours).median:.2f} ({time}; {best['runner']})"


def _rounds(found: list[dict[str, Any]]) -> int:
    return max(len(row.get("seconds", [])) for result in found for row in result["rows"])


def _cell(result: dict[str, Any], runner: str) -> str:
    row = next((row for row in result["rows"] if row["runner"] == runner), {})
    if not row.get("seconds"):
        return "-"
    time = summary(row["seconds"])
    return f"{milliseconds(time.median)} ({milliseconds(time.low)} to {milliseconds(time.high)})"
