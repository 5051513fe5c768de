"""Runs code in a process of its own that need not import PyTorch first: a fork of one that has done nothing else.

Importing takes seconds, a fork milliseconds. The process differs in nothing from one that has just imported: it has one
thread, has called no kernel, and ends as the interpreter ends.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

TESTS = Path(__file__).parent

_SERVER = """
import json, os, sys
import mobilenet_ext

def serve():
    "Forks for each line of the input, and says which process that is and how it ended; what to run, in the fork."
    for line in sys.stdin:
        code, *files = json.loads(line)
        process = os.fork()
        if process == 0:
            for stream, file in enumerate([os.devnull, *files]):
                os.dup2(os.open(file, os.O_RDWR), stream)
            return code
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return ""

exec(serve())
"""


@functools.cache
def _server(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """The process that is forked, which ends when its input does."""
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **dict(environment)}
    command = [sys.executable, "-c", _SERVER]
    return subprocess.Popen(
        command, env=variables, cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def run(code: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """What ``python -c code`` prints and ends with, run in the folder of the tests with these variables too."""
    server = _server(tuple(sorted(environment.items())))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        server.stdin.write(json.dumps([code, *map(str, files)]) + "\n")
        process = int(server.stdout.readline())
        late = threading.Timer(timeout, os.kill, (process, 9))
        late.start()
        status = int(server.stdout.readline())
        late.cancel()
        return subprocess.CompletedProcess([sys.executable, "-c", code], status, *(file.read_text() for file in files))
