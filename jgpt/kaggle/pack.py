"""A run directory as few flat files, and back: folders do not survive `kaggle datasets version`, nor many small files.

Beside the data path: at the end of a run on Kaggle each checkpoint becomes one uncompressed tar with its manifest, any
other folder one as well, and config.json, metrics.jsonl and the like stay as they are. Resuming and pulling unpack.

    checkpoint-STEP.tar  STEP/... and STEP.sha256        tokenizer.tar  tokenizer/...

A name is there only when the file is whole, and a folder goes only after its tar is there: where both are, the tar
counts. Nothing here needs JAX.
"""

import errno
import logging
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jgpt.errors import UserError

STAGING = ".staging-"  # begins the name of a folder for what is not whole yet, beside where it will be

log = logging.getLogger("jgpt")


def pack(run_dir: Path) -> None:
    """Pack a run directory in place, one folder at a time: the disk holds no more than one of them twice.

    A checkpoint that was cut off while it was saved has no manifest, and is dropped. Raises OSError when the disk is
    full; nothing is lost, and resuming reads what is half packed.
    """
    checkpoints = run_dir / "checkpoints"
    for manifest in sorted(checkpoints.glob("*.sha256")):
        step = checkpoints / manifest.stem
        if step.is_dir():
            _write_tar(run_dir / f"checkpoint-{step.name}.tar", [step, manifest])
            manifest.unlink()  # first: what is half deleted is never whole
            shutil.rmtree(step)
    shutil.rmtree(checkpoints, ignore_errors=True)
    for folder in sorted(path for path in run_dir.iterdir() if path.is_dir() and not path.name.startswith(".")):
        _write_tar(run_dir / f"{folder.name}.tar", [folder])
        shutil.rmtree(folder)


def unpack(folder: Path, run_dir: Path) -> None:
    """Turn the files of a run in `folder`, packed or not, back into the run directory `run_dir`.

    Both may be the same directory: its tars are then removed. A damaged tar is named and passed over. Raises UserError
    for a tar whose members would land elsewhere.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    clear_up(run_dir)
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
        if path.is_file() and path.suffix not in (".tar", ".tmp") and not path.name.startswith("."):
            copy_file(path, run_dir / path.name)


class Part(NamedTuple):
    """One folder of a run, in a tar or not: what holds it, its names there, and where it belongs in a run directory."""

    source: Path
    names: tuple[str, ...]
    place: str


def checkpoints_in(folder: Path) -> list[int]:
    """List the steps whose checkpoints are in a run's folder, packed or not, oldest first; none of them is verified."""
    found = {path.stem for path in (folder / "checkpoints").glob("*.sha256")}
    found |= {match[1] for path in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)(\.tar)?", path.name))}
    return sorted(int(step) for step in found if step.isdigit())


def folders_in(folder: Path) -> list[str]:
    """List the names of a run's other folders, packed or not."""
    found = {path.name.removesuffix(".tar") for path in folder.iterdir() if path.suffix == ".tar" or path.is_dir()}
    return sorted(name for name in found if not name.startswith((".", "checkpoint-")) and name != "checkpoints")


def fetch_checkpoint(folder: Path, step: int, run_dir: Path) -> Path | None:
    """Copy a checkpoint out of a run's folder into a staging folder, as `fetch` does."""
    return fetch(_checkpoint(folder, step), run_dir)


def fetch_folder(folder: Path, name: str, run_dir: Path) -> Path | None:
    """Copy another of its folders out of a run's folder into a staging folder, as `fetch` does."""
    return fetch(_folder(folder, name), run_dir)


def _checkpoint(folder: Path, step: int) -> Part:
    tar = folder / f"checkpoint-{step}.tar"
    source = next((path for path in (tar, tar.with_suffix("")) if path.exists()), folder / "checkpoints")
    return Part(source, (str(step), f"{step}.sha256"), "checkpoints")


def _folder(folder: Path, name: str) -> Part:
    tar = folder / f"{name}.tar"
    unpacked = folder / name if (folder / name / name).is_dir() else folder  # by Kaggle: it does that to some datasets
    return Part(tar if tar.is_file() else unpacked, (name,), "")


def fetch(part: Part, run_dir: Path) -> Path | None:
    """Copy a part of a run into a staging folder where it belongs in `run_dir`, and return that folder.

    None, and a warning, when the part is not all there or cannot be read.
    """
    staging = run_dir / part.place / f"{STAGING}{part.names[0]}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        if part.source.is_file():
            _extract(part.source, staging)
        else:
            for name in part.names:
                _copy(part.source / name, staging / name)
        found = {path.name for path in staging.iterdir()}
        damage = "" if found == set(part.names) else f"it holds {', '.join(sorted(found)) or 'nothing'}"
    except (OSError, EOFError, tarfile.ReadError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # no fault of what is read
        damage = str(error).splitlines()[0][:200]
    if damage:
        log.warning("%s is damaged and passed over: %s", part.source, damage)
        shutil.rmtree(staging)
        return None
    return staging


def install(staging: Path) -> None:
    """Move what is in a staging folder to the folder that this is in, in place of what is there, a manifest last."""
    found = sorted(staging.iterdir(), key=lambda path: path.suffix == ".sha256")
    for path in reversed(found):
        _remove(staging.parent / path.name)
    for path in found:
        path.replace(staging.parent / path.name)
    staging.rmdir()


def clear_up(run_dir: Path) -> None:
    """Remove what was being packed or unpacked in a run directory when its process was killed."""
    for pattern in (f"{STAGING}*", f"checkpoints/{STAGING}*", "*.tar.tmp"):
        for path in run_dir.glob(pattern):
            _remove(path)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file so that the new one is there whole or not at all."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder, without its mode: an input on Kaggle is read-only, and its copy shall not be."""
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
    """Write a tar of files and folders, each named from its parent, without whose they are."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for member in members:
                    tar.add(member, member.name, filter=_anonymous)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _extract(path: Path, directory: Path) -> None:
    """Extract a tar of files and folders; raise UserError for a member that is something else, or leads outside."""
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        wrong = next((f"{m.name} is a link or a device" for m in members if not (m.isfile() or m.isdir())), "")
        try:
            if not wrong:
                tar.extractall(directory, members, filter="data")
        except tarfile.FilterError as error:
            wrong = str(error)
    if wrong:
        shutil.rmtree(directory)
        raise UserError(
            f"{path} is no file that a run packed: {wrong}. Its members must be files and folders below its own name."
            " Take the output of a run of yours; nothing was written outside of the run directory."
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        pack(Path(sys.argv[1]))
    except OSError as error:
        log.warning("left unpacked: %s. What is there is good for going on all the same.", error)
