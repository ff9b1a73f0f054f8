"""How the commands lay out and name things: two columns, the first line of a docstring.

Beside the data path. Only the standard library is needed, so that `jgpt --help` runs where a package is missing.
"""

import ast
import textwrap
from collections.abc import Iterable
from pathlib import Path

from jgpt.wording import display_width, pad

WIDTH = 120


def columns(rows: Iterable[tuple[str, str]]) -> str:
    """Lay out names and what they mean in two columns, within WIDTH characters.

    >>> print(columns([("--a", "one"), ("--long", "two")]))
      --a     one
      --long  two
    """
    rows = list(rows)
    indent = 4 + max(display_width(name) for name, _ in rows)
    return "\n".join(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=pad(f"  {name}", indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        if text
        else f"  {name}"
        for name, text in rows
    )


def first_line(path: Path) -> str:
    """Return the first line of the docstring of a source file, without importing it."""
    try:
        return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    except (OSError, SyntaxError, UnicodeDecodeError):
        return "(cannot be read)"
