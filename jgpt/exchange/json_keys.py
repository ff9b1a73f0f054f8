"""Read the keys of somebody else's config.json: each value is of the right kind, or a clear error says what is wrong.

Beside the data path: `families.py` reads a model with it. The file may come from anywhere.
"""

import sys
from collections.abc import Mapping
from typing import Any

from jgpt.config.key import LARGEST_INT
from jgpt.errors import UserError
from jgpt.wording import range_text


class Keys:
    """Read the keys of a JSON object; every method raises UserError for a value of the wrong kind."""

    def __init__(self, given: Mapping[str, Any]):
        self.given = given

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = LARGEST_INT) -> int:
        """Read a whole number from `least` to `most`."""
        value = self.given.get(key)
        value = default if value is None else value
        if type(value) is not int or not least <= value <= most:
            raise wrong_value(key, value, f"a whole number, {range_text(least, most)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a number above 0."""
        value = self.given.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise wrong_value(key, value, "a number above 0")
        return float(value)

    def names(self, key: str) -> list[str]:
        """Read a list of texts; null and a missing key are an empty one."""
        value = self.given.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise wrong_value(key, value, "a list of texts")
        return value

    def flag(self, key: str) -> bool:
        """Read true or false; null and a missing key are false."""
        value = self.given.get(key)
        if value not in (True, False, None):
            raise wrong_value(key, value, "true or false")
        return bool(value)

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse any value but those allowed; a missing key counts as None."""
        if self.given.get(key) not in allowed:
            names = " or ".join(repr(value) for value in allowed if value is not None)
            raise wrong_value(key, self.given.get(key), names)


def wrong_value(key: str, value: Any, allowed: str) -> UserError:
    """Return the error for a value that is not allowed; None is a missing key."""
    given = f"no {key}" if value is None else f"{key}={shortened(value)}"
    return UserError(
        f"its config.json has {given}. Allowed: {allowed}; jgpt does not compute anything else. Take another model, or"
        " restore the published file."
    )


def shortened(value: Any) -> str:
    """Write a value of a file for a message; a number of many digits has no text in Python."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "(a value too large to print)"
    return text if len(text) <= 100 else f"{text[:100]}..."
