"""Turn ids into text while they are generated, in pieces that never break a character.

In the data path: after `decode.py`, before the terminal.
"""

import re
from collections.abc import Sequence

from jgpt.data.tokenizer import Tokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that is one byte of a character, as SentencePiece has them
BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing list of ids.

    All pieces together are `decode(before + ids)` without the `decode(before)` at its beginning. The text of a token
    depends on the token before it (a space is dropped at the beginning of a text), so each piece is decoded together
    with the ids of the last piece. Ids wait while bytes of a character may be missing. (The DecodeStream of the
    tokenizers library never returns bytes that are still incomplete at the end.)
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._previous = list(before)  # the ids of the last piece
        self._waiting: list[int] = []

    def add(self, ids: Sequence[int]) -> str:
        """Take the next ids; return the text that is complete, "" where none is."""
        self._waiting += ids
        piece = self._piece()
        last = self._tokenizer.backend.id_to_token(self._waiting[-1]) if self._waiting else ""
        # Only when a run of byte tokens has ended is it known whether they make characters.
        if not piece or piece.endswith(BROKEN) or BYTE.fullmatch(last or ""):
            return ""
        self._previous, self._waiting = self._waiting, []
        return piece

    def close(self) -> str:
        """Return the rest of the text, at the end of the ids."""
        return self._piece()

    def _piece(self) -> str:
        return self._tokenizer.decode(self._previous + self._waiting)[len(self._tokenizer.decode(self._previous)) :]
