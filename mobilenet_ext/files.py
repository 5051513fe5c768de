"""Files that several processes may write, or that a process may be killed in writing.

Locks are those of ``flock``: the operating system takes them back when their process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import platform
import secrets
from collections.abc import Iterator
from pathlib import Path

# What `flock` fails with on a file system that has no locks, or whose server does not answer for them.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)

_held: set[int] = set()


class InUse(OSError):
    """A lock that another process, or another thread, holds; the message says which one where that is known."""


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock while the body of a ``with`` statement runs.

    Args:
        path: the lock's file, in a folder that exists. It is there while the lock is held, and names the holder. What a
            killed process leaves of it locks nothing.
        wait: until nobody else holds the lock.

    Yields:
        Whether there is a lock: False on a file system that has none, where the body runs without.

    Raises:
        InUse: somebody else holds the lock, and ``wait`` is False.
        OSError: the file cannot be written.
    """
    path = Path(path)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            exclusive = _flock(descriptor, wait)
        except BaseException as error:
            holder = os.read(descriptor, 200).decode(errors="replace") if isinstance(error, BlockingIOError) else ""
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise InUse(holder or "another process") from error
            raise
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # the holder before has removed the file that was waited for
    owner = os.getpid()
    _held.add(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {owner} on {platform.node()}".encode())
        yield exclusive
    finally:
        if os.getpid() == owner:  # a forked child that unwinds holds nothing
            # In this order: the next holder could already be at a file that is no longer locked.
            path.unlink(missing_ok=True)
            _held.discard(descriptor)
            os.close(descriptor)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file so that, whatever happens, ``path`` holds either what it held before or all of ``content``.

    What earlier writers of the same file left when they were killed is removed.

    Raises:
        OSError: it cannot be written; ``path`` is as it was, and nothing is left beside it.
    """
    path = Path(path)
    remove_leftovers(path.parent, glob.escape(path.name))
    descriptor, temporary = _open_temporary(path)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    # The new name is on the disk only when its folder is. Some file systems cannot sync a folder; they lose nothing
    # that they had promised.
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(folder)
    except OSError:
        pass
    finally:
        os.close(folder)


def remove_leftovers(folder: str | os.PathLike[str], *names: str) -> None:
    """Removes the temporary files of writers that were killed; those of living ones stay.

    Args:
        folder: where ``write_atomically`` wrote.
        names: the files that it wrote, or patterns of them as in ``glob``.
    """
    for name in names:
        for temporary in Path(folder).glob(f".{name}.*.tmp"):
            try:
                descriptor = os.open(temporary, os.O_RDWR | os.O_NONBLOCK)
            except OSError:  # just gone, or not ours to write
                continue
            try:
                if _flock(descriptor, wait=False):
                    temporary.unlink(missing_ok=True)
            except OSError:  # its writer holds it; or the folder is no longer writable, which the next write reports
                pass
            finally:
                os.close(descriptor)


def _open_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside ``path``, locked for as long as its descriptor is open: a sign of life for others."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        # Not `tempfile`, whose files are private: here the system applies the process's umask, which nobody can read
        # without changing it under the other threads.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _flock(descriptor, wait=True)
        except BaseException:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        if _is_at(descriptor, temporary):
            return descriptor, temporary
        os.close(descriptor)  # taken for a leftover before it was locked


def _flock(descriptor: int, wait: bool) -> bool:
    """Locks an open file; False where the file system has no locks. Raises BlockingIOError where it is locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    # A lock belongs to the open file, which forked children share: the loading processes of a run that was killed would
    # hold on to it.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
