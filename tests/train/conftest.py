"""Fixtures for the tests of training: a tiny image folder, the command line in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
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


@pytest.fixture
def not_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Works in ``tmp_path`` without the rights of root, for whom no file is closed."""
    monkeypatch.chdir(tmp_path)
    if os.geteuid() != 0:
        yield
        return
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def deadline() -> Iterator[None]:
    """Ends a test that waits for ever, or follows links for ever."""

    def late(*_: object) -> None:
        pytest.fail("the test did not end")  # no Exception, which the code under test may catch

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
