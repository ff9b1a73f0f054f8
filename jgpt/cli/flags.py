"""The flags of a command and its config file, read; every mistake in them is a UserError.

Beside the data path: `run.py` calls it before the command.
"""

import difflib
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jgpt.config.defaults import default_config, flatten
from jgpt.errors import UserError

AUTO = re.compile(r"^(--?config\.execution\.micro_batch_size=)auto$")  # a key of whole numbers, where 0 is auto
OWN_CONFIG = "Begin with jgpt.config.default_config(), change keys of it, and return it."


def define_config() -> None:
    """Define the --config flag: a file in `configs/`, whose keys --config.KEY=VALUE overrides."""
    config_flags.DEFINE_config_file("config", None, "a config file; --config.KEY=VALUE overrides one of its keys")


def load_config() -> ConfigDict:
    """Return the config that the command line asks for."""
    return flags.FLAGS.config


def parse_flags(positional: int = 0) -> list[str]:
    """Parse sys.argv and return its arguments that are no flags, at most `positional`.

    Every mistake in it is a UserError, and so is one in the config file.
    """
    path = _config_file(sys.argv[1:]) if "config" in flags.FLAGS else None
    if path:
        _check_keys(sys.argv[1:])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections loads the file by load_module
            logging.disable(logging.WARNING)  # and warns where _check_config answers
            flags.FLAGS.set_gnu_getopt(positional > 0)  # flags may follow other arguments
            rest = flags.FLAGS([AUTO.sub(r"\g<1>0", argument) for argument in sys.argv])[1:]
        if path:
            hasattr(flags.FLAGS.config, "keys")  # raises the OSError that get_config() raised: ml_collections keeps it
    except flags.UnrecognizedFlagError as error:
        close = re.search(r"Did you mean: ([\w]+)", str(error))
        hint = f"Did you mean --{close[1]}? " if close else ""
        raise UserError(f"unknown flag --{error.flagname}. {hint}All flags are in --help.") from None
    except Exception as error:
        place = _place(error, path) if path else ""
        if not place and not isinstance(error, flags.Error):
            raise
        raise UserError(place or _wrong_value(str(error))) from None
    finally:
        logging.disable(logging.NOTSET)
    if len(rest) > positional:
        others = "Everything else" if positional else "Everything"
        raise UserError(
            f"unexpected argument {rest[positional]!r}. {others} is a flag, --NAME=VALUE. All flags are in --help."
        )
    if path:
        _check_config(path, flags.FLAGS.config)
    return rest


def _config_file(arguments: list[str]) -> Path:
    """Find the config file among the arguments; its errors say which files there are."""
    known = ", ".join(sorted(str(path) for path in Path("configs").glob("*.py")))
    allowed = f"Allowed: {known}, or" if known else "Allowed:"
    advice = f"{allowed} a file of your own with get_config(). For example: --config configs/quickstart.py"
    path = ""
    for i, argument in enumerate(arguments):
        if found := re.fullmatch(r"--?config(?:=(.*))?", argument):
            path = found[1] or (arguments[i + 1] if found[1] is None and i + 1 < len(arguments) else "")
    if not path or path.startswith("-"):
        raise UserError(f"no --config was given. {advice}")
    file = Path(path.split(":")[0])
    if not file.is_file():
        raise UserError(f"--config={path}: there is no such file (current folder: {Path.cwd()}). {advice}")
    return file


def _check_keys(arguments: list[str]) -> None:
    """Refuse overrides of keys that there are not, all at once."""
    known = flatten(default_config())
    groups = {key.split(".")[0] for key in known if "." in key}
    problems = []
    for argument in arguments:
        if not (found := re.match(r"--?(?:no)?config\.([^=]*)", argument)) or (key := found[1]) in known:
            continue
        if key in groups:
            keys = ", ".join(name.removeprefix(f"{key}.") for name in known if name.startswith(f"{key}."))
            problems.append(f"{found[0]} is a group of keys. Set one of its keys instead: {keys}.")
        else:
            problems.append(f"unknown config key {found[0]}.{did_you_mean(key, known)}")
    if problems:
        raise UserError(" ".join(problems) + " All keys are in --help.")


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """Name the keys that `key` may stand for: in another group, or spelled almost like it.

    >>> did_you_mean("n_layers", ["seed", "model.n_layers"]), did_you_mean("model.n_layer", ["seed", "model.n_layers"])
    (' Did you mean model.n_layers?', ' Did you mean model.n_layers?')
    >>> did_you_mean("zzz", ["seed", "model.n_layers"])
    ''
    """
    known = list(known)
    close = difflib.get_close_matches(key, known, 1)
    elsewhere = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    return f" Did you mean {' or '.join(elsewhere or close)}?" if close or elsewhere else ""


def _place(error: BaseException, path: Path) -> str:
    """Say in which line of the config file an error began; "" when it did not begin there."""
    cause: BaseException | None = error
    while cause is not None:
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if _same(frame.filename, path)]
        line = cause.lineno if isinstance(cause, SyntaxError) and _same(cause.filename, path) else None
        line = frames[-1].lineno if frames else line
        if line is not None:
            return f"{path}, line {line}: {_in_short(cause)} Mend that line, or name another file by --config."
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, AttributeError) and "'get_config'" in str(error):
        return (
            f"{path} has no function get_config(). A config file must have one, as those in configs/ do. {OWN_CONFIG}"
        )
    return ""


def _same(name: str | None, path: Path) -> bool:
    return name is not None and Path(name).absolute() == path.absolute()


def _in_short(error: BaseException) -> str:
    """Put an error into one line; ml_collections' own errors about keys repeat the whole config."""
    text = str(error.msg if isinstance(error, SyntaxError) else error)
    key = re.match(r"\W*(?:Key\W+)?(\w+)", text)
    close = re.search(r'Did you mean "(\w+)"', text)
    if isinstance(error, AttributeError | KeyError) and ("locked" in text or close) and key:
        return f"unknown config key {key[1]}." + (f" Did you mean {close[1]}?" if close else "")
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}".rstrip(".: ") + "."


def _check_config(path: Path, config: Any) -> None:
    """Refuse what get_config() returned when it is not a config of jgpt."""
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returned {config!r}, and it must return a config. {OWN_CONFIG}")
    found, known = flatten(config).keys(), flatten(default_config()).keys()
    differences = [f"the unknown key {key}" for key in sorted(found - known)]
    differences += [f"no key {key}" for key in sorted(known - found)]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(f"{path}: get_config() returned a config with {', '.join(differences[:3])}{more}. {OWN_CONFIG}")


def _wrong_value(error: str) -> str:
    """Say what a flag takes instead of the value that absl refused."""
    flag = re.search(r"flag --?((?:no)?[\w.]+)(?:=(.*?))?(?:: |$)", error, re.DOTALL)
    if not flag:
        return f"{error.rstrip('.')}. All flags are in --help."
    name, value = flag[1], flag[2]
    known = {f"config.{key}": default for key, default in flatten(default_config()).items()}
    if name in known:
        kind, default = type(known[name]).__name__, known[name]
    elif name in flags.FLAGS:
        kind, default = flags.FLAGS[name].flag_type(), flags.FLAGS[name].default
    else:
        kind, default = "", None
    example = f", such as {default}" if default not in (None, "", False, True) else ""
    if value is None:
        return f"--{name} was given without a value. Write --{name}=VALUE{example}. All flags are in --help."
    types = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    if outside := re.search(r"is not ((?:an? )?\w.*)", error):  # absl: "-1 is not a non-negative integer"
        wanted = outside[1]
    elif choices := re.search(r"one of <(.*)>", error):
        wanted = "one of " + choices[1].replace("|", ", ")
    else:
        wanted = types.get(kind, "another value") + example
    return f"--{name}={value!r}: it must be {wanted}. All flags are in --help."
