import copy
import errno
import functools
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mobilenet_ext.files import write_atomically
from mobilenet_ext.train import TrainError, default_recipe
from mobilenet_ext.train.checkpoint import load_checkpoint, load_state, load_weights, save_checkpoint
from mobilenet_ext.train.records import HISTORY


def content(**more: Any) -> dict[str, Any]:
    return {
        "config": default_recipe().to_dict(),
        "model": nn.Linear(300, 2).state_dict(),
        "classes": ["a", "b"],
        **more,
    }


def row(epoch: int) -> dict[str, Any]:
    return {name: float(epoch) for name in HISTORY} | {"epoch": epoch}


def state(**more: Any) -> dict[str, Any]:
    """The entries that a run goes on from."""
    return {
        "epoch": 1,
        "history": [row(1)],
        "dataset": {"name": "digits", "train_images": 3},
        "rng": {"cpu": torch.get_rng_state()},
        "optimizer": {},
        "scheduler": {},
        "scaler": None,
        **more,
    }


def test_round_trip(tmp_path: Path) -> None:
    written = content(epoch=3)
    save_checkpoint(tmp_path / "last.pt", written)
    read = load_checkpoint(tmp_path / "last.pt")
    assert read["config"] == default_recipe() and read["epoch"] == 3 and read["classes"] == ["a", "b"]
    model = nn.Linear(300, 2)
    load_weights(model, read, tmp_path / "last.pt")
    assert torch.equal(model.weight, written["model"]["weight"])


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
    with pytest.raises(TrainError, match=r"in file.pt do not fit MobileNetV1 0.25: size mismatch for weight"):
        load_weights(nn.Linear(300, 3), read, "file.pt")


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, content())
    whole = path.read_bytes()
    for position in [*range(0, len(whole), len(whole) // 97), *range(len(whole) - 110, len(whole))]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(TrainError, match=r"last\.pt is (damaged|not a checkpoint)"):
            load_checkpoint(path)
    path.write_bytes(whole)
    load_checkpoint(path)


@pytest.mark.parametrize("change", [lambda raw: raw[:-71], lambda raw: raw + b"x", lambda raw: raw + bytes(100)])
def test_a_checkpoint_cannot_lose_its_digest_unnoticed(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, content())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TrainError, match=r"last\.pt is (damaged|not a checkpoint)"):
        load_checkpoint(path)


@pytest.mark.parametrize("archive", [True, False])
def test_a_checkpoint_that_was_loaded_and_saved_again_is_read(tmp_path: Path, archive: bool) -> None:
    """It keeps the entry that says that there is a digest, and PyTorch writes none."""
    path = tmp_path / "edited.pt"
    save_checkpoint(path, content(**state()))
    edited = {**torch.load(path, weights_only=True), "classes": ["c", "d"]}
    torch.save(edited, path, _use_new_zipfile_serialization=archive)
    assert load_checkpoint(path, resumable=True)["classes"] == ["c", "d"]
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TrainError, match=r"edited\.pt is not a checkpoint, or is truncated or damaged"):
            load_checkpoint(path)


def test_checkpoints_of_before_there_were_digests_are_read(tmp_path: Path) -> None:
    torch.save({"format": "mobilenet_ext checkpoint 1", **content(), **state()}, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt", resumable=True)["classes"] == ["a", "b"]


def test_a_checkpoint_is_a_file_of_pytorchs(tmp_path: Path) -> None:
    written = content()
    save_checkpoint(tmp_path / "last.pt", written)
    for options in ({}, {"mmap": True}):
        read = torch.load(tmp_path / "last.pt", weights_only=True, **options)
        assert torch.equal(read["model"]["weight"], written["model"]["weight"])


WRONG = {
    "model": [None, [], {"weight": 1.0}, {0: torch.zeros(2)}],
    "classes": [None, [], ["a", 1], "ab", {"a": 0}, torch.zeros(2)],
    "epoch": [None, -1, 1.0, True, "1", 2, torch.tensor(1)],
    "history": [
        None,
        [],
        {},
        [[1]],
        [{"epoch": 1}],
        [{**row(1), "lr": "0.1"}],
        [{**row(1), "val_loss": None}],
        [row(2)],
    ],
    "dataset": [None, [], {"name": torch.zeros(2)}],
    "rng": [None, {}, {"cpu": [1, 2]}, {"cuda": torch.get_rng_state()}],
    "optimizer": [None, [], 1],
    "scheduler": [None, []],
    "scaler": [1, []],
}


@pytest.mark.parametrize("entry", WRONG)
def test_entries_of_wrong_types_are_named(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(**state()))
    load_checkpoint(path, resumable=True)
    for wrong in WRONG[entry]:
        save_checkpoint(path, content(**state()) | {entry: wrong})
        with pytest.raises(
            TrainError, match=rf"last\.pt holds an entry .*: (epoch|{entry}): expected .*, got "
        ) as caught:
            load_checkpoint(path, resumable=True)
        assert "\n" not in str(caught.value)
    missing = content(**state())
    del missing[entry]
    save_checkpoint(path, missing)
    with pytest.raises(TrainError, match=f"{entry}: expected .*, got NoneType"):
        load_checkpoint(path, resumable=True)


@pytest.mark.parametrize(
    "setting",
    [("width", "1"), ("epochs", 2.5), ("batch_size", True), ("resize", 256), ("resize", []), ("resize", [0.5]),
     ("mean", [0.5]), ("std", [0.0, 1.0, 1.0]), ("flip", 1), ("base_resolution", 0), ("val_resize", 0), ("data", 3),
     ("rotation", float("nan")), ("lr_floor", 2.0), ("amp", ["off"]), ("seed", None)],
)  # fmt: skip
def test_recipes_with_wrong_settings_are_refused_by_name(tmp_path: Path, setting: tuple[str, Any]) -> None:
    config = {**default_recipe().to_dict(), setting[0]: setting[1]}
    save_checkpoint(tmp_path / "file.pt", content(config=config))
    name = setting[0].replace("_", "-")
    with pytest.raises(TrainError, match=rf"file\.pt holds a recipe that this version cannot use: --{name} must be "):
        load_checkpoint(tmp_path / "file.pt")
    save_checkpoint(tmp_path / "file.pt", content(config=list(config)))
    with pytest.raises(TrainError, match="cannot use: this is not a recipe: list"):
        load_checkpoint(tmp_path / "file.pt")


@pytest.mark.parametrize("wrong", [torch.zeros(2, 300, dtype=torch.int64), torch.zeros(2, 300, dtype=torch.complex64)])
def test_weights_of_another_dtype_are_refused(tmp_path: Path, wrong: torch.Tensor) -> None:
    save_checkpoint(tmp_path / "file.pt", content(model={**nn.Linear(300, 2).state_dict(), "weight": wrong}))
    with pytest.raises(
        TrainError, match=r"file\.pt .*: model\.weight: expected a tensor of torch\.float32, got a tensor"
    ):
        load_weights(nn.Linear(300, 2), load_checkpoint(tmp_path / "file.pt"), tmp_path / "file.pt")


def parts() -> dict[str, Any]:
    """Optimizer, scheduler and scaler after a step."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {"optimizer": optimizer, "scheduler": scheduler, "scaler": torch.amp.GradScaler("cpu")}


MISSING = object()

WRONG_STATE = [
    ("optimizer.state.0.momentum_buffer", torch.zeros(3, 2)),
    ("optimizer.state.0.momentum_buffer", torch.zeros(2, 3, dtype=torch.int64)),
    ("optimizer.state.0.momentum_buffer", 1.0),
    ("optimizer.state.1", None),
    ("optimizer.state.5", {}),
    ("optimizer.state", []),
    ("optimizer.param_groups", []),
    ("optimizer.param_groups.0", "lr"),
    ("optimizer.param_groups.0.lr", "0.1"),
    ("optimizer.param_groups.0.nesterov", "no"),
    ("optimizer.param_groups.0.params", [0]),
    ("optimizer.param_groups.0.momentum", None),
    ("scheduler.last_epoch", None),
    ("scheduler.T_max", [5]),
    ("scheduler.base_lrs", [0.1, 0.1]),
    ("scheduler.base_lrs.0", "0.1"),
    ("scaler.scale", torch.ones(2)),
    ("scaler.growth_interval", None),
]


MISSING_STATE = [
    ("optimizer.state", MISSING),
    ("optimizer.param_groups", MISSING),
    ("optimizer.param_groups.0.lr", MISSING),
    ("optimizer.param_groups.0.params", MISSING),
    ("scheduler.last_epoch", MISSING),
    ("scheduler.base_lrs", MISSING),
    ("scaler.scale", MISSING),
]


@pytest.mark.parametrize(("where", "wrong"), WRONG_STATE + MISSING_STATE)
def test_states_of_another_structure_are_named(where: str, wrong: object) -> None:
    state = {name: copy.deepcopy(part.state_dict()) for name, part in parts().items()}
    entry, *inside = [int(step) if step.isdigit() else step for step in where.split(".")]
    holder = functools.reduce(operator.getitem, inside[:-1], state[entry])
    if wrong is MISSING:
        del holder[inside[-1]]
    else:
        holder[inside[-1]] = wrong
    part = parts()[entry]
    before = str(part.state_dict())
    with pytest.raises(TrainError, match=f"file.pt holds an entry that cannot be used: {where}: expected ") as caught:
        load_state(part, state, entry, "file.pt")
    assert "\n" not in str(caught.value) and str(part.state_dict()) == before


def test_states_of_other_versions_of_pytorch_are_read() -> None:
    """They may lack a flag, and have names that this one does not know."""
    for entry, part in parts().items():
        state = copy.deepcopy(part.state_dict())
        state["_unknown"] = state["step"] = 3
        if entry == "optimizer":
            for flag in ("foreach", "fused", "differentiable"):
                del state["param_groups"][0][flag]
        fresh = parts()[entry]
        load_state(fresh, {entry: state}, entry, "file.pt")
        if entry == "scheduler":
            fresh.step()
            part.step()
        if entry != "optimizer":
            assert fresh.state_dict() == part.state_dict()
        else:
            fresh.step()
            assert fresh.param_groups[0]["lr"] == part.param_groups[0]["lr"]
