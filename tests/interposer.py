"""Runs code in a process in which ``interposer.c`` stands between the CPU library and the system."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sysconfig
from pathlib import Path

import warm_process

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def _library() -> Path:
    source = Path(__file__).with_suffix(".c")
    library = ROOT / "build" / "interposer.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")  # another process may make the same
        compiler = sysconfig.get_config_var("CC").split()[0]
        # Where it stands before everything else, libstdc++ must be loaded with it.
        link = ["-Wl,--no-as-needed", "-l:libstdc++.so.6", "-ldl", "-lpthread"]
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", source, "-o", unfinished, *link], check=True)
        unfinished.replace(library)
    return library


def run(code: str) -> str:
    """What ``code`` prints, run with Python in a process of its own; it may call ``attach``."""
    result = warm_process.run(code, LD_PRELOAD=str(_library()))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def attach() -> ctypes.CDLL:
    """The interposer of this process, watching what the CPU library calls."""
    from mobilenet_ext.backends.cpu import LIBRARY

    interposer = ctypes.CDLL(os.environ["LD_PRELOAD"])
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(LIBRARY)):
            ranges += [int(address, 16) for address in line.split()[0].split("-")]
    interposer.interposer_watch(ctypes.c_size_t(min(ranges)), ctypes.c_size_t(max(ranges)))
    return interposer
