"""Say what is wrong with a file that is not the text that was expected, and what to do with it.

Beside the data path: `corpus.py` raises these errors. Each function knows one file by its first bytes, or by an error.
"""

import codecs
import shlex

from jgpt.data.encodings import NotDecodable, likely_encodings
from jgpt.data.find_files import is_packed
from jgpt.data.first_bytes import head_of, is_binary, not_text, unicode_of
from jgpt.data.remote import TextFile
from jgpt.errors import UserError

REPLACE_HINT = "set data.encoding_errors='replace' to read what cannot be decoded as U+FFFD"
SURELY_UTF8 = 3  # characters of several bytes that are right in UTF-8: by accident there are not so many


def look_at(file: TextFile) -> str:
    """Say what a file is whose first bytes on disk are no text's, or that it cannot be read; "" for text.

    Nothing is decompressed.
    """
    try:
        what = not_text(file, head_of(file))
    except OSError as error:
        return f"{file} cannot be read: {error}. Make it readable, or leave it out of data.text_glob."
    return f"{file} is not text: it is {what}; or leave it out of data.text_glob." if what else ""


def refuse_other_kinds(file: TextFile, head: bytes, encoding: str) -> None:
    """Raise UserError where the first bytes of a text, decompressed, are no text's, or surely in another encoding."""
    if is_packed(file) and (what := not_text(file.with_suffix(""), head)):
        raise UserError(f"{file} is not text: what it holds is {what}, after decompressing it.")
    name = codecs.lookup(encoding).name
    is_wide, found = name.startswith(("utf-16", "utf-32")), unicode_of(head)
    if found and found != name and not head.decode(name, "ignore").startswith("\ufeff"):
        raise UserError(f"{file} is not {encoding_name(encoding)}: it is {found}. {how_to_read(file, [found])}.")
    if is_wide and not found and head.isascii() or name != "utf-8" and _is_utf8(head):
        raise UserError(
            f"{file} is not {encoding_name(encoding)}: it is UTF-8. All files are read in one encoding. Leave "
            "data.encoding at 'utf-8', and convert the files that are not, or leave this one out of data.text_glob."
        )
    if not is_wide and is_binary(head):
        raise UserError(
            f"{file} is not text: {head.count(0):,} of its first {len(head):,} bytes are NUL, as in programs, images, "
            "weights and the token files of other tools. Leave it out of data.text_glob."
        )


def _is_utf8(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")("strict").decode(head)  # the end may be cut
    except UnicodeDecodeError:
        return False
    return sum(character > "\x7f" for character in text) >= SURELY_UTF8


def not_decodable(file: TextFile, place: str, error: NotDecodable, encoding: str, in_a_row: bool = False) -> UserError:
    """Explain bytes that an encoding does not have, with the encodings that they are likely in.

    `place` follows the file's name. What is in a row of a Parquet file must be UTF-8.
    """
    found = {} if in_a_row else likely_encodings(error.sample)
    likely = " or ".join(f"{encoding} ({preview!r})" for encoding, preview in found.items())
    hint = "Correct the row" if in_a_row else how_to_read(file, list(found))
    return UserError(
        f"{file}{place} is not {encoding_name(encoding)}: {error}. {f'It may be {likely}. ' if likely else ''}{hint}, "
        f"or {REPLACE_HINT}."
    )


def too_much_replaced(file: TextFile, replaced: int, characters: int, share: float, encoding: str) -> UserError:
    """Explain that more than `share` of a file would be U+FFFD."""
    return UserError(
        f"{file}: {replaced:,} of {characters:,} characters are not {encoding_name(encoding)}. "
        f"data.encoding_errors='replace' is for up to {share:.0%} of a file, since with more it is another encoding, "
        "or no text. Set it to 'strict' to hear which encoding is likely, or to 'replace_any' to read it nevertheless."
    )


def how_to_read(file: TextFile, encodings: list[str]) -> str:
    """Say how text in another encoding is read or converted; the first of `encodings` is the likeliest."""
    if not encodings:
        return "Set data.encoding to the encoding that it was written in, or convert it to UTF-8"
    hint = f"Set data.encoding={encodings[0]!r} to read it"
    if is_packed(file):
        return hint
    name, new = shlex.quote(str(file)), shlex.quote(str(file.with_name(f"{file.stem}.utf8{file.suffix}")))
    return f"{hint}, or convert it (iconv -f {encodings[0].replace('_', '-')} -t utf-8 {name} > {new})"


def lines_hint(text: str, file: TextFile) -> str:
    """Say how a file becomes JSON lines, where a line that is not JSON shows what the file is; else ""."""
    name, new = shlex.quote(str(file)), shlex.quote(str(file.with_name(f"{file.stem}.lines.jsonl")))
    if text.lstrip().startswith("["):
        return f" If the file is one JSON array, convert it: jq -c '.[]' {name} > {new}"
    if text.strip() == "{":
        return f" If its objects go over several lines, convert it: jq -c . {name} > {new}"
    if "\r" in text.strip():
        return f" Its lines end with a carriage return alone. Convert it: tr '\\r' '\\n' < {name} > {new}"
    return ""


def misnamed_hint(file: TextFile) -> str:
    """Say that a file with the suffix of a compression is not compressed, as some servers leave it; else ""."""
    compressed = is_packed(file) and file.suffix.lower() != ".parquet" and file.exists()
    head = head_of(file) if compressed else b""
    if not head or not_text(file.with_suffix(""), head):
        return ""
    name, new = shlex.quote(str(file)), shlex.quote(str(file.with_suffix("")))
    return f" It does not begin as a {file.suffix} file does. If it is plain text, run: mv {name} {new}"


def encoding_name(encoding: str) -> str:
    """Name an encoding in a sentence."""
    return "UTF-8" if encoding == "utf-8" else f"in data.encoding={encoding!r}"
