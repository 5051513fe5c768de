"""Results as JSON: where and with what they were taken, and every raw sample."""

from __future__ import annotations

import datetime
import errno
import json
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

import mobilenet_ext as mx
from mobilenet_ext.backends import cpu
from mobilenet_ext.files import write_atomically
from mobilenet_ext.train.errors import reason

FORMAT = 2  # of the files; raised when a reader of old ones would misread new ones
FOLDER = Path(__file__).parent / "results"


def device_name(device: str) -> str:
    """For people: the GPU's name, or the processor with its threads and the instruction set of our kernels."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads, {cpu.isa()}"


def commit() -> str | None:
    """Of the checkout. A copy of one without its history has it from the environment variable MOBILENET_EXT_COMMIT."""
    if given := os.environ.get("MOBILENET_EXT_COMMIT"):
        return given
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def about(device: str) -> dict[str, Any]:
    """The machine, versions and commit."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "backend": mx.backends.current(device),
        "versions": {"mobilenet_ext": mx.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "float32_products": torch.backends.cudnn.conv.fp32_precision if device == "cuda" else "ieee",
    }


def default_file(bench: str, about: dict[str, Any]) -> Path:
    """``benchmarks/results/<device>/<bench>.json``."""
    folder = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    return FOLDER / folder / f"{bench}.json"


def check_writable(path: Path) -> None:
    """Makes the folder of a result to come. Raises ValueError where the result could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):  # as `write_atomically`, beside it
            pass
    except OSError as error:
        raise ValueError(f"cannot write the result {path}: {reason(error)}") from error


def write(path: Path, report: dict[str, Any]) -> None:
    """Raises ValueError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": FORMAT, **report}, indent=1).encode() + b"\n")
    except OSError as error:
        raise ValueError(f"cannot write the result {path}: {reason(error)}") from error


def read(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is none of ours."""
    try:
        report = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read the result {path}: {reason(error)}") from error
    except ValueError as error:  # UnicodeDecodeError among them
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT or not {"about", "results"} <= report.keys():
        raise ValueError(f"{path}: not a result of `mobilenet-ext bench` in format {FORMAT}")
    return report
