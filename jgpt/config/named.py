"""A config for the API: by its name or its file, with other values for some of its keys.

Beside the data path: what `--config NAME --config.KEY=VALUE` is on the command line (`cli/flags.py`).
"""

import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jgpt.config.defaults import AUTO_KEYS, KEYS
from jgpt.config.files import config_files, find_config
from jgpt.config.length import keep_given_length
from jgpt.config.other_names import wrong_key
from jgpt.errors import UserError
from jgpt.wording import did_you_mean


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


def changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Return a copy of a config with other values for some keys; raise one UserError with all mistakes in them."""
    config, problems = config.copy_and_resolve_references(), []
    for key, value in changes.items():
        if key not in KEYS:
            problems.append(wrong_key(repr(key), key))
            continue
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        try:
            config.update_from_flattened_dict({key: 0 if key in AUTO_KEYS and value == "auto" else value})
        except TypeError:
            kind = type(KEYS[key].value).__name__
            problems.append(f"{key}={value!r} is of the type {type(value).__name__}. Allowed: {kind}.")
    if problems:
        raise UserError(" ".join(problems) + " All keys are in docs/configuration.md.")
    keep_given_length(config, changes)
    return config
