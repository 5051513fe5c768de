"""The soak (``soak.py``): a few seconds of it, and with ``-m soak`` twenty minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "seconds", [3, pytest.param(10, marks=pytest.mark.slow), pytest.param(1200, marks=pytest.mark.soak)]
)
def test_soak(seconds: int) -> None:
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--seconds", str(seconds)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
