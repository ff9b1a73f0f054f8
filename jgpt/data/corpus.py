"""Read files as documents, in bounded memory.

A document is read in pieces of at most `PIECE_CHARACTERS`, so a text file may have any size. Text is exact: no newline
is translated, and only a byte order mark is removed. In the data path: after `find_files.py`, before `tokenizer.py`.
"""

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from jgpt.data.find_files import CORRUPT, decompress
from jgpt.errors import UserError

PIECE_CHARACTERS = 1 << 18  # small, because tokenizers need about 100 bytes a token while they work
BATCH_CHARACTERS = 1 << 22  # text that is tokenized at a time: enough for all cores, little memory
Item = TypeVar("Item")
REPLACE_HINT = "set data.encoding_errors='replace' to read what cannot be decoded as U+FFFD"


class Piece(NamedTuple):
    """A part of a document: text, and whether the document ends with it."""

    text: str
    ends_document: bool


@dataclass
class Corpus:
    """The documents of some files: a text file is one document, a line of .jsonl or a row of .parquet is one."""

    files: list[Path]
    text_field: str = "text"
    encoding_errors: str = "strict"  # or "replace": U+FFFD in the place of what is not UTF-8
    replaced: int = field(default=0, init=False)  # characters that the last `pieces()` replaced
    bytes_read: int = field(default=0, init=False)  # of `n_bytes`, by the last `pieces()`: for the progress bar

    @property
    def n_bytes(self) -> int:
        """Bytes of the files on disk, where some may be compressed."""
        return sum(file.stat().st_size for file in self.files)

    def pieces(self, progress: str = "") -> Iterator[Piece]:
        """Yield all documents that are not empty, in pieces; with `progress` as its label, a terminal shows a bar.

        Raises UserError, with the file's name, when a file cannot be read or is not UTF-8.
        """
        return self._read(lambda file: chain.from_iterable(map(cut, self._documents(file))), progress)

    def _read(self, read: Callable[[Path], Iterator[Item]], progress: str) -> Iterator[Item]:
        self.replaced = self.bytes_read = done = 0
        hidden = None if progress else True  # None: tqdm shows the bar on terminals only
        with tqdm(total=self.n_bytes, desc=progress, unit="B", unit_scale=True, disable=hidden) as bar:
            for file in self.files:
                try:
                    for item in read(file):
                        bar.update(self.bytes_read - bar.n)
                        yield item
                    self.bytes_read = done = done + file.stat().st_size
                except CORRUPT as error:
                    raise UserError(
                        f"{file} cannot be read: {error}. Files must be whole and readable. "
                        "Replace this one, or leave it out of data.text_glob."
                    ) from error

    def _documents(self, file: Path) -> Iterator[Iterable[str]]:
        if file.suffix == ".parquet":
            yield from self._parquet_documents(file)
        elif file.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
            yield from self._jsonl_documents(file)
        else:
            texts = self._decode(self._blocks(file), 0, str(file))
            yield chain([next(texts, "").removeprefix("\ufeff")], texts)

    def _jsonl_records(self, file: Path) -> Iterator[tuple[str, Any]]:
        """Yield each line that is not empty: its place ("FILE, line N"), and its JSON value."""
        offset = 0
        for number, line in enumerate(_lines(self._blocks(file)), start=1):
            place = f"{file}, line {number}"
            text = "".join(self._decode([line], offset, place)).removeprefix("\ufeff")
            offset += len(line) + 1
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place} is not JSON: {error}. A .jsonl file holds one object a line.") from error
            yield place, record

    def _jsonl_documents(self, file: Path) -> Iterator[list[str]]:
        for place, record in self._jsonl_records(file):
            if not isinstance(record, dict) or not isinstance(record.get(self.text_field), str):
                have = f"has the fields {sorted(record)}" if isinstance(record, dict) else f"is {str(record)[:40]!r}"
                raise UserError(
                    f"{place} has no text in the field {self.text_field!r}: it {have}. "
                    "Each line must be an object with a string there. Set data.text_field to the field's name."
                )
            yield [self._well_formed(record[self.text_field], place)]

    def _parquet_documents(self, file: Path) -> Iterator[list[str]]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(f"{file} needs pyarrow, which is not installed. Run: pip install pyarrow") from error
        before, size, row = self.bytes_read, file.stat().st_size, 0
        try:
            with parquet.ParquetFile(file) as table:
                schema = table.schema_arrow
                kind = schema.field(self.text_field).type if self.text_field in schema.names else None
                if kind not in (pyarrow.string(), pyarrow.large_string()):
                    have = ", ".join(f"{column.name} ({column.type})" for column in schema)
                    raise UserError(
                        f"{file} has no text in the column {self.text_field!r}: it has {have}. "
                        "A column of strings is needed. Set data.text_field to its name."
                    )
                for batch in table.iter_batches(batch_size=256, columns=[self.text_field]):
                    for value in batch.column(0).cast(pyarrow.large_binary()):
                        if value.is_valid:
                            yield ["".join(self._decode([value.as_py()], 0, f"{file}, row {row}"))]
                        row += 1
                    self.bytes_read = before + size * row // table.metadata.num_rows
        except pyarrow.ArrowInvalid as error:
            raise OSError(f"it is not a complete Parquet file ({error})") from error

    def _blocks(self, file: Path) -> Iterator[bytes]:
        before = self.bytes_read
        with file.open("rb") as raw:
            for block in decompress(file, raw):
                self.bytes_read = before + raw.tell()
                yield block

    def _decode(self, blocks: Iterable[bytes], offset: int, place: str) -> Iterator[str]:
        """Decode UTF-8 that arrives in blocks, cut anywhere; errors name `place` and count bytes from `offset`."""
        pending = b""
        for block in chain(blocks, [b""]):  # blocks are never empty: an empty one marks the end
            data = pending + block
            try:
                text, n_decoded = codecs.utf_8_decode(data, self.encoding_errors, not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{place} is not UTF-8: byte 0x{data[error.start]:02x} at byte offset {offset + error.start} "
                    f"({error.reason}). Text must be UTF-8. Convert it (iconv -t utf-8), or {REPLACE_HINT}."
                ) from error
            if self.encoding_errors == "replace":  # do not count a U+FFFD that is in the file
                self.replaced += text.count("\ufffd") - data[:n_decoded].count(b"\xef\xbf\xbd")
            pending, offset = data[n_decoded:], offset + n_decoded
            if text:
                yield text

    def _well_formed(self, text: str, place: str) -> str:
        """Refuse or replace half a surrogate pair: JSON can spell it (\\ud800), and UTF-8 cannot hold it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            if self.encoding_errors == "strict":
                raise UserError(
                    f"{place} holds half a surrogate pair (U+{ord(text[error.start]):X}), which is not a character. "
                    f"Correct the line, or {REPLACE_HINT}."
                ) from error
            self.replaced += sum("\ud800" <= character <= "\udfff" for character in text)
            return without_surrogates(text)
        return text


def without_surrogates(text: str) -> str:
    r"""Replace each half of a surrogate pair by U+FFFD.

    >>> without_surrogates("a\ud800b") == "a\ufffdb"
    True
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def cut(texts: Iterable[str]) -> Iterator[Piece]:
    """Cut one document, given as texts of any length, into pieces; an empty document has none."""
    rest = ""
    for text in texts:
        rest, start = rest + text, 0
        while len(rest) - start > PIECE_CHARACTERS:
            end = _cut_before(rest, start, start + PIECE_CHARACTERS)
            yield Piece(rest[start:end], ends_document=False)
            start = end
        rest = rest[start:]
    if rest:
        yield Piece(rest, ends_document=True)


def _cut_before(text: str, start: int, end: int) -> int:
    """Find a place to cut, start < place <= end, that changes the ids as little as possible.

    The usual byte-level pre-tokenizers (GPT-2, GPT-4, Llama 3, Qwen) split between a letter or digit and a newline or
    space, so a cut there leaves the document's ids unchanged. If there is none, cut before a newline; else at the end.
    """
    low = max(start, end - (1 << 14))
    for mark, after_word in (("\n", True), (" ", True), ("\n", False)):
        at = text.rfind(mark, low, end)
        while at > low:
            before = at - text.startswith("\r\n", at - 1)
            if before > start and (text[before - 1].isalnum() or not after_word):
                return before
            at = text.rfind(mark, low, at)
    return end - text.startswith("\r\n", end - 1)


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def batched_by_characters(items: Iterable[Item], count: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Group items, in order, into lists of `BATCH_CHARACTERS` or a little more; `count` gives an item's characters."""
    batch: list[Item] = []
    n_characters = 0
    for item in items:
        batch.append(item)
        n_characters += count(item)
        if n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch
