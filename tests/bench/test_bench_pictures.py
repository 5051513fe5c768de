"""Pictures of results of every kind, looked at by their geometry; and the limits that nothing exceeds."""

from __future__ import annotations

import json
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pictures, results, scaling, table
from benchmarks.curves import EAGER
from benchmarks.limits import Limits, limits_of
from benchmarks.network import Workload
from benchmarks.peers import NAMES, OURS

pytest.importorskip("matplotlib")

from geometry import assert_readable, drawn, tick_labels

WORK = Workload("training", 1.0, 224, 32, "float32", "cpu")
DTYPES = ("float32", "bfloat16", "float16")
LONG = "a framework with a long name, compiled with everything that its manual recommends, version"
# Slower than anything that is timed below: a machine that was busy while its limits were measured.
LIMITS = {"bytes_per_second": [[2**21, 5e9], [2**25, 2e9]], "operations_per_second": 1e10}


def report(bench: str, found: list[dict[str, Any]], device: str = "a CPU", dtypes: tuple[str, ...] = DTYPES) -> Any:
    about = {"device": device, "versions": {"torch": "2"}, "commit": "c0ffee", "date": "2026-01-01T00:00:00+00:00"}
    return {"bench": bench, "about": about, "limits": dict.fromkeys(dtypes, LIMITS), "results": found}


def bars(times: dict[str, list[float]], panels: int = 1, device: str = "a CPU") -> dict[str, Any]:
    rows = [{"runner": name, **({"seconds": of, "error": 0} if of else {"skipped": ""})} for name, of in times.items()]
    result = {"workload": WORK._asdict(), "bytes": 10**9, "operations": 10**11, "rows": rows}
    return report("training", [result] * panels, device)


def spread(median: float) -> list[float]:
    return [0.7 * median, median, 1.6 * median]


BARS = {
    "all peers": lambda: bars({name: spread(1.2**i) for i, name in enumerate(NAMES)}, 4),
    "fourteen with long names": lambda: bars({f"{LONG} {i}": spread(0.1 + 0.01 * i) for i in range(14)}, 2),
    "a long device": lambda: bars({OURS: spread(0.1)}, device="NVIDIA " + "Grace Hopper Superchip " * 8),
    "one row": lambda: bars({OURS: [0.1]}),
    "nothing timed": lambda: bars({OURS: [], "eager NCHW": []}, 2),
    "some missing": lambda: bars({OURS: spread(0.1), "eager NCHW": [], "timm": spread(0.2)}),
    "all zero": lambda: bars({OURS: [0.0], "timm": [0.0]}),
    "a zero": lambda: bars({OURS: [0.0], "timm": spread(3e-3)}),
    "six decades": lambda: bars({f"peer {i}": spread(1e-5 * 10**i) for i in range(7)}, 3),
    "hours": lambda: bars({OURS: spread(5e3), "timm": spread(1e4), "JAX": spread(1e6)}, 2),
    "microseconds": lambda: bars({OURS: spread(1e-6), "timm": spread(1.23456e-6), "JAX": spread(0.1)}, 2),
}


def kernels(scale: dict[str, float], layers: int = 12, passes: tuple[str, ...] = ("forward", "backward")) -> Any:
    """``scale``: of the times of a dtype."""
    found = []
    for dtype, factor in scale.items():
        for pass_ in passes:
            for i in range(layers):
                kind = ("dense", "depthwise", "pointwise", "block", "pool")[min(i, 4) if i < 5 else 1 + i % 2]
                moved, operations = 250_000_000 >> i, 0 if kind == "pool" else (250_000_000 >> i) * (1 + i * i)
                work = {**WORK._replace(dtype=dtype)._asdict(), "pass": pass_, "layer": f"{kind} 32-32 8x8"}
                seconds = factor * max(moved / 30e9, operations / 1e12) * (1 + i % 3)
                rows = [
                    {"runner": OURS, "seconds": spread(seconds)},
                    {"runner": "timm", "seconds": spread(2 * seconds)},
                ]
                found.append({"workload": work, "count": 1, "bytes": moved, "operations": operations, "rows": rows})
    return report("kernels", found, dtypes=tuple(scale))


ROOFLINES = {
    "training": lambda: kernels({"float32": 1, "bfloat16": 0.5}),
    "inference": lambda: kernels({"float32": 1}, passes=("inference",)),
    "three dtypes": lambda: kernels({"float32": 1, "bfloat16": 0.7, "float16": 0.6}),
    "one layer": lambda: kernels({"bfloat16": 1}, layers=1),
    "a faster machine": lambda: kernels({"float32": 1e-3, "bfloat16": 1e-4}),
    "a slower machine than measured": lambda: kernels({"float32": 1e3, "bfloat16": 1e2}),
    "a dtype without results": lambda: {**kernels({"float32": 1}), "limits": dict.fromkeys(DTYPES, LIMITS)},
    "no layer of ours": lambda: without(kernels({"float32": 1}), OURS),
}


def without(found: Any, runner: str) -> Any:
    for result in found["results"]:
        result["rows"] = [row for row in result["rows"] if row["runner"] != runner]
    return found


def growth(
    base: float = 1e-3, power: float = 1.0, peak: int | None = 2**20, keep: int = 100, dtypes: Any = DTYPES
) -> Any:
    """Times of ``base * operations ** power``; of each axis the first ``keep`` points."""
    found = []
    for dtype in dtypes:
        for axis, values in scaling.POINTS.items():
            for value in values[:keep]:
                work = WORK._replace(**{axis: value}, dtype=dtype)
                seconds = base * (value / values[0]) ** power
                rows = [{"runner": OURS, "seconds": spread(seconds), "peak_bytes": peak},
                        {"runner": scaling.RUNNERS[1], "seconds": spread(3 * seconds), "peak_bytes": peak}]  # fmt: skip
                found.append(
                    {"axis": axis, "workload": work._asdict(), "bytes": 10**6, "operations": 10**9, "rows": rows}
                )
    return report("scaling", found, dtypes=dtypes)


GROWTHS = {
    "as measured": lambda: growth(dtypes=("float32", "bfloat16")),
    "three dtypes": lambda: growth(),
    "six decades": lambda: growth(base=1e-5, power=3.5),
    "hardly any growth": lambda: growth(base=0.2, power=0.01),
    "one point": lambda: growth(keep=1),
    "no memory": lambda: growth(peak=None),
    "no memory used": lambda: growth(peak=0),
    "ours missing": lambda: without(growth(), OURS),
    "cut off": lambda: {**growth(dtypes=("float32",)), "results": growth(dtypes=("float32",))["results"][:9]},
}


def losses(*history: float, panels: int = 1) -> dict[str, Any]:
    epochs = [{"epoch": i + 1, "train_loss": loss, "val_loss": 1.5 * loss} for i, loss in enumerate(history)]
    rows = [{"runner": name, "history": epochs} for name in (OURS, EAGER)]
    return report("curves", [{"workload": WORK._asdict(), "rows": rows}] * panels)


LOSSES = {
    "ten epochs": lambda: losses(*(2.3 / (i + 1) for i in range(10)), panels=2),
    "less than a decade": lambda: losses(*(2.3 - 0.1 * i for i in range(5))),
    "nearly flat": lambda: losses(2.301, 2.3005, 2.3, panels=3),
    "six decades": lambda: losses(*(10 ** -i for i in range(7))),
    "twelve decades": lambda: losses(*(1e6 * 10 ** -i for i in range(13)), panels=2),
    "one epoch": lambda: losses(2.3),
    "a zero": lambda: losses(2.3, 0.5, 0.0, 0.1),
    "all zero": lambda: losses(0.0, 0.0),
    "not finite": lambda: losses(2.3, math.nan, math.inf, 0.1),
    "hundreds of epochs": lambda: losses(*(2.3 / (i + 1) for i in range(400))),
}  # fmt: skip
KINDS = {"bars": BARS, "roofline": ROOFLINES, "growth": GROWTHS, "losses": LOSSES}
CASES = {f"{kind}, {name}": make for kind, cases in KINDS.items() for name, make in cases.items()}
# Two of each kind; the corners of the others are slow.
ORDINARY = {f"{kind}, {name}" for kind, cases in KINDS.items() for name in list(cases)[:2]}


def picture(monkeypatch: pytest.MonkeyPatch, found: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return drawn(monkeypatch, lambda: pictures.draw(found, folder / "x.json"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ORDINARY else pytest.mark.slow) for name in CASES]
)
def test_pictures_are_right(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = picture(monkeypatch, CASES[name](), tmp_path)
    assert_readable(figure)
    if name.startswith("roofline") and "no layer of ours" not in name:
        assert any(axes.axison for axes in figure.axes)
        assert all(under_its_roof(axes) for axes in figure.axes if axes.axison)


@pytest.mark.parametrize("file", sorted(results.FOLDER.glob("*/*.json")), ids=lambda file: file.stem)
def test_the_pictures_of_this_checkout_are_right(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if file.stem.startswith("networks-"):
        assert pictures.draw(results.read(file), tmp_path / "x.json") == []
        return
    figure = picture(monkeypatch, results.read(file), tmp_path)
    assert_readable(figure)
    if file.stem.startswith("kernels"):
        assert all(under_its_roof(axes) for axes in figure.axes)


def under_its_roof(axes: Any) -> bool:
    """Whether every dot is on or under the highest of the lines, at its intensity."""
    (roof,) = [line for line in axes.lines if line.get_linestyle() == "-"]
    dots = [line.get_xydata()[0] for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xydata())]
    xs, ys = ([math.log(value) for value in values] for values in (roof.get_xdata(), roof.get_ydata()))

    def height(x: float) -> float:
        i = next(i for i in range(1, len(xs)) if x <= xs[i])
        return ys[i - 1] + (x - xs[i - 1]) / (xs[i] - xs[i - 1]) * (ys[i] - ys[i - 1])

    assert dots
    return all(math.log(y) <= height(math.log(x)) + 1e-6 for x, y in dots)


@pytest.mark.parametrize("name", [n for n in (*ROOFLINES, *BARS) if "zero" not in n and n != "no layer of ours"])
def test_nothing_reaches_more_than_its_limit(name: str) -> None:
    found = {**ROOFLINES, **BARS}[name]()
    shares = [word for word in table.tables(found).split() if word.endswith("%")]
    assert shares or name == "nothing timed"
    assert all(0 <= float(share[:-1]) <= 100 for share in shares)


def test_nothing_of_this_checkout_reaches_more_than_its_limit() -> None:
    files = [file for file in results.FOLDER.glob("*/*.json") if json.loads(file.read_text())["bench"] != "curves"]
    for file in files:
        found = results.read(file)
        limits = limits_of(found)
        for result in found["results"]:
            for row in result["rows"]:
                if row.get("seconds") and result["bytes"]:  # which nobody counts of other people's networks
                    share = limits[result["workload"]["dtype"]].share(result, statistics.median(row["seconds"]))
                    assert 0 < share <= 1 + 1e-9, (file, row["runner"], result["workload"])


def test_a_limit_depends_on_the_amount_of_data() -> None:
    limits = Limits(((100, 50.0), (1000, 10.0)), 1e3)
    assert [limits.moving(amount) for amount in (1, 100, 999, 1000, 10**6)] == [50, 50, 50, 10, 10]
    assert limits.seconds(100, 0) == 2 and limits.seconds(1000, 0) == 100 and limits.seconds(100, 10**6) == 1e3
    # Less data than a cache holds cannot be slower to move than more: the call itself takes the time.
    assert Limits(((100, 5.0), (1000, 10.0)), 1e3).moving(100) == 10


def test_what_exceeds_a_limit_raises_it() -> None:
    limits = Limits(((100, 50.0), (1000, 10.0)), 1e3)
    assert limits.raised(1000, 0, 200.0) == limits, "slower than the limit"
    more = limits.raised(1000, 0, 50.0)
    assert more.moving(1000) == 20 and more.moving(100) == 50 and more.operations_per_second == 1e3
    assert limits.raised(1000, 0, 10.0).moving(100) == 100, "what more data can do, less can"
    assert limits.raised(10, 10**6, 100.0) == Limits(limits.bytes_per_second, 1e4)


def test_a_bar_that_is_cut_off_shows_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (axes,) = picture(monkeypatch, bars({OURS: [0.1], "timm": [0.2], "JAX": [18.0]}), tmp_path).axes
    assert [text.get_text().strip() for text in axes.texts] == ["→ 18000", "200", "100"]
    assert max(bar.get_width() for bar in axes.patches) <= axes.get_xlim()[1] < 1000


def test_growth_has_the_measured_points_as_ticks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = picture(monkeypatch, growth(), tmp_path)
    assert [axes.get_xlabel() for axes in figure.axes] == 2 * list(scaling.POINTS)
    for axes, values in zip(figure.axes, 2 * list(scaling.POINTS.values()), strict=True):
        assert [float(label.get_text()) for label in tick_labels(axes.xaxis)] == list(values)
    styles = {(line.get_linestyle(), line.get_color()) for line in figure.axes[0].lines}
    assert len(styles) == 2 * len(DTYPES), "two lines look the same"
