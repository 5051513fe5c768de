"""Two runs that want the same files, and runs that were killed in the middle of writing one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_run import assert_same_run, resume, train
from tiny import REPOSITORY, TINY, write_image

from mobilenet_ext.cli import main, options
from mobilenet_ext.train import InMemoryImagenette
from mobilenet_ext.train.output import LOCK, output_folder

# Waits after the first training batch until the file `go` is there.
PAUSED = """
import sys, time
from pathlib import Path
from mobilenet_ext.cli import main
from mobilenet_ext.train import run
class Progress(run.Progress):
    def __call__(self, running):
        super().__call__(running)
        while not Path("go").exists():
            Path("waiting").touch()
            time.sleep(0.01)
run.Progress = Progress
sys.exit(main(sys.argv[1:]))
"""

# Is killed at the given `fsync` of a file whose name holds the given text: it is written, and has not got its name yet.
KILLED = """
import os, signal, sys
from mobilenet_ext.cli import main
left, sync = {count}, os.fsync
def fsync(descriptor):
    global left
    if "{name}" in os.readlink(f"/proc/self/fd/{{descriptor}}"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = fsync
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An image folder, and the folder of a run on it that nothing happened to. Read only."""
    root = tmp_path_factory.mktemp("whole")
    for number in range(32):
        split = "train" if number < 24 else "val"
        write_image(root / "images" / split / ("dark", "light")[number % 2] / f"{number:02}.jpg", number)
    assert train(root / "images", root / "run") == 0
    return root / "images", root / "run"


def start(code: str, arguments: list[str], cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def settings(images: Path, out: Path) -> list[str]:
    return [*TINY, "--data", str(images), "--epochs", "3", "--out", str(out)]


def litter(out: Path) -> list[str]:
    return [path.name for path in out.rglob(".*")]


def test_the_second_of_two_runs_is_refused(
    whole: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, alone = whole
    out = tmp_path / "sweep" / "width-0.125"
    first = start(PAUSED, ["train", *settings(images, out), "--workers", "1"], tmp_path)
    try:
        while not (tmp_path / "waiting").exists() and first.poll() is None:
            time.sleep(0.05)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        said = f"another run writes into {out} (process {first.pid} on "
        sweep = ["sweep", "--widths", "0.125", *settings(images, out.parent)[2:], "--resume"]
        for second in (["train", *settings(images, out)], ["train", "--resume", "--out", str(out)], sweep):
            assert main(second) == 1
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and said in error
        assert main(["eval", str(out / "last.pt"), "--workers", "0", "--device", "cpu"]) == 0  # only reads
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    finally:
        (tmp_path / "go").touch()
        _, error = first.communicate(timeout=300)
    assert first.returncode == 0, error
    assert litter(tmp_path / "sweep") == []
    assert_same_run(alone, out)


def test_the_second_of_two_sweeps_is_refused(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with output_folder(tmp_path / "sweep"):
        assert main(["sweep", "--widths", "0.125", *settings(images, tmp_path / "sweep")[2:]]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"another run writes into {tmp_path / 'sweep'} (process {os.getpid()} on" in error
    assert list((tmp_path / "sweep").iterdir()) == []


@pytest.mark.slow
def test_a_killed_run_with_loading_processes_can_be_resumed_at_once(images: Path, tmp_path: Path) -> None:
    killed = start(PAUSED, ["train", *settings(images, tmp_path / "run"), "--workers", "2"], tmp_path)
    try:
        while not (tmp_path / "waiting").exists() and killed.poll() is None:
            time.sleep(0.05)
    finally:
        killed.kill()
        killed.communicate()
    assert (tmp_path / "run" / LOCK).exists()
    assert resume(tmp_path / "run") == 0
    assert litter(tmp_path / "run") == []


def test_a_folder_without_locks_is_used_with_a_note(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno
    import fcntl

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert train(images, tmp_path / "run", "--epochs", "1") == 0
    assert f"the file system of {tmp_path / 'run'} has no locks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "count"),
    [("last.pt", 1), *(pytest.param(*other, marks=pytest.mark.slow) for other in (
        ("config.json", 1), ("metrics.jsonl", 1), ("events.out", 1), ("last.pt", 3), ("best.pt", 1), ("curves.png", 1)
    ))],
)  # fmt: skip
def test_what_a_killed_run_leaves_half_written_is_gone_after_the_next(
    whole: tuple[Path, Path], tmp_path: Path, name: str, count: int
) -> None:
    images, alone = whole
    if name == "curves.png":
        pytest.importorskip("matplotlib", reason="draws it")
    if name == "events.out":
        pytest.importorskip("tensorboard", reason="writes them")
    out = tmp_path / "run"
    killed = start(KILLED.format(name=name, count=count), ["train", *settings(images, out)], tmp_path)
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    assert [path for path in litter(out) if path.startswith(f".{name}") and path.endswith(".tmp")]
    assert (resume(out) if (out / "last.pt").exists() else train(images, out)) == 0
    assert litter(out) == []
    assert_same_run(alone, out)


def test_the_temporary_files_of_earlier_versions_are_removed_too(images: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (".last.pt.k2_1x3ab.tmp", ".best.pt.0123abcd.tmp", ".notes.tmp"):
        (tmp_path / "run" / name).touch()
    assert train(images, tmp_path / "run", "--epochs", "1") == 0
    assert litter(tmp_path / "run") == [".notes.tmp"]  # not ours


def test_resuming_over_damaged_records(whole: tuple[Path, Path], tmp_path: Path) -> None:
    """Only the checkpoint is read; everything else is written anew."""
    _, alone = whole
    shutil.copytree(alone, tmp_path / "run")
    for name, damage in (("metrics.jsonl", b'{"epoch": 1\n[]'), ("config.json", b"[1, 2"), ("best.pt", b"")):
        (tmp_path / "run" / name).write_bytes(damage)
    for path in (tmp_path / "run").glob("events.out*"):
        path.write_bytes(b"no events")
    assert resume(tmp_path / "run") == 0
    (tmp_path / "run" / "best.pt").write_bytes((alone / "best.pt").read_bytes())  # the next better epoch writes it
    assert_same_run(alone, tmp_path / "run")


def damaged(content: dict, entry: str) -> dict:
    wrong = {
        "classes": 3,
        "model": {"weight": "no"},
        "config": {**content["config"], "resolution": "40"},
        "epoch": 7,
        "history": [{**row, "val_accuracy": None} for row in content["history"]],
        "optimizer": {**content["optimizer"], "state": {0: {"momentum_buffer": torch.zeros(3)}}},
        "scheduler": {**content["scheduler"], "last_epoch": "1"},
        "rng": {"cpu": torch.zeros(3, dtype=torch.uint8)},
        "dataset": [],
    }
    return {**content, entry: wrong[entry]}


@pytest.mark.parametrize(
    "entry", ["classes", "model", "config", "epoch", "history", "optimizer", "scheduler", "rng", "dataset"]
)
def test_commands_name_the_entry_of_a_checkpoint_that_is_wrong(
    whole: tuple[Path, Path], tmp_path: Path, entry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images, alone = whole
    path = tmp_path / "run" / "last.pt"
    shutil.copytree(alone, path.parent)
    content = torch.load(path, weights_only=True)
    del content["digest"]  # as a checkpoint of before, of which nobody can tell that it was changed
    torch.save(damaged(content, entry), path)
    capsys.readouterr()
    image = str(next((images / "val" / "dark").iterdir()))
    commands = [["train", "--resume", "--out", str(path.parent), "--workers", "0", "--device", "cpu"]]
    if entry in ("classes", "model", "config"):
        commands += [["eval", str(path), "--device", "cpu"], ["predict", str(path), image, "--device", "cpu"]]
    named = "resolution" if entry == "config" else entry
    for command in commands:
        assert main(command) == 1
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and str(path) in captured.err and named in captured.err, captured.err


def test_a_folder_is_taken_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(options.free_folder("digits"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 8 and Path("runs/digits") in folders and Path("runs/digits-8") in folders


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for torchvision's download, which takes a while; the folders it has been asked to fill."""
    datasets = pytest.importorskip("torchvision.datasets", reason="downloads Imagenette")
    asked: list[str] = []

    def imagenette(root: str, size: str, download: bool) -> None:
        asked.append(root)
        time.sleep(0.3)
        for split in ("train", "val"):
            write_image(Path(root) / "imagenette2-160" / split / "n01440764" / "1.png", 1)

    monkeypatch.setattr(datasets, "Imagenette", imagenette)
    return asked


def test_two_downloads_at_once_are_one(tmp_path: Path, download: list[str]) -> None:
    errors: list[Exception] = []

    def load() -> None:
        try:
            assert len(InMemoryImagenette(tmp_path, "train", "160px", download=True)) == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(download) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["imagenette2-160"]


def test_what_a_killed_download_left_is_removed(tmp_path: Path, download: list[str]) -> None:
    (tmp_path / ".download-abc" / "imagenette2-160").mkdir(parents=True)
    (tmp_path / ".download-abc" / "imagenette2-160.tgz").write_bytes(b"half")
    InMemoryImagenette(tmp_path, "val", "160px", download=True)
    assert [path.name for path in tmp_path.iterdir()] == ["imagenette2-160"]
