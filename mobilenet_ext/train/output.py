"""The folder that a run writes into: one run at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mobilenet_ext.files import InUse, locked, remove_leftovers
from mobilenet_ext.train.errors import TrainError, reason
from mobilenet_ext.train.report import note

LOCK = ".lock"


@contextlib.contextmanager
def output_folder(out: str | os.PathLike[str], *names: str) -> Iterator[None]:
    """Keeps a folder for this process while the body of a ``with`` statement runs.

    Args:
        out: the folder, created where needed.
        names: of the files written there, or patterns of them; what a killed run left of them half written is removed.

    Raises:
        TrainError: another run writes there, or nobody can.
    """
    out = Path(out)
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(locked(out / LOCK))
        except InUse as error:
            raise TrainError(
                f"another run writes into {out} ({error}): wait for it, or choose another --out"
            ) from error
        except FileExistsError as error:
            raise TrainError(f"--out must be a folder, and {out} is none") from error
        except OSError as error:
            raise TrainError(f"cannot write to the output folder {out}: {reason(error)}") from error
        if not alone:
            note(f"the file system of {out} has no locks: see to it that no other run writes there")
        remove_leftovers(out, *names)
        yield
