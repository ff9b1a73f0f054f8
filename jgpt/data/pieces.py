"""Cut a document into pieces that a tokenizer takes at a time, where it matters least; group what it takes together.

In the data path: `corpus.py` yields what this makes of its documents.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

PIECE_CHARACTERS = 1 << 18  # small, because tokenizers need about 100 bytes a token while they work
BATCH_CHARACTERS = 1 << 22  # text that is tokenized at a time: enough for all cores, little memory
Item = TypeVar("Item")


class Piece(NamedTuple):
    """A part of a document: text, and whether the document ends with it."""

    text: str
    ends_document: bool
    number: int = 0  # of the document, see `Corpus.pieces`


def cut(texts: Iterable[str], number: int = 0) -> Iterator[Piece]:
    """Cut one document, given as texts of any length, into pieces; an empty document has none."""
    rest = ""
    for text in texts:
        rest, start = rest + text, 0
        while len(rest) - start > PIECE_CHARACTERS:
            end = _cut_before(rest, start, start + PIECE_CHARACTERS)
            yield Piece(rest[start:end], ends_document=False, number=number)
            start = end
        rest = rest[start:]
    if rest:
        yield Piece(rest, ends_document=True, number=number)


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
