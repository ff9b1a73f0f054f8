"""What --help prints: a command's docstring, its flags, and every config key with its reason.

Beside the data path: `run.py` is the only caller.
"""

from absl import flags

from jgpt.cli.flags import own_flags
from jgpt.cli.text import columns, first_line
from jgpt.config.defaults import GROUPS
from jgpt.config.files import config_files

EXIT_CODES = (
    ("0", "done, or stopped on purpose (a signal, the deadline) with everything saved"),
    ("1", "a bug of jgpt: the only one that shows a traceback"),
    ("2", "a mistake in the flags, the config, the text or the directories: the message says what to do"),
    ("3", "the device ran out of memory"),
    ("4", "training diverged"),
    ("5", "another process of the run has ended; the same commands go on from the newest checkpoint"),
    ("130", "interrupted at once, by a second Ctrl-C"),
)


def help_text(doc: str) -> str:
    """Put together a command's --help: its docstring, its flags, and the configs and their keys where it takes one."""
    parts = [doc.strip()]
    rows = [
        (f"--{flag.name}", f"{' '.join(flag.help.split())}{_default(flag)}")
        for flag in own_flags()
        if flag.name != "config"
    ]
    if "config" in flags.FLAGS:
        rows.insert(0, ("--config NAME", "the config: one of those below by its name, or a file of your own"))
        rows.insert(1, ("--config.KEY=VALUE", "override one of its keys; give it as often as you like"))
    if rows:
        parts.append("Flags:\n" + columns(rows))
    if "config" in flags.FLAGS:
        parts.append("Configs:\n" + columns((name, first_line(path)) for name, path in config_files().items()))
        parts.append("Config keys, with their values where the config does not change them:\n" + config_keys())
    if "exit codes:" not in doc.lower():
        parts.append("Exit codes:\n" + columns(EXIT_CODES))
    return "\n\n".join(parts)


def _default(flag: flags.Flag) -> str:
    return "" if flag.default in (None, "", False) else f" (default {flag.default})"


def config_keys() -> str:
    """List every config key with its default and its reason, group by group.

    >>> "model.n_layers=6" in config_keys()
    True
    """
    parts = []
    for group in GROUPS:
        prefix = f"{group.name}." if group.name else ""
        rows = ((f"{prefix}{name}={key.default()}", key.explained()) for name, key in group.keys.items())
        parts.append(f"{group.name or 'top level'}: {group.reason}\n{columns(rows)}")
    return "\n".join(parts)
