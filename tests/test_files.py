"""Files that several processes may write: locks that die with their process, writes without litter."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mobilenet_ext import files
from mobilenet_ext.files import InUse, locked, remove_leftovers, write_atomically

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts Python code in a process of its own, in ``tmp_path``, and waits until it has printed a line."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        preamble = "import os, signal, sys, time\nfrom mobilenet_ext import files\nfrom pathlib import Path\n"
        process = subprocess.Popen(
            [sys.executable, "-c", preamble + code], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_lock_is_one_processs_and_names_it(tmp_path: Path, child: Callable[[str], subprocess.Popen[str]]) -> None:
    holder = child("with files.locked('lock'):\n  print('ready', flush=True); time.sleep(60)")
    with pytest.raises(InUse, match=f"process {holder.pid} on "), locked(tmp_path / "lock"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "lock") as alone:  # it died with the process; the file that it left does not count
        assert alone
    assert list(tmp_path.iterdir()) == []


def test_a_lock_holds_within_one_process_too(tmp_path: Path) -> None:
    refused: list[bool] = []

    def attempt() -> None:
        try:
            with locked(tmp_path / "lock"):
                refused.append(False)
        except InUse:
            refused.append(True)

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    attempt()
    assert refused == [True, False]


def test_forked_children_do_not_keep_the_lock_of_a_killed_parent(
    tmp_path: Path, child: Callable[[str], subprocess.Popen[str]]
) -> None:
    holder = child(
        "with files.locked('lock'):\n"
        "  if os.fork() == 0: Path('child').write_text(str(os.getpid())); time.sleep(60); os._exit(0)\n"
        "  while not Path('child').exists() or not Path('child').read_text(): time.sleep(0.01)\n"
        "  print('ready', flush=True); time.sleep(60)"
    )
    grandchild = int((tmp_path / "child").read_text())
    try:
        holder.kill()
        holder.wait()
        with locked(tmp_path / "lock"):
            os.kill(grandchild, 0)  # it is still there
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_forked_child_that_leaves_the_block_lets_nobody_in(tmp_path: Path) -> None:
    child = 0
    try:
        with locked(tmp_path / "lock"):
            child = os.fork()
            if child == 0:
                raise SystemExit
            os.waitpid(child, 0)
            assert (tmp_path / "lock").exists()
            with pytest.raises(InUse), locked(tmp_path / "lock"):
                pass
    finally:
        if child == 0:
            os._exit(0)


def test_waiting_takes_turns(tmp_path: Path) -> None:
    """More threads than the lock's file has lives: each finds it removed, or new, and none meets another."""
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with locked(tmp_path / "lock", wait=True):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and list(tmp_path.iterdir()) == []


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_file_system_without_locks_is_told(tmp_path: Path, no_locks: None) -> None:
    with locked(tmp_path / "lock") as alone:
        assert alone is False
    leftover = tmp_path / ".file.0123abcd.tmp"
    leftover.write_bytes(b"its writer may be alive")
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content" and leftover.exists()


def test_other_errors_of_locks_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "lock"):
        pass
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(tmp_path / "file", b"content")
    assert not (tmp_path / "file").exists() and not list(tmp_path.glob(".file*"))


def test_the_next_write_removes_what_a_killed_writer_left(
    tmp_path: Path, child: Callable[[str], subprocess.Popen[str]]
) -> None:
    (tmp_path / "file").write_bytes(b"before")
    killed = child(
        "def die(descriptor): print('ready', flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.fsync = die\nfiles.write_atomically('file', b'content')"
    )
    killed.wait()
    assert len(list(tmp_path.glob(".file.*.tmp"))) == 1
    assert (tmp_path / "file").read_bytes() == b"before"
    write_atomically(tmp_path / "file", b"after")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"after"


def test_what_a_living_writer_has_open_stays(tmp_path: Path, child: Callable[[str], subprocess.Popen[str]]) -> None:
    living = child(
        "sync = os.fsync\n"
        "def wait(descriptor):\n"
        "  os.fsync = sync; print('ready', flush=True)\n"
        "  while not Path('go').exists(): time.sleep(0.01)\n"
        "os.fsync = wait\nfiles.write_atomically('file', b'theirs')"
    )
    temporary = list(tmp_path.glob(".file.*.tmp"))
    remove_leftovers(tmp_path, "file", "*")
    write_atomically(tmp_path / "file", b"ours")
    assert len(temporary) == 1 and temporary[0].exists()
    (tmp_path / "go").touch()
    assert living.wait() == 0
    assert (tmp_path / "file").read_bytes() == b"theirs" and not list(tmp_path.glob(".file*"))


def test_only_temporaries_of_the_names_given_are_removed(tmp_path: Path) -> None:
    names = [".last.pt.aaaa.tmp", ".best.pt.aaaa.tmp", ".last.pt.tmp", "last.pt.aaaa.tmp", ".last.pt.aaaa"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, "last.pt", "missing")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(names[1:])
    write_atomically(tmp_path / "[b]est.pt", b"")  # a name is no pattern
    assert (tmp_path / ".best.pt.aaaa.tmp").exists()


def test_writing_does_not_touch_the_processs_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("files of other threads would be made with it"))
            write_atomically(tmp_path / "file", b"content")
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(8)]
    threads = [
        threading.Thread(target=lambda c=content: [write_atomically(tmp_path / "file", c) for _ in range(5)])
        for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert files._held == set()
