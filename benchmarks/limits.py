"""What the machine can do at most, measured in the run that is compared with it: a copy's rate and a product's."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.network import DTYPES
from benchmarks.timing import CLEARED, interleave

PRODUCT = 2048  # rows, columns and depth of the matrix product


class Limits(NamedTuple):
    """A roofline."""

    bytes_per_second: float  # read and written, of a copy that no cache holds
    operations_per_second: float  # of a large matrix product in the dtype

    def seconds(self, bytes_moved: int, operations: int) -> float:
        """The least time in which the machine moves so many bytes and does so many operations."""
        return max(bytes_moved / self.bytes_per_second, operations / self.operations_per_second)


def measure_limits(device: str, dtype: str, rounds: int = 5) -> Limits:
    """The best of several rounds, as limits are."""
    source = torch.randn(CLEARED // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(PRODUCT, PRODUCT, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
    best = {name: min(times) for name, times in interleave(calls, device, rounds, burst_s=0.1).items()}
    return Limits(2 * source.nbytes / best["copy"], 2 * PRODUCT**3 / best["product"])
