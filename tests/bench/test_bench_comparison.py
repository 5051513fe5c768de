"""The harness: who is timed, how, and what a table makes of it."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from benchmarks import checks, comparison, kernels, peers, table, timing
from benchmarks.limits import AMOUNTS, Limits, _moves, measure_limits
from benchmarks.network import Workload
from benchmarks.peers import torch_peers

LIMITS = Limits(((0, 1e10),), 1e11)
QUICK = comparison.Effort(rounds=2, burst_s=0.01, memory=False)
INFERENCE = Workload("inference", 0.25, 33, 2, "float32", "cpu")
TRAINING = INFERENCE._replace(task="training", resolution=64, batch=4)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, and one thread for the float64 references (see ``plain.one_thread``): no test looks at the times."""
    torch.set_num_threads(1)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("work", [INFERENCE, TRAINING], ids=["inference", "training"])
def test_ours_and_eager_are_timed(work: Workload, dtype: str) -> None:
    names = [peers.OURS, "eager NCHW", "eager channels_last"]
    work = work._replace(dtype=dtype)
    result = comparison.compare_runners(work, names, QUICK)
    assert [row["runner"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert 0 < row["error"] < (1e-2 if dtype == "float32" else 0.5)
    text = table.comparison_table(result, LIMITS)
    assert "eager NCHW" in text and "of limit" in text


@pytest.mark.bench
@pytest.mark.parametrize("name", [name for name in peers.NAMES if name not in (peers.OURS, "eager NCHW")])
@pytest.mark.parametrize("task", ["inference", "training"])
def test_every_peer_computes_the_network(name: str, task: str) -> None:
    """All that is installed here; each other says what it lacks."""
    work = Workload(task, 1.0, 64, 4, "float32", "cpu")
    peer = peers.get(name)
    reason = peer.missing(work)
    if reason is not None:
        assert ("not installed" in reason) == (peer.module is not None and not importlib.util.find_spec(peer.module))
        pytest.skip(reason)
    outputs = checks.outputs_of(checks.start(peer, work), work)
    error, complaint = checks.judge(outputs, checks.expected_of(work))
    assert complaint is None and error > 0


class NoLastReLU(torch_peers.EagerChannelsLast):
    """Almost the network."""

    def network(self, work: Workload) -> nn.Module:
        model = super().network(work)
        model.feature[-2][2] = nn.Identity()
        return model


class OtherWeights(torch_peers.EagerChannelsLast):
    """The right network with a stem that has moved."""

    def network(self, work: Workload) -> nn.Module:
        model = super().network(work)
        with torch.no_grad():
            model.feature[0][0].weight.mul_(torch.rand_like(model.feature[0][0].weight))
        return model


class Crashes(torch_peers.EagerChannelsLast):
    def network(self, work: Workload) -> nn.Module:
        raise RuntimeError("no such convolution\nand more")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("work", [INFERENCE, TRAINING], ids=["inference", "training"])
@pytest.mark.parametrize("wrong", [NoLastReLU, OtherWeights, Crashes])
def test_a_wrong_peer_is_refused(monkeypatch: pytest.MonkeyPatch, wrong: type, work: Workload, dtype: str) -> None:
    monkeypatch.setattr(peers, "get", lambda name: wrong())
    result = comparison.compare_runners(work._replace(dtype=dtype), ["theirs"], QUICK)
    (row,) = result["rows"]
    assert "seconds" not in row and "skipped" not in row
    assert row["refused"] == "RuntimeError: no such convolution" if wrong is Crashes else "wrong" in row["refused"]
    assert "theirs: " + row["refused"] in table.comparison_table(result, LIMITS)


def test_our_own_error_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "get", lambda name: Crashes())
    with pytest.raises(RuntimeError, match="no such convolution"):
        comparison.compare_runners(INFERENCE, [peers.OURS], QUICK)


def test_nan_and_other_shapes_are_refused() -> None:
    expected = checks.expected_of(INFERENCE)
    right = expected.outputs["logits"]
    assert checks.judge({"logits": right}, expected) == (0.0, None)
    for wrong in (right * float("nan"), right[:, :5]):
        assert "wrong logits" in checks.judge({"logits": wrong}, expected)[1]


def test_runners_take_turns() -> None:
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = timing.interleave(calls, "cpu", rounds=3, burst_s=0.0, pause_s=0.0)
    warm = 3 * (timing.WARM_UP + 1)
    assert order[warm:] == list("abc") * 3
    assert all(len(times) == 3 for times in samples.values())


def test_a_sample_is_the_mean_of_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def call() -> None:
        nonlocal now, calls
        calls += 1
        now += 2e-3 if calls % 2 else 4e-3

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    samples = timing.interleave({"a": call}, "cpu", rounds=4, burst_s=0.02, pause_s=0.0)["a"]
    assert samples == pytest.approx([3e-3] * 4, rel=0.1)
    before_bursts = timing.WARM_UP + 1
    assert calls == before_bursts + 4 * (10 + 1), "bursts of 0.02 s, each after a call that is not counted"


def test_summary() -> None:
    assert timing.summary([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 2.0, 4.0)
    assert timing.summary([7.0]) == (7.0, 7.0, 7.0)


def test_the_ratio_is_taken_round_by_round() -> None:
    drifting = [1.0, 2.0, 4.0]
    assert table.paired_ratio([2 * s for s in drifting], drifting) == (2.0, 2.0, 2.0)


def test_peak_memory_of_a_process_of_its_own() -> None:
    # The images of the larger batch alone take 3 MiB more, its first activations 8.
    small, large = (comparison.peak_memory("eager NCHW", INFERENCE._replace(batch=b, resolution=64)) for b in (1, 65))
    assert small is not None and large - small > 8 * 2**20
    assert comparison.peak_memory("nobody", INFERENCE) is None


def test_limits_are_measured() -> None:
    found = measure_limits("cpu", ["float32", "bfloat16"], rounds=1)
    assert list(found) == ["float32", "bfloat16"]
    for limits in found.values():
        assert [amount for amount, _ in limits.bytes_per_second] == list(AMOUNTS)
        assert all(1e8 < rate < 1e14 for _, rate in limits.bytes_per_second) and limits.operations_per_second > 1e8


def test_what_moves_data_moves_as_much_as_it_says() -> None:
    calls = _moves(AMOUNTS[0], "cpu")
    (read, of_read), (in_place, of_in_place), (copy, of_copy) = (calls[name] for name in ("read", "in place", "copy"))
    assert sum(part.nbytes for part in read.args) == of_read == AMOUNTS[0]
    assert read.args[0].data_ptr() != read.args[1].data_ptr()
    data = in_place()
    assert 2 * data.nbytes == of_in_place and data.data_ptr() == read.args[0].data_ptr()
    assert copy.args[0].nbytes + copy().nbytes == of_copy == AMOUNTS[0] and copy().std() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pass_", kernels.PASSES)
def test_kernels(pass_: str, dtype: str) -> None:
    names = ["eager NCHW", "eager channels_last"]
    work = Workload("training", 0.25, 33, 2, dtype, "cpu")
    results = list(kernels.compare_layers(work, pass_, names, QUICK))
    assert sum(result["count"] for result in results) == {"inference": 14}.get(pass_, 28)
    for result in results:
        assert [row["runner"] for row in result["rows"]] == [peers.OURS, *names]
        assert all(len(row["seconds"]) == 2 for row in result["rows"])
    text = table.kernels_table({"limits": {dtype: LIMITS._asdict()}, "results": results})
    assert "of the limit" in text and results[0]["workload"]["layer"] in text


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "RUNNERS", {peers.OURS: lambda *_: (lambda: None, 0.5)})
    with pytest.raises(ValueError, match="our forward of dense"):
        list(kernels.compare_layers(TRAINING, "forward", [], QUICK))
