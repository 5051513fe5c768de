"""What only a process of its own can show: Ctrl-C with workers, a full disk, exit codes, no tracebacks."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_records import metrics
from test_run import assert_same_run
from tiny import TINY, assert_one_message, run_process

from mobilenet_ext.cli import main

Cli = Callable[..., subprocess.CompletedProcess[str]]

# Ctrl-C in a terminal reaches every process of the group: the workers, too.
INTERRUPTED = """
import os, signal, sys
from mobilenet_ext.cli import main
from mobilenet_ext.train import run
class Progress(run.Progress):
    def __init__(self, title, batches):
        super().__init__(title, batches)
        self.title = title
    def __call__(self, running):
        super().__call__(running)
        if self.title == "2/3 train" and running.batches == 2:
            for press in range({presses}):
                os.killpg(0, signal.SIGINT)
run.Progress = Progress
sys.exit(main(sys.argv[1:]))
"""


def interrupted(arguments: list[str], cwd: Path, presses: int = 1) -> subprocess.CompletedProcess[str]:
    code = INTERRUPTED.format(presses=presses)
    return run_process([sys.executable, "-c", f"import os; os.setpgrp()\n{code}", *arguments], cwd)


def group_is_gone(marker: str) -> bool:
    """No process on this machine has ``marker`` on its command line."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in entry.read_bytes().decode(errors="replace").split("\0"):
                return False
        except OSError:
            continue
    return True


def test_ctrl_c_with_workers_ends_cleanly_and_resumes(images: Path, tmp_path: Path) -> None:
    settings = [*TINY, "--data", str(images), "--epochs", "3"]
    out = str(tmp_path / "broken")
    result = interrupted(["train", *settings, "--out", out, "--workers", "2"], tmp_path)
    assert result.returncode == 130, result
    assert "interrupted after 2 of 4 training batches" in result.stdout
    assert "Traceback" not in result.stderr and "Stopping after this batch" in result.stderr
    assert result.stderr.count("Stopping") == 1  # the workers keep quiet
    assert group_is_gone(out)
    assert torch.load(tmp_path / "broken" / "last.pt", weights_only=True)["epoch"] == 1
    assert main(["train", "--resume", "--out", out, "--workers", "1"]) == 0
    assert main(["train", *settings, "--out", str(tmp_path / "whole")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(images: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    settings = ["train", *TINY, "--data", str(images), "--epochs", "3", "--out", out, "--workers", "2"]
    result = interrupted(settings, tmp_path, presses=2)
    assert result.returncode == 130, result
    assert "Traceback" not in result.stderr and result.stderr.endswith("mobilenet-ext: interrupted\n")
    assert group_is_gone(out)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(cli: Cli, images: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: between the checkpoint with momentum and that without."""
    settings = ["train", *TINY, "--data", str(images), "--epochs", "2", "--out", str(tmp_path / "run")]
    assert main(settings) == 0
    size = (tmp_path / "run" / "last.pt").stat().st_size
    for path in (tmp_path / "run").iterdir():
        path.unlink()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 3 // 4, size * 3 // 4))

    result = cli(*settings, preexec_fn=limit)
    assert result.returncode == 1
    assert_one_message(result, "cannot write the checkpoint", "File too large")
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 0
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1, 2]


def test_errors_are_one_line_without_a_traceback(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    assert_one_message(cli("eval", "text.pt"), "text.pt is not a checkpoint")


def test_a_closed_pipe_is_no_error_message(images: Path, tmp_path: Path) -> None:
    command = (
        f"{sys.executable} -m mobilenet_ext train {' '.join(TINY)} --data {images} --epochs 3 --out run | head -n 1"
    )
    result = run_process(["bash", "-c", command], tmp_path)
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr
