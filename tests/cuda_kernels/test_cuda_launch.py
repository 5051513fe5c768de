"""Which error a launch reports: its own, on a CUDA runtime whose answers are given here."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import emulation
import pytest

SUCCESS, INVALID_VALUE, LAUNCH_FAILURE = 0, 1, 719


class Launched(NamedTuple):
    error: int
    last_error: int
    shared_asked_for: int
    arguments: tuple[int, int]


@pytest.fixture(scope="module")
def library() -> Path:
    if reason := emulation.why_not():
        pytest.skip(reason)
    return emulation.compile_library("launches", [Path(__file__).with_name("launches.cpp")], emulated=False)


def launch(library: Path, before: int, *, attribute: int = SUCCESS, launch: int = SUCCESS, shared: int = 0) -> Launched:
    values = [ctypes.c_int() for _ in range(4)]
    error = ctypes.CDLL(str(library)).launched(before, attribute, launch, shared, *map(ctypes.byref, values))
    after, asked_for, *arguments = (value.value for value in values)
    return Launched(error, after, asked_for, tuple(arguments))


def test_an_error_of_somebody_else_is_neither_ours_nor_lost(library: Path) -> None:
    assert launch(library, INVALID_VALUE) == (SUCCESS, INVALID_VALUE, 0, (7, ord("x")))


def test_our_error_is_reported_once(library: Path) -> None:
    assert launch(library, SUCCESS, launch=LAUNCH_FAILURE)[:2] == (LAUNCH_FAILURE, SUCCESS)


@pytest.mark.parametrize(("shared", "asked_for"), [(48 * 1024, 0), (48 * 1024 + 16, 48 * 1024 + 16)])
def test_much_shared_memory_is_asked_for(library: Path, shared: int, asked_for: int) -> None:
    assert launch(library, SUCCESS, shared=shared)[:3] == (SUCCESS, SUCCESS, asked_for)


def test_too_much_shared_memory_is_our_error(library: Path) -> None:
    launched = launch(library, SUCCESS, attribute=INVALID_VALUE, shared=300 * 1024)
    assert launched == (INVALID_VALUE, SUCCESS, 300 * 1024, (0, 0))
