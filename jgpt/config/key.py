"""What one setting is: its value, its reason, and what is allowed.

Beside the data path: `defaults.py` is the table of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jgpt.wording import range_text


@dataclass(frozen=True)
class Key:
    """One setting: its default value, why it is there, and what it may be.

    A number is allowed from `low` to `high`; a text with `choices` is one of them, each with its meaning.
    """

    value: Any
    reason: str
    low: float = -math.inf
    high: float = math.inf
    choices: Mapping[str, str] = field(default_factory=dict)
    shown: str = ""  # how help and documents write the value, where the value itself depends on the machine

    def allows(self, value: Any) -> bool:
        """Return whether a value is allowed; nan is in no range."""
        if self.choices:
            return value in self.choices
        return not self._is_number() or self.low <= value <= self.high

    def allowed(self) -> str:
        """Say what is allowed; "" where nothing but the type matters.

        >>> Key(0.0, "dropout", 0, 0.99).allowed(), Key("a", "a letter", choices={"a": "", "b": ""}).allowed()
        ('0 to 0.99', "'a' or 'b'")
        """
        if self.choices:
            *others, last = map(repr, self.choices)
            return f"{', '.join(others)} or {last}"
        return range_text(self.low, self.high) if self._is_number() and self.low > -math.inf else ""

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

    def _is_number(self) -> bool:
        return isinstance(self.value, int | float) and not isinstance(self.value, bool)


@dataclass(frozen=True)
class Group:
    """Settings that belong together: `name` is what stands before the dot, "" at the top."""

    name: str
    reason: str
    keys: Mapping[str, Key]
