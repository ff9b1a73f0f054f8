"""Open the token files as memmaps, and check them.

In the data path: between `write_tokens.py`, which writes them, and `batches.py`. The files are plain arrays of ids;
those of a split, in the order that meta.json gives, are one stream. Where meta.json has "format": "chat", they are
arrays of words (`words.py`): ids with two marks in the high bits. meta.json holds the hashes of what was
written.

A file that is mapped never changes: new tokens are new files, which take the names of the old ones.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jgpt.data.shards import Tokens, join_shards
from jgpt.data.token_directory import FORMAT_VERSION, hold_token_directory, read_token_meta
from jgpt.data.tokenizer import Tokenizer, load_tokenizer
from jgpt.data.words import IDS
from jgpt.data.write_shards import hash_part
from jgpt.errors import UserError

MOST_CHUNKS = 64  # compared when a split is opened: 4 GiB of each, about four seconds on a fast disk
log = logging.getLogger("jgpt")


@dataclass(frozen=True)
class TokenData:
    """An open token directory."""

    train: Tokens  # [n], ids or words: uint16 or uint32
    val: Tokens  # [n], the same
    meta: dict[str, Any]  # meta.json
    tokenizer: Tokenizer  # that made the ids

    @property
    def is_chat(self) -> bool:
        """Whether the tokens are words of conversations, of which only answers are learned."""
        return self.meta.get("format") == "chat"

    def ids(self, words: np.ndarray) -> np.ndarray:
        """Return the ids in a part of `train` or `val`, without marks."""
        return words & IDS if self.is_chat else words

    @property
    def val_targets(self) -> int:
        """The number of tokens in meta's `val_bytes` of text: all, or of conversations those that are learned."""
        return self.meta["val_targets" if self.is_chat else "val_tokens"]


def open_token_data(directory: Path) -> TokenData:
    """Open a token directory; raise UserError when it is incomplete, damaged, or of another version of jgpt."""
    with hold_token_directory(directory):
        opened = open_token_files(directory)
    return map_token_files(opened)


@dataclass(frozen=True)
class TokenFiles:
    """The open files of a token directory. They stay the same whatever happens in the directory: writers rename."""

    directory: Path
    meta: dict[str, Any]  # meta.json
    tokenizer: Tokenizer
    files: dict[str, list[BinaryIO]]  # by split, in the order of meta.json
    closing: ExitStack  # of all files


def open_token_files(directory: Path) -> TokenFiles:
    """Open the files that belong together; whoever calls holds the directory. Raises UserError as `open_token_data`."""
    meta = read_token_meta(directory)
    if meta.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{directory} holds no complete token files: meta.json is missing, damaged or of another version "
            f"(needed: {FORMAT_VERSION}). Run python -m jgpt.prepare, or set data.cache_dir to another directory."
        )
    tokenizer = load_tokenizer(directory / "tokenizer")
    if tokenizer.sha256 != meta["tokenizer_sha256"]:
        raise UserError(
            f"{directory / 'tokenizer'} is not the tokenizer that made the token files beside it. They must belong "
            f"together. {_advice(directory)}"
        )
    files: dict[str, list[BinaryIO]] = {}
    with ExitStack() as opened:
        for split in ("train", "val"):
            shards = meta[f"{split}_shards"]
            files[split] = [opened.enter_context(_open(directory / shard["file"], shard["bytes"])) for shard in shards]
        return TokenFiles(directory, meta, tokenizer, files, opened.pop_all())


def _open(path: Path, expected: int) -> BinaryIO:
    if not path.exists():
        raise UserError(f"{path} is missing, one of the token files that meta.json names. {_advice(path.parent)}")
    if (n_bytes := path.stat().st_size) != expected:
        raise UserError(
            f"{path} is damaged: it has {n_bytes:,} bytes, and {expected:,} are expected. {_advice(path.parent)}"
        )
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened: {error.strerror}. All token files must be readable at the same time. Make the "
            "file readable; where too many files are open, allow more (ulimit -n)."
        ) from error


def map_token_files(opened: TokenFiles) -> TokenData:
    """Compare the files with the hashes of what was written, and map them; close the files. Raises UserError."""
    dtype, tokens = np.dtype(opened.meta["dtype"]), {}
    with opened.closing:
        for split, files in opened.files.items():
            _check_content(opened, split)
            # An empty file cannot be mapped.
            filled = [file for file, shard in zip(files, opened.meta[f"{split}_shards"], strict=True) if shard["bytes"]]
            tokens[split] = join_shards([np.memmap(file, dtype, mode="r") for file in filled], dtype)
    return TokenData(tokens["train"], tokens["val"], opened.meta, opened.tokenizer)


def _check_content(opened: TokenFiles, split: str) -> None:
    """Compare the files of a split with the hashes of their chunks: all, or of a huge split some, evenly spread."""
    shards = opened.meta[f"{split}_shards"]
    chunks = [
        (file, shard, place)
        for file, shard in zip(opened.files[split], shards, strict=True)
        for place in range(len(shard["chunks_sha256"]))
    ]
    if (n := len(chunks)) > MOST_CHUNKS:
        chunks = [chunks[i * (n - 1) // (MOST_CHUNKS - 1)] for i in range(MOST_CHUNKS)]
        log.info(
            "tokens: of %s in %s, %d of %d parts were compared with their hashes",
            split, opened.directory, MOST_CHUNKS, n,
        )  # fmt: skip
    for file, shard, place in chunks:
        n_bytes = shard["chunk_bytes"]
        if hash_part(file, place * n_bytes, n_bytes) != shard["chunks_sha256"][place]:
            raise UserError(
                f"{opened.directory / shard['file']} is damaged: it is not what was written, somewhere in the "
                f"{n_bytes:,} bytes from {place * n_bytes:,} on (their sha256 differs). {_advice(opened.directory)}"
            )


def _advice(directory: Path) -> str:
    return f"Put the file back; or, if the text is still there, delete {directory}: the next run makes a new one."
