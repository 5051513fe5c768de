"""The harness: who is timed, how, and what a table makes of it."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from combinations import combinations
from torch import nn

from benchmarks import checks, comparison, kernels, network, peers, table, timing, warm_up
from benchmarks.limits import AMOUNTS, Limits, _moves, measure_limits
from benchmarks.network import Workload
from benchmarks.peers import torch_peers
from mobilenet_ext import backends

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


@combinations("wrong, work, dtype", [NoLastReLU, OtherWeights, Crashes], [INFERENCE, TRAINING], ["float32", "bfloat16"])
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


@pytest.mark.slow
def test_peak_memory_of_a_process_of_its_own() -> None:
    # The images of the larger batch alone take 3 MiB more, its first activations 8.
    small, large = (comparison.peak_memory("eager NCHW", INFERENCE._replace(batch=b, resolution=64)) for b in (1, 65))
    assert small is not None and large - small > 8 * 2**20
    assert comparison.peak_memory("nobody", INFERENCE) is None


@pytest.mark.slow
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


def test_a_wrong_kernel_is_a_row_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def runner(layer: network.Layer, pass_: str, work: Workload) -> tuple[timing.Call, float]:
        if layer.kind == "pool":
            raise RuntimeError("an illegal access\nand more")
        return lambda: None, 0.5 if layer.kind == "dense" else 0.0

    monkeypatch.setattr(kernels, "RUNNERS", {peers.OURS: runner, "theirs": runner})
    results = list(kernels.compare_layers(TRAINING, "forward", ["theirs"], QUICK))
    refused = {r["workload"]["layer"].split()[0]: [row.get("refused") for row in r["rows"]] for r in results}
    assert refused["dense"] == ["wrong output: relative error 5.0e-01"] * 2
    assert refused["pool"] == ["RuntimeError: an illegal access"] * 2 and refused["depthwise"] == [None] * 2
    text = table.kernels_table({"limits": {"float32": LIMITS._asdict()}, "results": results})
    assert "mobilenet_ext: RuntimeError: an illegal access" in text and "theirs / it" in text
    only = table.kernels_table({"limits": {"float32": LIMITS._asdict()}, "results": results[:1]})
    assert "batch 4: refused" in only
    assert table.one_line(results[0]["rows"]).startswith("mobilenet_ext: wrong output")


def test_a_second_backend_has_its_own_times() -> None:
    work = Workload("training", 0.25, 33, 1, "float32", "cpu")
    used = []
    with backends.use("cpu"):
        for result in kernels.compare_layers(work, "inference", ["eager NCHW"], QUICK, ["reference"]):
            used.append([row["runner"] for row in result["rows"]])
            assert all(row["seconds"] for row in result["rows"])
    assert used[0] == [peers.OURS, "eager NCHW", "mobilenet_ext, reference"]
    assert peers.is_ours(used[0][2])
    text = table.kernels_table({"limits": {"float32": LIMITS._asdict()}, "results": [result]})
    assert "mobilenet_ext, reference: ms  eager NCHW / it" in text and "predicted" not in text


def test_predictions_are_of_layers_of_the_network() -> None:
    model = table._prediction()
    for pass_, layers in model["microseconds"].items():
        names = {layer.name for layer in network.layers_of(1.0, 224, pass_)}
        assert set(layers) <= names and len(layers) >= len(names) - 2
    workload = {**model["workload"], "pass": "forward", "layer": "depthwise 512-512 14x14"}
    assert table.predicted(workload) == 63e-6
    assert table.predicted({**workload, "batch": 32}) is None and table.predicted({**workload, "layer": "no"}) is None
    row = {"runner": peers.OURS, "seconds": [1e-4] * 3}
    result = {"workload": workload, "count": 5, "bytes": 10**8, "operations": 1, "rows": [row]}
    text = table.kernels_table({"limits": {"bfloat16": LIMITS._asdict()}, "results": [result]})
    assert "predicted for an H100: ms" in text and text.splitlines()[-1].endswith("0.063")


def test_a_call_alone_and_its_host_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has both where there is a GPU."""
    now = 0.0

    def takes(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: takes(5e-3))
    times = timing.alone(lambda: takes(1e-3), 3)
    assert times.host == pytest.approx([1e-3] * 3) and times.total == pytest.approx([6e-3] * 3)
    row = {"runner": "a", "error": 0.0, "seconds": [6e-3], "alone_seconds": times.total, "host_seconds": times.host}
    result = {"workload": INFERENCE._asdict(), "bytes": 1, "operations": 1, "rows": [row]}
    lines = table.comparison_table(result, LIMITS).splitlines()
    assert lines[1].endswith("alone ms  host ms") and lines[2].split()[-2:] == ["6", "1"]


def test_a_step_that_does_not_fit_in_float64_is_checked_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, places = checks._exact, []

    def full(work: Workload, device: str) -> dict[str, torch.Tensor]:
        places.append(device)
        if len(places) == 1:
            raise torch.OutOfMemoryError("full")
        return exact(work, device)

    monkeypatch.setattr(checks, "_exact", full)
    assert checks.expected_of(TRAINING).outputs["loss"] > 0 and places == ["cpu", "cpu"]


def test_a_captured_step_starts_from_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph's replay stood in for by the step itself."""

    class Graph:
        def __init__(self, function: timing.Call) -> None:
            function()
            function()
            self.replay = function

    monkeypatch.setattr(torch_peers, "capture", Graph)
    captured = torch_peers.EagerCaptured().training(TRAINING)
    outcome, expected = captured.first_step(), torch_peers.EagerChannelsLast().training(TRAINING).first_step()
    assert outcome.loss == pytest.approx(expected.loss, rel=1e-5)
    torch.testing.assert_close(outcome.stem_grad, expected.stem_grad, rtol=1e-3, atol=1e-4)
    assert torch_peers.EagerCaptured().missing(TRAINING) == "a CUDA graph needs a GPU"


def test_kernels_are_compiled_in_processes_beforehand(capfd: pytest.CaptureFixture[str]) -> None:
    options = "--device cpu --dtype float32 --resolution 33".split()
    assert warm_up.main(["inference:0.25:1", "inference:0.25:2", *options]) == 0
    assert "20 of 20 layers" in capfd.readouterr().out
    works = [Workload("training", width, 224, 128, "bfloat16", "cuda") for width in (1.0, 0.5, 1.0)]
    jobs = warm_up.jobs_of(works)
    assert {pass_ for _, pass_, _ in jobs} == {"forward", "backward"} and len(jobs) == 2 * 2 * 20


def test_a_kernel_that_does_not_compile_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pool = lambda processes, *_, **__: ThreadPoolExecutor(1)  # noqa: E731

    def fails(layer: network.Layer, pass_: str, work: Workload) -> timing.Call:
        if layer.kind == "pool":
            raise RuntimeError("no such register")
        return lambda: None

    monkeypatch.setattr(warm_up, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(warm_up, "kernel_call", fails)
    assert warm_up.main(["training:0.25:1", "--device", "cpu"]) == 1
    said = capfd.readouterr()
    assert "38 of 40 layers" in said.out and said.err.count("RuntimeError: no such register") == 2
