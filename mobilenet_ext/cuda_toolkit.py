"""Finds the CUDA toolkit. Standard library only: it must work where torch has no CUDA, or before torch is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DEFAULT_HOME = Path("/usr/local/cuda")


class CudaToolkit(NamedTuple):
    home: Path  # has bin/nvcc and lib64/libcudart.so
    version: str
    found_by: str


def find_cuda_toolkit() -> CudaToolkit | None:
    """The CUDA toolkit to compile with, or None where there is none.

    In this order: the environment variables CUDA_HOME and CUDA_PATH, the nvcc on PATH, /usr/local/cuda. A folder counts
    only with the compiler and the runtime library to link with in it.
    """
    for home, found_by in _candidates():
        nvcc = home / "bin" / "nvcc"
        if nvcc.is_file() and (home / "lib64" / "libcudart.so").exists():
            release = re.search(r"\bV(\d+(?:\.\d+)+)", _output(str(nvcc), "--version"))
            if release:
                return CudaToolkit(home, release.group(1), found_by)
    return None


def _candidates() -> Iterator[tuple[Path, str]]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]), f"environment variable {variable}"
    nvcc = shutil.which("nvcc")
    if nvcc:
        # nvcc on PATH may be a link to the compiler or a script that starts it; the compiler itself says where it is.
        top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
        if top:
            yield Path(top.group(1)).resolve(), f"nvcc on PATH, {nvcc}"
    yield DEFAULT_HOME, "default folder"


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout
