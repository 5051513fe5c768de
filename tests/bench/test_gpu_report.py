"""`benchmarks/gpu_report.sh` without a GPU: a stand-in for Python says what it is asked to do, and fails where told."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import cli, results

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "gpu_report.sh"
DEVICE = "NVIDIA H100 80GB HBM3"
STAND_IN = f"""#!/bin/bash
case "$*" in
  *get_device_name*) echo "{DEVICE}"; exit ;;
  *"import xdist"*) exit 1 ;;
esac
echo "commit $MOBILENET_EXT_COMMIT: $*"
[ -z "$SLEEPS" ] || sleep "$SLEEPS"
while (($#)); do
  if [ "$1" = --junitxml ]; then echo "$JUNIT" > "$2"; fi
  if [ -n "$FAILS" ] && [ "$1" = "$FAILS" ]; then exit 3; fi
  shift
done
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the script and nothing else of the checkout."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def report(checkout: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"MOBILENET_EXT_COMMIT": "c0ffee", "OUT": "", "FAILS": "", "SLEEPS": "", "JUNIT": "", **environment}
    given = {**os.environ, "PYTHON": str(checkout / "python"), **settings}
    command = [str(checkout / "benchmarks" / "gpu_report.sh"), *parts]
    return subprocess.run(command, env=given, cwd=checkout, capture_output=True, text=True, timeout=60)


def test_every_part_runs_and_its_commands_are_ours(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = report(checkout, "all", OUT="elsewhere")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all passed" in done.stdout
    logs = {file.stem: file.read_text() for file in (checkout / "elsewhere").iterdir()}
    assert "commit c0ffee" in logs["kernels-cuda"] and "pip install" in logs["build"]
    asked = {part: log for part, log in logs.items() if "mobilenet_ext bench" in log}
    assert {"kernels-forward", "inference-1", "training", "memory", "scaling", "curves"} <= set(asked)
    assert {"tests-triton", "tests-cuda", "sanitizer", "speed", "doctor"} <= set(logs)
    parsed = []
    monkeypatch.setattr(cli, "_measure", lambda args: parsed.append(args) or 0)
    for part, log in asked.items():
        words = shlex.split(next(line for line in log.splitlines() if line.startswith("+ ")))
        assert cli.main(words[words.index("bench") + 1 :]) == 0
        assert parsed[-1].device == "cuda" and parsed[-1].json == checkout / "elsewhere" / f"{part}.json"


def test_a_failure_stops_no_other_part_and_is_named(checkout: Path) -> None:
    done = report(checkout, "training", "doctor", "inference-1", FAILS="training")
    assert done.returncode == 1 and "failed: training;" in done.stdout and "doctor: passed" in done.stdout
    assert "inference-1: passed" in done.stdout and "FAILED with status 3" in done.stdout
    folder = results.default_file("x", {"device": DEVICE}).parent.name
    assert (checkout / "benchmarks" / "results" / folder / "training.log").is_file()


def test_nothing_runs_without_the_build(checkout: Path) -> None:
    done = report(checkout, "doctor", FAILS="pip")
    assert done.returncode == 1 and "failed: build" in done.stdout and "doctor" not in done.stdout


@pytest.mark.parametrize("reason, status", [("needs two GPUs", 0), ("backend cuda: no", 1)])
def test_skipped_tests_show_nothing(checkout: Path, reason: str, status: int) -> None:
    done = report(checkout, "tests-cuda", JUNIT=f'<skipped type="pytest.skip" message="{reason}">x</skipped>')
    assert done.returncode == status and ("tests were skipped" in done.stdout) == bool(status)


def test_a_part_that_takes_too_long_is_cut_off(checkout: Path) -> None:
    script = checkout / "benchmarks" / "gpu_report.sh"
    script.write_text(script.read_text().replace("LIMIT=560", "LIMIT=2"))
    (checkout / "python").write_text(STAND_IN.replace("sleep", "[[ $* != *doctor* ]] || sleep"))
    done = report(checkout, "doctor", "curves", SLEEPS="30")
    assert done.returncode == 1 and "failed: doctor;" in done.stdout and "curves: passed" in done.stdout
    log = next((checkout / "benchmarks" / "results").glob("*/doctor.log")).read_text()
    assert "mobilenet_ext doctor" in log and "cut off" in log


def test_a_copy_without_history_must_be_told_its_commit(checkout: Path) -> None:
    done = report(checkout, "doctor", MOBILENET_EXT_COMMIT="", GIT_CEILING_DIRECTORIES=str(checkout.parent))
    assert done.returncode == 2 and "set MOBILENET_EXT_COMMIT" in done.stderr
    assert "there are: build" in report(checkout, "nothing").stderr
