"""Hold a directory against other processes, by a lock on a file in it.

Beside the data path: a run directory is held while its run lasts, a token directory while it is read or written. The
lock is the kernel's (flock), so it goes with its process, however that ends.
"""

import errno
import functools
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None

LOCK = ".lock"  # the name of the file
POLL_SECONDS = 0.2  # while waiting; the first polls follow faster, as most wait for a moment only
log = logging.getLogger("jgpt")


class HeldElsewhere(Exception):
    """Another process holds the directory; the text says which, as far as it is known."""


@contextmanager
def hold(directory: Path, wait_for: str = "") -> Iterator[bool]:
    """Hold a directory while the block runs, and make it where it is missing; yield whether it is really held.

    While another process holds it, HeldElsewhere is raised. With `wait_for`, which says what that process is doing, one
    line is logged instead, and this process waits; any signal interrupts it. Where the system or the file system has no
    locks, a warning is logged once and False is yielded. Raises OSError when the file of the lock cannot be written.
    """
    if fcntl is None:
        directory.mkdir(parents=True, exist_ok=True)
        _warn("this system has none")
        yield False
        return
    pause = POLL_SECONDS / 32
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / LOCK).open("a+b", buffering=0) as file:
            taken = _try(file)
            if taken is None or (taken and _is_there(file, directory / LOCK)):
                with _signed(file, bool(taken)):
                    yield bool(taken)
                return
            holder = _holder(file)
        if taken:  # whoever held it has deleted the directory
            continue
        if not wait_for:
            raise HeldElsewhere(holder)
        if pause == POLL_SECONDS / 2:
            log.info("waiting for %s, which is %s in %s (Ctrl-C stops waiting)", holder, wait_for, directory)
        time.sleep(pause)
        pause = min(2 * pause, POLL_SECONDS)


def _try(file: IO[bytes]) -> bool | None:
    """Try to lock an open file: whether it is ours now, or None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            return False
        _warn(f"the file system answered: {error.strerror}")
        return None
    return True


@functools.cache
def _warn(reason: str) -> None:
    """Log once for each reason that nothing can be locked."""
    log.warning(
        "directories cannot be locked here (%s): see to it that no two processes write to one run directory, or to one "
        "data.cache_dir, at the same time",
        reason,
    )


def _is_there(file: IO[bytes], path: Path) -> bool:
    """Tell whether an open file still has its name: the lock of a deleted file keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _signed(file: IO[bytes], ours: bool) -> Iterator[None]:
    """Write into the file who holds it, for those who wait; on a full disk it stays empty."""
    if ours:
        with suppress(OSError):
            file.truncate(0)
            file.write(f"{os.getpid()} {platform.node()}\n".encode())
    try:
        yield
    finally:
        if ours:
            with suppress(OSError):
                file.truncate(0)


def other_holder(directory: Path) -> str:
    """Return which other process has signed the lock of a directory that this one holds; "" where none has.

    The directory was removed then, and made again by that process.
    """
    try:
        with (directory / LOCK).open("rb") as file:
            words = file.read(300).decode(errors="replace").split()
            return "" if not words or words == [str(os.getpid()), platform.node()] else _holder(file)
    except OSError:  # no file: nobody holds it
        return ""


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    match file.read(300).decode(errors="replace").split():
        case [pid, host] if pid.isdigit():
            return f"another process (pid {pid}{'' if host == platform.node() else f' on {host}'})"
    return "another process"
