"""`benchmarks/gpu_report.sh` without a GPU: a stand-in for Python says what it is asked to do, and fails where told."""

from __future__ import annotations

import argparse
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
  *EXT_SUFFIX*) printf '%s\\n' /python/include /torch .cpython-312.so; exit ;;
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
    unset = dict.fromkeys(("OUT", "FAILS", "SLEEPS", "JUNIT", "PREBUILT"), "")
    given = {**os.environ, "PYTHON": str(checkout / "python"), **unset, "MOBILENET_EXT_COMMIT": "c0ffee", **environment}
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
    parsed = check_commands(list(asked.values()), monkeypatch)
    assert [args.json for args in parsed] == [checkout / "elsewhere" / f"{part}.json" for part in asked]
    assert all(args.device == "cuda" for args in parsed)


def check_commands(logs: list[str], monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """What `mobilenet-ext bench` makes of the commands in the logs."""
    parsed: list[argparse.Namespace] = []
    monkeypatch.setattr(cli, "_measure", lambda args: parsed.append(args) or 0)
    for line in "\n".join(logs).splitlines():
        if line.startswith("+ ") and " bench " in line:
            words = shlex.split(line)
            assert cli.main(words[words.index("bench") + 1 :]) == 0
    return parsed


def test_quick_runs_its_parts_and_leaves_few_files(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = report(checkout, "quick", OUT="elsewhere")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(file.name for file in (checkout / "elsewhere").iterdir()) == ["build.log", "quick.log"]
    log = (checkout / "elsewhere" / "quick.log").read_text()
    parts = [line.split()[1].strip(",:") for line in log.splitlines() if line.startswith("== ") and "passed" in line]
    assert parts == ["smoke", "correct", "compile", "layers", "step", "calls", "widths", "step-cuda", "calls-cuda"]
    asked = check_commands([log], monkeypatch)
    files = {args.json.name for args in asked}
    assert len(files) == len(asked) == 6, "with two logs eight files"
    assert all(args.json.parent == checkout / "elsewhere" and args.dtype == ["bfloat16"] for args in asked)
    assert asked[0].backend == ["triton", "cuda"] and asked[0].peers == [] and asked[0].batch == [256]
    # What is timed has been compiled.
    (compiled,) = (shlex.split(line) for line in log.splitlines() if line.startswith("+ ") and "warm_up" in line)
    works = {tuple(word.split(":")) for word in compiled[compiled.index("benchmarks.warm_up") + 1 :]}
    for args in asked:
        task = "inference" if args.bench == "inference" else "training"
        batches = args.batch or cli.INFERENCE_BATCHES["cuda"]
        assert {(task, f"{width:g}", str(batch)) for width in args.width for batch in batches} <= works
    assert ("inference", "1", "256") in works


def test_a_part_of_quick_stands_alone(checkout: Path) -> None:
    done = report(checkout, "layers", OUT="elsewhere")
    assert done.returncode == 0 and (checkout / "elsewhere" / "layers.log").is_file()


@pytest.mark.slow
def test_quick_ends_in_time(checkout: Path) -> None:
    """A part that hangs is cut off after its own time, and what is late after all of it."""
    script = checkout / "benchmarks" / "gpu_report.sh"
    text = script.read_text().replace("[smoke]=100", "[smoke]=2").replace("QUICK_LIMIT=525", "QUICK_LIMIT=5")
    script.write_text(text)
    stand_in = STAND_IN.replace("sleep", "[[ $* != *doctor* && $* != *warm_up* ]] || sleep")
    (checkout / "python").write_text(stand_in)
    done = report(checkout, "quick", OUT="elsewhere", SLEEPS="30")
    assert done.returncode == 1 and "correct: passed" in done.stdout
    assert "failed: smoke compile layers" in done.stdout and "no time left for" in done.stdout
    assert done.stdout.count("cut off") == 2


def test_a_build_from_elsewhere_is_used(checkout: Path) -> None:
    prebuilt = checkout / "carried"
    for folder in (prebuilt, checkout / "mobilenet_ext", checkout / "csrc" / "host"):
        folder.mkdir(parents=True)
    for name in ("_cpu.abi3.so", "_cuda.abi3.so"):
        (prebuilt / name).write_text(name)
    (checkout / "csrc" / "host" / "a.cpp").touch()
    info = prebuilt / "build_info_generated.h"
    info.write_text('#define MX_BUILD_CUDA_ARCHITECTURES "9.0"\n')
    done = report(checkout, "doctor", OUT="elsewhere", PREBUILT="carried", CXX="echo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout / "mobilenet_ext" / "_cuda.abi3.so").read_text() == "_cuda.abi3.so"
    log = (checkout / "elsewhere" / "build.log").read_text()
    assert "csrc/host/a.cpp -o mobilenet_ext/_host.cpython-312.so" in log and "pip" not in log
    assert f"-I{prebuilt}" in log and "-isystem /torch/include" in log
    info.write_text('#define MX_BUILD_CUDA_ARCHITECTURES ""\n')
    done = report(checkout, "doctor", OUT="elsewhere", PREBUILT="carried", CXX="echo")
    assert done.returncode == 1 and "has no CUDA kernels" in done.stdout


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
