#!/usr/bin/env python
"""Random problems for ops, modules, chains, fused and frozen networks, on every instruction set of this machine:

    tests/fuzz.py --seconds 600
    tests/fuzz.py --problems 10000 --seed 7 --isa avx2 --only frozen
    tests/fuzz.py --problem frozen:12345 --isa avx2

Each result is judged as ``fuzz_judge.py`` says. What is wrong is printed as the command that shows it again, with what
was drawn and what came out; a worker that dies or hangs is wrong at the problem it was at, and the rest goes on.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

KINDS = ("ops", "modules", "chains", "fused", "frozen")
# A round of problems: networks take ten times as long as the others.
ROUND = ("ops", "chains", "modules", "frozen", "ops", "chains", "modules", "frozen", "ops", "chains", "fused")
HANG = 120  # seconds, for one problem


def main() -> int:
    arguments = parse()
    if arguments.worker:
        return work(arguments)
    from cpu_ops import ISAS, supports

    isas = [isa for isa in ISAS if supports(isa)] if arguments.isa == "all" else [arguments.isa]
    total = Counts()
    workers = [Worker(arguments, isa, i, len(isas), total) for i, isa in enumerate(isas)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    total.report()
    return 1 if total.wrong or not total.done else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="stop after these (default: 60, without --problems)")
    parser.add_argument("--problems", type=int, help="stop after these, all instruction sets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", default="all", help="of MOBILENET_EXT_CPU_ISA (default: all that this machine has)")
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--problem", metavar="KIND:INDEX", help="this one alone")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)  # first index and step
    arguments = parser.parse_args()
    if arguments.seconds is None and arguments.problems is None:
        arguments.seconds = 60
    return arguments


class Counts:
    """Problems and wrong ones, by kind and instruction set."""

    def __init__(self) -> None:
        self.done: collections.Counter[tuple[str, str]] = collections.Counter()
        self.wrong: collections.Counter[tuple[str, str]] = collections.Counter()

    def report(self) -> None:
        for axis in (0, 1):
            for name in dict.fromkeys(key[axis] for key in self.done):
                done, wrong = (sum(n for key, n in c.items() if key[axis] == name) for c in (self.done, self.wrong))
                print(f"{name}: {done} problems, {wrong} wrong")
        print(f"{self.done.total()} problems, {self.wrong.total()} wrong")


class Worker(threading.Thread):
    """Runs one instruction set's share of the problems in a process of its own, and another where that one dies."""

    def __init__(self, arguments: argparse.Namespace, isa: str, first: int, step: int, total: Counts) -> None:
        super().__init__(daemon=True)
        self.arguments, self.isa, self.first, self.step, self.total = arguments, isa, first, step, total
        self.end = None if arguments.seconds is None else time.monotonic() + arguments.seconds
        # OpenMP's threads sleep while they wait: there are more of them than processors.
        self.environment = {**os.environ, "MOBILENET_EXT_CPU_ISA": isa, "OMP_WAIT_POLICY": "passive"}

    def run(self) -> None:
        at: int | None = self.first
        while at is not None:
            at = self.run_process(at)

    def run_process(self, first: int) -> int | None:
        """The index to go on from, where the process ended too early."""
        options = ["--worker", str(first), str(self.step), f"--seed={self.arguments.seed}"]
        for name in ("only", "problem", "problems"):
            if (value := getattr(self.arguments, name)) is not None:
                options.append(f"--{name}={value}")
        if self.end is not None:
            options.append(f"--seconds={max(self.end - time.monotonic(), 0)}")
        process = subprocess.Popen(
            [sys.executable, sys.argv[0], *options], env=self.environment, stdout=subprocess.PIPE, text=True
        )
        current, index, finished = None, first, False
        for line in process.stdout:
            word, _, rest = line.rstrip("\n").partition(" ")
            if word == "start":
                current, index = rest.split()[0], int(rest.split()[1])
            elif word in ("right", "wrong"):
                self.count(current, word == "wrong", rest)
                current = None
            elif word == "end":
                finished = True
        code = process.wait()
        if finished:
            return None
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        if current is None:
            self.total.wrong["worker", self.isa] += 1
            print(f"wrong: the worker of {self.isa} ended without a problem: {how}", flush=True)
            return None
        self.count(current, True, f"the process died: {how}")
        return None if self.arguments.problem else index + self.step

    def count(self, problem: str, wrong: bool, what: str) -> None:
        key = problem.partition(":")[0], self.isa
        self.total.done[key] += 1
        if wrong:
            self.total.wrong[key] += 1
            seed = f" --seed {self.arguments.seed}" if self.arguments.seed else ""
            print(f"wrong: tests/fuzz.py --problem {problem} --isa {self.isa}{seed}  # {what}", flush=True)


def work(arguments: argparse.Namespace) -> int:
    """In a worker process: one line when a problem starts and one when it ends."""
    from fuzz_judge import judge
    from fuzz_problems import problem

    first, step = arguments.worker
    end = None if arguments.seconds is None else time.monotonic() + arguments.seconds
    for index in itertools.count(first, step):
        kind = arguments.only or ROUND[index // step % len(ROUND)]
        if arguments.problem:
            kind, index = arguments.problem.split(":")[0], int(arguments.problem.split(":")[1])
        elif (end is not None and time.monotonic() > end) or index >= (arguments.problems or index + 1):
            break
        print(f"start {kind}:{index} {index}", flush=True)
        faulthandler.dump_traceback_later(HANG, exit=True)
        made = problem(arguments.seed, kind, index)
        complaints = judge(made)
        faulthandler.cancel_dump_traceback_later()
        drawn = ", ".join(f"{name}: {value}" for name, value in made.settings.items())
        text = f"{'; '.join(complaints)} | {drawn}".replace("\n", " ")
        print(f"wrong {text}" if complaints else "right", flush=True)
        if arguments.problem:
            break
    print("end", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
