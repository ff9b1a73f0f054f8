"""Send a run or a model to a bucket, or to any other address that fsspec opens (gs://, s3://), and get it back.

Beside the data path: `publish.py` calls it for the places that are such addresses. What opens a kind of address is the
user's: gcsfs for gs://, s3fs for s3://, with credentials where those look for them. A run arrives packed (`pack.py`):
each of its checkpoints is one object.
"""

import uuid
from pathlib import Path, PurePosixPath
from typing import Any

from jgpt.data.remote import said
from jgpt.errors import UserError
from jgpt.kaggle.session.pack import packed_steps

CHECKPOINTS = "checkpoint-*.tar"  # of which only the newest is needed to resume


def check(address: str) -> None:
    """Raise UserError where the address cannot be opened, or where nothing can be written to it and deleted there."""
    files, root = _open(address)
    mark = f"{root}/.writable-{uuid.uuid4().hex}"
    try:
        if files.exists(
            root.partition("/")[0] or "/"
        ):  # else makedirs would make the bucket: its name may be misspelled
            files.makedirs(root, exist_ok=True)
        files.pipe_file(mark, b"jgpt was here")
        files.rm_file(mark)
    except Exception as error:  # of the service, of its client, of the network: each has its own
        raise UserError(
            f"{address!r} cannot be written to: {said(error)}. The bucket must exist, and the credentials must allow to"
            " write to it, to list it and to delete. Check them with the tools of the service (gcloud storage, aws s3)."
        ) from error


def send(directory: Path, address: str) -> None:
    """Upload all files of a directory; then delete the checkpoints there that the directory does not have.

    The small files go first: where an upload ends half-way, the earlier checkpoint is still there, and a run that goes
    on from it leaves out what metrics.jsonl says of later steps. Raises what fsspec and the service raise.
    """
    files, root = _open(address)
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in sorted(paths, key=lambda path: path.match(CHECKPOINTS)):
        target = f"{root}/{path.relative_to(directory).as_posix()}"
        if path.parent != directory:
            files.makedirs(target.rpartition("/")[0], exist_ok=True)
        files.put_file(str(path), target)
    for name in _names(files, root):
        if PurePosixPath(name).match(CHECKPOINTS) and not (directory / name).exists():
            files.rm_file(f"{root}/{name}")


def fetch(address: str, folder: Path, *wanted: str) -> Path | None:
    """Download the files directly below the address into `folder`, those `wanted` or all.

    Returns `folder`, or None where nothing is there. Raises UserError where it cannot be read: to begin again would
    replace what is there.
    """
    files, root = _open(address)
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in _names(files, root) if not wanted or name in wanted]
    try:
        for name in names:
            files.get_file(f"{root}/{name}", str(folder / name))
    except Exception as error:
        raise UserError(f"{address!r} cannot be read: {said(error)}. Nothing was changed. Try again.") from error
    return folder if names else None


def newest_step(address: str) -> int:
    """Return the step of the newest checkpoint of a run at the address, -1 where there is none."""
    return max(packed_steps(_names(*_open(address))), default=-1)


def _open(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and its path there."""
    import fsspec  # here: it takes a while, and most runs send nothing

    try:
        files, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise UserError(f"{address!r} needs a package: {error}. Install it with pip.") from error
    except Exception as error:  # an unknown kind of address, or credentials that the client reads at once
        raise UserError(
            f"{address!r} cannot be opened: {said(error)}. Allowed: gs://BUCKET/FOLDER and so on."
        ) from error
    return files, root.rstrip("/")


def _names(files: Any, root: str) -> list[str]:
    """List the names of the files directly below a folder, as they are now; none where it does not exist."""
    files.invalidate_cache()
    try:
        found = files.ls(root, detail=True)
    except FileNotFoundError:
        return []
    except Exception as error:
        raise UserError(f"{root!r} cannot be listed: {said(error)}. Nothing was changed. Try again.") from error
    names = (PurePosixPath(entry["name"]).name for entry in found if entry["type"] == "file")
    return sorted(name for name in names if not name.startswith("."))
