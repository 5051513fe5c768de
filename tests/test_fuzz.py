"""The fuzz (``tests/fuzz.py``): some of its problems, and that it notices what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_judge import judge
from fuzz_problems import problem
from torch import Tensor

import mobilenet_ext as mx
from mobilenet_ext import chain, layers, ops

SEED = 1
COUNTS = {"ops": 60, "modules": 40, "chains": 30, "fused": 2, "frozen": 40}


def complaints(kind: str) -> Iterator[tuple[int, list[str]]]:
    """What is wrong with the problems of a kind."""
    with mx.backends.use("cpu"):
        for index in range(COUNTS[kind]):
            if wrong := judge(problem(SEED, kind, index)):
                yield index, wrong


@pytest.mark.parametrize("kind", COUNTS)
def test_nothing_is_wrong(kind: str) -> None:
    assert list(complaints(kind)) == []


def test_a_problem_is_a_function_of_its_number() -> None:
    first, again = (problem(SEED, "chains", 5) for _ in range(2))
    assert first.settings == again.settings and first.threads == again.threads
    torch.testing.assert_close(first.x, again.x, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(problem(SEED + 1, "chains", 5).x.flatten()[:1], first.x.flatten()[:1])


def scaled(factor: float, output: int | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes of an op one with a result that is a little too large."""

    def plant(op: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*args: Any) -> Any:
            out = op(*args)
            if output is None:
                return out * factor
            return tuple(o * factor if i == output else o for i, o in enumerate(out))

        return wrong

    return plant


def one_element(op: Callable[..., Any]) -> Callable[..., Any]:
    """Makes of an op one that forgets the last element of its result."""

    def wrong(*args: Any) -> Tensor:
        out = op(*args).clone()
        out[-1:, -1:, -1:, -1:] = 0
        return out

    return wrong


def of_threads(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: op(*args) * (1 + 1e-7 * (torch.get_num_threads() > 1))


def without_nan(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: op(*args).nan_to_num(0)


PLANTED = {
    "an output off by 1e-3": (ops, "norm_act_forward", scaled(1 + 1e-3), "chains"),
    "an output off by 3e-5": (ops, "norm_act_forward", scaled(1 + 3e-5), "modules"),
    "a gradient off by 1e-3": (ops.BACKWARD, "pointwise", scaled(1 + 1e-3, 1), "modules"),
    "a layer's gradient off by 1e-3": (ops.BACKWARD, "depthwise", scaled(1 + 1e-3, 0), "ops"),
    "one element forgotten": (ops.INFERENCE, "depthwise", one_element, "ops"),
    "the biased variance as the running one": (
        chain,
        "update_running_stats_",
        lambda op: lambda *args: op(*args[:4], [10**9] * len(args[4]), args[5]),
        "modules",
    ),
    "a convolution without its bias": (ops.FORWARD, "pointwise", lambda op: lambda *args: op(*args[:10]), "modules"),
    "bits that depend on the threads": (ops, "norm_act_forward", of_threads, "modules"),
    "NaN lost": (ops.INFERENCE, "pointwise", without_nan, "ops"),
    "statistics that are not differentiable": (
        layers,
        "_split_grad",
        lambda op: lambda *args: (op(*args)[0], torch.zeros_like(op(*args)[1]), *op(*args)[2:]),
        "ops",
    ),
    "a frozen model off by 1e-3": (chain, "execute", scaled(1 + 1e-3), "frozen"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, plant, kind = PLANTED[fault]
    if isinstance(place, dict):
        monkeypatch.setitem(place, name, plant(place[name]))
    else:
        monkeypatch.setattr(place, name, plant(getattr(place, name)))
    assert next(complaints(kind), None)


BROKEN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import fuzz, fuzz_problems

right = fuzz_problems.problem

def problem(seed, kind, index):
    if index == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    made = right(seed, kind, index)
    if index == 3:
        made.ours = lambda model, x: 1 / 0
    return made

fuzz_problems.problem = problem
sys.exit(fuzz.main())
"""


def test_a_worker_that_dies_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, str(script), "--problems=5", "--only=ops", "--isa=baseline", "--seed=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "--problem ops:1 --isa baseline --seed 1  # the process died: SIGSEGV" in done.stdout
    assert "--problem ops:3 --isa baseline --seed 1  # raised ZeroDivisionError" in done.stdout
    assert done.stdout.endswith("\n5 problems, 2 wrong\n")
