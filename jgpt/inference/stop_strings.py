"""End a text at any of some strings, while it comes in pieces.

In the data path: after `text_stream.py`, before the reader.
"""

from collections.abc import Sequence


class StopStrings:
    """A text that ends before the first of `strings`. What may be the beginning of one is held back.

    >>> stops = StopStrings(["END"])
    >>> stops.add("one E"), stops.add("N, two E"), stops.add("NDless")
    (('one ', False), ('EN, two ', False), ('', True))
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._held = strings, ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Take the next piece; return what can be shown, and whether the text ends there."""
        text = self._held + piece
        if found := [place for string in self._strings if (place := text.find(string)) >= 0]:
            self._held = ""
            return text[: min(found)], True
        n_held = max((self._begun(text, string) for string in self._strings), default=0)
        cut = len(text) - n_held
        self._held = text[cut:]
        return text[:cut], False

    def close(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, string: str) -> int:
        """Return the length of the longest beginning of `string` with which `text` ends."""
        return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
