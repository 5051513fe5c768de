"""Times of several runners, taken in turn, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

Call = Callable[[], object]

# Longer than the threads of a pool spin for more work: those of the runner before would halve the speed of the next.
PAUSE_S = 0.3
WARM_UP = 2  # calls
CLEARED = 256 * 2**20  # bytes written between two calls on a GPU: more than any L2 holds
KERNEL_CLEARS = 12  # in front of one kernel: longer than a slow host takes to launch it, which is not the kernel's time


class Summary(NamedTuple):
    """Of samples: their median, and the quartiles around it."""

    median: float
    low: float
    high: float


def summary(samples: list[float]) -> Summary:
    if len(samples) < 2:
        return Summary(samples[0], samples[0], samples[0])
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(statistics.median(samples), low, high)


def interleave(
    calls: dict[str, Call], device: str, rounds: int, burst_s: float, pause_s: float = PAUSE_S, clears: int = 1
) -> dict[str, list[float]]:
    """Seconds a call of each runner, one sample a round: A B C, A B C, ...

    A sample is the mean over a burst of calls that lasts about ``burst_s`` seconds, at least one call. Each burst comes
    after a pause and, where a call is shorter than a burst, after one call that is not counted. On a GPU there is no
    pause, and a sample is the median of the burst's calls by events, each behind ``clears`` writes that clear the L2.
    """
    on_gpu = device == "cuda"
    burst = partial(_gpu_burst, clears=clears) if on_gpu else _cpu_burst
    lengths = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):  # compiles, allocates, packs
            call()
        start = time.perf_counter()
        burst(call, 1)  # on a GPU the write that clears the L2 takes longer than a small kernel
        lengths[name] = max(1, round(burst_s / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if not on_gpu:
                time.sleep(pause_s)
            if lengths[name] > 1:
                call()
            samples[name].append(burst(call, lengths[name]))
    return samples


def _cpu_burst(call: Call, length: int) -> float:
    start = time.perf_counter()
    for _ in range(length):
        call()
    return (time.perf_counter() - start) / length


def _gpu_burst(call: Call, length: int, clears: int) -> float:
    other = torch.empty(CLEARED, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(length)]
    for start, end in events:
        for _ in range(clears):
            other.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return 1e-3 * statistics.median(start.elapsed_time(end) for start, end in events)


class Alone(NamedTuple):
    """Calls that a GPU has nothing else to do beside, in seconds: until the last result is there, and until the host
    has launched everything. Where both are the same, the host is what takes the time."""

    total: list[float]
    host: list[float]


def alone(call: Call, count: int) -> Alone:
    """One call at a time: behind others the host would wait for room in the queue of launches."""
    times = Alone([], [])
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        times.total.append(time.perf_counter() - start)
    return times
