"""Find the files that globs name, and read them as blocks of bytes.

In the data path: the beginning; next is `corpus.py`.
"""

import functools
import glob
import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jgpt.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd

    CORRUPT = (OSError, EOFError, zlib.error, zstd.ZstdError)
else:
    CORRUPT = (OSError, EOFError, zlib.error)  # EOFError: a truncated .gz or .zst

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
SUFFIXES = {  # by data.format
    "text": (*(text + packed for text in TEXT_SUFFIXES for packed in ("", ".gz", ".zst")), ".parquet"),
    "chat": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
}
SUPPORTED = {
    "text": f"{', '.join(TEXT_SUFFIXES)}, each also with .gz or .zst, and .parquet",
    "chat": ".jsonl, also with .gz or .zst, as data.format is 'chat' (to convert .parquet: python -c \"import json, "
    "pyarrow.parquet as p; [print(json.dumps(row)) for row in p.read_table('OLD.parquet').to_pylist()]\" > NEW.jsonl)",
}
PACKED_SUFFIXES = (".gz", ".zst", ".parquet")  # compressed: their size says little of the text's
BLOCK_BYTES = 1 << 18
RUN_FILES = ("config.json", "versions.json", "metrics.jsonl")  # at the top of every run directory


def find_files(text_glob: str, format: str = "text") -> list[Path]:
    """List the files that comma-separated globs or directories name: absolute paths, sorted, each once.

    `format` is data.format; "chat" takes only .jsonl. Files that a run wrote (samples.txt) are left out, unless the
    name leads into the run directory. Raises UserError when a glob matches no file of a supported kind.
    """
    files: set[str] = set()
    is_run = functools.cache(holds_run)
    for part in filter(None, (part.strip() for part in text_glob.split(","))):
        path = os.path.expanduser(part)
        pattern = os.path.join(glob.escape(path), "**", "*") if os.path.isdir(path) else path
        # The name of an existing file is not a glob, even when it has a "[" in it.
        names = [path] if os.path.isfile(path) else glob.iglob(pattern, recursive=True)
        matches = list(names)
        readable = [match for match in matches if match.endswith(SUFFIXES[format]) and os.path.isfile(match)]
        supported = [match for match in readable if not any(map(is_run, _folders_between(path, match)))]
        if not supported:
            others = sorted({"".join(Path(match).suffixes[-2:]) or "without a suffix" for match in matches})
            kind = "text" if format == "text" else ".jsonl"
            what = f"only files that are not {kind} ({', '.join(others[:8])})" if others else "no file"
            what = f"only files that a run of jgpt wrote ({readable[0]})" if readable else what
            raise UserError(
                f"data.text_glob: {part!r} matches {what} (current folder: {os.getcwd()}). Supported are "
                f"{SUPPORTED[format]}. Set data.text_glob to a folder, or to a glob such as 'folder/**/*.txt'."
            )
        files.update(map(os.path.abspath, supported))
    if not files:
        raise UserError(
            "data.text_glob is empty. It must name files with text. Set it to a folder, or to a glob such as "
            "'folder/**/*.txt'."
        )
    return sorted(map(Path, files))


def holds_run(folder: str | Path) -> bool:
    """Return whether a folder is a run directory, as its files show, even one that was moved or unpacked."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in RUN_FILES)


def _folders_between(pattern: str, match: str) -> list[str]:
    """List the folders of `match` that the user did not name: those below the part of `pattern` without a glob.

    >>> _folders_between("/input/**/*.txt", "/input/mine/texts/a.txt"), _folders_between("/a/b.txt", "/a/b.txt")
    (['/input/mine/texts', '/input/mine'], [])
    """
    named = pattern
    while glob.has_magic(named) and not os.path.exists(named):
        named = os.path.dirname(named)
    folders, folder, named = [], os.path.dirname(os.path.abspath(match)), os.path.abspath(named)
    while len(folder) > len(named):
        folders.append(folder)
        folder = os.path.dirname(folder)
    return folders


def decompress(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Yield an open file in blocks, never empty, decompressed according to its suffix.

    Raises one of CORRUPT when the file is damaged, and UserError when a package to read it is missing.
    """
    stream = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
    if file.suffix == ".zst":
        if sys.version_info >= (3, 14):
            stream = zstd.open(raw)
        else:
            yield from _decompress_zstd(file, raw)
            return
    while block := stream.read(BLOCK_BYTES):
        yield block


def _decompress_zstd(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Decompress frame by frame, because zstandard's own stream reader accepts a truncated file."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{file} needs zstandard, which is not installed. Run: pip install zstandard") from error
    frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, ended, data = frames.decompressobj(), True, b""
    while data := data or raw.read(BLOCK_BYTES // 16):
        try:
            block = frame.decompress(data)
        except zstandard.ZstdError as error:
            raise OSError(f"it is not a complete .zst file ({error})") from error
        if block:
            yield block
        ended, data = frame.eof, frame.unused_data
        if ended:
            frame = frames.decompressobj()
    if not ended:
        raise EOFError("the compressed stream ends in the middle")
