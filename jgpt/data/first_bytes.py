"""What a file really is, by its first bytes: names lie, and a file that is not text must not be learned as text.

Beside the data path: `corpus.py` asks before it reads text, and `exchange/` where a model's file does not open.
"""

import codecs
import shlex

from jgpt.data.remote import TextFile

HEAD_BYTES = 1 << 12
# How files of a kind begin, what they are, and what to do; {file} is the name as a shell takes it.
SIGNATURES = (
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer, not the file that it stands for",
     "cd {folder} && git lfs pull"),
    (b"\x1f\x8b", "compressed by gzip", "mv {file} {file}.gz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "mv {file} {file}.zst"),
    (tuple(b"BZh%d1AY&SY" % level for level in range(1, 10)), "compressed by bzip2", "mv {file} {file}.bz2"),
    (b"\xfd7zXZ\x00", "compressed by xz", "mv {file} {file}.xz"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "lz4 -d {file} {file}.txt"),
    (b"PK\x03\x04", "a zip archive (as .zip, .docx, .epub and .xlsx are)", "unzip {file} -d {file}.unpacked"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {file}"),
    (b"Rar!\x1a\x07", "a rar archive", "unrar x {file}"),
    (b"PAR1\x15", "a Parquet file", "mv {file} {file}.parquet"),
    (b"ARROW1\x00\x00", "an Arrow file", "python -c 'import sys, pandas; pandas.read_feather(sys.argv[1]).to_parquet("
     "sys.argv[1] + \".parquet\")' {file}"),
    (b"%PDF-", "a PDF", "pdftotext {file} {file}.txt"),
    (b"{\\rtf1", "a document in RTF", "pandoc -f rtf -t plain {file} -o {file}.txt"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "soffice --convert-to txt {file}"),
    (b"SQLite format 3\x00", "an SQLite database", "sqlite3 {file} .dump"),
)  # fmt: skip
TAR_AT, TAR = 257, b"ustar"
BOMS = (  # the longer ones first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
HTML = (b"<!doctype html", b"<html")
OWN = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz", ".parquet": "Parquet"}  # what suffixes promise


def head_of(file: TextFile) -> bytes:
    """Return the first bytes of a file on disk; raise OSError where it cannot be read."""
    with file.open("rb") as raw:
        return raw.read(HEAD_BYTES)


def not_text(file: TextFile, head: bytes) -> str:
    """Say what a file is, and the command that helps, where its first bytes are no text's; else "".

    >>> from pathlib import Path
    >>> not_text(Path("a.txt"), b"PK\\x03\\x04...")
    'a zip archive (as .zip, .docx, .epub and .xlsx are). Run: unzip a.txt -d a.txt.unpacked'
    """
    own = OWN.get(file.suffix.lower())
    for magic, what, command in SIGNATURES:
        if head.startswith(magic) and not (own and own in what):
            names = {"file": shlex.quote(str(file)), "folder": shlex.quote(str(file.parent))}
            return f"{what}. Run: {command.format(**names)}"
    if head[TAR_AT:].startswith(TAR):
        return f"a tar archive. Run: tar -xf {shlex.quote(str(file))}"
    return ""


def unicode_of(head: bytes) -> str:
    """Name the encoding of text in UTF-16 or UTF-32, by its mark or its many NULs; "" where it is neither.

    >>> unicode_of("Hi there".encode("utf-16")), unicode_of("Hi there".encode("utf-16-be")), unicode_of(b"Hi")
    ('utf-16', 'utf-16-be', '')
    """
    for mark, encoding in BOMS:
        if head.startswith(mark):
            return encoding
    for width, encoding in ((4, "utf-32"), (2, "utf-16")):
        part = head[: len(head) // width * width]
        nulls = [part[i::width].count(0) / max(1, len(part) // width) for i in range(width)]
        if len(part) >= 2 * width and nulls[0] < 0.1 and min(nulls[width // 2 :]) > 0.2:
            return f"{encoding}-le"
        if len(part) >= 2 * width and nulls[-1] < 0.1 and min(nulls[: width // 2]) > 0.2:
            return f"{encoding}-be"
    return ""


def is_binary(head: bytes) -> bool:
    """Return whether so many bytes are NUL that a file is no text: one in twenty."""
    return head.count(0) > len(head) / 20


def why_unusable(file: TextFile) -> str:
    """Explain a file of a model that does not open: " It is ..." with the command that helps, or "".

    For files that are no text as well, such as weights: a pointer, an archive, or a web page in the place of the file.
    """
    try:
        head = head_of(file)
    except OSError:
        return ""  # the caller's own error says it
    if what := not_text(file, head):
        return f" It is {what}."
    if head.lstrip().lower().startswith(HTML):
        return " It is a web page: the server sent a page, such as a login, in the place of the file."
    return ""
