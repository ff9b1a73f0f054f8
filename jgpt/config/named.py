"""A config for the API: by its name or its file, with other values for some of its keys.

Beside the data path: what `--config NAME --config.KEY=VALUE` is on the command line (`cli/flags.py`).
"""

import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jgpt.config.defaults import AUTO_KEYS, KEYS
from jgpt.config.files import config_files, find_config
from jgpt.config.length import keep_given_length
from jgpt.config.other_names import wrong_key
from jgpt.errors import UserError
from jgpt.wording import did_you_mean


def check_arguments(config: Any, changes: Any, on_record: Any) -> None:
    """Raise UserError where an argument of `jgpt.train` is of another type: what it may be is said before any work."""
    if not isinstance(config, ConfigDict | str | os.PathLike):
        raise UserError(
            f"the config is of the type {type(config).__name__}. Allowed: the name of a config, the path of a config"
            ' file, or what its get_config() returns. Settings come second: jgpt.train("base", {"seed": 2})'
        )
    if not isinstance(changes, Mapping | None):
        raise UserError(
            f"the changes are {str(changes)[:60]!r}, of the type {type(changes).__name__}. Allowed: a dict of keys and"
            ' values, such as {"optimizer.total_steps": 100}.'
        )
    if on_record is not None and not callable(on_record):
        raise UserError(f"on_record={str(on_record)[:60]!r}. Allowed: a function that takes a record, a dict.")


def config_named(name: str) -> ConfigDict:
    """Return the config that get_config() of a file returns; `name` is one of ours, or a path. Raises UserError."""
    path = find_config(name)
    if path is None:
        raise UserError(
            f"there is no config {name!r}.{did_you_mean(Path(name).stem, config_files())} Allowed:"
            f" {', '.join(config_files())}, or the path of a file with get_config(). Correct the name."
        )
    make = runpy.run_path(str(path)).get("get_config")
    config = make() if callable(make) else None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path} has no get_config() that returns a config. Write one as in our configs, such as base.")
    return config


def plain(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return changes with paths as texts, and numbers of NumPy as Python's: what a user could type, too."""
    found = {}
    for key, value in changes.items():
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        found[key] = value.item() if isinstance(value, np.generic) else value
    return found


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of a config with other values for some keys; raise one UserError with all mistakes in them."""
    config, problems = config.copy_and_resolve_references(), []
    for key, value in plain(changes).items():
        if key not in KEYS:
            problems.append(wrong_key(repr(key), str(key)))
            continue
        try:
            config.update_from_flattened_dict({key: 0 if key in AUTO_KEYS and value == "auto" else value})
        except (TypeError, OverflowError):
            kind = type(KEYS[key].value).__name__
            problems.append(f"{key}={value!r} is of the type {type(value).__name__}. Allowed: {kind}.")
    if problems:
        raise UserError(" ".join(problems) + " All keys are in docs/configuration.md.")
    keep_given_length(config, changes)
    return config
