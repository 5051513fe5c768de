"""The emulated device itself: it must find planted faults, and multiply as tensor cores do."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch

THREADS = 64


@pytest.fixture(scope="module")
def planted() -> Path:
    if reason := emulation.why_not():
        pytest.skip(reason)
    return emulation.compile_library("planted", [Path(__file__).with_name("planted.cu")])


def run(library: Path, name: str, *inputs: torch.Tensor, shape: tuple[int, ...] = (THREADS,)) -> torch.Tensor:
    out = torch.zeros(shape)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in [*inputs, out, out][:2]]
    ctypes.CDLL(str(library)).run(name.encode(), *pointers, ctypes.c_void_p(out.data_ptr()))
    return out


def in_both_orders(library: Path, name: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
    loaded = ctypes.CDLL(str(library))
    results = []
    for order in (1, -1):
        loaded.mx_emulator_order(order)
        results.append(run(library, name, *inputs))
    loaded.mx_emulator_order(1)
    return results


def test_a_race_depends_on_the_order_of_the_threads(planted: Path) -> None:
    expected = torch.arange(1.0, THREADS + 1) % THREADS
    assert all(torch.equal(result, expected) for result in in_both_orders(planted, "barrier"))
    racing = in_both_orders(planted, "race")
    assert any(not torch.equal(result, expected) for result in racing)
    assert not torch.equal(racing[0].nan_to_num(-1.0), racing[1].nan_to_num(-1.0))


def test_a_copy_arrives_when_it_is_waited_for(planted: Path) -> None:
    x = torch.randn(THREADS)
    assert torch.equal(run(planted, "copied", x), x)
    assert run(planted, "copy not waited for", x).isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent barrier", "threads wait for each other: 32 at __syncthreads, 0 at .*, 32 have returned, of 64"),
        ("different operations", "lanes of a warp are at __syncwarp and at __shfl_xor_sync"),
        ("beyond shared memory", "written 0 bytes past the shared memory of 256"),
        ("unaligned", "load_matrices: the address in shared memory is not a multiple of 16"),
        ("large block", r"a block of \(1056, 1, 1\) threads"),
        ("large grid", r"a grid of \(1, 65536, 1\) blocks"),
    ],
)
def test_faults_are_reported(planted: Path, name: str, message: str) -> None:
    code = f"import ctypes; x = (ctypes.c_float * 64)(); ctypes.CDLL({str(planted)!r}).run({name.encode()!r}, x, x, x)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search("emulated device: " + message, result.stderr), result.stderr


@pytest.mark.parametrize(
    ("name", "dtype", "depth"),
    [("float16", torch.float16, 16), ("bfloat16", torch.bfloat16, 16), ("shared", torch.float16, 16)],
)
def test_products_of_16_bits(planted: Path, name: str, dtype: torch.dtype, depth: int) -> None:
    a, b = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype)
    torch.testing.assert_close(run(planted, name, a, b, shape=(16, 8)), a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_products_of_tf32(planted: Path) -> None:
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    out, exact = run(planted, "tf32", a, b, shape=(16, 8)), a @ b
    rounded = [(x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for x in (a, b)]
    torch.testing.assert_close(out, rounded[0] @ rounded[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, exact, rtol=1e-5, atol=1e-5)
