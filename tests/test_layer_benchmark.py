"""``benchmarks/layers.py``: its account of bytes, and that each of its calls runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mobilenet_ext as mx

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "layers.py"


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("layers_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def gigabytes(layers: ModuleType, pass_: str) -> float:
    return sum(layer.bytes_moved(pass_, 256, 2) for layer in layers.network(1.0, 224, pass_)) / 1e9


def test_bytes(layers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits, 224x224, batch 256: 5.2 GB forward, 3.2 GB for inference by blocks; backward 12.0 GB, or 10.4 and 14.2
    with all, or none, of the pointwise convolutions in one pass."""
    assert gigabytes(layers, "forward") == pytest.approx(5.2, abs=0.05)
    assert gigabytes(layers, "inference") == pytest.approx(3.2, abs=0.05)
    for largest, expected in ((layers.ONE_PASS, 12.0), (1024 * 1024, 10.4), (0, 14.2)):
        monkeypatch.setattr(layers, "ONE_PASS", largest)
        assert gigabytes(layers, "backward") == pytest.approx(expected, abs=0.05)


def test_layers_are_those_of_the_network(layers: ModuleType) -> None:
    model = mx.MobileNetV1(10, 0.75)
    convolutions = [unit[0] for unit in model.feature[:-1]]
    listed = layers.network(0.75, 224, "forward")
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convolutions] == [layer[1:4] for layer in listed[:-1]]
    assert listed[-1].size == 7


def test_script(layers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    file = tmp_path / "results" / "layers.json"
    options = {"--width": 0.25, "--batch": 1, "--resolution": 33, "--dtype": "float32", "--device": "cpu"}
    command = [str(word) for option in options.items() for word in option]
    monkeypatch.setattr(layers, "CLEARED", 2**20)
    monkeypatch.setattr(sys, "argv", ["layers.py", *command, "--repeats", "2", "--json", str(file)])
    torch.set_num_threads(1)
    with mx.backends.use("auto"):
        layers.main()
    report = json.loads(file.read_text())
    assert len(report["layers"]) == 28 + 28 + 14
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in report["layers"])
    assert {"device", "commit", "date", "versions", "copy_bytes_per_second"} <= set(report)
    assert capsys.readouterr().out.count("GB/s") == 1 + 70 + 3
