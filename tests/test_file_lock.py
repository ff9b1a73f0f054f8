"""Holding a directory: one process at a time, who it is, and systems without locks."""

import errno
import fcntl
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jgpt import file_lock
from jgpt.file_lock import LOCK, HeldElsewhere, hold

HOLD = """
import logging, sys
from pathlib import Path
from jgpt.file_lock import hold
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
with hold(Path(sys.argv[1]), wait_for=sys.argv[2]) as held:
    print("held", held, flush=True)
    sys.stdin.read()
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a process that holds `tmp_path` until it is killed."""
    processes = []

    def start(wait_for: str = "", first: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", first + HOLD, str(tmp_path), wait_for]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_who_holds_a_directory_is_named_and_a_killed_process_holds_nothing(tmp_path: Path, start: Start) -> None:
    other = start()
    assert line(other) == "held True\n"
    with pytest.raises(HeldElsewhere, match=rf"^another process \(pid {other.pid}\)$"), hold(tmp_path):
        pytest.fail("two processes hold one directory")
    (tmp_path / LOCK).write_text("12 elsewhere\n")
    with pytest.raises(HeldElsewhere, match=r"^another process \(pid 12 on elsewhere\)$"), hold(tmp_path):
        pass
    (tmp_path / LOCK).write_text("")
    with pytest.raises(HeldElsewhere, match=r"^another process$"), hold(tmp_path):
        pass
    other.kill()
    other.wait()
    with hold(tmp_path) as held:
        assert held


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_waiting_says_for_whom_and_a_signal_ends_it(tmp_path: Path, start: Start, number: signal.Signals) -> None:
    first = start()
    assert line(first) == "held True\n"
    second, third = start("baking"), start("baking")
    for waiting in (second, third):
        assert f"waiting for another process (pid {first.pid}), which is baking in {tmp_path} (Ctrl-C" in line(waiting)
    second.send_signal(number)
    second.wait()
    assert second.returncode == -number
    first.kill()
    assert line(third) == "held True\n"


def test_a_directory_that_was_deleted_while_it_was_held_is_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    with hold(directory):
        (directory / LOCK).unlink()
        directory.rmdir()
        with hold(directory):  # of another file: the first holds nothing any more
            with pytest.raises(HeldElsewhere), hold(directory):
                pass
    assert (directory / LOCK).is_file()


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EACCES, errno.EINVAL])
def test_a_file_system_without_locks_is_used_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, "no such thing here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    file_lock._warn.cache_clear()
    for directory in (tmp_path / "run", tmp_path / "tokens"):
        with hold(directory) as held, hold(directory):
            assert held is False
    assert caplog.text.count("cannot be locked here (the file system answered: no such thing here)") == 1


def test_a_system_without_flock_is_used_with_one_warning(start: Start) -> None:
    other = start(first="import sys; sys.modules['fcntl'] = None\n")  # as on Windows: importing it fails
    assert "directories cannot be locked here (this system has none)" in line(other)
    assert line(other) == "held False\n"
