"""What a run leaves behind epoch by epoch: ``metrics.jsonl``, TensorBoard events, the picture of the curves.

The checkpoint holds the same history, and is the authority: a resumed run first rewrites the records from it, so that
an epoch that was recorded but whose checkpoint was never written appears once, not twice, when it is run again.
"""

from __future__ import annotations

import io
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mobilenet_ext.files import write_atomically
from mobilenet_ext.train.errors import TrainError, reason, require
from mobilenet_ext.train.plots import plot_curves

METRICS, PICTURE = "metrics.jsonl", "curves.png"
EVENTS_PREFIX = "events.out.tfevents."

# The tags of the events, by the metrics' keys.
TAGS = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/val",
    "lr": "lr",
    "images_per_second": "images_per_second",
}

# The numbers of an epoch that a resumed run goes on from.
HISTORY = ("epoch", "time", "seconds", *TAGS)

SECONDS_BETWEEN_PICTURES = 30.0


class Records:
    """The records in one output folder.

    Args:
        out: the folder.
        history: the epochs so far; the records are made to hold exactly these.
        title: over the picture.

    Raises:
        TrainError: they cannot be written.
    """

    def __init__(self, out: Path, history: Sequence[Mapping[str, Any]], title: str) -> None:
        self.out, self.title = out, title
        self.missing = [name for name in ("tensorboard", "matplotlib") if not _installed(name)]
        self._pictured = 0.0
        self._events: BinaryIO | None = None
        try:
            write_atomically(out / METRICS, b"".join(_metrics_line(row) for row in history))
            self._start_events(history)
            self._metrics = open(out / METRICS, "ab")
        except OSError as error:
            raise TrainError(f"cannot write to {out}: {reason(error)}") from error

    def _start_events(self, history: Sequence[Mapping[str, Any]]) -> None:
        old = list(self.out.glob(EVENTS_PREFIX + "*"))
        if "tensorboard" not in self.missing:
            name = f"{EVENTS_PREFIX}{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            content = _event_record(wall_time=time.time(), file_version="brain.Event:2")
            content += b"".join(_epoch_events(row) for row in history)
            write_atomically(self.out / name, content)
            self._events = open(self.out / name, "ab")
        for path in old:
            path.unlink()

    def add(self, row: Mapping[str, Any]) -> None:
        """Records an epoch.

        Raises:
            TrainError: it cannot be written.
        """
        try:
            self._metrics.write(_metrics_line(row))
            self._metrics.flush()
            if self._events is not None:
                self._events.write(_epoch_events(row))
                self._events.flush()
        except OSError as error:
            raise TrainError(f"cannot write to {self.out}: {reason(error)}") from error

    def draw(self, history: Sequence[Mapping[str, Any]], *, at_once: bool) -> None:
        """Draws the picture of the curves; unless ``at_once``, not more often than every half minute.

        Raises:
            TrainError: it cannot be written.
        """
        if not history or "matplotlib" in self.missing:
            return
        if at_once or time.monotonic() - self._pictured >= SECONDS_BETWEEN_PICTURES:
            try:
                plot_curves(history, self.out / PICTURE, self.title)
            except OSError as error:
                raise TrainError(f"cannot write {self.out / PICTURE}: {reason(error)}") from error
            self._pictured = time.monotonic()

    def close(self) -> None:
        """Closes the files. They are flushed after every epoch, so a failure here has been reported before."""
        for file in (self._metrics, self._events):
            if file is not None:
                try:
                    file.close()
                except OSError:
                    pass


def _installed(module: str) -> bool:
    try:
        require(module, module)
    except TrainError:
        return False
    return True


def _metrics_line(row: Mapping[str, Any]) -> bytes:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"  # JSON has no NaN


def _epoch_events(row: Mapping[str, Any]) -> bytes:
    return b"".join(
        _event_record(
            wall_time=row["time"], step=row["epoch"], summary={"value": [{"tag": tag, "simple_value": row[key]}]}
        )
        for key, tag in TAGS.items()
    )


def _event_record(**fields: Any) -> bytes:
    """One event as TensorBoard's files hold it.

    Put together here and not by ``SummaryWriter``, whose thread meets a full disk with a traceback on stderr, later.
    """
    proto = require("tensorboard.compat.proto.event_pb2", "writing events", "tensorboard")
    writer = require("tensorboard.summary.writer.record_writer", "writing events", "tensorboard")
    record = io.BytesIO()
    writer.RecordWriter(record).write(proto.Event(**fields).SerializeToString())
    return record.getvalue()
