"""What a program gives to the Python API, checked: a value of another type is a mistake of the user, and is named.

Beside the data path: `jgpt.api` asks here, before it loads or writes anything.
"""

import secrets
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from jgpt.config.defaults import MOST_TOKENS
from jgpt.errors import UserError


def whole(name: str, value: Any, low: int, high: int = MOST_TOKENS) -> int:
    """Return a whole number of Python, NumPy or JAX; raise UserError for anything else, and out of range.

    >>> whole("rows", 2.5, 1)
    Traceback (most recent call last):
    jgpt.errors.UserError: rows=2.5, of the type float. Allowed: a whole number from 1 to 16,777,216.
    """
    if not isinstance(value, Integral):
        raise UserError(f"{_shown(name, value)}. Allowed: a whole number from {low} to {high:,}.")
    if not low <= int(value) <= high:
        raise UserError(f"{name}={int(value)}. Allowed: a whole number from {low} to {high:,}.")
    return int(value)


def string(name: str, value: Any, advice: str) -> str:
    """Return a text; raise UserError with `advice` for anything else."""
    if not isinstance(value, str):
        raise UserError(f"{_shown(name, value)}. Allowed: a text. {advice}")
    return value


def seed_of(value: Any) -> int:
    """Return a seed from 0 to 2**32 - 1, as the server does: a larger or negative number wraps, None is any."""
    if value is None:
        return secrets.randbelow(2**32)
    if not isinstance(value, Integral):
        raise UserError(f"{_shown('seed', value)}. Allowed: a whole number, or None for another text each time.")
    return int(value) % 2**32


def stop_strings(value: Any) -> list[str]:
    """Return the texts before which an answer ends; None is none."""
    strings = [] if value is None else [value] if isinstance(value, str) else value
    strings = list(strings) if isinstance(strings, Iterable) else [strings]
    if not all(isinstance(string, str) and string for string in strings):
        raise UserError(f"stop={str(value)[:60]!r}. Allowed: a text, or several in a list; none of them empty.")
    return strings


def _shown(name: str, value: Any) -> str:
    given = repr(value)
    return f"{name}={given if len(given) <= 60 else given[:57] + '...'}, of the type {type(value).__name__}"
