"""Opt-in autotuning: with ``MOBILENET_EXT_AUTOTUNE=1``, a problem's first call times the candidates of
``heuristics.py`` and the fastest is kept on disk, for this process and later ones.

Without it the first candidate runs, and nothing is timed or read. The choices are in one JSON file per GPU model,
Triton version and version of this library, in ``MOBILENET_EXT_CACHE`` (default: ``$XDG_CACHE_HOME/mobilenet_ext`` or
``~/.cache/mobilenet_ext``). Deleting it is safe. Which candidate wins decides the order of summation, so two machines
with different choices may differ in the last bits; one machine with its file does not.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import triton

from mobilenet_ext import __version__
from mobilenet_ext.files import locked, write_atomically
from mobilenet_ext.triton.heuristics import Config

R = TypeVar("R")

enabled = os.environ.get("MOBILENET_EXT_AUTOTUNE", "0") == "1"
_lock = threading.RLock()  # a candidate may be two kernels, which are tuned while it is timed


def run(op: str, problem: tuple, candidates: Sequence[Config], launch: Callable[[Config], R]) -> R:
    """``launch`` with the first of ``candidates``, or, where autotuning is on, with the fastest.

    Args:
        op: name of the kernel op.
        problem: what the choice may depend on: shapes, dtype, flags.
        candidates: launch parameters; all must give the same result but for the order of summation.
        launch: runs the op with given parameters.
    """
    if not enabled or len(candidates) == 1:
        return launch(candidates[0])
    return launch(_choice(op, problem, candidates, launch))


def _choice(op: str, problem: tuple, candidates: Sequence[Config], launch: Callable[[Config], R]) -> Config:
    key = f"{op} {problem}"
    path = cache_file()
    with _lock:
        choices = _choices(path)
        for candidate in candidates:
            if choices.get(key) == candidate:
                return candidate
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]  # timing waits for the GPU, which a graph under capture cannot
        times = [_time(launch, candidate) for candidate in candidates]
        best = candidates[times.index(min(times))]
        return _keep(path, key, best, candidates)


def _time(launch: Callable[[Config], R], candidate: Config) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(candidate), return_mode="median")
    except triton.runtime.errors.OutOfResources:  # a candidate too large for this GPU
        return float("inf")


def cache_file() -> Path:
    """Where the current GPU's choices are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobilenet_ext"
    folder = Path(os.environ.get("MOBILENET_EXT_CACHE") or default)
    gpu = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    return folder / f"autotune-{gpu}-triton-{triton.__version__}-{__version__}.json"


@cache
def _choices(path: Path) -> dict[str, Config]:
    try:
        choices = json.loads(path.read_text())
        return choices if isinstance(choices, dict) else {}
    except (OSError, ValueError):  # none yet, or damaged: tuned again
        return {}


def _keep(path: Path, key: str, best: Config, candidates: Sequence[Config]) -> Config:
    """Adds a choice to the file, unless another process was first: then theirs counts.

    Where the file cannot be written, this process remembers.
    """
    known = _choices(path)
    known[key] = best
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock"), wait=True):
            _choices.cache_clear()  # other processes may have added to the file meanwhile
            choices = _choices(path)
            if choices.get(key) not in candidates:
                choices[key] = best
            choices.update({**known, **choices})
            write_atomically(path, json.dumps(choices, indent=1).encode())
            return choices[key]
    except OSError as error:
        warnings.warn(f"mobilenet_ext: autotuning's choices are not kept: {error}", stacklevel=2)
        return best
