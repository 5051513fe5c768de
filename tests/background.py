"""What takes long and runs in processes of its own: started when the session starts, it has what processor the tests
leave idle."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_pool = ThreadPoolExecutor(os.cpu_count())
_running: set[subprocess.Popen] = set()


def start(function: Callable[..., Any], *arguments: Any) -> Future:
    """Calls ``function``, which waits for processes (``run``), in a thread of as many as there are processors."""
    return _pool.submit(function, *arguments)


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
