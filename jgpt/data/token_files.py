"""Open the token files `train.bin` and `val.bin` as memmaps, and check them.

In the data path: between `write_tokens.py`, which writes them, and `batches.py`. The files are plain arrays of ids.
Where meta.json has "format": "chat", they are arrays of the words of `conversations.py`: ids with two marks in the high
bits. meta.json holds the hashes of what was written.

A file that is mapped never changes: new tokens are new files, which take the names of the old ones.
"""

import hashlib
import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jgpt.data.conversations import IDS
from jgpt.data.token_directory import FORMAT_VERSION, hold_token_directory, read_token_meta
from jgpt.data.tokenizer import Tokenizer, load_tokenizer
from jgpt.errors import UserError

CHUNK_BYTES = 1 << 26  # that one hash of meta.json is for
BLOCK_BYTES = 1 << 20  # read at a time: it stays in the processor's cache
MOST_CHUNKS = 64  # compared when a file is opened: 4 GiB of each, about four seconds on a fast disk
log = logging.getLogger("jgpt")


@dataclass(frozen=True)
class TokenData:
    """An open token directory."""

    train: np.ndarray  # [n], ids or words: uint16 or uint32
    val: np.ndarray  # [n], the same
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
    files: dict[str, BinaryIO]  # train and val


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
    paths = {split: directory / f"{split}.bin" for split in ("train", "val")}
    for split, path in paths.items():
        n_tokens = meta[f"{split}_tokens"]
        n_bytes, expected = path.stat().st_size if path.exists() else 0, n_tokens * np.dtype(meta["dtype"]).itemsize
        if not path.exists() or n_bytes != expected:
            raise UserError(
                f"{path} is damaged: it has {n_bytes:,} bytes, and {expected:,} are expected "
                f"({n_tokens:,} tokens of {meta['dtype']}). {_advice(directory)}"
            )
    return TokenFiles(directory, meta, tokenizer, {split: path.open("rb") for split, path in paths.items()})


def map_token_files(opened: TokenFiles) -> TokenData:
    """Compare the files with the hashes of what was written, and map them; close the files. Raises UserError."""
    arrays, dtype = {}, np.dtype(opened.meta["dtype"])
    with ExitStack() as closing:
        for file in opened.files.values():
            closing.enter_context(file)
        for split, file in opened.files.items():
            _check_content(opened, split)
            empty = opened.meta[f"{split}_tokens"] == 0  # an empty file cannot be mapped
            arrays[split] = np.zeros(0, dtype) if empty else np.memmap(file, dtype, mode="r")
    return TokenData(arrays["train"], arrays["val"], opened.meta, opened.tokenizer)


def hashes_of(split: str, file: BinaryIO) -> dict[str, Any]:
    """Return the entries of meta.json with the sha256 of an open file, and of each of its chunks."""
    whole, chunks = hashlib.sha256(), []
    for start in range(0, file.seek(0, os.SEEK_END), CHUNK_BYTES):
        chunks.append(_hash_part(file, start, CHUNK_BYTES, whole))
    return {
        f"{split}_sha256": whole.hexdigest(),
        f"{split}_chunks_sha256": chunks,
        "chunk_bytes": CHUNK_BYTES,
    }


def _hash_part(file: BinaryIO, start: int, n_bytes: int, whole: Any = None) -> str:
    """Return the sha256 of a part of a file, read in small blocks; add them to the hash of the whole as well."""
    part = hashlib.sha256()
    file.seek(start)
    while block := file.read(min(n_bytes, BLOCK_BYTES)):
        n_bytes -= len(block)
        part.update(block)
        if whole is not None:
            whole.update(block)
    return part.hexdigest()


def _check_content(opened: TokenFiles, split: str) -> None:
    """Compare a file with the hashes of its chunks: all of them, or in a huge file some, evenly spread."""
    path, file, meta = opened.directory / f"{split}.bin", opened.files[split], opened.meta
    hashes, chunk_bytes = meta[f"{split}_chunks_sha256"], meta["chunk_bytes"]
    places = range(len(hashes))
    if len(hashes) > MOST_CHUNKS:
        places = [i * (len(hashes) - 1) // (MOST_CHUNKS - 1) for i in range(MOST_CHUNKS)]
        log.info("tokens: of %s, %d of %d parts were compared with their hashes", path, MOST_CHUNKS, len(hashes))
    for place in places:
        if _hash_part(file, place * chunk_bytes, chunk_bytes) != hashes[place]:
            raise UserError(
                f"{path} is damaged: it is not what was written, somewhere in the {chunk_bytes:,} bytes from "
                f"{place * chunk_bytes:,} on (their sha256 differs). {_advice(opened.directory)}"
            )


def _advice(directory: Path) -> str:
    return f"Put the file back; or, if the text is still there, delete {directory}: the next run makes a new one."
