"""Whole runs on tiny images: what they leave behind, Ctrl-C, resuming, and what is refused."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_records import events, is_png, metrics
from tiny import TINY

from mobilenet_ext.cli import main
from mobilenet_ext.train import TrainError, default_recipe, run
from mobilenet_ext.train.loop import RunningStats
from mobilenet_ext.train.report import Progress

LINE = re.compile(
    r"Epoch: (\d+)/(\d+) Train Loss: \d+\.\d{4} Accuracy: [01]\.\d{4} Time: \d+\.\d{5}"
    r"  \| Val Loss: \d+\.\d{4} Accuracy: [01]\.\d{4}"
)


def train(images: Path, out: Path, *more: object) -> int:
    return main(["train", *TINY, "--data", str(images), "--epochs", "3", "--out", str(out), *map(str, more)])


def resume(out: Path, *more: object) -> int:
    return main(["train", "--resume", "--out", str(out), "--workers", "0", "--device", "cpu", *map(str, more)])


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "images_per_second", "time")}
        for row in rows
    ]


def tensors(value: Any, at: str = "") -> dict[str, Any]:
    """A checkpoint, flat."""
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in tensors(item, f"{at}/{name}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in tensors(item, f"{at}/{i}").items()}
    return {at: value}


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same but for the times, and nothing twice."""
    assert without_times(metrics(one)) == without_times(metrics(other))
    for name in ("last.pt", "best.pt"):
        contents = [tensors(torch.load(out / name, weights_only=True)) for out in (one, other)]
        assert contents[0].keys() == contents[1].keys()
        for key, value in contents[0].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, contents[1][key]), key
            elif not key.endswith(("/seconds", "/images_per_second", "/time")):
                assert value == contents[1][key], key
    scalars = [[(step, tag, value) for step, tag, value, _ in events(out)] for out in (one, other)]
    timed = "images_per_second"
    assert [s for s in scalars[0] if s[1] != timed] == [s for s in scalars[1] if s[1] != timed]
    assert len(set(scalars[1])) == len(scalars[1])


class InterruptingProgress(Progress):
    """Sends this process SIGINT after the given batch of the given pass."""

    title, batch = "2/3 train", 2

    def __init__(self, title: str, batches: int) -> None:
        super().__init__(title, batches)
        self._active = title == self.title

    def __call__(self, running: RunningStats) -> None:
        super().__call__(running)
        if self._active and running.batches == self.batch:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An image folder and the folder of a whole run on it. Read only."""
    from tiny import write_image

    root = tmp_path_factory.mktemp("finished")
    for number in range(32):
        split = "train" if number < 24 else "val"
        write_image(root / "images" / split / ("dark", "light")[number % 2] / f"{number:02}.jpg", number)
    assert train(root / "images", root / "whole") == 0
    return root / "images", root / "whole"


def test_what_a_run_leaves_behind(finished: tuple[Path, Path]) -> None:
    images, out = finished
    assert [row["epoch"] for row in metrics(out)] == [1, 2, 3]
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["width"] == 0.125 and config["recipe"]["data"] == str(images)
    assert config["classes"] == ["dark", "light"]
    assert config["dataset"] == {"name": "folder", "train_images": 24, "val_images": 8}
    last = torch.load(out / "last.pt", weights_only=True)
    best = torch.load(out / "best.pt", weights_only=True)
    assert last["epoch"] == 3
    accuracies = [row["val_accuracy"] for row in metrics(out)]
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    names = {path.name.partition(".tfevents.")[0] for path in out.iterdir()}
    assert names <= {"config.json", "metrics.jsonl", "last.pt", "best.pt", "curves.png", "events.out"}


def test_the_curves_are_drawn(finished: tuple[Path, Path]) -> None:
    pytest.importorskip("matplotlib", reason="draws them")
    assert is_png(finished[1] / "curves.png")


def test_the_learning_rate_falls_along_a_cosine(finished: tuple[Path, Path]) -> None:
    rates = [row["lr"] for row in metrics(finished[1])]
    # 0.01 to 0.0001 over three epochs: cos(0), cos(pi/3), cos(2 pi/3)
    assert rates == pytest.approx([0.01, 0.0001 + 0.0099 * 0.75, 0.0001 + 0.0099 * 0.25])


def test_the_line_of_an_epoch(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(images, tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert [LINE.fullmatch(line).group(1, 2) for line in lines] == [("1", "3"), ("2", "3"), ("3", "3")]
    row = metrics(tmp_path / "run")[0]
    assert (
        f"Train Loss: {row['train_loss']:.4f} Accuracy: {row['train_accuracy']:.4f} Time: {row['seconds']:.5f}"
        in lines[0]
    )
    assert f"Val Loss: {row['val_loss']:.4f} Accuracy: {row['val_accuracy']:.4f}" in lines[0]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished: tuple[Path, Path], tmp_path: Path) -> None:
    images, whole = finished
    assert train(images, tmp_path / "again") == 0
    assert_same_run(whole, tmp_path / "again")
    assert train(images, tmp_path / "other", "--seed", 1) == 0
    assert metrics(tmp_path / "other")[0]["train_loss"] != metrics(whole)[0]["train_loss"]


@pytest.mark.parametrize(
    ("title", "batch", "said"),
    [
        ("2/3 train", 2, r"Epoch: 2/3 Train Loss: \S+ Accuracy: \S+ Time: \S+  \| interrupted after 2 of 4 training"),
        ("1/3 train", 1, r"Epoch: 1/3 Train Loss: \S+ Accuracy: \S+ Time: \S+  \| interrupted after 1 of 4 training"),
        ("2/3 val", 1, r"\| Val Loss: \S+ Accuracy: \S+  \| interrupted after 4 of 4 training batches, 1 of 2 val"),
    ],
)
def test_ctrl_c_reports_the_epoch_so_far_and_resume_gives_the_whole_run(
    finished: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    title: str,
    batch: int,
    said: str,
) -> None:
    images, whole = finished
    out, epoch = tmp_path / "run", int(title[0])
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(InterruptingProgress, "title", title)
        patch.setattr(InterruptingProgress, "batch", batch)
        patch.setattr(run, "Progress", InterruptingProgress)
        assert train(images, out) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    output = capsys.readouterr().out
    assert re.search(said, output)
    assert f"last.pt is the end of epoch {epoch - 1}; --resume --out {out} goes on" in output
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == epoch - 1 == len(metrics(out))
    torch.manual_seed(123)  # whatever state the resuming process is in
    assert resume(out) == 0
    assert_same_run(whole, out)


def test_a_run_killed_between_records_and_checkpoint_repeats_nothing(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, whole = finished
    out, save = tmp_path / "run", run.save_checkpoint

    def dies_at_last(path: Path, content: dict[str, Any]) -> None:
        if content["epoch"] == 2 and path.name == "last.pt":
            raise TrainError("power cut")
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", dies_at_last)
        assert train(images, out) == 1
    assert len(metrics(out)) == 2 and torch.load(out / "last.pt", weights_only=True)["epoch"] == 1
    assert resume(out) == 0
    assert_same_run(whole, out)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_resumes_too(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str) -> None:
    assert train(images, tmp_path / "whole", "--amp", amp) == 0
    with monkeypatch.context() as patch:
        patch.setattr(run, "Progress", InterruptingProgress)
        assert train(images, tmp_path / "run", "--amp", amp) == 130
    assert resume(tmp_path / "run") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert (torch.load(tmp_path / "run" / "last.pt", weights_only=True)["scaler"] is not None) == (amp == "fp16")


def test_a_finished_run_has_nothing_left_to_do(finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = metrics(finished[1])
    assert resume(finished[1]) == 0
    assert "nothing left to do" in capsys.readouterr().out and metrics(finished[1]) == before


def test_a_diverging_run_says_so(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(images, tmp_path / "run", "--lr", "1e30") == 1
    error = capsys.readouterr().err
    assert "diverged" in error and "--lr" in error


REFUSED = [
    (["--width", "0"], "--width must be greater than 0, not 0.0"),
    (["--epochs", "0"], "--epochs must be 1 or more"),
    (["--workers", "-1"], "--workers must be 0 or more"),
    (["--device", "nonsense"], "--device must be auto, cpu, cuda or cuda:N, not 'nonsense'"),
    (["--backend", "nonsense"], "--backend nonsense: "),
    (["--data", "/no/such/folder"], "no folder /no/such/folder"),
    (["--resume"], "--resume needs --out"),
    (["--out", __file__], f"--out must be a folder, and {__file__} is none"),
    (["--data", __file__], f"no folder {__file__}"),
    (["--data", 300 * "x", "--out", "run"], f"no folder {300 * 'x'}"),
    (["--data", "imagenette", "--data-dir", __file__], f"--data-dir must be a folder, and {__file__} is none"),
    (["--out", 300 * "x"], f"cannot write to the output folder {300 * 'x'}: File name too long"),
    (["--resume", "--out", 300 * "x"], f"there is no run to resume in {300 * 'x'}"),
    (["--init", "."], "cannot read the file of weights .: Is a directory"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED)
def test_bad_options_are_one_message(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("mobilenet-ext: ") and said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--width", "0.5"], "--width is 0.125 there, 0.5 now"),
        (["--epochs", "9", "--lr", "1"], "--epochs is 3 there, 9 now; --lr is 0.01 there, 1.0 now"),
        (["--data", "digits"], "the data is no longer the same"),
    ],
)
def test_resuming_another_run_is_refused(
    finished: tuple[Path, Path], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished[1] / "last.pt").read_bytes()
    assert resume(finished[1], *arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"cannot resume {finished[1]}" in error and said in error
    assert (finished[1] / "last.pt").read_bytes() == before


def test_resuming_accepts_the_same_settings_and_moved_images(finished: tuple[Path, Path], tmp_path: Path) -> None:
    images, out = finished
    (tmp_path / "moved").symlink_to(images)
    assert resume(out, "--width", "0.125", "--data", tmp_path / "moved") == 0


def test_a_folder_with_a_run_is_not_overwritten(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*finished) == 1
    assert "already holds a run: --resume goes on with it" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_resuming_without_a_whole_checkpoint_is_refused(
    finished: tuple[Path, Path], tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "truncated":
        (tmp_path / "last.pt").write_bytes((finished[1] / "last.pt").read_bytes()[:5000])
    assert resume(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("no last.pt" if damage == "missing" else "truncated") in error


def test_an_unwritable_out_is_one_message(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")  # permissions would not stop root
    out = tmp_path / "file" / "run"
    assert train(images, out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"cannot write to the output folder {out}: Not a directory" in error


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_place_for_runs_that_cannot_be_made_is_one_message(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    deadline: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    for get_in_the_way in (lambda: Path("runs").symlink_to("nowhere"), Path("runs").touch):
        get_in_the_way()
        assert main([command]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot make the output folder runs/digits-" in error
        Path("runs").unlink()


def test_corrupt_images_are_named_counted_and_skipped(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [images / "train" / "dark" / "04.jpg", images / "val" / "light" / "25.jpg"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:300])
    assert train(images, tmp_path / "run", "--workers", 2) == 0
    error = capsys.readouterr().err
    assert all(error.count(str(path)) == 1 for path in broken)
    assert "unreadable images skipped: 2" in error
    assert [row["unreadable"] for row in metrics(tmp_path / "run")] == [2, 2, 2]
    assert main(["eval", str(tmp_path / "run" / "last.pt"), "--workers", "0", "--device", "cpu"]) == 0
    assert "7 images" in capsys.readouterr().out


def test_corrupt_images_are_refused_by_a_flag_before_training(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [images / "train" / "dark" / "04.jpg", images / "val" / "light" / "25.jpg"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:300])
    assert train(images, tmp_path / "run", "--corrupt", "refuse") == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and f"unreadable images in {images}: 2: {broken[0]} (" in captured.err
    assert f"{broken[1]} (" in captured.err
    assert captured.out == "" and not (tmp_path / "run" / "last.pt").exists()


def test_an_empty_class_folder_is_one_message(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "train" / "grey").mkdir()
    assert train(images, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"class folder without images: {images}/train/grey" in error


def test_imagenette_from_its_published_layout(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images.rename(tmp_path / "imagenette2-160")
    arguments = ["train", *TINY, "--data", "imagenette", "--data-dir", str(tmp_path), "--epochs", "1"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert "on imagenette2-160" in capsys.readouterr().out
    assert [row["epoch"] for row in metrics(tmp_path / "run")] == [1]


def test_the_digits_are_learned(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="holds the digits")
    recipe = default_recipe("digits", resolution=40, epochs=3)
    result = run.run_training(recipe, tmp_path / "run", run.RunOptions())
    assert result.best_accuracy > 0.8
    assert result.parameters == 218378 and not result.interrupted


def test_missing_scikit_learn_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["train", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install scikit-learn" in error


def test_default_folders_do_not_collide(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", *TINY, "--data", str(images), "--epochs", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["images-w0.125", "images-w0.125-2"]


def test_unknown_options_are_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--no-such-option"])
    assert caught.value.code == 2 and "--no-such-option" in capsys.readouterr().err
