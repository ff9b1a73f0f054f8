"""A config for the API: other values for its keys, and what is said of a key that cannot be set."""

from pathlib import Path

import pytest

from jgpt.config.defaults import default_config
from jgpt.config.named import changed
from jgpt.errors import UserError


def test_a_path_is_the_text_of_it():
    assert changed(default_config(), {"out_dir": Path("runs") / "mine"}).out_dir == "runs/mine"
    with pytest.raises(UserError, match="seed=.1. is of the type str. Allowed: int"):
        changed(default_config(), {"seed": Path("1")})


def test_a_group_is_no_key():
    with pytest.raises(UserError, match="'optimizer' is a group of keys: kind, .*Did you mean optimizer.kind"):
        changed(default_config(), {"optimizer": "adam"})
