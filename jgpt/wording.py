"""Format numbers, bytes, durations, ranges and guesses of names for people.

Beside the data path: logs, reports and errors use these.
"""

import difflib
import math
from collections.abc import Iterable


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
