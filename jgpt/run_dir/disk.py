"""How much disk a run may take: what is free, and no more than its budget.

Beside the data path: `setup.py` asks before the first step, `checkpoint.py` before each save.
"""

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


def check_room(run_dir: Path, n_bytes: int, disk_gb: float) -> None:
    """Raise UserError where a checkpoint of so many bytes would take the run directory above its budget."""
    if disk_gb and room(run_dir, disk_gb) < n_bytes:
        there = bytes_below(run_dir) / 1e9
        raise UserError(
            f"a checkpoint of {n_bytes / 1e9:.2f} GB would take {run_dir}, which holds {there:.2f} GB already, above"
            f" its checkpoint.disk_gb={disk_gb:g}. Earlier checkpoints are whole. Remove what does not"
            " belong there, or raise --config.checkpoint.disk_gb, then run the same command again."
        )
