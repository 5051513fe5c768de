"""What the machine can do at most, measured in the run that is compared with it: a copy's rate and a product's."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from benchmarks.network import DTYPES
from benchmarks.timing import CLEARED, Call, interleave

# Rows, columns and depth of matrix products: which one a library does best differs from machine to machine.
PRODUCTS = ((2048, 2048, 2048), (1024, 1024, 1024), (6272, 512, 512))


class Limits(NamedTuple):
    """A roofline."""

    bytes_per_second: float  # read and written, of a copy that no cache holds
    operations_per_second: float  # of the best of a few matrix products in the dtype

    def seconds(self, bytes_moved: int, operations: int) -> float:
        """The least time in which the machine moves so many bytes and does so many operations."""
        return max(bytes_moved / self.bytes_per_second, operations / self.operations_per_second)


def measure_limits(device: str, dtype: str, rounds: int = 5) -> Limits:
    """The best of several rounds, as limits are."""
    source = torch.randn(CLEARED // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
    operations = {}
    for rows, columns, depth in PRODUCTS:
        a, b = (torch.randn(shape, device=device).to(DTYPES[dtype]) for shape in ((rows, depth), (depth, columns)))
        name = f"{rows}x{columns}x{depth}"
        calls[name] = partial(torch.mm, a, b, out=a.new_empty(rows, columns))
        operations[name] = 2 * rows * columns * depth
    best = {name: min(times) for name, times in interleave(calls, device, rounds, burst_s=0.1).items()}
    rate = max(count / best[name] for name, count in operations.items())
    return Limits(2 * source.nbytes / best["copy"], rate)
