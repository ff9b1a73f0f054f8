"""What --help prints: a command's docstring, its flags, and every config key with its comment.

Beside the data path: `cli.py` is the only caller.
"""

import ast
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from jgpt.config.defaults import default_config

WIDTH = 120
EXIT_CODES = (
    ("0", "done, or stopped on purpose (a signal, the deadline) with everything saved"),
    ("1", "a bug of jgpt: the only one that shows a traceback"),
    ("2", "a mistake in the flags, the config, the text or the directories: the message says what to do"),
    ("3", "the device ran out of memory"),
    ("4", "training diverged"),
    ("130", "interrupted at once, by a second Ctrl-C"),
)


def help_text(doc: str) -> str:
    """Put together a command's --help: its docstring, its flags, and the configs and their keys where it takes one."""
    parts = [doc.strip()]
    ours = ("jgpt.", "__main__", sys.argv[0])
    by_module = flags.FLAGS.flags_by_module_dict()
    rows = [
        (f"--{flag.name}", f"{' '.join(flag.help.split())}{_default(flag)}")
        for module, found in by_module.items() if module.startswith(ours)
        for flag in found if flag.name != "config"
    ]  # fmt: skip
    if "config" in flags.FLAGS:
        rows.insert(0, ("--config FILE", "a config file: one of those below, or your own"))
        rows.insert(1, ("--config.KEY=VALUE", "override one of its keys; give it as often as you like"))
    if rows:
        parts.append("Flags:\n" + columns(rows))
    if "config" in flags.FLAGS:
        files = [(str(path), _first_line(path)) for path in sorted(Path("configs").glob("*.py"))]
        if files:
            parts.append("Config files:\n" + columns(files))
        parts.append("Config keys, and their values where the config file does not change them:\n" + config_keys())
    if "exit code" not in doc.lower():
        parts.append("Exit codes:\n" + columns(EXIT_CODES))
    return "\n\n".join(parts)


def columns(rows: Iterable[tuple[str, str]]) -> str:
    """Lay out names and what they mean in two columns, within WIDTH characters.

    >>> print(columns([("--a", "one"), ("--long", "two")]))
      --a     one
      --long  two
    """
    rows = list(rows)
    indent = 4 + max(len(name) for name, _ in rows)
    return "\n".join(
        textwrap.fill(text, WIDTH, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
        if text
        else f"  {name}"
        for name, text in rows
    )


def _default(flag: flags.Flag) -> str:
    return "" if flag.default in (None, "", False) else f" (default {flag.default})"


def _first_line(path: Path) -> str:
    """Return the first line of a file's docstring."""
    try:
        return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    except (OSError, SyntaxError, UnicodeDecodeError):
        return "(cannot be read)"


def config_keys() -> str:
    """List every config key with its default and its comment, read from the source of `default_config`.

    >>> "model.n_layers=6" in config_keys()
    True
    """
    source = inspect.getsource(default_config)
    comments = {
        token.start[0]: token.string.removeprefix("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    groups, rows = {"config": ""}, []
    for line in ast.walk(ast.parse(source)):
        if not isinstance(line, ast.Assign) or not isinstance(target := line.targets[0], ast.Attribute):
            continue
        name, value = groups[ast.unparse(target.value)] + target.attr, ast.get_source_segment(source, line.value)
        if value == "ConfigDict()":
            groups[ast.unparse(line.targets[1])] = f"{name}."
            continue
        lines = range(line.lineno, (line.end_lineno or line.lineno) + 1)
        rows.append((f"{name}={value}", " ".join(comments[n] for n in lines if n in comments)))
    return columns(rows)
