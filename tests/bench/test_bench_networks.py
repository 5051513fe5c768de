"""The bench on networks of other libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import checks, cli, peers, pictures, readme, results
from benchmarks.network import Workload

timm = pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

NETWORKS = ["timm:mobilenetv3_small_050", "torchvision:mnasnet0_5"]
OPTIONS = ["--resolution", "64", "--batch", "2", "--rounds", "2", "--burst", "0.01", "--no-memory"]


@pytest.mark.parametrize("bench", ["inference", "training"])
def test_a_run_of_several(bench: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    words = [bench, "--model", *NETWORKS, "--dtype", "float32", *OPTIONS, "--json", str(file)]
    assert cli.main([*words, "--peers", peers.OURS, peers.EAGER, "JAX", "timm"]) == 0
    text = capsys.readouterr().out
    assert all(f"{bench}, {name}, 64x64, batch 2" in text for name in NETWORKS)
    report = json.loads(file.read_text())
    assert [result["workload"]["network"] for result in report["results"]] == NETWORKS
    for result in report["results"]:
        ours, eager, *others = result["rows"]
        assert 0 < ours["error"] < 1e-2 and 0 < eager["error"] < 1e-2
        assert all("MobileNetV1" in row.get("skipped", "") or "not installed" in row["skipped"] for row in others)
    assert pictures.draw(results.read(file), file) == []  # of several networks there is none
    lines = readme._networks(results.read(file), readme.README.parent / file.name).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:6]] == [f"`{name}`" for name in NETWORKS]
    assert all(f"; {peers.EAGER})" in line for line in lines[4:6])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "timm:mobilenetv2_10"], "no such classifier; did you mean"),
        (["--model", "mobilenet_v2"], "expected torchvision:NAME or timm:NAME"),
        (["--model", NETWORKS[0], "--width", "0.5"], "--width: only mobilenet_v1 has one"),
    ],
)
def test_what_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inference", *words]) == 1
    assert message in capsys.readouterr().err


def test_old_results_are_of_mobilenet_v1() -> None:
    assert Workload(**Workload("inference", 1.0, 224, 1, "float32", "cpu")._asdict()).title == "MobileNetV1 1, 224x224"
    assert Workload("inference", 1.0, 224, 1, "float32", "cpu").is_mobilenet_v1


def test_nothing_is_random() -> None:
    """Dropout and stochastic depth are off, so that every peer computes the same step."""
    work = Workload("training", 1.0, 64, 2, "float32", "cpu", "torchvision:efficientnet_b0")
    model = work.plain()
    outputs = []
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            outputs.append(model(work.images()))
    assert torch.equal(*outputs)
    assert checks.expected_of(work).outputs.keys() == {"loss", "classifier's gradient", "stem's gradient"}
