"""Read files as documents, in bounded memory.

A document is read in pieces of at most `PIECE_CHARACTERS`, so a text file may have any size. Text is exact: no newline
is translated, and only a byte order mark is removed. In the data path: after `find_files.py`, before `tokenizer.py`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

from tqdm import tqdm

from jgpt.data.decompress import CORRUPT, decompress
from jgpt.data.encodings import NotDecodable, decode, without_surrogates
from jgpt.data.find_files import JSON_LINES
from jgpt.data.first_bytes import HEAD_BYTES
from jgpt.data.not_text import (
    REPLACE_HINT,
    lines_hint,
    look_at,
    misnamed_hint,
    not_decodable,
    refuse_other_kinds,
    too_much_replaced,
)
from jgpt.data.parquet import text_column
from jgpt.data.pieces import Piece, cut
from jgpt.data.remote import TextFile
from jgpt.errors import UserError

LINE_CHARACTERS = 1 << 28  # of .jsonl: a line must be in memory as a whole, a few times
MOST_REPLACED = 0.01  # of a file's characters: more is another encoding, and what is left of it is no text
MOST_BAD_FILES, MOST_BYTES_AFTER = 20, 1 << 30  # after a bad file others are looked for, but not for hours
Item = TypeVar("Item")


@dataclass
class Corpus:
    """The documents of some files: a text file is one document, a line of .jsonl or a row of .parquet is one."""

    files: Sequence[TextFile]
    text_field: str = "text"
    encoding_errors: str = "strict"  # or "replace": U+FFFD in the place of what is not text; "replace_any": any share
    encoding: str = field(default="utf-8", kw_only=True)  # any text encoding that Python knows; .parquet is UTF-8
    first_file: int = field(default=0, kw_only=True)  # the number of files before these, where they are a part of all
    replaced: int = field(default=0, init=False)  # characters that the last `pieces()` replaced
    nulls: int = field(default=0, init=False)  # rows without text that the last `pieces()` left out
    bytes_read: int = field(default=0, init=False)  # of `n_bytes`, by the last `pieces()`: for the progress bar
    _file_number: int = field(default=0, init=False)  # of the file that is read, among all
    _characters: int = field(default=0, init=False)  # that were decoded
    _undecoded: int = field(default=0, init=False)  # of these, U+FFFD in the place of bytes

    @property
    def n_bytes(self) -> int:
        """Bytes of the files on disk, where some may be compressed."""
        return sum(file.stat().st_size for file in self.files)

    def pieces(self, progress: str = "") -> Iterator[Piece]:
        """Yield all documents that are not empty, in pieces; with `progress` as its label, a terminal shows a bar.

        The number of a document is that of its file plus its own in the file. So it does not depend on what is in other
        files, which another process may read. Raises UserError, with the names of the files, when some cannot be read
        or are not text in `encoding`.
        """
        return self._read(self._pieces, progress)

    def _pieces(self, file: TextFile) -> Iterator[Piece]:
        number = self._file_number
        for document in self._documents(file):
            for piece in cut(document, number):
                yield piece
                number += piece.ends_document

    def remarks(self) -> str:
        """Say how much the last `pieces()` replaced and left out, as the end of a line; "" where it is nothing."""
        counts = {"characters replaced": self.replaced, "rows without text (null) left out": self.nulls}
        return "".join(f", {n:,} {what}" for what, n in counts.items() if n)

    def _read(self, read: Callable[[TextFile], Iterator[Item]], progress: str) -> Iterator[Item]:
        self.replaced = self.nulls = self.bytes_read = 0
        if bad := {file: problem for file in self.files if (problem := look_at(file))}:
            others = [file for file in self.files if file not in bad]
            raise self._all_bad(list(bad.values()), others, read)
        hidden = None if progress else True  # None: tqdm shows the bar on terminals only
        with tqdm(total=self.n_bytes, desc=progress, unit="B", unit_scale=True, disable=hidden) as bar:
            for i, file in enumerate(self.files):
                self._file_number = self.first_file + i
                try:
                    for item in self._read_file(file, read):
                        bar.update(self.bytes_read - bar.n)
                        yield item
                except UserError as error:
                    raise self._all_bad([str(error)], self.files[i + 1 :], read) from error

    def _read_file(self, file: TextFile, read: Callable[[TextFile], Iterator[Item]]) -> Iterator[Item]:
        before, undecoded, characters = self.bytes_read, self._undecoded, self._characters
        try:
            yield from read(file)
            self.bytes_read = before + file.stat().st_size
        except CORRUPT as error:
            raise UserError(
                f"{file} cannot be read: {error}. Files must be whole and readable. "
                f"Replace this one, or leave it out of data.text_glob.{misnamed_hint(file)}"
            ) from error
        undecoded, characters = self._undecoded - undecoded, self._characters - characters
        if self.encoding_errors == "replace" and undecoded > MOST_REPLACED * characters:
            raise too_much_replaced(file, undecoded, characters, MOST_REPLACED, self.encoding)

    def _all_bad(
        self, known: list[str], others: Sequence[TextFile], read: Callable[[TextFile], Iterator[Any]]
    ) -> UserError:
        """Make one error of all bad files: read the others for nothing but their problems, as far as that is quick."""
        problems, n_bytes, n_left = list(known), 0, len(others)
        for file in others:
            if n_bytes > MOST_BYTES_AFTER or len(problems) >= MOST_BAD_FILES:
                break
            try:
                n_left -= 1
                n_bytes += file.stat().st_size if file.exists() else 0
                for _ in self._read_file(file, read):
                    pass
            except UserError as error:
                problems.append(str(error))
        if len(problems) == 1 and not n_left:
            return UserError(problems[0])
        lines = problems[:MOST_BAD_FILES]
        if len(problems) > len(lines):
            lines.append(f"and {len(problems) - len(lines):,} more")
        if n_left:
            lines.append(f"{n_left:,} files after these were not looked at")
        return UserError(f"{len(problems):,} files of data.text_glob cannot be used:\n  - " + "\n  - ".join(lines))

    def _documents(self, file: TextFile) -> Iterator[Iterable[str]]:
        if file.suffix.lower() == ".parquet":
            yield from self._parquet_documents(file)
        elif file.name.lower().endswith(JSON_LINES):
            yield from self._jsonl_documents(file)
        else:
            yield self._texts(file)

    def _texts(self, file: TextFile, by_line: bool = False) -> Iterator[str]:
        """Yield the text of a file, cut anywhere, without a byte order mark; errors name the line where asked."""
        texts = self._decode(self._blocks(file), file, by_line)
        return chain([next(texts, "").removeprefix("\ufeff")], texts)

    def _jsonl_records(self, file: TextFile) -> Iterator[tuple[str, Any]]:
        """Yield each line that is not empty: its place ("FILE, line N"), and its JSON value."""
        for number, line in enumerate(_lines(self._texts(file, by_line=True), file), start=1):
            place = f"{file}, line {number}"
            text = line.removeprefix("\ufeff")  # files that were joined have one inside
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{place} is not JSON: {error}. A .jsonl file holds one object a line.{lines_hint(text, file)}"
                ) from error
            yield place, record

    def _jsonl_documents(self, file: TextFile) -> Iterator[list[str]]:
        for place, record in self._jsonl_records(file):
            text = record.get(self.text_field, 0) if isinstance(record, dict) else 0
            if text is None:
                self.nulls += 1
            elif isinstance(text, str):
                yield [self._well_formed(text, place)]
            else:
                have = f"has the fields {sorted(record)}" if isinstance(record, dict) else f"is {str(record)[:40]!r}"
                if isinstance(record, dict) and self.text_field in record:
                    have = f"has {str(text)[:40]} there"
                hint = lines_hint("[", file) if isinstance(record, list) else ""
                raise UserError(
                    f"{place} has no text in the field {self.text_field!r}: it {have}. Each line must be an object "
                    f"with a string (or null, which is left out) there. Set data.text_field to the field's name.{hint}"
                )

    def _parquet_documents(self, file: TextFile) -> Iterator[list[str]]:
        before, size, row = self.bytes_read, file.stat().st_size, 0
        for values, n_rows in text_column(file, self.text_field):
            for value in values:
                if value is None:
                    self.nulls += 1
                else:
                    yield ["".join(self._decode([value], file, row=f", row {row}"))]
                row += 1
            self.bytes_read = before + size * row // n_rows

    def _blocks(self, file: TextFile) -> Iterator[bytes]:
        before = self.bytes_read
        with file.open("rb") as raw:
            for i, block in enumerate(decompress(file, raw)):
                if i == 0:
                    refuse_other_kinds(file, block[:HEAD_BYTES], self.encoding)
                self.bytes_read = before + raw.tell()
                yield block

    def _decode(self, blocks: Iterable[bytes], file: TextFile, by_line: bool = False, row: str = "") -> Iterator[str]:
        """Decode bytes that arrive in blocks, cut anywhere; errors name the file, and its line or row."""
        encoding = "utf-8" if row else self.encoding
        try:
            for text in decode(blocks, encoding, self.encoding_errors != "strict", self._count_replaced):
                self._characters += len(text)
                yield text
        except NotDecodable as error:
            place = f", line {error.line}" if by_line else row
            raise not_decodable(file, place, error, encoding, in_a_row=bool(row)) from error

    def _count_replaced(self, n: int) -> None:
        self.replaced += n
        self._undecoded += n

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


def _lines(texts: Iterable[str], file: TextFile) -> Iterator[str]:
    r"""Join text that is cut anywhere to lines, in time that does not grow faster than the text.

    >>> from pathlib import Path
    >>> list(_lines(["a", "b\nc\n\n", "d"], Path("a.jsonl")))
    ['ab', 'c', '', 'd']
    """
    parts: list[str] = []
    n_lines, n_characters = 1, 0
    for text in texts:
        first, *others = text.split("\n")
        parts.append(first)
        n_characters += len(first)
        if n_characters > LINE_CHARACTERS:
            raise UserError(
                f"{file}, line {n_lines} is longer than {LINE_CHARACTERS:,} characters. A line must fit in memory. "
                f"Cut it, or save its text as .txt.{lines_hint(parts[0], file)}"
            )
        for line in others:
            yield "".join(parts)
            parts, n_characters, n_lines = [line], len(line), n_lines + 1
    yield "".join(parts)
