"""Manifests: the sha256 of every file of a checkpoint, written when it is whole and compared before it is trusted.

Beside the data path: `checkpoint.py` writes them, everything that loads a checkpoint asks.
"""

import hashlib
from pathlib import Path


def whole_steps(directory: Path) -> list[int]:
    """List the steps that have a manifest and a directory, oldest first (their files are not read)."""
    found = (path.stem for path in directory.glob("*.sha256"))
    return sorted(int(stem) for stem in found if stem.isdecimal() and (directory / stem).is_dir())


def digest(directory: Path) -> str:
    """Return a sha256sum listing of every file below `directory`, named from its parent."""
    lines = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(directory.parent)}\n")
    return "".join(lines)


def verify(directory: Path, step: int) -> str:
    """Compare a step with its manifest; return what is wrong with it, or ""."""
    expected = set((directory / f"{step}.sha256").read_text(errors="replace").splitlines())
    found = set(digest(directory / str(step)).splitlines())
    wrong = sorted({line[66:] for line in expected ^ found})
    return "" if not wrong else f"{len(wrong)} of its files changed or missing, such as {wrong[0]}"
