"""What takes long and runs in processes of its own: started when the session starts, it has what processor the tests
leave idle. A worker of pytest-xdist, of which each collects all tests and runs a share, starts it when a test asks."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_pool = ThreadPoolExecutor(os.cpu_count())
_running: set[subprocess.Popen] = set()
_in_worker = "PYTEST_XDIST_WORKER" in os.environ


class Later:
    """In place of a future: calls the function when its result is first asked for."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.result = functools.cache(functools.partial(function, *arguments))


def start(function: Callable[..., Any], *arguments: Any) -> Future | Later:
    """Calls ``function``, which waits for processes (``run``), in a thread of as many as there are processors."""
    return Later(function, arguments) if _in_worker else _pool.submit(function, *arguments)


def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """A process that gives way to the tests, with all that it says as its stdout."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    os.setpriority(os.PRIO_PROCESS, process.pid, 10)
    _running.add(process)
    try:
        said, _ = process.communicate()
    finally:
        _running.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, said)


def stop() -> None:
    """Ends what nobody waits for any more."""
    _pool.shutdown(wait=False, cancel_futures=True)
    for process in list(_running):
        process.terminate()
