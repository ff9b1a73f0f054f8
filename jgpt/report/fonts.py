"""Which font of this machine draws a text: the name of a run may be in any script, and matplotlib's own font has few.

Beside the data path: the pictures ask before they draw a title. matplotlib is installed where this is called.
"""

from collections.abc import Iterable
from contextlib import suppress
from functools import cache

LAST_RESORT = "Last Resort"  # a font of matplotlib that draws every character as a box


@cache  # the fonts are looked through once for a name, not at every evaluation
def drawable(text: str) -> tuple[str, tuple[str, ...]]:
    """Return as much of a text as can be drawn, and the families of fonts that draw it.

    That is all of it, where an installed font has the characters that the default font lacks. Else they are left out;
    where no letter or digit remains, the text is empty. A character without a glyph would be a box, and a warning each
    time that it is drawn.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    default = FontProperties()
    lacking = _lacking(findfont(default), text)
    if not lacking:
        return text, (default.get_name(),)
    for font in sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400)):
        with suppress(OSError, RuntimeError):  # it was deleted since, or is damaged
            if not font.name.startswith(LAST_RESORT) and not _lacking(font.fname, lacking):
                return text, (default.get_name(), font.name)
    rest = " ".join("".join(" " if character in lacking else character for character in text).split())
    return (rest if any(map(str.isalnum, rest)) else ""), (default.get_name(),)


def _lacking(font_file: str, characters: Iterable[str]) -> set[str]:
    from matplotlib.font_manager import get_font

    font = get_font(font_file)
    return {character for character in characters if not font.get_char_index(ord(character))}
