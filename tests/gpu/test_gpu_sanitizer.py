"""compute-sanitizer finds nothing in the CUDA kernels: no access out of bounds, no race, no uninitialised memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import every_op
import pytest

import mobilenet_ext as mx

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
REASON = mx.backends.available()["cuda"] or (None if SANITIZER else "compute-sanitizer is not found")


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_clean(tool: str) -> None:
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, every_op.__file__, "cuda"]
    path = os.pathsep.join([str(Path(mx.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Without PyTorch's cache of memory every tensor is an allocation of its own, whose end the sanitizer knows.
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout or "RACECHECK SUMMARY: 0 hazards" in result.stdout
