"""Kernels with one fault each, and sound ones, for the tests of the reader of machine code."""

from __future__ import annotations

import machine_code
import torch
import triton
import triton.language as tl


@triton.jit
def spills(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """A tile of 32 KiB a warp, all of it live at once."""
    i = tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + i * BLOCK + j)
    tl.store(y_ptr + i * BLOCK + j, x / tl.sum(x) + tl.sum(x, 1)[:, None])


@triton.jit
def loses_nan(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.maximum(tl.load(x_ptr + i), 0.0))


@triton.jit
def keeps_nan(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.maximum(tl.load(x_ptr + i), 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit(do_not_specialize=["rows", "channels"])
def narrow(x_ptr, y_ptr, rows, channels, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for row in range(rows):
        tl.store(y_ptr + row * channels + i, tl.load(x_ptr + row * channels + i))


@triton.jit(do_not_specialize=["rows", "units"])
def wide(x_ptr, y_ptr, rows, units, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for row in range(rows):
        tl.store(y_ptr + row * units * 8 + i, tl.load(x_ptr + row * units * 8 + i))


@triton.jit
def multiplies(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None]
    j = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + i * BLOCK + j)
    tl.store(y_ptr + i * BLOCK + j, tl.dot(x, x).to(y_ptr.dtype.element_ty))


def record(architecture: machine_code.Architecture) -> list[machine_code.Launch]:
    launches: dict[str, machine_code.Launch] = {}
    x = torch.empty(16384, device="meta")
    half = x.half()
    with machine_code.recording(architecture, launches):
        spills[(1,)](x, x, BLOCK=128, num_warps=1)
        loses_nan[(1,)](x, x, BLOCK=1024)
        keeps_nan[(1,)](x, x, BLOCK=1024)
        narrow[(1,)](half, half, 16, 1024, BLOCK=1024)
        wide[(1,)](half, half, 16, 128, BLOCK=1024)
        multiplies[(1,)](half, half, BLOCK=128)
    return list(launches.values())
