"""Fixtures for the tests of training: a tiny image folder, the command line in a process of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import command, run_process, write_image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image folder: two classes, 24 training and 8 validation images."""
    root = tmp_path / "images"
    for number in range(32):
        split = "train" if number < 24 else "val"
        write_image(root / split / ("dark", "light")[number % 2] / f"{number:02}.jpg", number)
    return root


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``mobilenet-ext`` in a process of its own, in ``tmp_path``."""
    return lambda *arguments, **options: run_process(command(*arguments), tmp_path, **options)
