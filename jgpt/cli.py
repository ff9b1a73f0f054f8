"""What all commands share: flags in; text, one clear message and an exit code out.

Beside the data path: the commands (`python -m jgpt.NAME`) are the only callers.
"""

import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from jgpt import config as config_module
from jgpt.config import UserError
from jgpt.training.loop import TrainingDiverged
from jgpt.training.metrics import TerminalHandler

EXIT_DONE, EXIT_BUG, EXIT_USER, EXIT_MEMORY, EXIT_DIVERGED = 0, 1, 2, 3, 4


def define_config() -> None:
    """Define the --config flag: a file in `configs/`, whose keys --config.KEY=VALUE overrides."""
    config_flags.DEFINE_config_file("config", None, "a config file; --config.KEY=VALUE overrides one of its keys")


def load_config() -> ConfigDict:
    """Return the config that the command line asks for."""
    if flags.FLAGS["config"].value is None:
        known = ", ".join(sorted(str(path) for path in Path("configs").glob("*.py"))) or "a file with get_config()"
        raise UserError(f"no --config was given. Allowed: {known}. For example: --config configs/quickstart.py")
    return flags.FLAGS.config


def run(main: Callable[[], int | None], doc: str | None) -> None:
    """Run a command: parse its flags, call `main`, exit with 0 done or stopped on purpose, 2 the user's input,
    3 out of memory, 4 training diverged, 1 a bug of ours (the only one that shows a traceback).

    `doc` is the command's docstring, which heads its --help.
    """
    set_up_logging()
    if {"-h", "--help", "-help", "--helpfull"} & set(sys.argv[1:]):
        print(help_text(doc or ""))
        sys.exit(EXIT_DONE)
    try:
        parse_flags()
        sys.exit(main() or EXIT_DONE)
    except UserError as error:
        code, message = EXIT_USER, str(error)
    except TrainingDiverged as error:
        code, message = EXIT_DIVERGED, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except BrokenPipeError:  # the reader of a pipe went away: `| head`
        sys.stderr.close()
        sys.exit(EXIT_DONE)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            traceback.print_exc()
            sys.exit(EXIT_BUG)
        code = EXIT_MEMORY
        message = (
            f"the device ran out of memory: {str(error).splitlines()[0]}. Take a smaller --config.batch.micro_batch_size (the "
            "global batch stays as it is), or --config.remat=block"
        )
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def set_up_logging() -> None:
    """Send the log of jgpt to the terminal as plain lines, once."""
    log = logging.getLogger("jgpt")
    if not log.handlers:
        log.addHandler(TerminalHandler())
        log.setLevel(logging.INFO)
        log.propagate = False


def parse_flags() -> None:
    """Parse sys.argv; every mistake in it is a UserError."""
    try:
        rest = flags.FLAGS(sys.argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            flags.FLAGS.config.keys()  # a config file that failed to load says so here
    except AttributeError as error:  # ml_collections: an override names a key that is not there
        raise UserError(_unknown_key(str(error))) from None
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise UserError(f"{error}. See --help") from None
    if len(rest) > 1:
        raise UserError(f"unexpected {' '.join(rest[1:])!r}: everything is a flag, --NAME=VALUE. See --help")


def _unknown_key(error: str) -> str:
    missing = re.search(r"'(\w+)'", error)
    suggestion = re.search(r'Did you mean "(\w+)"', error)
    given = [a for a in sys.argv if missing and re.match(rf"--config\.(\w+\.)*{missing[1]}(\.|=|$)", a)]
    name = given[0].split("=")[0] if given else (missing[1] if missing else error)
    hint = f"did you mean {suggestion[1]!r}? " if suggestion else ""
    return f"unknown config key {name}: {hint}All keys are in --help"


def help_text(doc: str) -> str:
    """Put together a command's --help: its docstring, its flags, and the config's keys where it takes one."""
    parts = [doc.strip()]
    main_flags = flags.FLAGS.flags_by_module_dict().get(sys.argv[0], []) + flags.FLAGS.flags_by_module_dict().get(
        "__main__", []
    )
    rows = [(f"--{flag.name}", f"{flag.help}" + _default(flag)) for flag in main_flags if flag.name != "config"]
    if "config" in flags.FLAGS:
        rows.insert(0, ("--config FILE", "a config file, such as those in configs/"))
        rows.insert(1, ("--config.KEY=VALUE", "override one of its keys"))
    if rows:
        width = max(len(name) for name, _ in rows)
        parts.append("flags:\n" + "\n".join(f"  {name:{width}}  {text}" for name, text in rows))
    if "config" in flags.FLAGS:
        parts.append("config keys and what they are before a config file changes them:\n" + config_keys())
    return "\n\n".join(parts)


def _default(flag: flags.Flag) -> str:
    return "" if flag.default in (None, "", False) else f" (default {flag.default})"


def config_keys() -> str:
    """List every config key with its default and its comment, read from the source of `default_config`.

    >>> "model.n_layers" in config_keys()
    True
    """
    source = inspect.getsource(config_module.default_config)
    groups = {alias: name for name, alias in re.findall(r"config\.(\w+) = (\w+) = ConfigDict\(\)", source)}
    lines = []
    for owner, key, value, comment in re.findall(r"^    (\w+)\.(\w+) = (.+?)(?:  # (.*))?$", source, re.MULTILINE):
        if "ConfigDict()" not in value:
            name = key if owner == "config" else f"{groups[owner]}.{key}"
            lines.append((f"{name}={value}", comment))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:{width}}  {comment}".rstrip() for name, comment in lines)
