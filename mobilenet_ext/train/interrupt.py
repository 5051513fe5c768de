"""Ctrl-C during training: the batch in hand is finished, then everything ends in order."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType


class Interrupt:
    """While active, the first Ctrl-C only sets ``requested``; a second one raises ``KeyboardInterrupt``.

    It stands in for Python's own handler and for nothing else: where SIGINT is ignored, as shells start background
    jobs, or the program has a handler of its own, and outside the main thread, where Python allows no handlers, this
    has no effect.

    A forked worker process inherits the handler; there it does nothing, so that no worker dies of Ctrl-C even before
    it has switched the signal off.
    """

    def __init__(self) -> None:
        self.requested = False
        self._process = os.getpid()

    def __enter__(self) -> Interrupt:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if signal.getsignal(signal.SIGINT) == self._handle:  # and nobody has put another in its place meanwhile
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if sys.stderr is None:  # started without: number 2 may be any file
            return
        # Not print: the interrupted code may be in the middle of one.
        with contextlib.suppress(OSError):  # the terminal may be gone, the request is not
            os.write(2, b"\nStopping after this batch; Ctrl-C again to stop at once.\n")

    def __bool__(self) -> bool:
        return self.requested

    def __call__(self) -> bool:
        """Whether to stop; made to be handed over as ``should_stop``."""
        return self.requested
