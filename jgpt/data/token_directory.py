"""The token directory: where it is, who may write in it, and whether it is complete.

In the data path: below `write_tokens.py`, which fills it, and `token_files.py`, which opens what is in it. A token
directory is complete when it has a meta.json, which is removed first and written last, with a hash of itself.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jgpt.atomic_write import write_file
from jgpt.config.files import user_path
from jgpt.errors import UserError
from jgpt.file_lock import LOCK, hold
from jgpt.wording import json_text

FORMAT_VERSION = 2
FILES = ("meta.json", "train.bin", "val.bin")  # meta.json is removed first and written last


def token_directory(config: ConfigDict) -> Path:
    """Return the directory of a config's token files: data.cache_dir, or tokens/ in the run directory."""
    return user_path(config.data.cache_dir or f"{config.out_dir}/tokens").absolute()


def make_token_directory(directory: Path) -> None:
    """Make the directory; refuse one whose files jgpt did not write."""
    directory.mkdir(parents=True, exist_ok=True)
    # In this order: a process that prepares tokens at this moment makes its tokenizer first.
    found = [directory / name for name in FILES if (directory / name).exists()]
    ours = (directory / "meta.json").exists() or (directory / "tokenizer").exists()
    if found and not ours:
        raise UserError(
            f"{found[0]} exists, and jgpt did not write it. A token directory must be new, or written by jgpt. "
            "Set data.cache_dir to another directory."
        )


def hold_token_directory(directory: Path) -> AbstractContextManager[bool]:
    """Hold a token directory against other processes, and wait while another holds it; tell whether it is really held.

    One that cannot be written, as a directory of inputs, is not held: whoever opens it compares it with its hashes.
    """
    lock = directory / LOCK
    if not os.access(lock if lock.exists() else directory, os.W_OK):
        return nullcontext(False)
    return hold(directory, wait_for="preparing tokens")


@contextmanager
def storage_errors(directory: Path) -> Iterator[None]:
    """Turn an error of the file system into a UserError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"the token directory {directory} {'has no space left' if full else 'cannot be written'}: {error}. It "
            "takes 2 or 4 bytes a token. Free space, or set data.cache_dir to another directory."
        ) from error


def check_room(directory: Path, needed: int) -> None:
    """Raise OSError when a disk has less room than the bytes that are needed."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"at least {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def write_token_meta(directory: Path, meta: dict[str, Any]) -> None:
    """Write meta.json with a hash of itself, which completes a token directory."""
    write_file(directory / "meta.json", json_text(meta | {"meta_sha256": _hash_meta(meta)}) + "\n")


def read_token_meta(directory: Path) -> dict[str, Any]:
    """Return the content of a token directory's meta.json; {} where it is missing or is not what was written."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) and meta.get("meta_sha256") == _hash_meta(meta) else {}


def _hash_meta(meta: dict[str, Any]) -> str:
    others = {key: value for key, value in meta.items() if key != "meta_sha256"}
    return hashlib.sha256(json.dumps(others).encode()).hexdigest()  # ASCII: a name that is not UTF-8 has no bytes
