"""What a run says while it runs: the progress bar, the line of each epoch, notes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mobilenet_ext.train.decoding import UnreadableImage
from mobilenet_ext.train.errors import TrainError, require
from mobilenet_ext.train.loop import EpochStats, RunningStats

SECONDS_BETWEEN_UPDATES = 0.2


def epoch_line(epoch: int, epochs: int, train: EpochStats, val: EpochStats | None) -> str:
    """The line of an epoch; without ``val`` only the half that is known."""
    line = (
        f"Epoch: {epoch}/{epochs} Train Loss: {train.loss:.4f} Accuracy: {train.accuracy:.4f} Time: {train.seconds:.5f}"
    )
    if val is not None:
        line += f"  | Val Loss: {val.loss:.4f} Accuracy: {val.accuracy:.4f}"
    return line


class Progress:
    """A bar on stderr over the batches of a pass: loss, accuracy and images per second. Only on a terminal.

    Args:
        title: in front of the bar.
        batches: how many there are.
    """

    def __init__(self, title: str, batches: int) -> None:
        self._bar = None
        if _on_a_terminal() and progress_missing() is None:
            tqdm = require("tqdm", "the progress bar", "tqdm").tqdm
            self._bar = tqdm(
                total=batches,
                desc=title,
                leave=False,
                mininterval=SECONDS_BETWEEN_UPDATES,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            )

    def __call__(self, running: RunningStats) -> None:
        """Moves the bar on; made to be handed over as ``on_batch``."""
        # update() is true when the bar was drawn, a few times a second: only then the GPU is waited for.
        if self._bar is not None and self._bar.update():
            speed = running.images_per_second
            self._bar.set_postfix_str(
                f"loss {running.loss:.4f} accuracy {running.accuracy:.4f} {speed:.0f} images/s", refresh=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _on_a_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # None: the process was started with it closed


def progress_missing() -> str | None:
    """Why there can be no progress bar, or None."""
    try:
        require("tqdm", "the progress bar", "tqdm")
    except TrainError as error:
        return str(error)
    return None


def note(message: str) -> None:
    """Prints a line on stderr, above the progress bar where there is one."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None and _on_a_terminal():
        tqdm.tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr, flush=True)


def say(message: str) -> None:
    """Prints a line on stdout, at once, so that a log that is followed shows it."""
    print(message, flush=True)


def unreadable_noter(split: str) -> Callable[[UnreadableImage], None]:
    """What names the images of a split that are left out."""
    return lambda image: note(f"skipped an unreadable {split} image: {image}")
