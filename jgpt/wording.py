"""Format numbers, bytes, durations, ranges, tables, JSON and guesses of names for people.

Beside the data path: logs, reports and errors use these.
"""

import difflib
import json
import math
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def format_duration(seconds: float) -> str:
    """Write a duration in its two largest units.

    >>> [format_duration(seconds) for seconds in (0, 42.4, 252, 11_100, 187_200, float("nan"))]
    ['0s', '42s', '4m 12s', '3h 05m', '2d 04h', '?']
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}h"
    return f"{h}h {m:02}m" if h else f"{m}m {s:02}s" if m else f"{s}s"


def format_count(n: float) -> str:
    """Write a number with one decimal and its power of a thousand.

    >>> [format_count(n) for n in (0, 950, 12_345, 999_990, 1_234_567, 3e9, float("inf"))]
    ['0', '950', '12.3k', '1.0M', '1.2M', '3.0B', 'inf']
    """
    for unit in ("", "k", "M", "B"):
        if abs(n) < (999.5 if not unit else 999.95):
            return f"{n:.1f}{unit}" if unit else f"{n:.0f}"
        n /= 1000
    return f"{n:.1f}T" if math.isfinite(n) else str(n)


GIB = 2**30


def gib(n: float) -> str:
    """Write bytes in GiB.

    >>> gib(4770354232)
    '4.44 GiB'
    """
    return f"{n / GIB:.2f} GiB"


def range_text(lowest: float, highest: float) -> str:
    """Write a range in words.

    >>> range_text(0, 0.99), range_text(1, math.inf), range_text(0, 2**31 - 1)
    ('0 to 0.99', '1 or more', '0 to 2,147,483,647')
    """
    low, high = (f"{int(x):,}" if x < math.inf and x == int(x) else repr(x) for x in (lowest, highest))
    return f"{low} or more" if highest == math.inf else f"{low} to {high}"


def json_text(value: Any, encoding: str | None = "utf-8", indent: int | None = 2) -> str:
    r"""Write JSON with the characters of every script as they are, so that people can read and copy them.

    Where `encoding` lacks one of them all become ASCII. Half of a surrogate pair, which stands for a byte in a file's
    name that is not UTF-8, stays an escape, and comes back when the text is read.

    >>> print(json_text({"run": "中文", "name": "\udc80"}, indent=None))
    {"run": "中文", "name": "\udc80"}
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def display_width(text: str) -> int:
    """Count the columns that a text takes on a terminal: 2 for a character of East Asia, none for a mark on one.

    >>> display_width("loss"), display_width("中文故事"), display_width("e\u0301")
    (4, 8, 1)
    """
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in text)
    return len(text) + wide - marks


def pad(text: str, width: int, right: bool = False) -> str:
    """Fill a text with spaces up to `width` columns of a terminal; `right` puts it at their right end.

    >>> pad("中文", 6) + "|", pad("1.5", 6, right=True)
    ('中文  |', '   1.5')
    """
    space = " " * (width - display_width(text))
    return space + text if right else text + space


def table(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> str:
    """Lay out rows of cells in columns; those of the numbers in `left` begin at their left end, others end together.

    >>> print(table([["run", "loss"], ["中文", "1.5"], ["b", "10.5"]], left=[0]))
    run   loss
    中文   1.5
    b     10.5
    """
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    padded = [[pad(cell, widths[n], right=n not in left) for n, cell in enumerate(row)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def shorten(text: str, width: int) -> str:
    """Cut a text that is wider than `width` columns, and mark that.

    >>> shorten("中文故事", 8), shorten("中文故事", 6)
    ('中文故事', '中文…')
    """
    if display_width(text) <= width:
        return text
    columns, n = 0, 0
    while (columns := columns + display_width(text[n])) < width:
        n += 1
    return text[:n] + "…"


def either(names: Iterable[str]) -> str:
    """Join names as a choice.

    >>> either(["a", "b", "c"])
    'a, b or c'
    """
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Name the known name that is spelled almost like `name`, as a sentence with a space before it; "" without one.

    >>> did_you_mean("trian", ["train", "plan"]), did_you_mean("zzz", ["train", "plan"])
    (' Did you mean train?', '')
    """
    close = difflib.get_close_matches(name, list(known), 1, cutoff)
    return f" Did you mean {close[0]}?" if close else ""
