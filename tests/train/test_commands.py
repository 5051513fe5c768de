"""The commands eval, predict and sweep."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_records import is_png, metrics
from test_run import InterruptingProgress
from tiny import TINY, write_dark_and_light, write_image

from mobilenet_ext.cli import main
from mobilenet_ext.train import default_recipe, run, sweep

HERE = ["--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images/`` and the run ``run/``, trained until dark and light images are told apart."""
    root = tmp_path_factory.mktemp("trained")
    write_dark_and_light(root / "images")
    settings = ["--data", str(root / "images"), "--epochs", "20", "--lr", "0.02", "--out", str(root / "run")]
    assert main(["train", *TINY, *settings]) == 0
    return root


def test_eval_prints_what_training_measured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained / "run" / "last.pt"), *HERE]) == 0
    output, last = capsys.readouterr().out, metrics(trained / "run")[-1]
    assert f"loss   {last['val_loss']:.4f}  (label smoothing 0.1)\n" in output
    assert f"top-1  {last['val_accuracy']:.4f}\n" in output
    assert "top-5  1.0000\n" in output and "8 images" in output
    by_class = dict(re.findall(r"^(dark|light) +(\S+) +4$", output, re.MULTILINE))
    assert sum(map(float, by_class.values())) / 2 == pytest.approx(last["val_accuracy"], abs=1e-4)


def test_eval_of_other_data(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "data" / "val" / "dark" / "1.png", 0)
    checkpoint = str(trained / "run" / "last.pt")
    assert main(["eval", checkpoint, "--data", str(tmp_path / "data"), *HERE]) == 1
    assert "other classes than expected: light" in capsys.readouterr().err
    write_image(tmp_path / "data" / "val" / "light" / "1.png", 1)
    assert main(["eval", checkpoint, "--data", str(tmp_path / "data"), "--batch-size", "1", *HERE]) == 0
    assert "2 images" in capsys.readouterr().out


def test_predict(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("dark", "light")):
        write_image(tmp_path / f"{name}.png", 100 + number, size=(90, 60))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    paths = [str(tmp_path / name) for name in ("dark.png", "broken.jpg", "light.png")]
    checkpoint = str(trained / "run" / "best.pt")
    assert main(["predict", checkpoint, *paths, "--top", "1", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert re.fullmatch(rf"{paths[0]}\n  [01]\.\d+  dark\n{paths[2]}\n  [01]\.\d+  light\n", captured.out)
    assert (
        captured.err.startswith(f"mobilenet-ext: cannot read the image {paths[1]} (") and captured.err.count("\n") == 1
    )
    assert main(["predict", checkpoint, paths[0], "--device", "cpu"]) == 0
    chances = [float(chance) for chance in re.findall(r"^  (\S+)", capsys.readouterr().out, re.MULTILINE)]
    assert len(chances) == 2 and sum(chances) == pytest.approx(1, abs=2e-4) and chances[0] >= chances[1]


def test_predict_with_a_model_of_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="holds the digits")
    write_image(tmp_path / "image.png", 0)
    settings = ["--resolution", "33", "--width", "0.0625", "--epochs", "1", "--batch-size", "200", "--device", "cpu"]
    assert main(["train", *settings, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run" / "last.pt"), str(tmp_path / "image.png"), "--device", "cpu"]) == 0
    assert len(set(re.findall(r"^  0\.\d{4}  (\d)$", capsys.readouterr().out, re.MULTILINE))) == 5


@pytest.mark.parametrize("command", [["eval"], ["predict"]])
def test_checkpoints_that_are_none(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["image.png"] if command == ["predict"] else []
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    for name, said in (("missing.pt", "No such file"), ("other.pt", "not a checkpoint of mobilenet-ext train")):
        assert main([*command, str(tmp_path / name), *more, "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and name in error and said in error


def sweep_arguments(images: Path, out: Path, *more: str) -> list[str]:
    tiny = TINY[2:]  # the sweep has --widths
    return [
        "sweep",
        "--widths",
        "0.125",
        "0.0625",
        *tiny,
        "--data",
        str(images),
        "--epochs",
        "3",
        "--out",
        str(out),
        *more,
    ]


def test_sweep(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(sweep_arguments(images, tmp_path / "sweep")) == 0
    out = tmp_path / "sweep"
    table = (out / "sweep.md").read_text()
    assert table in capsys.readouterr().out + "\n"
    assert table.splitlines()[0] == "| width | parameters | accuracy | seconds an epoch |"
    rows = json.loads((out / "sweep.json").read_text())
    assert [row["width"] for row in rows] == [0.125, 0.0625]
    for row in rows:
        folder = out / f"width-{row['width']:g}"
        history = metrics(folder)
        assert row["accuracy"] == max(line["val_accuracy"] for line in history) and row["epochs"] == 3
        assert row["seconds_per_epoch"] == sorted(line["seconds"] for line in history)[1]
        weights = torch.load(folder / "last.pt", weights_only=True)["model"]
        trainable = [value for name, value in weights.items() if "running" not in name and "num_batches" not in name]
        assert row["parameters"] == sum(value.numel() for value in trainable)
        assert f"| {row['width']:g} | {row['parameters']:,} | {row['accuracy']:.4f} |" in table


def test_the_sweeps_picture(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws it")
    assert main(sweep_arguments(images, tmp_path / "sweep", "--epochs", "1")) == 0
    assert is_png(tmp_path / "sweep" / "sweep.png")


def test_an_interrupted_sweep_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        patch.setattr(run, "Progress", InterruptingProgress)
        assert main(sweep_arguments(images, out)) == 130
    assert not (out / "width-0.0625").exists()
    assert main(sweep_arguments(images, out)) == 1
    assert "already holds a sweep: --resume" in capsys.readouterr().err
    assert main(sweep_arguments(images, out, "--resume", "--epochs", "4")) == 1
    assert "cannot resume" in capsys.readouterr().err
    assert main(sweep_arguments(images, out, "--resume")) == 0
    assert [len(metrics(out / name)) for name in ("width-0.125", "width-0.0625")] == [3, 3]
    assert [row["epochs"] for row in json.loads((out / "sweep.json").read_text())] == [3, 3]


def test_a_wrong_width_shows_before_any_training(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sweep_arguments(images, tmp_path / "sweep", "--widths", "0.125", "0")) == 1
    assert "--width must be greater than 0, not 0.0" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_sweep_without_widths_is_the_four_of_the_paper() -> None:
    from mobilenet_ext.cli.sweep import WIDTHS

    assert WIDTHS == (1.0, 0.75, 0.5, 0.25)
    assert sweep.run_folder("out", default_recipe("imagenette")) == Path("out/width-1")
