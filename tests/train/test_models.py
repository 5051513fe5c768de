"""Networks of torchvision and timm under the recipe: trained, resumed, measured, used, compared, refused."""

from __future__ import annotations

import json
import random
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_graph import recorded
from test_records import metrics
from test_run import InterruptingProgress, assert_same_run
from tiny import TINY, write_dark_and_light
from torch import Tensor, nn

import mobilenet_ext as mx
from mobilenet_ext.cli import main
from mobilenet_ext.models import libraries
from mobilenet_ext.train import Recipe, RunOptions, TrainError, default_recipe, load_model, model, run, run_training
from mobilenet_ext.train.checkpoint import save_checkpoint

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")

NETWORK = "timm:mobilenetv3_small_050"
WITH_DROPOUT = "torchvision:mobilenet_v3_small"
HERE = ["--device", "cpu", "--workers", "0"]


def train(images: Path, out: Path, name: str, *more: object) -> int:
    settings = [*TINY[2:], "--data", images, "--model", name, "--epochs", "3", "--out", out, *more]  # without a width
    return main(["train", *map(str, settings)])


def resume(out: Path, *more: str) -> int:
    return main(["train", "--resume", "--out", str(out), *HERE, *more])


def one_message(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("mobilenet-ext: ") and error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``images/`` and the run ``run/`` of a network with dropout. Read only."""
    root = tmp_path_factory.mktemp("trained")
    write_dark_and_light(root / "images")
    assert train(root / "images", root / "run", WITH_DROPOUT) == 0
    return root


# --- Building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NETWORK, "torchvision:shufflenet_v2_x0_5"])
def test_a_model_is_the_librarys_with_the_recipes_seed_on_the_kernels(name: str) -> None:
    before = torch.get_rng_state()
    built = model.build_model(default_recipe("digits", model=name, seed=5), 3, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    expected = libraries.create(name, 3)
    torch.testing.assert_close(built.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert isinstance(built, type(expected)) and mx.fusion_report(built).fused > 0
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in built.parameters() if p.dim() == 4)


def test_trying_a_model_leaves_no_trace() -> None:
    recipe, cpu = default_recipe("digits", model=WITH_DROPOUT), torch.device("cpu")
    built = model.build_model(recipe, 3, cpu)
    before, state = {name: value.clone() for name, value in built.state_dict().items()}, torch.get_rng_state()
    model.check_trainable(built, recipe, 3, 100, cpu)
    torch.testing.assert_close(built.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state) and built.training


# --- Running ----------------------------------------------------------------------------------------------------------


def test_a_run_of_a_network(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((trained / "run" / "config.json").read_text())
    assert (config["recipe"]["model"], config["recipe"]["width"], config["init"]) == (WITH_DROPOUT, 1.0, None)
    checkpoint, last = str(trained / "run" / "last.pt"), metrics(trained / "run")[-1]
    assert main(["eval", checkpoint, *HERE]) == 0
    output = capsys.readouterr().out
    assert f"loss   {last['val_loss']:.4f}" in output and f"top-1  {last['val_accuracy']:.4f}" in output
    image = trained / "images" / "val" / "dark" / "24.jpg"
    assert main(["predict", checkpoint, str(image), "--device", "cpu"]) == 0
    assert len(re.findall(r"^  [01]\.\d{4}  (?:dark|light)$", capsys.readouterr().out, re.MULTILINE)) == 2
    loaded, recipe, classes = load_model(checkpoint)
    assert isinstance(loaded, torchvision.models.MobileNetV3) and not loaded.training
    assert recipe.model == WITH_DROPOUT and classes == ["dark", "light"]


def test_a_broken_run_is_resumed_bit_for_bit(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "Progress", InterruptingProgress)
        assert train(trained / "images", tmp_path / "run", WITH_DROPOUT) == 130
    torch.manual_seed(123)
    random.seed(123)
    assert resume(tmp_path / "run") == 0
    assert_same_run(trained / "run", tmp_path / "run")


def test_resuming_with_another_model_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(trained / "run", "--model", NETWORK) == 1
    assert f"--model is {WITH_DROPOUT} there, {NETWORK} now" in one_message(capsys)
    assert main(["train", *TINY, "--data", str(trained / "images"), "--epochs", "1", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert resume(tmp_path, "--model", NETWORK) == 1
    assert f"--model is mobilenet_v1 there, {NETWORK} now" in one_message(capsys)


def test_the_networks_name_is_in_what_is_said_and_in_the_default_folder(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY[2:], "--data", str(images), "--model", NETWORK, "--epochs", "1", "--amp", "bf16"]) == 0
    assert capsys.readouterr().out.startswith(f"{NETWORK} on folder, 40x40: ")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["images-mobilenetv3_small_050"]


def test_steps_of_a_network_from_graphs(images: Path, tmp_path: Path) -> None:
    recipe = default_recipe(str(images), model=NETWORK, resolution=40, batch_size=6, epochs=2)
    histories = []
    with recorded() as graphs:
        for captures in (False, True):
            result = run_training(recipe, tmp_path / str(captures), RunOptions(workers=0, cuda_graph=captures))
            histories.append([(row["train_loss"], row["val_loss"]) for row in result.history])
            assert bool(graphs) == captures
    assert histories[0] == histories[1]


def test_runs_of_before_there_were_other_models_go_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*TINY, "--data", str(images), "--epochs", "3"]
    assert main(["train", *settings, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(run, "Progress", InterruptingProgress)
        assert main(["train", *settings, "--out", str(tmp_path / "run")]) == 130
    for name in ("last.pt", "best.pt"):
        content = torch.load(tmp_path / "run" / name, weights_only=True)
        del content["config"]["model"], content["init"]
        save_checkpoint(tmp_path / "run" / name, content)
    assert resume(tmp_path / "run") == 0
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert last["config"]["model"] == "mobilenet_v1" and last["init"] is None
    expected = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["model"]
    torch.testing.assert_close(last["model"], expected, rtol=0, atol=0)
    assert main(["eval", str(tmp_path / "run" / "best.pt"), *HERE]) == 0


def test_sweep_compares_networks(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, settings = tmp_path / "sweep", [*TINY[2:], "--data", str(images), "--epochs", "1"]
    command = ["sweep", "--models", NETWORK, "torchvision:shufflenet_v2_x0_5", "--out", str(out), *settings]
    assert main(command) == 0
    table = (out / "sweep.md").read_text()
    assert table in capsys.readouterr().out + "\n"
    assert table.startswith("| model | parameters |") and f"| {NETWORK} | 570,274 | " in table
    rows = json.loads((out / "sweep.json").read_text())
    assert [row["model"] for row in rows] == [NETWORK, "torchvision:shufflenet_v2_x0_5"]
    assert (out / "timm-mobilenetv3_small_050" / "last.pt").exists()
    assert main([*command, "--resume"]) == 0
    assert main([*command[:3], "timm:no_such", *command[4:]]) == 1
    with pytest.raises(SystemExit):
        main([*command, "--widths", "1"])


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet18"], "--model must be mobilenet_v1, torchvision:NAME or timm:NAME, not resnet18"),
        (["--model", "timm:../mine"], "--model must be mobilenet_v1, torchvision:NAME or timm:NAME, not timm:../mine"),
        (["--model", "timm:mobilenetv3_smal_050"], "no such classifier; did you mean mobilenetv3_small_050 or "),
        (["--model", "torchvision:fcn_resnet50"], "--model torchvision:fcn_resnet50: no such classifier"),
        (["--model", NETWORK, "--width", "0.5"], f"--width must be left out with --model {NETWORK}, not 0.5"),
        (["--model", NETWORK, "--resolution", "0"], "--resolution must be between 1 and 4096, not 0"),
    ],
)
def test_wrong_names_and_settings_are_one_message(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 1
    assert said in one_message(capsys)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    checkpoint = str(trained / "run" / "last.pt")
    for command in (["train", "--model", WITH_DROPOUT], ["eval", checkpoint], ["predict", checkpoint, "1.png"]):
        assert main([*command, "--device", "cpu"]) == 1
        assert re.search(r"torchvision cannot be imported \(.*\); `pip install torchvision`", one_message(capsys))


def test_weights_of_another_network_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(trained / "run" / "last.pt", weights_only=True)
    content["config"]["model"] = NETWORK
    save_checkpoint(tmp_path / "last.pt", content)
    assert main(["eval", str(tmp_path / "last.pt"), *HERE]) == 1
    assert f"do not fit {NETWORK}: " in one_message(capsys)


class Net(nn.Module):
    """Gives what ``outputs`` makes of its logits."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.linear, self.outputs = nn.Linear(3, 2), outputs

    def forward(self, x: Tensor) -> Any:
        return self.outputs(self, self.linear(x.mean((2, 3))))


def fails(net: Net, logits: Tensor) -> Tensor:
    raise AssertionError("images of 224x224 only\nand more lines")


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (lambda net, logits: (logits, logits) if net.training else logits, "gives tuple in training, on 2 images of"),
        (lambda net, logits: logits if net.training else {"a": logits}, "gives dict in evaluation, on 2 images of"),
        (lambda net, logits: logits[:, :1], r"gives \[2, 1\] in training, .* 40x40; logits \[2, 2\] are needed"),
        (fails, "does not run in training, on 2 images of 40x40: images of 224x224 only$"),
    ],
)
def test_what_cannot_be_trained_is_said_before_the_first_epoch(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outputs: Any,
    said: str,
) -> None:
    monkeypatch.setattr(libraries, "create", lambda name, classes: Net(outputs))
    assert train(images, tmp_path / "run", NETWORK) == 1
    assert re.search(f"mobilenet-ext: {NETWORK} {said}", one_message(capsys), re.MULTILINE)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_last_batch_of_one_image_is_tried(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--resolution", 16, "--epochs", 1)  # a map of 1x1 in front of the last BatchNorm
    shufflenet = "torchvision:shufflenet_v2_x0_5"
    assert train(images, tmp_path / "run", shufflenet, *small, "--batch-size", 23) == 1
    message = one_message(capsys)
    assert "does not run in training, on 1 image of 16x16: Expected more than 1 value per channel" in message
    assert message.rstrip().endswith("try a --batch-size that leaves no batch with one image, or a larger --resolution")
    assert train(images, tmp_path / "run", shufflenet, *small, "--batch-size", 12) == 0
    for unreadable in sorted((images / "train").glob("*/*"))[:23]:  # which shows in the epoch, not before
        unreadable.write_bytes(b"")
    assert train(images, tmp_path / "few", shufflenet, *small, "--batch-size", 12) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"mobilenet-ext: {shufflenet} does not train on a batch: Expected more than 1 value")
    assert message.endswith("try a --batch-size that leaves no batch with one image, or a larger --resolution")


@pytest.mark.parametrize(
    ("name", "said"), [("googlenet", "gives GoogLeNetOutputs"), ("vit_b_32", "Wrong image height")]
)
def test_published_networks_that_do_not_fit(name: str, said: str) -> None:
    recipe, cpu = Recipe(data="digits", model=f"torchvision:{name}", resolution=64), torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of how torchvision will initialise it some day
        built = model.build_model(recipe, 10, cpu)
    with pytest.raises(TrainError, match=said):
        model.check_trainable(built, recipe, 10, 100, cpu)
