"""Ctrl-C during training: the batch in hand is finished, then everything ends in order."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class Interrupt:
    """While active, the first Ctrl-C only sets ``requested``; a second one raises ``KeyboardInterrupt``.

    A forked worker process inherits the handler; there it does nothing, so that no worker dies of Ctrl-C even before
    it has switched the signal off. Outside the main thread, where Python allows no handlers, this has no effect.
    """

    def __init__(self) -> None:
        self.requested = False
        self._process = os.getpid()
        self._previous: object = None
        self._active = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]
            self._active = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the interrupted code may be in the middle of one.
        os.write(2, b"\nStopping after this batch; Ctrl-C again to stop at once.\n")

    def __bool__(self) -> bool:
        return self.requested

    def __call__(self) -> bool:
        """Whether to stop; made to be handed over as ``should_stop``."""
        return self.requested
