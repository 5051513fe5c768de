"""Autotuning: off unless asked for, and then each problem is timed once and its choice kept on disk."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from mobilenet_ext import triton
from mobilenet_ext.contract import NO_PADDING, Act
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


ONE = (1, 1, 1, 1)  # on each side
U, BN, GRAD_BN = torch.empty(2, 8, 6, 6, device="meta"), torch.empty(5, 8), torch.empty(6, 8)
DEPTHWISE, POINTWISE, DENSE = torch.empty(8, 1, 3, 3), torch.empty(8, 8, 1, 1), torch.empty(8, 8, 3, 3)
STATISTICS = (None, None, 1e-5, True)
# The arguments of each op that takes an activation.
WITH_ACTIVATION = {
    "depthwise_forward": lambda act: (U, BN, act, DEPTHWISE, 1, ONE, *STATISTICS),
    "depthwise_backward": lambda act: (U, U, GRAD_BN, U, BN, act, True, DEPTHWISE, 1, ONE, True, True),
    "depthwise_inference": lambda act: (U, BN, act, DEPTHWISE, 1, ONE),
    "pointwise_forward": lambda act: (U, BN, act, POINTWISE, 1, NO_PADDING, *STATISTICS),
    "pointwise_backward": lambda act: (U, U, GRAD_BN, U, BN, act, True, POINTWISE, 1, NO_PADDING, True, True),
    "pointwise_inference": lambda act: (U, BN, act, POINTWISE, 1, NO_PADDING),
    "dense_inference": lambda act: (U, BN, act, DENSE, 1, ONE),
    "norm_act_forward": lambda act: (U, BN, act, False),
    "norm_act_backward": lambda act: (U, U, BN, act, True, False),
    "norm_act_forward, pooled": lambda act: (U, BN, act, True),
    "norm_act_backward, pooled": lambda act: (U[..., :1, :1], U, BN, act, True, True),
    "block_inference": lambda act: (U, BN, act, DEPTHWISE, 1, ONE, BN, Act.RELU, POINTWISE),
    "block_inference, second": lambda act: (U, BN, Act.RELU, DEPTHWISE, 1, ONE, BN, act, POINTWISE),
}


@pytest.mark.parametrize("op", WITH_ACTIVATION)
def test_each_activation_has_its_choice(op, monkeypatch):
    class Asked(Exception):
        pass

    def problem(act):
        with pytest.raises(Asked) as asked:
            triton.ops[op.partition(",")[0]](*WITH_ACTIVATION[op](act))
        return str(asked.value.args)

    def run(op, problem, candidates, launch):
        raise Asked(op, problem)

    monkeypatch.setattr(autotune, "run", run)
    assert len({problem(act) for act in Act}) == len(Act)
    assert problem(Act.RELU) == problem(Act.RELU.value)


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
