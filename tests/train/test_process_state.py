"""What belongs to the whole process is looked at before it is taken, and given back: signals, random numbers, ..."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import InterruptingProgress, assert_same_run
from tiny import TINY, command, run_process

import mobilenet_ext as mx
from mobilenet_ext.cli import main
from mobilenet_ext.train import Classifier, Recipe, RunOptions, default_recipe, load_model, run, run_training
from mobilenet_ext.train.interrupt import Interrupt

Cli = Callable[..., subprocess.CompletedProcess[str]]


def tiny_recipe(images: Path) -> Recipe:
    return default_recipe(str(images), width=0.125, resolution=40, batch_size=6, epochs=3)


@pytest.fixture
def sigint() -> Iterator[None]:
    """Gives SIGINT its handler back."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# --- SIGINT -----------------------------------------------------------------------------------------------------------


def test_an_ignored_sigint_stays_ignored(sigint: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert not interrupt.requested and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_handler_of_the_programs_own_stays(sigint: None) -> None:
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGINT] and not interrupt.requested


def test_a_handler_set_meanwhile_stays(sigint: None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("stderr", [None, sys.stderr])
def test_ctrl_c_is_heard_without_a_terminal(sigint: None, monkeypatch: pytest.MonkeyPatch, stderr: Any) -> None:
    def gone(*arguments: object) -> None:
        raise OSError("the terminal was closed")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch, Interrupt() as interrupt:
        patch.setattr(os, "write", gone)
        patch.setattr(sys, "stderr", stderr)
        os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.requested


def test_training_with_sigint_ignored_goes_on(
    images: Path, tmp_path: Path, sigint: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(run, "Progress", InterruptingProgress)
    assert main(["train", *TINY, "--data", str(images), "--epochs", "3", "--out", str(tmp_path / "run")]) == 0


def test_a_shells_background_job_goes_on(images: Path, tmp_path: Path) -> None:
    """Shells without job control start those with SIGINT ignored; Ctrl-C then reaches the whole group."""
    train = " ".join(command("train", *TINY, "--data", images, "--epochs", "2", "--out", "run"))
    script = f"trap '' TERM; {train} & while [ ! -e run/last.pt ]; do sleep 0.1; done; kill -INT $!; wait $!"
    result = run_process(["sh", "-c", script], tmp_path)
    assert result.returncode == 0 and "Epoch: 2/2" in result.stdout, result


def test_training_with_closed_output(images: Path, tmp_path: Path) -> None:
    train = " ".join(command("train", *TINY, "--data", images, "--epochs", "1", "--out", "run"))
    assert run_process(["sh", "-c", f"{train} >&- 2>&- <&-"], tmp_path).returncode == 0
    assert run_process(command("eval", "run/last.pt", "--workers", "0"), tmp_path).returncode == 0


# --- Everything else --------------------------------------------------------------------------------------------------


def process_state() -> dict[str, Any]:
    umask = os.umask(0o022)
    os.umask(umask)
    return {
        "random numbers": torch.get_rng_state().tolist(),
        "backend": mx.backends._chosen,
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision),
        "dtype and device": (torch.get_default_dtype(), torch.get_default_device()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "umask": umask,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "descriptors": sorted(os.listdir("/proc/self/fd")) if sys.platform == "linux" else [],
    }


def test_a_run_leaves_the_process_as_it_was(images: Path, tmp_path: Path) -> None:
    run_training(tiny_recipe(images), tmp_path / "first", RunOptions())  # loads matplotlib, TensorBoard and the like
    torch.manual_seed(7)
    before = process_state()
    run_training(tiny_recipe(images), tmp_path / "run", RunOptions(backend="reference"))
    assert process_state() == before


def test_a_refused_run_leaves_the_process_as_it_was(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = process_state()
    with pytest.raises(mx.train.TrainError, match="no folder"):
        run_training(tiny_recipe(images / "missing"), tmp_path / "run", RunOptions(backend="reference"))
    assert process_state() == before


def test_using_a_checkpoint_leaves_the_process_as_it_was(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(tiny_recipe(images), tmp_path / "run", RunOptions())
    checkpoint = str(tmp_path / "run" / "last.pt")
    image = str(next((images / "val" / "dark").iterdir()))
    torch.manual_seed(7)
    before = process_state()
    load_model(checkpoint)
    Classifier(checkpoint).best_classes(image)
    options = ["--device", "cpu", "--backend", "reference"]
    assert main(["eval", checkpoint, "--workers", "0", *options]) == 0
    assert main(["predict", checkpoint, image, *options]) == 0
    assert process_state() == before


@pytest.mark.parametrize(
    "state",
    ["no_grad", "device", *(pytest.param(s, marks=pytest.mark.slow) for s in ("float64", "deterministic", "warnings"))],
)
def test_a_run_does_not_depend_on_the_state_of_the_process(images: Path, tmp_path: Path, state: str) -> None:
    run_training(tiny_recipe(images), tmp_path / "plain", RunOptions())
    with warnings.catch_warnings():
        try:
            if state == "no_grad":
                torch.set_grad_enabled(False)
            elif state == "float64":
                torch.set_default_dtype(torch.float64)
            elif state == "deterministic":
                torch.use_deterministic_algorithms(True)
            elif state == "warnings":
                warnings.simplefilter("error")
            elif state == "device":
                torch.set_default_device("meta")
            run_training(tiny_recipe(images), tmp_path / "run", RunOptions())
        finally:
            torch.set_grad_enabled(True)
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
            torch.set_default_device(None)
    assert_same_run(tmp_path / "plain", tmp_path / "run")
