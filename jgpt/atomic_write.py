"""Write a file or a directory whole or not at all.

Beside the data path: every file that jgpt writes goes through here, so that a killed process leaves no half-written
file under a name that somebody reads, and two processes that write the same file do not meet: the last one wins.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jgpt.wording import json_text


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[Any]:
    """Yield an open temporary file, which becomes `path` when the block ends; on any error it is removed.

    The temporary file is in the same directory, and no other process uses its name. It is flushed and synced to the
    disk before it is renamed. `mode` is that of `open`; text is UTF-8, and newlines are written as they are. Raises
    OSError when the file cannot be written.
    """
    temporary = _temporary(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with temporary.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path, where the block writes a file, which becomes `path` when the block ends.

    For libraries that want a name. On any error the file is removed. Raises OSError when it cannot be written.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a new temporary directory, which becomes `path` when the block ends; on any error it is removed.

    `path` must be missing or an empty directory by then. Raises OSError when it cannot be written.
    """
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_file(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all; raise OSError when that fails."""
    with atomic_file(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs, whole or not at all; what is read from it is `value`."""
    write_file(path, json_text(value) + "\n")


def _temporary(path: Path) -> Path:
    """Return a name beside `path` that no other process, thread or host uses."""
    return path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files that killed processes left in a directory; nobody may be writing to it now."""
    for leftover in directory.glob(f"*.*-{'[0-9a-f]' * 8}.tmp"):
        leftover.unlink(missing_ok=True)
