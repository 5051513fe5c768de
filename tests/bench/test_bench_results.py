"""What is done with results: files, comparisons of two, pictures, the README."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import mobilenet_ext.cli as command_line
from benchmarks import cli, compare, curves, kernels, limits, pictures, readme, results, scaling, table
from benchmarks.network import Workload
from benchmarks.peers import CAPTURED, OURS
from mobilenet_ext.cli import bench
from mobilenet_ext.train.recipe import Recipe
from mobilenet_ext.train.run import RunOptions, RunResult
from mobilenet_ext.untouched import is_untouched

WORK = Workload("training", 1.0, 224, 32, "float32", "cpu")
ABOUT = {
    "device": "a CPU",
    "backend": "cpu",
    "versions": {"torch": "2"},
    "commit": "c0ffee",
    "date": "2026-01-01T00:00:00+00:00",
}


def samples(median: float, seed: int, spread: float = 0.05, rounds: int = 9) -> list[float]:
    """As a shared machine gives them: some per cent apart, now and then one far off."""
    generator = random.Random(seed)
    times = [median * (1 + generator.gauss(0, spread)) for _ in range(rounds)]
    times[generator.randrange(rounds)] *= 1.5
    return times


def report(seed: int, ours: float = 1.0, peer: float = 2.0, work: Workload = WORK) -> dict[str, Any]:
    rows = [
        {"runner": OURS, "version": "1", "error": 1e-6, "seconds": samples(ours, seed), "peak_bytes": 2**20},
        {"runner": "eager", "version": "2", "error": 1e-6, "seconds": samples(peer, seed + 1000)},
        {"runner": "absent", "version": None, "skipped": "absent is not installed"},
    ]
    result = {"workload": work._asdict(), "bytes": 10, "operations": 20, "rows": rows}
    limits = {"float32": {"bytes_per_second": [[0, 1e9]], "operations_per_second": 1e10}}
    return {
        "format": results.FORMAT, "bench": work.task, "about": ABOUT, "limits": limits, "results": [result],
        "command": "mobilenet-ext bench training",
    }  # fmt: skip


def test_a_slowdown_of_a_fifth_is_reported_and_noise_is_not() -> None:
    found = missed = false = 0
    for seed in range(100):
        slower = compare.changes(report(seed), report(seed + 5000, ours=1.2))
        found += sum(c.beyond_noise for c in slower if c.runner == OURS)
        missed += sum(not c.beyond_noise for c in slower if c.runner == OURS)
        same = compare.changes(report(seed), report(seed + 5000))
        false += sum(c.beyond_noise for c in same)
    assert found >= 95, f"{missed} of 100 planted slowdowns missed"
    assert false <= 6, f"{false} of 200 unchanged measurements reported"


def test_the_report_names_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    results.write(before, report(1))
    results.write(after, report(2, ours=1.2))
    assert cli.main(["compare", str(before), str(after)]) == 0
    text = capsys.readouterr().out
    assert f"slower  {OURS}: training 1.0 224 32 float32 cpu" in text and "eager:" not in text
    results.write(after, report(2))
    cli.main(["compare", str(before), str(after)])
    assert "no change of 5% or more beyond noise" in capsys.readouterr().out
    assert "faster" in compare.report(report(1, ours=1.5), report(2))


def test_nothing_in_common_and_other_machines_are_said() -> None:
    assert "nothing in common" in compare.report(report(1), report(2, work=WORK._replace(batch=1)))
    other = report(2)
    other["about"] = {**ABOUT, "device": "another CPU"}
    assert "different machines" in compare.report(report(1), other)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 2}', b"\xff"])
def test_files_of_others_are_refused(tmp_path: Path, text: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    assert cli.main(["compare", str(path), str(path)]) == 1
    assert one_line(capsys).startswith(f"mobilenet-ext bench: {path}: not ")


def test_results_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results.write(tmp_path / "result.json", report(1))
    for path, why in ((tmp_path / "missing.json", "No such file or directory"), (tmp_path, "Is a directory")):
        assert cli.main(["compare", str(tmp_path / "result.json"), str(path)]) == 1
        assert one_line(capsys) == f"mobilenet-ext bench: cannot read the result {path}: {why}"


def test_a_result_that_cannot_be_written_is_refused_before_the_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*arguments: Any) -> None:
        raise AssertionError("measures first")

    monkeypatch.setattr(limits, "measure_limits", measure)
    (tmp_path / "file").touch()
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "file" / "x.json", "(File exists|Not a directory)")):
        assert cli.main(["kernels", "--device", "cpu", "--json", str(path)]) == 1
        assert re.fullmatch(f"mobilenet-ext bench: cannot write the result {path}: {why}", one_line(capsys))
    monkeypatch.setattr(results, "FOLDER", tmp_path / "file")
    assert cli.main(["kernels", "--device", "cpu", "--save"]) == 1
    assert "cannot write the result" in one_line(capsys)
    with pytest.raises(AssertionError, match="measures first"):
        cli.main(["kernels", "--device", "cpu", "--json", str(tmp_path / "new" / "x.json")])
    assert list((tmp_path / "new").iterdir()) == []


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_captured_run_of_ours_is_no_peer() -> None:
    rows = report(1, ours=2.0, peer=3.0)["results"][0]["rows"]
    best = table.best_peer([*rows, {"runner": CAPTURED, "seconds": samples(1.0, 7)}])
    assert best is not None and best["runner"] == "eager"


def kernels_report() -> dict[str, Any]:
    layers = []
    for pass_ in ("forward", "backward", "inference"):
        for layer, operations in (("depthwise 32-32 8x8", 50), ("pointwise 32-64 8x8", 5000), ("pool 8-8 2x2", 0)):
            work = {**WORK._asdict(), "pass": pass_, "layer": layer}
            rows = [{"runner": OURS, "error": 0.0, "seconds": [1e-6, 2e-6]}]
            layers.append({"workload": work, "count": 1, "bytes": 100, "operations": operations, "rows": rows})
    return {**report(1), "bench": "kernels", "results": layers}


def scaling_report() -> dict[str, Any]:
    points = []
    for axis, values in scaling.POINTS.items():
        for value in values:
            (result,) = report(1, work=WORK._replace(**{axis: value}))["results"]
            result["rows"][1]["runner"] = scaling.RUNNERS[1]
            points.append({"axis": axis, **result, "operations": 1000 * value})
    return {**report(1), "bench": "scaling", "results": points}


def curves_report() -> dict[str, Any]:
    epoch = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.5, "val_accuracy": 0.25, "seconds": 1.0}
    history = [epoch, {**epoch, "epoch": 2, "train_loss": 1.0}]
    rows = [{"runner": name, "history": history} for name in (OURS, curves.EAGER)]
    return {**report(1), "bench": "curves", "results": [{"workload": WORK._asdict(), "rows": rows}]}


@pytest.mark.parametrize(
    "make",
    [lambda: report(1), kernels_report, scaling_report, curves_report],
    ids=["bars", "roofline", "growth", "losses"],
)
def test_pictures(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, again = (pictures.draw(make(), tmp_path / f"{name}.json")[0].read_text() for name in ("a", "b"))
    assert first == again and "<svg" in first and "a CPU" in first


def test_curves_are_of_the_fused_and_of_the_plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    fusing, recipes = [], []

    def run(recipe: Recipe, out: str, options: RunOptions) -> RunResult:
        fusing.append(is_untouched(nn.ReLU()))
        recipes.append(recipe)
        return RunResult(Path(out), 1, [{"epoch": 1}], False)

    monkeypatch.setattr(curves, "run_training", run)
    result = curves.compare_training(WORK._replace(dtype="bfloat16"), epochs=3)
    assert [row["runner"] for row in result["rows"]] == [OURS, curves.EAGER] and fusing == [True, False]
    assert is_untouched(nn.ReLU()), "the hook is gone"
    assert recipes[0] == recipes[1] and recipes[0].amp == "bf16" and recipes[0].epochs == 3
    assert curves.curves_lines(curves_report()["results"])[1] == [
        f"{OURS}, float32", "2", "1.0000", "2.5000", "0.2500", "1.00"
    ]  # fmt: skip
    assert "validation accuracy" in table.tables(curves_report())


def test_the_readme_is_written_from_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    monkeypatch.setattr(readme, "README", file)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    file.write_text("no section")
    with pytest.raises(ValueError, match="lacks the lines"):
        readme.update()
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    results.write(tmp_path / "results" / "a-cpu" / "training.json", report(1))
    assert readme.update(check=True) == 1
    pytest.importorskip("matplotlib")
    assert readme.update() == 0 and readme.update(check=True) == 0
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| best peer / mobilenet_ext | 2" in text or "| best peer / mobilenet_ext | 1.9" in text
    assert "absent" not in text and "(results/a-cpu/training.json)" in text and "(results/a-cpu/training.svg)" in text


def test_runs_of_one_benchmark_share_a_table_and_backends_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    for name, backend, batch in (("", "triton", 256), ("-1", "triton", 1), ("-cuda", "cuda", 256)):
        found = report(1, work=WORK._replace(batch=batch))
        found["about"] = {**ABOUT, "backend": backend}
        results.write(tmp_path / "results" / "a-gpu" / f"training{name}.json", found)
    text = readme.section(tmp_path / "results")
    assert text.count("**Training step**") == 2 and "a CPU, backend triton:" in text and "a CPU, backend cuda:" in text
    assert "| | batch 1, float32 | batch 256, float32 |" in text and "| | batch 256, float32 |" in text
    assert all(f"(results/a-gpu/training{name}.json)" in text for name in ("", "-1", "-cuda"))


def test_the_readme_of_a_result_that_is_of_peers_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    found = report(1)
    found["results"][0]["rows"] = [row for row in found["results"][0]["rows"] if row["runner"] != OURS]
    results.write(tmp_path / "results" / "a-cpu" / "training.json", found)
    text = readme.section(tmp_path / "results")
    assert "eager" in text and "**mobilenet_ext**" not in text and "| best peer / mobilenet_ext |  |" in text


def test_the_readme_of_this_checkout_is_current() -> None:
    assert readme.update(check=True) == 0


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "inference.json"
    options = "--device cpu --width 0.25 --resolution 33 --batch 1 2 --dtype float32 --rounds 2 --no-memory".split()
    chosen = ["--peers", OURS, "eager channels_last", "--json", str(path)]
    assert command_line.main(["bench", "inference", *options, *chosen]) == 0
    saved = results.read(path)
    assert [r["workload"]["batch"] for r in saved["results"]] == [1, 2]
    assert {"device", "versions", "commit", "date"} <= set(saved["about"]) and saved["limits"]["float32"]
    assert saved["command"].startswith("mobilenet-ext bench inference --device cpu")
    assert "'eager channels_last'" in saved["command"] and "best peer / it" in capsys.readouterr().out
    assert compare.changes(saved, json.loads(path.read_text()))[0].ratio == 1


def test_a_run_that_is_cut_off_leaves_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    options = "--device cpu --width 0.25 --resolution 33 --batch 1 --dtype float32 --passes forward --rounds 1 --peers"
    compare_layers = kernels.compare_layers

    def cut_off(*args: Any) -> Any:
        layers = compare_layers(*args)
        yield next(layers)
        yield next(layers)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "compare_layers", cut_off)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["kernels", *options.split(), "--json", str(path)])
    assert [[row["runner"] for row in r["rows"]] for r in results.read(path)["results"]] == [[OURS]] * 2


def test_the_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILENET_EXT_COMMIT", "c0ffee")
    assert results.about("cpu")["commit"] == "c0ffee"


@pytest.mark.parametrize(
    "arguments", [["inference", "--batch", "0"], ["training", "--peers", "nobody"], ["kernels", "--dtype", "int8"], []]
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line.main(["bench", *arguments])
    assert error.value.code == 2 and "mobilenet-ext bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "inference"),
        (["-h"], "compare"),
        (["kernels", "--help"], "bench kernels"),
        (["compare", "-h"], "after"),
    ],
)
def test_help(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line.main(["bench", *arguments])
    captured = capsys.readouterr()
    assert error.value.code == 0 and captured.err == ""
    assert captured.out.startswith("usage: mobilenet-ext bench ") and said in captured.out


def test_an_option_before_the_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line.main(["bench", "--rounds", "3", "kernels"])
    assert error.value.code == 2 and "mobilenet-ext bench: error:" in capsys.readouterr().err


def test_without_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert command_line.main(["bench", "kernels"]) == 2
    assert "source checkout" in capsys.readouterr().err
