"""The token directory: where it is, who may write in it, and whether it is complete.

In the data path: below `write_tokens.py`, which fills it, and `token_files.py`, which opens what is in it. A token
directory is complete when it has a meta.json, which is removed first and written last, with a hash of itself. While
tokens are made they are in parts/ (`parts.py`).
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jgpt.atomic_write import write_json
from jgpt.config.files import user_path
from jgpt.errors import UserError, is_disk_full
from jgpt.file_lock import LOCK, hold

FORMAT_VERSION = 3  # of meta.json. In version 2 each split was one file, train.bin and val.bin: it is still read
TOKENS_VERSION = 2  # another one would mean: the same text and settings give other tokens
TOKEN_FILE = re.compile(r"(train|val)(_\d{5,})?\.bin")


def token_directory(config: ConfigDict) -> Path:
    """Return the directory of a config's token files: data.cache_dir, or tokens/ in the run directory."""
    return user_path(config.data.cache_dir or f"{config.out_dir}/tokens").absolute()


def make_token_directory(directory: Path) -> None:
    """Make the directory; refuse one whose files jgpt did not write."""
    directory.mkdir(parents=True, exist_ok=True)
    # In this order: a process that prepares tokens at this moment makes its tokenizer first.
    found = _files(directory)
    ours = (directory / "meta.json").exists() or (directory / "tokenizer").exists()
    if found and not ours:
        raise UserError(
            f"{found[0]} exists, and jgpt did not write it. A token directory must be new, or written by jgpt. "
            "Set data.cache_dir to another directory."
        )


def remove_tokens(directory: Path) -> None:
    """Remove the token files of a directory, meta.json first; the tokenizer stays."""
    (directory / "meta.json").unlink(missing_ok=True)
    for path in _files(directory):
        path.unlink(missing_ok=True)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if TOKEN_FILE.fullmatch(path.name))


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
        if is_disk_full(error):
            what, advice = "has no space left", "It takes 2 or 4 bytes a token. Free space"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            what, advice = "cannot be written", "Something else has this name. Remove it"
        else:
            what, advice = "cannot be written", "It must be a directory that you may write in. Make it one"
        raise UserError(
            f"the token directory {directory} {what}: {error}. {advice}, or set data.cache_dir to another directory."
        ) from error


def check_room(directory: Path, needed: int) -> None:
    """Raise OSError when a disk has less room than the bytes that are needed."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"at least {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def write_token_meta(directory: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, which completes a token directory."""
    write_signed(directory / "meta.json", meta)


def read_token_meta(directory: Path) -> dict[str, Any]:
    """Return the content of a token directory's meta.json; {} where it is missing or is not what was written.

    That of version 2 is returned as version 3 has it.
    """
    meta = read_signed(directory / "meta.json")
    if meta.get("format_version") != 2:
        return meta
    itemsize = {"uint16": 2, "uint32": 4}[meta["dtype"]]
    for split in ("train", "val"):
        meta[f"{split}_shards"] = [
            {
                "file": f"{split}.bin",
                "bytes": meta[f"{split}_tokens"] * itemsize,
                "sha256": meta[f"{split}_sha256"],
                "chunk_bytes": meta["chunk_bytes"],
                "chunks_sha256": meta.pop(f"{split}_chunks_sha256"),
            }
        ]
    return meta | {"format_version": FORMAT_VERSION}


def write_signed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with a hash of itself, so that it is known whether it is what was written."""
    write_json(path, content | {"meta_sha256": _hash(content)})


def read_signed(path: Path) -> dict[str, Any]:
    """Return what `write_signed` wrote; {} where the file is missing or is not what was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and content.get("meta_sha256") == _hash(content) else {}


def _hash(content: dict[str, Any]) -> str:
    others = {key: value for key, value in content.items() if key != "meta_sha256"}
    return hashlib.sha256(json.dumps(others).encode()).hexdigest()  # ASCII: a name that is not UTF-8 has no bytes
