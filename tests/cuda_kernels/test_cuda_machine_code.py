"""The machine code of the CUDA kernels: nothing spilled, wide accesses, tensor cores, NaN kept."""

from __future__ import annotations

import re
from collections.abc import Callable

import cubins
import pytest
import sass
from cubins import FILES, POINTWISE, PRODUCTS, Kernels
from emulation import SOURCES

pytestmark = pytest.mark.skipif(cubins.why_not() is not None, reason=str(cubins.why_not()))

# The one that has most of what is looked at; the others are a slow repetition.
ARCHITECTURES = [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (75, 80))]


@pytest.fixture(scope="session", params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def architecture(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="session")
def kernels(architecture: int) -> Kernels:
    return cubins.of(architecture)


def check(kernels: Kernels, find: Callable[[sass.MachineCode], str | None]) -> None:
    assert kernels
    faults = {name: fault for name, code in kernels.items() if (fault := find(code))}
    assert not faults, faults


def test_every_kernel_file_is_looked_at() -> None:
    assert sorted(FILES) == sorted(path.stem for path in (SOURCES / "cuda").glob("*.cu"))


def test_nothing_is_kept_in_local_memory(kernels: Kernels) -> None:
    check(kernels, sass.spilled)


def test_no_maximum_loses_a_nan(kernels: Kernels) -> None:
    check(kernels, sass.loses_nan)


@pytest.mark.parametrize(
    ("file", "pattern", "bits"),
    [
        ("depthwise_forward", r"forward<(__half|__nv_bfloat16), 8, .*", 128),
        ("depthwise_forward", r"forward<float, 4, .*", 128),
        ("depthwise_forward", r"forward<(__half|__nv_bfloat16), 4, 5, .*", 64),  # or 25 taps are too many registers
        ("depthwise_backward", r"stride_[12]<float, 4>", 128),
        ("depthwise_backward", r"stride_[12]<(__half|__nv_bfloat16), 4>", 64),  # eight channels are too many registers
        ("depthwise_backward", r"five_by_five<float, 2, .*", 64),
        ("norm_act", r"(forward|backward)<.*, [48](, \w+)*>", 128),
    ],
)
def test_accesses_are_wide(kernels: Kernels, file: str, pattern: str, bits: int) -> None:
    wide = {name: code for name, code in kernels.items() if name[0] == file and re.fullmatch(pattern, name[1])}
    check(wide, lambda code: sass.narrow(code, bits))


@pytest.mark.parametrize(
    ("file", "pattern", "loads", "far"),
    [
        ("depthwise_forward", r"forward<(__half|__nv_bfloat16), 8, 3, 1, \w+>", 4, 250),
        ("depthwise_forward", r"forward<(__half|__nv_bfloat16), 8, 3, 2, \w+>", 6, 150),
        ("depthwise_forward", r"forward<float, 4, 3, 1, \w+>", 4, 75),
        ("depthwise_forward", r"forward<float, 4, 3, 2, \w+>", 6, 85),
        ("depthwise_forward", r"forward<.*, 4, 5, 1, \w+>", 6, 150),
        ("depthwise_forward", r"forward<.*, 4, 5, 2, \w+>", 10, 40),
        ("depthwise_backward", r"stride_1<(__half|__nv_bfloat16), 4>", 10, 300),
        ("depthwise_backward", r"stride_1<float, 4>", 12, 200),  # of u a second time
        ("depthwise_backward", r"stride_2<.*, 4>", 8, 300),
    ],
)
def test_loads_are_in_flight_over_a_row(kernels: Kernels, file: str, pattern: str, loads: int, far: int) -> None:
    """Those of a row are all under way before one is waited for: the first reader is most of a row's work away. (A bias
    is read from the cache where it is added.)"""
    mine = {name: code for name, code in kernels.items() if name[0] == file and re.fullmatch(pattern, name[1])}
    assert mine
    flights = {name: code.in_flight for name, code in mine.items()}
    waits = {name: flight for name, flight in flights.items() if sum(f >= far for f in flight) != loads}
    assert not waits, waits


def test_products_run_on_tensor_cores(kernels: Kernels, architecture: int) -> None:
    """Those of float32 that must be exact do not; those that a GPU cannot have are a fault."""
    products = {
        name: (*operands.groups(), code)
        for name, code in kernels.items()
        if (operands := re.search(r"(\w*Shape)<(\w+), (\w+), ", name[1]))
    }
    assert {file for file, _ in products} == set(PRODUCTS)
    for name, (shape, dtype, kind, code) in products.items():
        if architecture < 80:
            large = shape == "Shape" and ", 128>" in name[1]  # more shared memory than there is
            available = kind in ("__half", "float") and not large
        else:
            available = (dtype, kind) != ("__nv_bfloat16", "float")
        if not available:
            assert len(code.instructions) < 32 and code.matching("BPT.TRAP"), name
        elif kind == "float":
            assert not code.matching("HMMA.*") and code.matching("FFMA.*"), name
        else:
            assert code.matching("HMMA.*"), name


@pytest.mark.parametrize("file", POINTWISE)
def test_products_move_128_bits_at_once(kernels: Kernels, file: str) -> None:
    """Where the channel count allows it. (The other products load weights of nine taps one by one.)"""
    looked_at = 0
    for (of, name), code in kernels.items():
        if of == file and re.search(r"(Input|Gradient)<\w+, true>", name) and len(code.instructions) >= 32:
            loads = [op for op in code.in_loops if re.match(r"(LDG|LDGSTS)\.", op)]
            assert loads and all(".128" in op for op in loads), name
            looked_at += 1
    assert looked_at >= 3
