"""Ids to text while they are made, in pieces that never break a character.

In the data path: behind `decode.py`, before the terminal.
"""

import re
from collections.abc import Sequence

from jgpt.data.tokenizer import Tokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that is one byte of a character, as SentencePiece has them
BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing list of ids; all pieces together are `decode(before + ids)`, less `decode(before)`.

    What a token adds depends on the one before it (a space is dropped at the beginning of a text), so each piece is
    decoded behind the ids of the last one. Text waits while bytes of it may be missing. (The DecodeStream of the
    tokenizers library never hands out what is still broken at the end.)
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._told = list(before)  # the ids of the last piece
        self._waiting: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        """Take the next ids; return the text that is whole by now, "" where none is."""
        self._waiting += ids
        piece = self._piece()
        last = self._tokenizer.backend.id_to_token(self._waiting[-1]) if self._waiting else ""
        # Whether byte tokens make characters is known when their run has ended.
        if not piece or piece.endswith(BROKEN) or BYTE.fullmatch(last or ""):
            return ""
        self._told, self._waiting = self._waiting, []
        return piece

    def close(self) -> str:
        """Return what waits: no more ids come."""
        return self._piece()

    def _piece(self) -> str:
        return self._tokenizer.decode(self._told + self._waiting)[len(self._tokenizer.decode(self._told)) :]
