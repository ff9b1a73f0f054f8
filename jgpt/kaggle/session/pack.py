"""Pack a run directory into a few files without folders, and unpack it: Kaggle's datasets drop folders.

Beside the data path: at the end of a run on Kaggle each checkpoint and its manifest become one uncompressed tar, any
other folder becomes one too, and config.json, metrics.jsonl and so on stay as they are. Resuming and pulling unpack.

    checkpoint-STEP.tar  STEP/... and STEP.sha256        tokenizer.tar  tokenizer/...

A tar gets its name only when it is complete, and only then its folder is deleted: where both exist, the tar counts.
Nothing here needs JAX.
"""

import errno
import logging
import re
import shutil
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jgpt import atomic_write
from jgpt.atomic_write import atomic_file
from jgpt.data.find_files import holds_run
from jgpt.errors import UserError, is_disk_full
from jgpt.run_dir.disk import bytes_below
from jgpt.run_dir.manifest import steps_without_manifest, whole_steps

STAGING = ".staging-"  # the start of the name of a folder whose content is not complete yet

log = logging.getLogger("jgpt")


def pack(run_dir: Path) -> None:
    """Pack a run directory in place, one folder at a time, so the disk never holds two copies of more than one.

    A checkpoint without a manifest was not saved completely, and is deleted; where there are more than one, somebody
    removed their manifests, and they are left as they are. Raises OSError when the disk is full: nothing is lost then,
    and the run can be resumed from the half-packed directory.
    """
    checkpoints = run_dir / "checkpoints"
    without = steps_without_manifest(checkpoints)
    for step in whole_steps(checkpoints):
        folder, manifest = checkpoints / str(step), checkpoints / f"{step}.sha256"
        _write_tar(run_dir / f"checkpoint-{step}.tar", [folder, manifest])
        manifest.unlink()  # first: without it a half-deleted checkpoint does not count as whole
        shutil.rmtree(folder)
    if len(without) > 1:
        log.warning("%s: steps %s have no manifest, and are not packed", checkpoints, ", ".join(map(str, without)))
    else:
        shutil.rmtree(checkpoints, ignore_errors=True)
    folders = [path for path in run_dir.iterdir() if path.is_dir() and path != checkpoints]
    for folder in sorted(path for path in folders if not path.name.startswith(".")):
        _write_tar(run_dir / f"{folder.name}.tar", [folder])
        shutil.rmtree(folder)


def unpack(folder: Path, run_dir: Path) -> None:
    """Turn the files of a run in `folder`, packed or not, back into the run directory `run_dir`.

    Both may be the same directory: its tars are then deleted. A damaged tar is skipped with a warning. Raises UserError
    for a tar whose members lead outside of the directory.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    in_place = folder.resolve() == run_dir.resolve()
    parts = [_checkpoint(folder, step) for step in checkpoints_in(folder)]
    outside = [name for name in folders_in(folder) if not run_dir.resolve().is_relative_to((folder / name).resolve())]
    parts += [_folder(folder, name) for name in outside]
    for part in parts:
        if in_place and part.source.is_dir():
            continue
        staging = fetch(part, run_dir)
        if staging is not None:
            install(staging)
            if in_place:
                part.source.unlink()
    for path in [] if in_place else sorted(folder.iterdir()):
        if path.suffix not in (".tar", ".tmp") and not path.name.startswith("."):
            copy_file(path, run_dir / path.name)


class Part(NamedTuple):
    """One folder of a run, packed or not: its tar or parent folder, its names there, its place in a run directory."""

    source: Path
    names: tuple[str, ...]
    place: str


def checkpoints_in(folder: Path) -> list[int]:
    """List the steps of the checkpoints in a run's folder, packed or not, oldest first; they are not verified."""
    names = [path.stem for path in (folder / "checkpoints").glob("*.sha256")]
    unpacked = {int(name) for name in names if name.isdecimal()}
    return sorted(unpacked | packed_steps(path.name for path in folder.iterdir()))


def packed_steps(names: Iterable[str]) -> set[int]:
    """Return the steps of the packed checkpoints among the names of files; Kaggle may have unpacked a tar to a folder.

    >>> packed_steps(["checkpoint-20.tar", "checkpoint-40", "tokenizer.tar"]) == {20, 40}
    True
    """
    return {int(match[1]) for name in names if (match := re.fullmatch(r"checkpoint-(\d+)(\.tar)?", name))}


def folders_in(folder: Path) -> list[str]:
    """List the names of a run's other folders, packed or not."""
    names = {path.name.removesuffix(".tar") for path in folder.iterdir() if path.suffix == ".tar" or path.is_dir()}
    return sorted(name for name in names if not name.startswith((".", "checkpoint-")) and name != "checkpoints")


def fetch_checkpoint(folder: Path, step: int, run_dir: Path) -> Path | None:
    """Copy a checkpoint from a run's folder into a staging folder; see `fetch`."""
    return fetch(_checkpoint(folder, step), run_dir)


def fetch_folder(folder: Path, name: str, run_dir: Path) -> Path | None:
    """Copy any other folder of a run into a staging folder; see `fetch`."""
    return fetch(_folder(folder, name), run_dir)


def _checkpoint(folder: Path, step: int) -> Part:
    tar = folder / f"checkpoint-{step}.tar"
    source = next((path for path in (tar, tar.with_suffix("")) if path.exists()), folder / "checkpoints")
    return Part(source, (str(step), f"{step}.sha256"), "checkpoints")


def _folder(folder: Path, name: str) -> Part:
    tar = folder / f"{name}.tar"
    # Kaggle itself unpacks the tars of some datasets, each into a folder of the tar's name.
    unpacked = folder / name if (folder / name / name).is_dir() else folder
    return Part(tar if tar.is_file() else unpacked, (name,), "")


def fetch(part: Part, run_dir: Path) -> Path | None:
    """Copy a part of a run into a staging folder beside its place in `run_dir`, and return the staging folder.

    Logs a warning and returns None when the part is not complete or cannot be read.
    """
    staging = run_dir / part.place / f"{STAGING}{part.names[0]}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        if part.source.is_symlink() and not holds_run(part.source):  # a mount itself may be one
            raise OSError("it is a link, and a run writes none")
        _check_room(part, staging)
        if part.source.is_file():
            _extract(part.source, staging)
        else:
            for name in part.names:
                _copy(part.source / name, staging / name)
        names = {path.name for path in staging.iterdir()}
        damage = "" if names == set(part.names) else f"it holds {', '.join(sorted(names)) or 'nothing'}"
    except (OSError, EOFError, tarfile.ReadError) as error:
        if is_disk_full(error):
            raise  # our disk is full: the source is not damaged
        damage = str(error).splitlines()[0][:200]
    if damage:
        log.warning("%s is damaged and skipped: %s", part.source, damage)
        shutil.rmtree(staging)
        return None
    return staging


def install(staging: Path) -> None:
    """Move the content of a staging folder into its parent, and replace what is there; a manifest comes last."""
    paths = sorted(staging.iterdir(), key=lambda path: path.suffix == ".sha256")
    for path in reversed(paths):
        _remove(staging.parent / path.name)
    for path in paths:
        path.replace(staging.parent / path.name)
    staging.rmdir()


def remove_leftovers(run_dir: Path) -> None:
    """Delete half-written files in a run directory, from a process that was killed while it packed or unpacked."""
    for pattern in (f"{STAGING}*", f"checkpoints/{STAGING}*"):
        for path in run_dir.glob(pattern):
            _remove(path)
    atomic_write.remove_leftovers(run_dir)


def _check_room(part: Part, staging: Path) -> None:
    """Raise OSError, as a full disk does, where a part is larger than what is free; a sparse file may be."""
    paths = [part.source] if part.source.is_file() else [part.source / name for name in part.names]
    size = sum(path.stat().st_size if path.is_file() else bytes_below(path) for path in paths)
    if size > (free := shutil.disk_usage(staging).free):
        message = f"{part.source} has {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        raise OSError(errno.ENOSPC, message)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, if there is one; the copy appears only when it is complete. A link is left out with a warning."""
    if not source.is_file():
        return
    if source.is_symlink():
        log.warning("%s is a link, and left out: a run writes none", source)
        return
    with source.open("rb") as whole, atomic_file(target) as file:
        shutil.copyfileobj(whole, file)


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder without its mode: an input on Kaggle is read-only, and the copy must be writable.

    Raises OSError for a link: it may lead anywhere, such as to the user's credentials.
    """
    if source.is_symlink():
        raise OSError(f"{source.name} is a link, and a run writes none")
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            _copy(path, target / path.name)
    else:
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_tar(path: Path, members: Sequence[Path]) -> None:
    """Write a tar of files and folders, each named relative to its parent, without the names of users."""
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for member in members:
            tar.add(member, member.name, filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _extract(path: Path, directory: Path) -> None:
    """Extract a tar of files and folders; raise UserError for any other member, or one that leads outside."""
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        wrong = next((f"{m.name} is a link or a device" for m in members if not (m.isfile() or m.isdir())), "")
        # A sparse file of some bytes can stand for terabytes of zeros.
        wrong = next((f"{m.name} is a sparse file" for m in members if m.issparse()), wrong)
        try:
            if not wrong:
                tar.extractall(directory, members, filter="data")
        except tarfile.FilterError as error:
            wrong = str(error)
    if wrong:
        shutil.rmtree(directory)
        raise UserError(
            f"{path} was not packed by a run: {wrong}. Its members must be files and folders below its own name."
            " Use the output of your own run; nothing was written outside of the run directory."
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        pack(Path(sys.argv[1]))
    except OSError as error:
        log.warning("not packed: %s. The run can still be resumed.", error)
