"""Make a new directory for what is exported, and say what is wrong with its name or its place.

Beside the data path: `write_model.py`, `write_adapter.py` and `gguf_file.py` write there.
"""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jgpt.atomic_write import atomic_directory
from jgpt.errors import UserError

# Not ENOTEMPTY, which another process leaves, nor a full disk.
OF_THE_PLACE = (errno.EACCES, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS)


def check_new(out: Path) -> None:
    """Raise UserError where `out` is not the name of a new or an empty directory."""
    with place_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not empty. Allowed: a new directory, or an empty one. Name another.")


@contextmanager
def place_errors(out: Path) -> Iterator[None]:
    """Turn an error about the name of `out`, or about the place where it would be, into a UserError.

    An error about another file, such as weights that cannot be read, stays as it is.
    """
    try:
        yield
    except OSError as error:
        named = str(error.filename or "")  # `out`, a temporary name that begins so, or a directory above
        is_there = named and (named.startswith(str(out)) or Path(named) in out.parents)
        if error.errno not in OF_THE_PLACE or not is_there or error.filename2:  # two names: another process was there
            raise
        raise UserError(
            f"{out} cannot be made: {error.strerror}. Allowed: a name in a directory that you may write in. Name"
            " another."
        ) from None


@contextmanager
def new_directory(out: Path, planned: int) -> Iterator[Path]:
    """Yield a temporary directory for `planned` bytes: it becomes `out` at the end, and is removed on an error."""
    with place_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
    if planned > free:
        raise UserError(
            f"the model takes {planned / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free at {out.parent}. Make room, name"
            " a directory on another disk, or export with --dtype=fp16."
        )
    try:
        with place_errors(out), atomic_directory(out) as directory:
            yield directory
    except OSError as error:
        if error.filename2 != str(out):  # it is not about the new name
            raise
        raise UserError(f"{out} cannot be made: {error.strerror}. Another process wrote there. Name another.") from None
