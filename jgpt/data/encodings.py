"""Decode text that arrives in blocks, and name the encodings that bytes are likely to be in.

In the data path: `corpus.py` reads with this, and `tokenizer.py` asks for text without halves of surrogate pairs.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

SAMPLE_BYTES, PREVIEW = 1 << 12, 24
LIKELY = 0.8  # of the characters that are not ASCII must be usual ones of the language
PUNCTUATION = "“”‘’–—…•°§©®«»€£½\xa0"

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]")


class NotDecodable(ValueError):
    """Bytes that an encoding does not have."""

    def __init__(self, reason: str, offset: int, line: int, sample: bytes) -> None:
        super().__init__(reason)
        self.offset, self.line, self.sample = offset, line, sample  # from the text's begin; what stands there


def decode(blocks: Iterable[bytes], encoding: str, replace: bool, count: Callable[[int], None]) -> Iterator[str]:
    """Decode blocks of bytes that are cut anywhere. Raises NotDecodable unless `replace` puts U+FFFD instead.

    `count` is called with the number of characters that were replaced. A U+FFFD that is in the text is none, in UTF-8.
    """
    decoder = codecs.getincrementaldecoder(encoding)("replace" if replace else "strict")
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    n_bytes, n_lines, tail = 0, 0, b""
    for block in chain(blocks, [b""]):  # blocks are never empty: an empty one marks the end
        try:
            text = decoder.decode(block, not block)
        except UnicodeDecodeError as error:
            data, start = error.object, error.start
            line = n_lines + 1 + codecs.decode(data[:start], encoding, "ignore").count("\n")
            before = data[max(0, start - SAMPLE_BYTES // 16) : start]
            sample = before[before.rfind(b"\n") + 1 :] if before.isascii() or b"\n" in before else b""
            sample += data[start : start + SAMPLE_BYTES]
            reason = f"byte 0x{data[start]:02x} at byte offset {{}} ({error.reason})"
            offset = n_bytes + len(block) - len(data) + start
            raise NotDecodable(reason.format(offset), offset, line, sample) from error
        except UnicodeError as error:  # such as UTF-16 without its mark
            raise NotDecodable(str(error), n_bytes, n_lines + 1, block) from error
        if replace:
            own = (tail + block).count(b"\xef\xbf\xbd") if is_utf8 else 0
            tail = block[-2:]
            count(text.count("\ufffd") - own)
        n_bytes, n_lines = n_bytes + len(block), n_lines + text.count("\n")
        if text:
            yield text


def without_surrogates(text: str) -> str:
    r"""Replace each half of a surrogate pair by U+FFFD.

    >>> without_surrogates("a\ud800b") == "a\ufffdb"
    True
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def likely_encodings(sample: bytes) -> dict[str, str]:
    """Name up to three encodings that bytes are likely to be in, the likeliest first, each with what it reads.

    The share of usual characters decides. A short sample may have several: who reads the language sees which is right.

    >>> likely_encodings("Привет, мир".encode("koi8-r"))
    {'koi8-r': 'Привет, мир'}
    """
    found = []
    for place, (encoding, usual) in enumerate(_USUAL.items()):
        try:
            text = codecs.getincrementaldecoder(encoding)("strict").decode(sample)  # the end may be cut
        except UnicodeError:
            continue
        foreign = [i for i, character in enumerate(text) if character > "\x7f"]
        share = sum(usual(text, i) for i in foreign) / max(1, len(foreign))
        if foreign and share >= LIKELY and not _CONTROLS.search(text):
            start = max(0, foreign[0] - PREVIEW // 3)
            found.append((-share, place, encoding, " ".join(text[start : start + PREVIEW].split())))
    by_preview: dict[str, str] = {}
    for _, _, encoding, preview in sorted(found):
        by_preview.setdefault(preview, encoding)  # of an encoding and its extension the first
    return {encoding: preview for preview, encoding in list(by_preview.items())[:3]}


def _lead(character: str, encoding: str, *ranges: tuple[int, int]) -> bool:
    """Return whether the first of two bytes of a character is in one of the ranges: there the usual ones are."""
    data = character.encode(encoding, "ignore")
    return len(data) == 2 and any(low <= data[0] <= high for low, high in ranges)


def _korean(text: str, i: int) -> bool:
    return "가" <= text[i] <= "힣" and _lead(text[i], "euc_kr", (0xB0, 0xC8)) or text[i] in PUNCTUATION


def _japanese(text: str, i: int) -> bool:
    kanji = _lead(text[i], "euc_jp", (0xB0, 0xCF))
    around = text[max(0, i - 16) : i + 17]  # Japanese is never without kana for long
    is_kana = "\u3040" <= text[i] <= "\u30ff" or "\u3000" <= text[i] <= "\u3020" or "！" <= text[i] <= "～"
    return is_kana or kanji and any("\u3040" <= character <= "\u30ff" for character in around)


def _chinese(text: str, i: int) -> bool:
    return _lead(text[i], "gb2312", (0xA1, 0xA1), (0xA3, 0xA3), (0xB0, 0xD7))


def _traditional(text: str, i: int) -> bool:
    return _lead(text[i], "big5", (0xA1, 0xC6))


def _cyrillic(text: str, i: int) -> bool:
    before, after = text[max(0, i - 1) : i], text[i + 1 : i + 2]
    is_letter = "А" <= text[i] <= "я" or text[i] in "ёЁіІїЇєЄґҐ№"
    is_mixed = any(character.isascii() and character.isalpha() for character in before + after)
    fits = not is_mixed and not (text[i].isupper() and before.isalpha())
    return is_letter and fits or text[i] in PUNCTUATION


def _western(text: str, i: int) -> bool:
    beside = text[max(0, i - 1) : i] + text[i + 1 : i + 2]
    is_letter = "À" <= text[i] <= "ÿ" or text[i] in "ŒœŠšŽžŸßƒ"
    return is_letter and any("a" <= character.lower() <= "z" for character in beside) or text[i] in PUNCTUATION


_USUAL: dict[str, Callable[[str, int], bool]] = {
    "euc_kr": _korean,
    "cp949": _korean,
    "shift_jis": _japanese,
    "cp932": _japanese,
    "euc_jp": _japanese,
    "gb18030": _chinese,
    "big5": _traditional,
    "cp1252": _western,
    "cp1251": _cyrillic,
    "koi8-r": _cyrillic,
    "utf-16-le": lambda text, i: any(usual(text, i) for usual in (_japanese, _korean, _chinese, _cyrillic)),
}
