"""How the commands lay out and name things: two columns, "did you mean", the first line of a docstring.

Beside the data path. Only the standard library is imported, so that `jgpt --help` runs where a package is missing.
"""

import ast
import difflib
import textwrap
from collections.abc import Iterable
from pathlib import Path

WIDTH = 120


def columns(rows: Iterable[tuple[str, str]]) -> str:
    """Lay out names and what they mean in two columns, within WIDTH characters.

    >>> print(columns([("--a", "one"), ("--long", "two")]))
      --a     one
      --long  two
    """
    rows = list(rows)
    indent = 4 + max(len(name) for name, _ in rows)
    return "\n".join(
        textwrap.fill(
            text,
            WIDTH,
            initial_indent=f"  {name}".ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        if text
        else f"  {name}"
        for name, text in rows
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Name what `name` may stand for: a known name in another group, or one spelled almost like it; "" without one.

    >>> did_you_mean("n_layers", ["seed", "model.n_layers"]), did_you_mean("model.n_layer", ["seed", "model.n_layers"])
    (' Did you mean model.n_layers?', ' Did you mean model.n_layers?')
    >>> did_you_mean("zzz", ["seed", "model.n_layers"])
    ''
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    elsewhere = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    return f" Did you mean {' or '.join(elsewhere or close)}?" if close or elsewhere else ""


def first_line(path: Path) -> str:
    """Return the first line of the docstring of a source file, without importing it."""
    try:
        return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    except (OSError, SyntaxError, UnicodeDecodeError):
        return "(cannot be read)"
