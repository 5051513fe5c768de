"""What the machine can do at most, measured in the run that is compared with it: how fast it multiplies, and how fast
it moves data, which depends on their amount.

Samuel Williams, Andrew Waterman, David Patterson: Roofline, Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.network import DTYPES
from benchmarks.timing import KERNEL_CLEARS, Call, interleave, summary
from mobilenet_ext import ops
from mobilenet_ext.contract import Act

# Rows, columns and depth of matrix products: which one a library does best differs from machine to machine.
PRODUCTS = ((2048, 2048, 2048), (1024, 1024, 1024), (6272, 512, 512))
# Bytes: within a core's cache, within the cores' common one, more than any cache holds.
AMOUNTS = tuple(2**20 * count for count in (2, 8, 32, 128, 512))


class Limits(NamedTuple):
    """A roofline with a roof for each amount of data: what stays in a cache from one call to the next moves faster."""

    bytes_per_second: tuple[tuple[int, float], ...]  # amounts of data, ascending, and the rate from each on
    operations_per_second: float

    def moving(self, bytes_moved: int) -> float:
        """Bytes per second that an op with so many to read and write moves at most."""
        # What more data can do, less can: with little of them the call itself takes most of the time.
        return max(rate for _, rate in self.bytes_per_second[self._roof(bytes_moved) :])

    def _roof(self, bytes_moved: int) -> int:
        """Which one is over so much data; the first is also over less."""
        return max((i for i, (amount, _) in enumerate(self.bytes_per_second) if amount <= bytes_moved), default=0)

    def seconds(self, bytes_moved: int, operations: int) -> float:
        """The least time in which the machine moves so many bytes and does so many operations."""
        return max(bytes_moved / self.moving(bytes_moved), operations / self.operations_per_second)

    def share(self, result: dict[str, Any], seconds: float) -> float:
        """The fraction of the limit that a runner of the result reaches in so many seconds."""
        return self.seconds(result["bytes"], result["operations"]) / seconds

    def raised(self, bytes_moved: int, operations: int, seconds: float) -> Limits:
        """The limits, none of them below what was done in so many seconds."""
        rates, at = list(self.bytes_per_second), self._roof(bytes_moved)
        rates[at] = rates[at][0], max(rates[at][1], bytes_moved / seconds)
        return Limits(tuple(rates), max(self.operations_per_second, operations / seconds))


def limits_of(report: dict[str, Any]) -> dict[str, Limits]:
    """By dtype: what was measured as a limit, or what a runner of the report reached where that is more, since the
    machine may have been slower while its limits were measured. Nothing exceeds them."""
    found = {
        dtype: Limits(tuple((amount, rate) for amount, rate in of["bytes_per_second"]), of["operations_per_second"])
        for dtype, of in report["limits"].items()
    }
    for result in report["results"]:
        dtype = result["workload"]["dtype"]
        for row in result["rows"]:
            if row.get("seconds") and result["bytes"]:
                time = summary(row["seconds"]).median
                found[dtype] = found[dtype].raised(result["bytes"], result["operations"], time)
    return found


def measure_limits(device: str, dtypes: Sequence[str], rounds: int = 5, burst_s: float = 0.1) -> dict[str, Limits]:
    """By dtype."""
    measure = partial(_best_rate, device=device, rounds=rounds, burst_s=burst_s)
    moving = tuple((amount, measure(_moves(amount, device))) for amount in AMOUNTS)
    return {dtype: Limits(moving, measure(_products(dtype, device))) for dtype in dtypes}


def _best_rate(calls: dict[str, tuple[Call, int]], device: str, rounds: int, burst_s: float) -> float:
    """Of calls with the bytes or operations of each: a limit is the best that was seen in any round."""
    timed = {name: call for name, (call, _) in calls.items()}
    samples = interleave(timed, device, rounds, burst_s, pause_s=0.1, clears=KERNEL_CLEARS)
    return max(calls[name][1] / min(times) for name, times in samples.items())


def _moves(amount: int, device: str) -> dict[str, tuple[Call, int]]:
    """Calls that go through so many bytes of data, and what they read and write of them; no op does less with a byte.

    PyTorch's copy is not among them. It moves more than it is asked to: before a core stores to memory that it has not
    read, it reads it. Our kernel's stores go past the cache, and in place the memory has been read anyway.
    """
    data = torch.rand(amount // 4, device=device)
    one, other = data.chunk(2)
    source, bn = one.view(1, -1, 1, 64).permute(0, 3, 1, 2), torch.rand(5, 64, device=device)
    return {
        "read": (partial(torch.dot, one, other), amount),
        "in place": (data.relu_, 2 * amount),
        "copy": (partial(ops.norm_act_forward, source, bn, Act.RELU, False), amount),
    }


def _products(dtype: str, device: str) -> dict[str, tuple[Call, int]]:
    calls: dict[str, tuple[Call, int]] = {}
    for rows, columns, depth in PRODUCTS:
        a, b = (torch.randn(shape, device=device).to(DTYPES[dtype]) for shape in ((rows, depth), (depth, columns)))
        image, weight = a.view(1, rows, 1, depth).permute(0, 3, 1, 2), b.t().contiguous().view(columns, depth, 1, 1)
        size, operations = f"{rows}x{columns}x{depth}", 2 * rows * columns * depth
        calls[f"torch.mm {size}"] = partial(torch.mm, a, b, out=a.new_empty(rows, columns)), operations
        calls[f"ours {size}"] = partial(ops.pointwise_inference, image, None, Act.LINEAR, weight, 1, 0), operations
    return calls
