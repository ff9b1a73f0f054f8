"""How much disk a run may take: what is free, and no more than its budget.

Beside the data path: `setup.py` asks before the first step, `checkpoint.py` before each save.
"""

import errno
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

from jgpt.errors import UserError

SMALL_FILES = 20_000_000  # bytes of a budget left for metrics, samples, plots, and what Orbax writes beside the arrays


def bytes_below(folder: Path) -> int:
    """Return the bytes of all files below a folder; what is deleted meanwhile does not count."""
    total = 0
    for directory, _, names in os.walk(folder):  # passes over directories that vanish, where rglob raises
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(directory, name)).st_size
    return total


def room(run_dir: Path, disk_gb: float) -> int:
    """Return the bytes that a checkpoint may take now: what is free, and what is left of `disk_gb` (0: no budget)."""
    free = shutil.disk_usage(run_dir).free
    return min(free, int(disk_gb * 1e9) - SMALL_FILES - bytes_below(run_dir)) if disk_gb else free


def cannot_write(directory: Path, error: BaseException) -> str:
    """Say that a checkpoint could not be written to `directory`, why, and how much of its disk is free."""
    if not directory.parent.is_dir():
        return f"{directory.parent} is gone, which held the checkpoints."
    free = shutil.disk_usage(directory.parent).free / 1e9
    reason = (str(error) or type(error).__name__).splitlines()[0][:300].removesuffix(".")
    full = os.strerror(errno.ENOSPC)
    reason = full if full in str(error) else reason  # tensorstore says so at the end of a long line
    return f"a checkpoint could not be written to {directory} ({free:.2f} GB free): {reason}."


def silence_orbax() -> None:
    """Keep what Orbax logs off the terminal: it raises every error as well, once, and we say it in one message."""
    logging.getLogger("absl").addFilter(_not_of_orbax)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what a save that failed has left in a directory of checkpoints.

    Its threads may write a last file while this runs. What is left then is removed when the directory is opened again.
    """
    for partial in checkpoints.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(partial, ignore_errors=True)


def check_room(run_dir: Path, n_bytes: int, disk_gb: float) -> None:
    """Raise UserError where a checkpoint of so many bytes would take the run directory above its budget."""
    if disk_gb and room(run_dir, disk_gb) < n_bytes:
        there = bytes_below(run_dir) / 1e9
        raise UserError(
            f"a checkpoint of {n_bytes / 1e9:.2f} GB would take {run_dir}, which holds {there:.2f} GB already, above"
            f" its checkpoint.disk_gb={disk_gb:g}. Earlier checkpoints are whole. Remove what does not"
            " belong there, or raise --config.checkpoint.disk_gb, then run the same command again."
        )
