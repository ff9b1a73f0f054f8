"""Read a file as blocks of bytes, decompressed.

In the data path: after `find_files.py`, before `corpus.py`.
"""

import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from jgpt.data.remote import TextFile
from jgpt.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd

    CORRUPT = (OSError, EOFError, zlib.error, zstd.ZstdError)
else:
    CORRUPT = (OSError, EOFError, zlib.error)  # EOFError: a truncated .gz or .zst

BLOCK_BYTES = 1 << 18
ZSTD_INPUT_BYTES = 1 << 10  # at a time: zstd can make 32,768 bytes of one
MOST_TIMES, ONCE_PAST = 1000, 1 << 30  # text becomes 3 to 100 times smaller; only what is past 1 GB is refused


def decompress(file: TextFile, raw: BinaryIO) -> Iterator[bytes]:
    """Yield an open file in blocks, never empty, decompressed according to its suffix.

    Raises one of CORRUPT when the file is damaged, and UserError when a package to read it is missing, or when it
    becomes so much longer that it cannot be text.
    """
    size, n_bytes = max(file.stat().st_size, 1), 0
    try:
        for block in _READERS.get(file.suffix.lower(), _plain)(raw):
            n_bytes += len(block)
            if n_bytes > max(ONCE_PAST, MOST_TIMES * size):
                raise UserError(
                    f"{file} is {size:,} bytes and becomes over {n_bytes / 1e9:.1f} GB. Text is rarely more than 100 "
                    f"times smaller when compressed, and {MOST_TIMES:,} times is the limit. Decompress it yourself if "
                    "it is right, or leave it out of data.text_glob."
                )
            yield block
    except ImportError as error:
        is_zstd = file.suffix.lower() == ".zst"
        what = "Run: pip install zstandard" if is_zstd else "Decompress it yourself: this Python was built without it"
        raise UserError(f"{file} needs {error.name}, which is not installed. {what}") from error


def _plain(stream: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while block := stream.read(BLOCK_BYTES):
        yield block


def _gzip(raw: BinaryIO) -> Iterator[bytes]:
    return _plain(gzip.GzipFile(fileobj=raw))


def _bz2(raw: BinaryIO) -> Iterator[bytes]:
    import bz2

    yield from _plain(bz2.BZ2File(raw))  # type: ignore[arg-type]


def _xz(raw: BinaryIO) -> Iterator[bytes]:
    import lzma

    try:
        yield from _plain(lzma.LZMAFile(raw))  # type: ignore[arg-type]
    except lzma.LZMAError as error:
        raise OSError(f"it is not a complete .xz file ({error})") from error


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Decompress frame by frame, because zstandard's own stream reader accepts a truncated file."""
    if sys.version_info >= (3, 14):
        yield from _plain(zstd.open(raw))
        return
    import zstandard

    frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, ended, data = frames.decompressobj(), True, b""
    parts, n_bytes = [], 0
    while data := data or raw.read(ZSTD_INPUT_BYTES):
        try:
            parts.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise OSError(f"it is not a complete .zst file ({error})") from error
        n_bytes += len(parts[-1])
        if n_bytes >= BLOCK_BYTES:
            yield b"".join(parts)
            parts, n_bytes = [], 0
        ended, data = frame.eof, frame.unused_data
        if ended:
            frame = frames.decompressobj()
    if n_bytes:
        yield b"".join(parts)
    if not ended:
        raise EOFError("the compressed stream ends in the middle")


_READERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {".gz": _gzip, ".zst": _zstd, ".bz2": _bz2, ".xz": _xz}
