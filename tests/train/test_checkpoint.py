import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobilenet_ext.train import TrainError, default_recipe
from mobilenet_ext.train.checkpoint import load_checkpoint, load_weights, save_checkpoint, write_atomically


def content(**more: Any) -> dict[str, Any]:
    return {"config": default_recipe().to_dict(), "model": nn.Linear(300, 2).state_dict(), **more}


def test_round_trip(tmp_path: Path) -> None:
    written = content(epoch=3, classes=["a", "b"])
    save_checkpoint(tmp_path / "last.pt", written)
    read = load_checkpoint(tmp_path / "last.pt")
    assert read["config"] == default_recipe() and read["epoch"] == 3 and read["classes"] == ["a", "b"]
    model = nn.Linear(300, 2)
    load_weights(model, read, tmp_path / "last.pt")
    assert torch.equal(model.weight, written["model"]["weight"])


def test_the_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(epoch=1))
    before = path.read_bytes()

    def disk_full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, disk_full)
        message = "cannot write the checkpoint .*last.pt: No space left on device; .*last.pt is still the one of before"
        with pytest.raises(TrainError, match=message):
            save_checkpoint(path, content(epoch=2))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1])
    write_atomically(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_truncated_checkpoints_are_refused_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, content())
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TrainError, match=r"last\.pt is not a checkpoint, or is truncated or damaged"):
            load_checkpoint(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with pytest.raises(TrainError, match=r"cannot read the checkpoint .*file\.pt: No such file"):
        load_checkpoint(path)
    path.write_text("some text")
    with pytest.raises(TrainError, match="not a checkpoint"):
        load_checkpoint(path)
    for other in (nn.Linear(2, 2).state_dict(), torch.zeros(3), {"format": "another"}):
        torch.save(other, path)
        with pytest.raises(TrainError, match="not a checkpoint of mobilenet-ext train"):
            load_checkpoint(path)
    torch.save(nn.Linear(2, 2), path)  # a pickled module would run code
    with pytest.raises(TrainError, match="not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(TrainError, match=r"cannot read the checkpoint .*: Is a directory"):
        load_checkpoint(tmp_path)


def test_recipes_of_other_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    for config in ({"data": "digits", "colour": 1}, {}, {"data": "digits", "width": 0.0}):
        save_checkpoint(path, {"config": config})
        with pytest.raises(TrainError, match="holds a recipe that this version cannot use"):
            load_checkpoint(path)
    save_checkpoint(path, {})
    with pytest.raises(TrainError, match="holds a recipe that this version cannot use"):
        load_checkpoint(path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "file.pt", content())
    read = load_checkpoint(tmp_path / "file.pt")
    with pytest.raises(TrainError, match=r"in file.pt do not fit MobileNetV1 of width 0.25: size mismatch for weight"):
        load_weights(nn.Linear(300, 3), read, "file.pt")
