"""Manifests: the sha256 of every file of a checkpoint, written when it is whole and compared before it is trusted.

Beside the data path: `checkpoint.py` writes them, and everything that reads a checkpoint asks here first. The JSON that
goes with a checkpoint (its meta) is read here only, after its own files were compared.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jgpt.errors import UserError


def whole_steps(directory: Path) -> list[int]:
    """List the steps that have a manifest and a directory, oldest first (their files are not read)."""
    return [step for step in _present(directory) if _manifest(directory, step).is_file()]


def steps_without_manifest(directory: Path) -> list[int]:
    """List the steps that have a directory and no manifest, oldest first.

    A process that is killed while it saves leaves one such step. Nothing tells whether it is whole.
    """
    return [step for step in _present(directory) if not _manifest(directory, step).is_file()]


def _present(directory: Path) -> list[int]:
    found = directory.iterdir() if directory.is_dir() else ()
    names = [path.name for path in found if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and name == str(int(name)))


def _manifest(directory: Path, step: int) -> Path:
    return directory / f"{step}.sha256"


def digest(directory: Path) -> str:
    """Return a sha256sum listing of every file below `directory`, named from its parent; raise OSError."""
    return _listing(directory, directory.parent)


def _listing(directory: Path, start: Path) -> str:
    lines = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(start)}\n")
    return "".join(lines)


def verify(directory: Path, step: int, item: str = "") -> str:
    """Compare a step with its manifest; return what is wrong with it, or "".

    `item` names one folder of the step, such as "meta", whose files alone are compared.
    """
    try:
        expected = _expected(directory, step, item)
        found = set(_listing(directory / str(step) / item, directory).splitlines())
    except OSError as error:
        return f"{error.strerror or error} ({Path(error.filename or directory).name})"
    if item and not expected:
        return f"its manifest names no file of {step}/{item}"
    wrong = sorted({line[66:] for line in expected ^ found})
    return "" if not wrong else f"{len(wrong)} of its files changed or missing, such as {wrong[0]}"


def _expected(directory: Path, step: int, item: str = "") -> set[str]:
    """Return the lines of a step's manifest, or those of one item; raise OSError where it cannot be read."""
    lines = set(_manifest(directory, step).read_text(errors="replace").splitlines())
    return {line for line in lines if line[66:].startswith(f"{step}/{item}/")} if item else lines


def is_imported(directory: Path, step: int) -> bool:
    """Tell whether a step holds parameters alone, as its manifest says, and no optimizer state to go on with."""
    try:
        return bool(_expected(directory, step, "params")) and not _expected(directory, step, "training")
    except OSError:
        return False


def check_whole(directory: Path, step: int, damage: str) -> None:
    """Raise UserError where there is `damage` to a step, with the other steps that there are."""
    if damage:
        others = [other for other in whole_steps(directory) if other != step]
        advice = f"Take another with --step: {others}." if others else "There is no other."
        raise UserError(f"checkpoint {step} in {directory} is damaged: {damage}. {advice}")


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """Read the JSON that a checkpoint carries: step, tokens, val_loss and what the run was.

    Its files are compared with the manifest first. Raises UserError where they are damaged.
    """
    damage, meta = verify(directory, step, "meta"), None
    if not damage:
        try:
            meta = json.loads((directory / str(step) / "meta" / "metadata").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            damage = f"meta/metadata: {error}"
        else:
            damage = "" if isinstance(meta, dict) else "meta/metadata is no JSON object"
    check_whole(directory, step, damage)
    assert isinstance(meta, dict)
    return meta


def newest_meta(directory: Path, steps: Iterable[int]) -> dict[str, Any]:
    """Read the meta of the newest of `steps` (oldest first) whose meta is undamaged; {} where there is none."""
    for step in reversed(list(steps)):
        try:
            return read_meta(directory, step)
        except UserError:  # restoring passes over it as well
            continue
    return {}


def val_loss_of(directory: Path, step: int) -> float:
    """Return a checkpoint's validation loss; infinity where it has none, or is too damaged to say."""
    try:
        loss = read_meta(directory, step).get("val_loss")
    except UserError:
        return math.inf
    return loss if isinstance(loss, int | float) and math.isfinite(loss) else math.inf
