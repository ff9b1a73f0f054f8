"""What one setting is: its value, its reason, and what is allowed.

Beside the data path: `defaults.py` is the table of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jgpt.wording import range_text

LARGEST_INT = 2**31 - 1  # on devices: steps, seeds and sizes are int32 there


@dataclass(frozen=True)
class Key:
    """One setting: its default value, why it is there, and what it may be.

    A number is allowed from `low` to `high`, which no number is without: what comes from a user must not make an array
    or a loop that nothing bounds. A text with `choices` is one of them, each with its meaning.
    """

    value: Any
    reason: str
    low: float = -math.inf
    high: float = LARGEST_INT
    choices: Mapping[str, str] = field(default_factory=dict)
    shown: str = ""  # how help and documents write the value, where the value itself depends on the machine

    def allows(self, value: Any) -> bool:
        """Return whether a value is of the default's type, and in its range; inf and nan are in none.

        >>> key = Key(6, "blocks", low=1, high=9)
        >>> [key.allows(value) for value in (1, 10, True, None, "6")]
        [True, False, False, False, False]
        """
        if isinstance(value, bool) != isinstance(self.value, bool) or not isinstance(value, self._types()):
            return False
        if self.choices:
            return value in self.choices
        if isinstance(value, str):
            return "\0" not in value  # no name of a file has it
        return not self._is_number() or self.low <= value <= self.high

    def allowed(self, in_full: bool = False) -> str:
        """Say what is allowed: for help, "" where nothing but the type matters; `in_full` for an error.

        >>> Key(0.0, "dropout", 0, 0.99).allowed(), Key("a", "a letter", choices={"a": "", "b": ""}).allowed()
        ('0 to 0.99', "'a' or 'b'")
        >>> Key(6, "blocks", low=1).allowed(), Key(6, "blocks", low=1).allowed(in_full=True)
        ('1 or more', '1 to 2,147,483,647')
        """
        if self.choices:
            *others, last = map(repr, self.choices)
            return f"{', '.join(others)} or {last}"
        if self._is_number():
            return range_text(self.low, math.inf if self.high == LARGEST_INT and not in_full else self.high)
        return ("true or false" if isinstance(self.value, bool) else "a text without NUL bytes") if in_full else ""

    def default(self) -> str:
        """Write the default value as help and documents show it."""
        return self.shown or repr(self.value)

    def explained(self) -> str:
        """Say the reason with the meaning of each choice, or the range.

        >>> Key(6, "blocks", low=1).explained()
        'blocks (1 or more)'
        >>> Key("rope", "of positions", choices={"rope": "", "learned": "GPT-2"}).explained()
        "of positions: 'rope', 'learned' (GPT-2)"
        """
        if self.choices:
            named = [f"{name!r} ({meaning})" if meaning else repr(name) for name, meaning in self.choices.items()]
            return f"{self.reason}: {', '.join(named)}"
        return f"{self.reason} ({self.allowed()})" if self.allowed() else self.reason

    def _types(self) -> tuple[type, ...]:
        return (int, float) if isinstance(self.value, float) else (type(self.value),)

    def _is_number(self) -> bool:
        return isinstance(self.value, int | float) and not isinstance(self.value, bool)


@dataclass(frozen=True)
class Group:
    """Settings that belong together: `name` is what stands before the dot, "" at the top."""

    name: str
    reason: str
    keys: Mapping[str, Key]
