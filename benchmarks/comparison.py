"""Whole networks, ours and the peers', on one workload: built, checked, timed in turn, and their memory measured."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import checks, peers
from benchmarks.network import Workload
from benchmarks.peers.base import Peer
from benchmarks.timing import alone, interleave

Row = dict[str, Any]
ALONE_CALLS = 15


class Effort(NamedTuple):
    """How long and how often is measured."""

    rounds: int = 9
    burst_s: float = 0.25
    memory: bool = True


def compare_runners(work: Workload, names: Sequence[str], effort: Effort) -> dict[str, Any]:
    """A result for one workload: the bytes and operations that bound it, and a row for each runner.

    A row has the runner's name, version and, where it ran, ``error`` (relative, against float64), ``seconds`` (a sample
    a round), on a GPU ``alone_seconds`` and ``host_seconds`` (as of ``timing.alone``), and ``peak_bytes``; where it did
    not, ``skipped`` says why it cannot do the work, ``refused`` what was wrong with its output.
    """
    expected = checks.expected_of(work)
    rows, runners = [], {}
    for name in names:
        row, runner = _prepare(name, work, expected)
        print(f"  {name}: {row.get('skipped') or row.get('refused') or 'ready'}", file=sys.stderr, flush=True)
        rows.append(row)
        if runner is not None:
            runners[name] = runner
    for name, samples in interleave(runners, work.device, effort.rounds, effort.burst_s).items():
        row = next(row for row in rows if row["runner"] == name)
        row["seconds"] = samples
        if work.device == "cuda":
            row["alone_seconds"], row["host_seconds"] = alone(runners[name], ALONE_CALLS)
    runners.clear()
    gc.collect()
    if effort.memory:
        for row in rows:
            if "seconds" in row:
                row["peak_bytes"] = peak_memory(row["runner"], work)
    return {
        "workload": work._asdict(),
        "bytes": work.bytes_moved(),
        "operations": work.operations(),
        "rows": rows,
    }


def _prepare(name: str, work: Workload, expected: checks.Expected) -> tuple[Row, Any]:
    """The runner's row, and the runner if its output is right."""
    row: Row = {"runner": name}
    try:
        peer = peers.get(name)
        row["version"] = _version(peer)
        reason = peer.missing(work)
        if reason is not None:
            return {**row, "skipped": reason}, None
        runner = checks.start(peer, work)
        row["error"], complaint = checks.judge(checks.outputs_of(runner, work), expected)
    except Exception as error:  # of somebody else's code: a line of the table, not the end of the run
        if name == peers.OURS:
            raise
        return {**row, "refused": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}, None
    return ({**row, "refused": complaint}, None) if complaint else (row, runner)


def _version(peer: Peer) -> str | None:
    try:
        return version(peer.version_of) if peer.version_of else None
    except PackageNotFoundError:
        return None


# --- memory, in a process of its own ----------------------------------------------------------------------------------


def peak_memory(name: str, work: Workload) -> int | None:
    """Bytes at the peak of three calls above those before the first, in a fresh process; None where it failed.

    On a CPU of the process, so that what a compiler keeps from the first call counts; on a GPU of torch's allocator.
    """
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "benchmarks.comparison", name, json.dumps(work._asdict()), threads]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def _measure_own_peak(name: str, work: Workload) -> int:
    def status(field: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024

    runner = checks.start(peers.get(name), work)
    if work.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            runner()
        return torch.cuda.max_memory_allocated() - before
    before = status("VmRSS")
    for _ in range(3):
        runner()
    return status("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(_measure_own_peak(sys.argv[1], Workload(**json.loads(sys.argv[2]))))
