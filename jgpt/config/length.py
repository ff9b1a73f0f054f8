"""The length of a run: in steps, or in hours and epochs. What a user sets replaces the other kind that a config has.

Beside the data path: the command line and the API ask when they change a config.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ml_collections import ConfigDict

STEPS, BUDGETS = "total_steps", ("budget_hours", "budget_epochs")

log = logging.getLogger("jgpt")


def keep_given_length(config: ConfigDict, given: Collection[str]) -> None:
    """Clear the length that a config has of its own where the `given` keys have one of the other kind, and say so.

    Where both kinds are given, or none, nothing changes: the checks of the config report it.

    >>> from jgpt.config import default_config
    >>> config = default_config()
    >>> config.optimizer.budget_epochs = 3.0
    >>> keep_given_length(config, ["optimizer.budget_epochs"])
    >>> config.optimizer.total_steps
    0
    """
    o = config.optimizer
    steps = f"optimizer.{STEPS}" in given and o[STEPS]
    budgets = [name for name in BUDGETS if f"optimizer.{name}" in given and o[name]]
    if steps and not budgets:
        others = [name for name in BUDGETS if o[name]]
    elif budgets and f"optimizer.{STEPS}" not in given and o[STEPS]:
        others = [STEPS]
    else:
        return
    if others:
        kept = [STEPS] if steps else budgets
        log.info(
            "%s in the place of the config's %s", " and ".join(f"optimizer.{name}={o[name]:g}" for name in kept),
            " and ".join(f"{name}={o[name]:g}" for name in others),
        )  # fmt: skip
    for name in others:
        o[name] = type(o[name])(0)
