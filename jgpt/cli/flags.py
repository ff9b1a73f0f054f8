"""The flags of a command and its config file, read; every mistake in them is a UserError.

Beside the data path: `run.py` calls it before the command.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from jgpt.config.defaults import AUTO_KEYS, KEYS, flatten
from jgpt.config.files import config_files, find_config
from jgpt.config.length import keep_given_length
from jgpt.config.moved import new_key
from jgpt.config.other_names import called_here, unknown_flag, wrong_key
from jgpt.errors import UserError
from jgpt.wording import did_you_mean

if TYPE_CHECKING:
    from ml_collections import ConfigDict

HELP = {"-h", "--help", "-help", "--helpfull"}
CONFIG_FLAG = re.compile(r"--?config(?:=(.*))?", re.DOTALL)
AUTO = re.compile(rf"^(--?config\.(?:{'|'.join(map(re.escape, AUTO_KEYS))})=)auto$")
OWN_CONFIG = "Start with jgpt.config.default_config(), change its keys, and return it."


def asks_for_help() -> bool:
    """Return whether the command line asks for --help."""
    return not HELP.isdisjoint(sys.argv[1:])


def define_config() -> None:
    """Define the --config flag: a config of ours or a file, whose keys --config.KEY=VALUE overrides."""
    meaning = "a config; --config.KEY=VALUE overrides one of its keys"
    if asks_for_help():  # which needs the flag's name alone, and is faster without ml_collections
        flags.DEFINE_string("config", None, meaning)
    else:
        from ml_collections import config_flags

        config_flags.DEFINE_config_file("config", None, meaning)


def own_flags() -> list[flags.Flag]:
    """Return the flags that jgpt defined for this command, without absl's own."""
    ours = ("jgpt.", "__main__", sys.argv[0])
    by_module = flags.FLAGS.flags_by_module_dict()
    return [flag for module, found in by_module.items() if module.startswith(ours) for flag in found]


def load_config() -> ConfigDict:
    """Return the config that the command line asks for."""
    return flags.FLAGS.config


def parse_flags(positional: int = 0) -> list[str]:
    """Parse sys.argv and return its arguments that are no flags, at most `positional`.

    Every mistake in it is a UserError, and so is one in the config file.
    """
    arguments, path = sys.argv[1:], None
    if "config" in flags.FLAGS:
        arguments, path = _with_config_file(arguments)
        _check_keys(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections loads the file by load_module
            logging.disable(logging.WARNING)  # and warns where _check_config answers
            flags.FLAGS.set_gnu_getopt(positional > 0)  # flags may follow other arguments
            rest = flags.FLAGS([sys.argv[0], *(AUTO.sub(r"\g<1>0", argument) for argument in arguments)])[1:]
        if path:
            hasattr(flags.FLAGS.config, "keys")  # raises the OSError that get_config() raised: ml_collections keeps it
    except flags.UnrecognizedFlagError as error:
        hint = unknown_flag(error.flagname, [flag.name for flag in own_flags()], "config" in flags.FLAGS)
        raise UserError(f"unknown flag --{error.flagname}.{hint} All flags are in --help.") from None
    except Exception as error:
        place = _place(error, path) if path else ""
        if not place and not isinstance(error, flags.Error):
            raise
        raise UserError(place or _wrong_value(str(error))) from None
    finally:
        logging.disable(logging.NOTSET)
    for flag in own_flags():  # absl's bounds let NaN through; the config's keys have ranges of their own
        if isinstance(flag.value, float) and not (math.isfinite(flag.value) or flag.name.startswith("config.")):
            raise UserError(f"--{flag.name}={flag.value}: it must be a finite number. All flags are in --help.")
    if len(rest) > positional:
        others = "Everything else" if positional else "Everything"
        raise UserError(
            f"unexpected argument {rest[positional]!r}.{_flag_of(rest[positional])} {others} is a flag, --NAME=VALUE."
            " All flags are in --help."
        )
    if path:
        _check_config(path, flags.FLAGS.config)
        from ml_collections import config_flags

        keep_given_length(flags.FLAGS.config, config_flags.get_override_values(flags.FLAGS["config"]))
    return rest


def _flag_of(argument: str) -> str:
    """Say of which flag an argument may be the value, as a sentence with a space before it."""
    if argument.startswith("config."):
        return f" Did you mean --{argument}?"
    if "model" in flags.FLAGS and not flags.FLAGS.model:
        return f" Did you mean --model={argument}?"
    return " A value with spaces needs quotes around it."


def _with_config_file(arguments: list[str]) -> tuple[list[str], Path]:
    """Put the path of the config file into the arguments, where a config may be given by its name; return both."""
    known = config_files()
    allowed = f"Allowed: {', '.join(known)}, or a file of your own with get_config()."
    advice = f"{allowed} For example: --config quickstart"
    given = []
    for i, argument in enumerate(arguments):
        if found := CONFIG_FLAG.fullmatch(argument):
            given += [(i, found[1]) if found[1] is not None else (i + 1, "".join(arguments[i + 1 : i + 2]))]
    if not given or not given[-1][1] or given[-1][1].startswith("-"):
        named = next((f" Did you mean --config {argument}?" for argument in arguments if find_config(argument)), "")
        raise UserError(f"no --config was given.{named} {advice}")
    if len(given) > 1:
        names = " and ".join(f"--config={value}" for _, value in given)
        raise UserError(f"{names} were given. Allowed: one config, whose keys --config.KEY=VALUE overrides.")
    place, value = given[0]
    name, colon, argument = value.partition(":")  # what follows the colon is an argument of get_config
    path = find_config(name)
    if path is None:
        hint = did_you_mean(Path(name).stem, known)
        raise UserError(
            f"--config={value}: there is no such config or file (current folder: {Path.cwd()}).{hint} {advice}"
        )
    flag = arguments[place].removesuffix(value)
    return [*arguments[:place], f"{flag}{path}{colon}{argument}", *arguments[place + 1 :]], path


def _check_keys(arguments: list[str]) -> None:
    """Refuse overrides of keys that do not exist, all at once."""
    problems = []
    for argument in arguments:
        if not (found := re.match(r"--?(?:no)?config\.([^=]*)", argument)) or (key := found[1]) in KEYS:
            continue
        problems.append(wrong_key(found[0], key))
    if problems:
        raise UserError(" ".join(problems) + " All keys are in --help.")


def _place(error: BaseException, path: Path) -> str:
    """Say in which line of the config file an error began; "" when it did not begin there."""
    cause: BaseException | None = error
    while cause is not None:
        frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if _same(frame.filename, path)]
        line = cause.lineno if isinstance(cause, SyntaxError) and _same(cause.filename, path) else None
        line = frames[-1].lineno if frames else line
        if line is not None:
            return f"{path}, line {line}: {_in_short(cause)} Fix that line, or name another config by --config."
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
        hint = called_here(key[1]) or (f" Did you mean {close[1]}?" if close else "")
        return new_key(key[1]) or f"unknown config key {key[1]}.{hint}"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}".rstrip(".: ") + "."


def _check_config(path: Path, config: Any) -> None:
    """Refuse what get_config() returned when it is not a config of jgpt."""
    from ml_collections import ConfigDict

    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returned {config!r}, and it must return a config. {OWN_CONFIG}")
    found = flatten(config).keys()
    differences = [f"the unknown key {key}" for key in sorted(found - KEYS.keys())]
    differences += [f"no key {key}" for key in sorted(KEYS.keys() - found)]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(f"{path}: get_config() returned a config with {', '.join(differences[:3])}{more}. {OWN_CONFIG}")


def _wrong_value(error: str) -> str:
    """Say what a flag takes instead of the value that absl refused."""
    flag = re.search(r"flag --?((?:no)?[\w.]+)(?:=(.*?))?(?:: |$)", error, re.DOTALL)
    if not flag:
        return f"{error.rstrip('.')}. All flags are in --help."
    name, value = flag[1], flag[2]
    key = name.removeprefix("config.")
    if name.startswith("config.") and key in KEYS:
        kind, default = type(KEYS[key].value).__name__, KEYS[key].value
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
