"""Autotuning: off unless asked for, and then each problem is timed once and its choice kept on disk."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from mobilenet_ext.triton import autotune, heuristics

CANDIDATES = (
    heuristics.config(num_warps=4, BLOCK=1),
    {"PROGRAMS": 3, "kernel": heuristics.config(num_warps=8, BLOCK=2)},
    heuristics.config(num_warps=2, BLOCK=3),
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "choices.json"
    monkeypatch.setattr(autotune, "cache_file", lambda: path)
    autotune._choices.cache_clear()
    yield path
    autotune._choices.cache_clear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list:
    """Autotuning switched on; the candidates that were timed, of which the second is the fastest."""
    calls = []

    def time(launch, candidate):
        calls.append(candidate)
        return [3.0, 1.0, float("inf")][CANDIDATES.index(candidate)]

    monkeypatch.setattr(autotune, "enabled", True)
    monkeypatch.setattr(autotune, "_time", time)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


def run(problem: tuple = (1, "torch.float32"), candidates: tuple = CANDIDATES) -> dict:
    return autotune.run("op", problem, candidates, lambda config: config)


def test_off_by_default(file):
    assert not autotune.enabled
    assert run() is CANDIDATES[0]
    assert not file.exists()


def test_the_fastest_is_kept(file, timed):
    assert run() == CANDIDATES[1]
    assert timed == list(CANDIDATES)
    assert run() == CANDIDATES[1] and len(timed) == 3
    assert list(json.loads(file.read_text()).values()) == [CANDIDATES[1]]
    assert list(file.parent.iterdir()) == [file]


def test_another_process_reuses_the_choice(file, timed):
    run()
    autotune._choices.cache_clear()
    assert run() == CANDIDATES[1]
    assert len(timed) == 3


def test_each_problem_has_its_choice(file, timed):
    run((1,))
    run((2,))
    assert len(timed) == 6 and len(json.loads(file.read_text())) == 2


def test_choices_of_other_processes_are_kept(file, timed):
    run((1,))
    file.write_text(json.dumps({**json.loads(file.read_text()), "theirs": {"BLOCK": 7}}))
    run((2,))
    assert len(json.loads(file.read_text())) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"op (1, \'torch.float32\')": {"BLOCK": 99}}'])
def test_a_damaged_or_outdated_file_is_tuned_again(file, timed, content):
    file.parent.mkdir()
    file.write_text(content)
    assert run() == CANDIDATES[1]
    assert len(timed) == 3


def test_one_candidate_needs_no_timing(file, timed):
    assert run(candidates=CANDIDATES[:1]) is CANDIDATES[0]
    assert not timed


def test_nothing_is_timed_while_a_graph_is_captured(file, timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert run() is CANDIDATES[0]
    assert not timed and not file.exists()


def test_a_candidate_may_be_tuned_itself(file, timed, monkeypatch):
    """As of a block, which may run as two kernels. (Where this fails, it hangs.)"""

    def launch(config):
        return run((2,)) if config is CANDIDATES[0] else config

    timing = autotune._time
    monkeypatch.setattr(autotune, "_time", lambda launch, candidate: (launch(candidate), timing(launch, candidate))[1])
    assert autotune.run("outer", (1,), CANDIDATES, launch) == CANDIDATES[1]
    assert len(json.loads(file.read_text())) == 2


def test_a_file_that_cannot_be_written(file, timed):
    file.parent.write_text("not a folder")
    with pytest.warns(UserWarning, match="not kept"):
        assert run((1,)) == CANDIDATES[1]
    with pytest.warns(UserWarning, match="not kept"):
        run((2,))
    assert run((1,)) == CANDIDATES[1] and len(timed) == 6


def test_who_tunes_a_problem_first_decides_for_all(file, timed, monkeypatch):
    run((1,))
    theirs = {key: CANDIDATES[2] for key in json.loads(file.read_text())}
    file.unlink()
    autotune._choices.cache_clear()

    def time(launch, candidate):
        file.write_text(json.dumps(theirs))  # while this process still measures
        return float(CANDIDATES.index(candidate))

    monkeypatch.setattr(autotune, "_time", time)
    assert run((1,)) == CANDIDATES[2] and json.loads(file.read_text()) == theirs


def test_processes_that_add_choices_at_once_lose_none(file, timed):
    def process(number):
        autotune._keep(file, f"problem {number}", CANDIDATES[1], CANDIDATES)

    threads = [threading.Thread(target=process, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(file.read_text())) == 8
    assert list(file.parent.iterdir()) == [file]
