"""The Triton kernels without a GPU: under Triton's interpreter, and as machine code.

A process either interprets kernels or compiles them: Triton reads TRITON_INTERPRET where a kernel is defined. In an
ordinary process a test file of this folder is therefore one test, which runs it in an interpreting process of its own;
``TRITON_INTERPRET=1 pytest tests/triton_kernels/test_triton_pointwise_forward.py -k ...`` runs its tests one by one.
``test_triton_machine_code.py`` is the other way round: it compiles.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mobilenet_ext.backends.triton import interpreted

COMPILING = ("test_triton_machine_code.py",)
NO_TRITON = None if importlib.util.find_spec("triton") else "Triton is not installed"


class InterpretedFile(pytest.File):
    """A test file that is not imported here."""

    def collect(self) -> Iterator[pytest.Item]:
        yield InterpretedTests.from_parent(self, name="interpreted")


class InterpretedTests(pytest.Item):
    """All tests of a file, in an interpreting process."""

    def runtest(self) -> None:
        if NO_TRITON:
            pytest.skip(NO_TRITON)
        runs = self.session.stash.get(RUNS, None)
        if runs is None:
            runs = self.session.stash[RUNS] = start_all(self.session.items)
        done = runs[self.path].result()
        if done.returncode:
            pytest.fail(done.stdout, pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} under Triton's interpreter"


RUNS = pytest.StashKey[dict]()


def start_all(items: list[pytest.Item]) -> dict:
    """Start the processes of all files, as many at a time as there are processors."""
    pool = ThreadPoolExecutor(os.cpu_count())
    files = dict.fromkeys(item.path for item in items if isinstance(item, InterpretedTests))
    runs = {file: pool.submit(run_interpreted, file) for file in files}
    pool.shutdown(wait=False)
    return runs


def run_interpreted(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if (NO_TRITON or not interpreted) and module_path.name not in COMPILING:
        return InterpretedFile.from_parent(parent, path=module_path)
    return None
