"""The Triton kernels without a GPU: under Triton's interpreter, and as machine code.

A process either interprets kernels or compiles them: Triton reads TRITON_INTERPRET where a kernel is defined. In an
ordinary process a test file of this folder is therefore one test, and one more of what is slow in it, which runs it in
an interpreting process of its own;
``TRITON_INTERPRET=1 pytest tests/triton_kernels/test_triton_pointwise_forward.py -k ...`` runs its tests one by one.
``test_triton_machine_code.py`` is the other way round: it compiles.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import warm_process

from mobilenet_ext.backends.triton import interpreted

COMPILING = ("test_triton_machine_code.py",)
NO_TRITON = None if importlib.util.find_spec("triton") else "Triton is not installed"


class InterpretedFile(pytest.File):
    """A test file that is not imported here."""

    def collect(self) -> Iterator[pytest.Item]:
        yield InterpretedTests.from_parent(self, name="interpreted")
        if any(name in self.path.read_text() for name in ("combinations", "in_turn", "mark.slow")):
            yield InterpretedTests.from_parent(self, name="interpreted, slow", slow=True)


class InterpretedTests(pytest.Item):
    """All tests of a file that are not slow, or all that are, in an interpreting process."""

    def __init__(self, slow: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.slow = slow
        if slow:
            self.add_marker(pytest.mark.slow)

    def runtest(self) -> None:
        if NO_TRITON:
            pytest.skip(NO_TRITON)
        arguments = ["-n0", "-p", "no:cacheprovider", *(["-m", "slow"] if self.slow else []), str(self.path)]
        code = f"import sys, pytest; sys.exit(pytest.main({arguments}))"
        done = warm_process.run(code, timeout=3600, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        if done.returncode:
            pytest.fail(done.stdout + done.stderr, pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} under Triton's interpreter"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """This folder first: a test of it may take as long as thousands of others, which fill up what time a worker of
    pytest-xdist has left at the end."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(scope="session", autouse=True)
def _prepared_once() -> Iterator[None]:
    """Triton prepares its own modules for each launch, and for each call of a function in a kernel, which is a third of
    an interpreter's time: here they stay prepared."""
    if not interpreted:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        patch.setattr(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope())
        yield
        scope.restore()


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the heuristics see is a GPU of one multiprocessor: the interpreter runs programs one after the other, and
    takes a tenth of a second for each, whatever it has to do. Tests of several programs choose them."""
    if interpreted:
        from mobilenet_ext.triton import gpu

        monkeypatch.setattr(gpu, "H100", gpu.H100._replace(multiprocessors=1))


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if (NO_TRITON or not interpreted) and module_path.name not in COMPILING:
        return InterpretedFile.from_parent(parent, path=module_path)
    return None
