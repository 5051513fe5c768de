import json
from pathlib import Path
from typing import Any

import pytest

from mobilenet_ext.train import TrainError, records
from mobilenet_ext.train.plots import plot_curves, plot_sweep


def row(epoch: int) -> dict[str, Any]:
    names = ("lr", "train_loss", "val_loss", "train_accuracy", "val_accuracy", "images_per_second")
    return {"epoch": epoch, "time": 1000.0 + epoch, **{name: epoch / 8 for name in names}}


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def events(out: Path) -> list[tuple[int, str, float, float]]:
    """(step, tag, value, time) of every scalar in the folder's event files, read by TensorBoard."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader", reason="reads the events")
    return [
        (event.step, value.tag, value.tensor.float_val[0], event.wall_time)
        for path in sorted(out.glob("events.out.tfevents.*"))
        for event in loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_metrics_and_events_hold_every_epoch(tmp_path: Path) -> None:
    recorder = records.Records(tmp_path, [], "title")
    for epoch in (1, 2):
        recorder.add(row(epoch))
        assert [line["epoch"] for line in metrics(tmp_path)] == list(range(1, epoch + 1))  # at once, for who follows
    assert metrics(tmp_path) == [row(1), row(2)]
    expected = {(e, tag, e / 8, 1000.0 + e) for e in (1, 2) for tag in records.TAGS.values()}
    assert set(events(tmp_path)) == expected and len(events(tmp_path)) == len(expected)
    recorder.close()


def test_resuming_rewrites_what_goes_beyond_the_history(tmp_path: Path) -> None:
    first = records.Records(tmp_path, [], "title")
    for epoch in (1, 2, 3):
        first.add(row(epoch))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "trai')  # torn by a power cut
    second = records.Records(tmp_path, [row(1), row(2)], "title")
    second.add(row(3))
    second.close()
    assert metrics(tmp_path) == [row(1), row(2), row(3)]
    assert sorted(step for step, tag, *_ in events(tmp_path) if tag == "loss/train") == [1, 2, 3]
    assert len(events(tmp_path)) == 3 * len(records.TAGS)


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    recorder = records.Records(tmp_path, [], "title")
    recorder.add({**row(1), "val_loss": float("nan")})
    recorder.close()
    assert metrics(tmp_path)[0]["val_loss"] is None


def test_the_picture_is_drawn_at_once_or_seldom(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture")
    recorder, picture = records.Records(tmp_path, [], "title"), tmp_path / "curves.png"
    recorder.draw([row(1)], at_once=False)
    assert is_png(picture)
    picture.unlink()
    recorder.draw([row(1)], at_once=False)
    assert not picture.exists()
    recorder.draw([row(1), row(2)], at_once=True)
    assert is_png(picture)
    recorder.close()


def test_missing_packages_cost_only_what_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("tensorboard", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    recorder = records.Records(tmp_path, [], "title")
    recorder.add(row(1))
    recorder.draw([row(1)], at_once=True)
    recorder.close()
    assert recorder.missing == ["tensorboard", "matplotlib"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_unwritable_folder_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(TrainError, match=r"cannot write to .*: Is a directory"):
        records.Records(tmp_path, [], "title")


def test_the_pictures_show_four_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture")
    from mobilenet_ext.train import plots

    figures: list[Any] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    history = [row(1), row(2)]
    plot_curves(history, tmp_path / "one.png", "title")
    plot_sweep({"width 1": history, "width 0.5": history[:1]}, tmp_path / "sweep.png", "title")
    assert is_png(tmp_path / "one.png") and is_png(tmp_path / "sweep.png")
    one, many = figures
    assert [len(axis.lines) for axis in one.axes] == [2, 2]
    assert [len(axis.lines) for axis in many.axes] == [2, 2, 2, 2]
    assert {axis.get_ylabel() for axis in many.axes} == set(plots.CURVES.values())
    assert [line.get_label() for line in many.axes[0].lines] == ["width 1", "width 0.5"]


@pytest.mark.parametrize(("first", "scale"), [(3.0, "linear"), (70.0, "log")])
def test_a_loss_that_starts_high_does_not_flatten_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float, scale: str
) -> None:
    pytest.importorskip("matplotlib", reason="draws the picture")
    from mobilenet_ext.train import plots

    scales: list[list[str]] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: scales.append([a.get_yscale() for a in figure.axes]))
    history = [
        {**row(1), "train_loss": 2.0, "val_loss": first},
        {**row(2), "train_loss": 1.0, "val_loss": float("nan")},
    ]
    plot_curves(history, tmp_path / "one.png", "title")
    assert scales == [[scale, "linear"]]
