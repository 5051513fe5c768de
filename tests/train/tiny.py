"""Tiny images, and processes that run the command line, for the tests of training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).parents[2]

# A run of 4 training batches and 2 validation batches an epoch.
TINY = ["--width", "0.125", "--resolution", "40", "--batch-size", "6", "--workers", "0", "--device", "cpu"]


def write_image(path: Path, seed: int, size: tuple[int, int] = (48, 40)) -> None:
    """A noisy image whose brightness depends on the parity of ``seed``."""
    image = pytest.importorskip("PIL.Image", reason="Pillow writes the test's images")
    noise = np.random.default_rng(seed).integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(noise + np.uint8(seed % 2 * 120)).save(path)


def write_dark_and_light(folder: Path) -> None:
    """A folder of images that are learned at once: 24 to train with and 8 to validate with, of two classes."""
    for number in range(32):
        split = "train" if number < 24 else "val"
        write_image(folder / split / ("dark", "light")[number % 2] / f"{number:02}.jpg", number)


# Source of ``peak()``, the most memory that a process has had, in bytes. ru_maxrss would count the parent's, too.
PEAK = """
def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mobilenet_ext", *map(str, arguments)]


def run_process(arguments: list[str], cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    # As many threads as here: runs of both kinds are compared bit for bit.
    environment = {"PYTHONPATH": str(REPOSITORY), **os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        arguments, cwd=cwd, env=environment, text=True, capture_output=True, timeout=120, check=False, **options
    )


def assert_one_message(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The command failed with one line on stderr that has these parts."""
    assert result.returncode not in (0, None), result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mobilenet-ext: "), result.stderr
    for part in parts:
        assert part in lines[0]
