"""Write a stream of tokens into files of a limited size, with their hashes.

In the data path: below `write_tokens.py` and `conversations.py`, which write; beside `token_files.py`, which compares.
"""

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from jgpt.atomic_write import atomic_file

SHARD_BYTES = 1 << 30  # of a file, at most: such files are easy to copy, and to fetch again where one is damaged
CHUNK_BYTES = 1 << 26  # that one hash is for
BLOCK_BYTES = 1 << 20  # read at a time: it stays in the processor's cache


class ShardWriter:
    """Write the tokens of a split into DIRECTORY/SPLIT_00000.bin, SPLIT_00001.bin, ...; a context.

    A file has its name once it is complete. `shards` are the entries of meta.json for the files. Where the block ends
    by an error, complete files stay, and the last one is removed. Raises OSError where a file cannot be written.
    """

    def __init__(self, directory: Path, split: str) -> None:
        self.directory, self.split = directory, split
        self.shards: list[dict[str, Any]] = []
        self.n_bytes = 0  # that were written to all files
        self._file: BinaryIO | None = None
        self._closing = ExitStack()

    def __enter__(self) -> "ShardWriter":
        return self

    def write(self, data: bytes) -> None:
        """Write whole tokens."""
        rest = memoryview(data)
        while rest:
            file = self._file or self._begin()
            room = SHARD_BYTES - file.tell()
            file.write(rest[:room])
            self.n_bytes += len(rest[:room])
            rest = rest[room:]
            if rest:
                self._complete(file)

    def _begin(self) -> BinaryIO:
        path = self.directory / shard_name(self.split, len(self.shards))
        self._file = file = self._closing.enter_context(atomic_file(path, "w+b"))
        return file

    def _complete(self, file: BinaryIO) -> None:
        with self._closing:
            self.shards.append({"file": shard_name(self.split, len(self.shards))} | hashes_of(file))
        self._file = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._file is not None:
            self._complete(self._file)
        else:
            self._closing.__exit__(kind, error, traceback)


def shard_name(split: str, place: int) -> str:
    """Name a token file.

    >>> shard_name("train", 3)
    'train_00003.bin'
    """
    return f"{split}_{place:05}.bin"


def hashes_of(file: BinaryIO) -> dict[str, Any]:
    """Return the entries of meta.json for an open file: its bytes, and the sha256 of all and of each of its chunks."""
    whole, chunks, n_bytes = hashlib.sha256(), [], file.seek(0, os.SEEK_END)
    for start in range(0, n_bytes, CHUNK_BYTES):
        chunks.append(hash_part(file, start, CHUNK_BYTES, whole))
    return {"bytes": n_bytes, "sha256": whole.hexdigest(), "chunk_bytes": CHUNK_BYTES, "chunks_sha256": chunks}


def hash_stream(paths: list[Path]) -> str:
    """Return the sha256 of the content of files, one after the other."""
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                whole.update(block)
    return whole.hexdigest()


def hash_part(file: BinaryIO, start: int, n_bytes: int, whole: Any = None) -> str:
    """Return the sha256 of a part of a file, read in small blocks; add them to the hash of the whole as well."""
    part = hashlib.sha256()
    file.seek(start)
    while block := file.read(min(n_bytes, BLOCK_BYTES)):
        n_bytes -= len(block)
        part.update(block)
        if whole is not None:
            whole.update(block)
    return part.hexdigest()
