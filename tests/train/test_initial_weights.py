"""``--init``: where weights may come from, the head of another size, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import InterruptingProgress, assert_same_run
from tiny import TINY
from torch import Tensor, nn

from mobilenet_ext import MobileNetV1
from mobilenet_ext.cli import main
from mobilenet_ext.train import TrainError, run
from mobilenet_ext.train.initial_weights import InitialWeights, load_initial_weights, read_initial_weights

State = dict[str, Tensor]
HEAD = ["classifier.1.weight", "classifier.1.bias"]


def network(classes: int = 2, width: float = 0.125, seed: int = 1) -> MobileNetV1:
    torch.manual_seed(seed)
    return MobileNetV1(classes, width)


@pytest.fixture
def state() -> State:
    """Weights for three classes, unlike any fresh ones."""
    return {
        name: value + 0.25 if value.is_floating_point() else value for name, value in network(3).state_dict().items()
    }


@pytest.fixture
def train(images: Path, tmp_path: Path) -> Callable[..., int]:
    """Trains a tiny network on two classes, into ``tmp_path / "run"``."""
    settings = [*TINY, "--data", str(images), "--epochs", "1", "--out", str(tmp_path / "run")]
    return lambda *more: main(["train", *settings, *map(str, more)])


def load(state: State, classes: int = 2, **more: Any) -> tuple[State, State, list[str]]:
    """A fresh network's weights, those after loading, and what was not taken."""
    model = network(classes, **more)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    left = load_initial_weights(model, InitialWeights("file.pth", "", state), classes, "MobileNetV1 0.125")
    return fresh, model.state_dict(), left


# --- Files ------------------------------------------------------------------------------------------------------------


def save_safetensors(state: State, path: Path) -> None:
    pytest.importorskip("safetensors.torch", reason="writes the file").save_file(state, path)


WAYS = {
    "a.pth": torch.save,
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "nested.pt": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
    "parallel.tar": lambda state, path: torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, path),
    "parameters.pth": lambda state, path: torch.save({k: nn.Parameter(v, False) for k, v in state.items()}, path),
    "a.safetensors": save_safetensors,
}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_keep_weights_is_read(tmp_path: Path, state: State, name: str) -> None:
    WAYS[name](state, tmp_path / name)
    weights = read_initial_weights(tmp_path / name)
    torch.testing.assert_close(dict(weights.tensors), state, rtol=0, atol=0)
    assert weights.origin == {
        "file": str(tmp_path / name),
        "sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest(),
    }


def test_a_checkpoint_of_a_run_is_held_against_its_digest(train: Callable[..., int], tmp_path: Path) -> None:
    assert train() == 0
    path = tmp_path / "run" / "last.pt"
    expected = torch.load(path, weights_only=True)["model"]
    torch.testing.assert_close(dict(read_initial_weights(path).tensors), dict(expected), rtol=0, atol=0)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(TrainError, match=r"last\.pt is damaged: its bytes are not those that were written"):
        read_initial_weights(path)
    path.write_bytes(raw[:-71])
    with pytest.raises(TrainError, match=r"last\.pt is not a file of weights, or is truncated or damaged"):
        read_initial_weights(path)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_files_that_are_none_are_refused_and_run_nothing(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(state, "whole.pth")
    for name, value in {"module.pth": network(), "code.pth": {"weight": RunsCode()}}.items():
        torch.save(value, name)
    files = {
        "empty.pth": b"",
        "truncated.pth": Path("whole.pth").read_bytes()[:5000],
        "page.pth": b"<!DOCTYPE html>",
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    for name in (*files, "module.pth", "code.pth"):
        with pytest.raises(TrainError, match=f"^{name} is not a file of weights, or is truncated or damaged$"):
            read_initial_weights(name)
    assert not Path("ran").exists()
    for name, said in {"missing.pth": "No such file", ".": "Is a directory"}.items():
        with pytest.raises(TrainError, match=f"^cannot read the file of weights {name}: {said}"):
            read_initial_weights(name)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"\xff" * 100])
def test_files_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("safetensors.torch", reason="reads the file")
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(TrainError, match=r"a\.safetensors is not a file of weights, or is truncated or damaged: \S"):
        read_initial_weights(tmp_path / "a.safetensors")


def test_missing_safetensors_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(TrainError, match=r"reading \.safetensors files needs safetensors .*: pip install safetensors"):
        read_initial_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({}, r"dict \{\}"),
        ([1, 2], r"list \[1, 2\]"),
        (torch.zeros(2), "a torch.strided tensor of torch.float32 on cpu"),
        ({"weight": 1.5}, "weight: float 1.5"),
        ({3: torch.zeros(2)}, "3: a torch.strided tensor"),
        ({"weight": torch.zeros(2).to_sparse()}, "weight: a torch.sparse_coo tensor"),
        ({"weight": torch.zeros(2, device="meta")}, "weight: a torch.strided tensor of torch.float32 on meta"),
    ],
)
def test_files_of_other_things_are_refused(tmp_path: Path, content: Any, got: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(TrainError, match=f"is not a file of weights: expected dense tensors by name, got {got}"):
        read_initial_weights(tmp_path / "a.pth")


# --- Loading ----------------------------------------------------------------------------------------------------------


def test_a_head_of_the_same_size_is_taken(state: State) -> None:
    _, loaded, left = load(state, classes=3)
    assert left == []
    torch.testing.assert_close(dict(loaded), state, rtol=0, atol=0)


def test_a_head_of_another_size_starts_fresh_and_is_named(state: State) -> None:
    fresh, loaded, left = load(state)
    assert left == ["classifier.1.weight [3, 128], here [2, 128]", "classifier.1.bias [3], here [2]"]
    for name, value in loaded.items():
        assert torch.equal(value, fresh[name] if name in HEAD else state[name]), name


def test_half_precision_and_files_without_counts_are_taken(state: State) -> None:
    old = {name: value.half() for name, value in state.items() if "num_batches_tracked" not in name}
    _, loaded, _ = load(old, classes=3)
    assert all(torch.equal(loaded[name], value.float()) for name, value in old.items())
    assert loaded["feature.0.1.num_batches_tracked"] == 0


def changed(state: State, **changes: Tensor | None) -> State:
    values = {**state, **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"feature__0__1__bias": None}, ": feature.0.1.bias is missing"),
        ({"classifier__1__bias": None}, r": classifier.1.weight is \[3, 128\], not \[2, 128\]"),
        ({"classifier__1__bias": torch.zeros(2)}, r": classifier.1.weight is \[3, 128\], not \[2, 128\]"),
        ({"classifier__1__weight": torch.zeros(3, 64)}, r": classifier.1.weight is \[3, 64\], not \[2, 128\]"),
        ({"extra": torch.zeros(1)}, ", which has no extra"),
        ({"feature__0__1__bias": torch.zeros(5)}, r": feature.0.1.bias is \[5\], not \[4\]"),
        ({"feature__0__1__bias": torch.zeros(4).int()}, ": feature.0.1.bias is of torch.int32, not of torch.float32"),
        ({"feature__0__1__bias": torch.zeros(4).cfloat()}, ": feature.0.1.bias is of torch.complex64, not of"),
    ],
)
def test_the_first_difference_is_named(state: State, changes: dict[str, Tensor | None], said: str) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = InitialWeights("file.pth", "", changed(state, **changes))
    with pytest.raises(TrainError, match=f"^the weights in file.pth do not fit MobileNetV1 0.125{said}"):
        load_initial_weights(model, weights, 2, "MobileNetV1 0.125")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("classes", [4, 8, 16])
def test_layers_with_as_many_channels_as_classes_are_no_heads(classes: int) -> None:
    """The channels of width 0.125 against those of 0.25, twice as many in every layer."""
    with pytest.raises(TrainError, match=r"do not fit MobileNetV1 0.125: feature.0.[01].weight is \[8[],]"):
        load(network(3, width=0.25).state_dict(), classes)


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_a_run_starts_from_them_and_records_them(
    train: Callable[..., int], tmp_path: Path, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.pth"
    torch.save(state, path)
    assert train("--init", path, "--lr", "1e-30") == 0
    assert (
        f"starts from the weights in {path}; its head is for another number of classes, and is not taken: "
        "classifier.1.weight [3, 128], here [2, 128]; classifier.1.bias [3], here [2]\n"
    ) in capsys.readouterr().out
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert torch.equal(last["model"]["feature.0.0.weight"], state["feature.0.0.weight"])
    expected = {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init"] == expected == last["init"]


def test_resuming_does_not_need_the_file(
    train: Callable[..., int],
    tmp_path: Path,
    state: State,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.pth"
    torch.save(state, path)
    assert train("--init", path, "--epochs", 3, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(run, "Progress", InterruptingProgress)
        assert train("--init", path, "--epochs", 3) == 130
    capsys.readouterr()
    assert train("--resume", "--epochs", 3, "--init", path) == 1
    assert "--init cannot be given with --resume: the run in " in capsys.readouterr().err
    path.unlink()
    assert train("--resume", "--epochs", 3) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "run")]
    assert config[0]["init"] == config[1]["init"] is not None


def test_bad_files_are_one_message(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    for name, said in {"page.pth": "is not a file of weights", "missing.pth": "No such file", ".": "directory"}.items():
        assert train("--init", tmp_path / name) == 1
        error = capsys.readouterr().err
        assert error.startswith("mobilenet-ext: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("torchvision:squeezenet1_1", "classifier.1.weight [7, 512, 1, 1], here [2, 512, 1, 1]"),  # a convolution
        ("torchvision:mnasnet0_5", "classifier.1.weight [7, 1280], here [2, 1280]"),  # reads the version of its weights
        ("timm:mobilenetv3_small_050", "classifier.weight [7, 1024], here [2, 1024]"),
    ],
)
def test_files_of_libraries(
    train: Callable[..., int],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    head: str,
) -> None:
    pytest.importorskip(name.partition(":")[0], reason="has the network")
    from mobilenet_ext.models import libraries

    path = tmp_path / "a.safetensors"
    save_safetensors(libraries.create(name, 7).state_dict(), path)
    settings = [*TINY[2:], "--data", str(images), "--epochs", "1", "--out", str(tmp_path / "run")]
    assert main(["train", *settings, "--model", name, "--init", str(path)]) == 0
    assert head in capsys.readouterr().out
    assert train("--init", path, "--out", tmp_path / "other") == 1
    assert "do not fit MobileNetV1 0.125: feature.0.0.weight is missing" in capsys.readouterr().err
