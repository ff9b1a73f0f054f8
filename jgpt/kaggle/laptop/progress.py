"""Read from its outputs how far a run on Kaggle has come, and write the kernel that continues it.

Beside the data path: `resume` and `chain` of `python -m jgpt.kaggle` call it. This machine keeps the kernel that was
pushed; everything else is read from Kaggle each time.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict, config_flags

from jgpt.cli.flags import AUTO
from jgpt.config.length import keep_given_length
from jgpt.errors import UserError
from jgpt.kaggle.laptop.kernel import Kernel, write_folder
from jgpt.kaggle.session.machines import machine_of

if TYPE_CHECKING:
    from jgpt.kaggle.laptop.client import Kaggle

LOOK_BACK = 10  # versions without output, before a run counts as lost
NEXT = "next"  # in the folder of the first push: the folder of the version that continues it


@dataclass(frozen=True)
class Progress:
    """The content of status.json in a version's output."""

    version: int
    state: str  # finished, stopped, failed; running when it was killed
    step: int
    total_steps: int
    reason: str
    trained_hours: float  # of the whole run so far

    def __str__(self) -> str:
        reason = f" ({self.reason.splitlines()[0]})" if self.reason and self.state != "finished" else ""
        return f"version {self.version}: {self.state}{reason} at step {self.step:,} of {self.total_steps:,}"


def last_progress(kaggle: "Kaggle", slug: str, newest: int) -> Progress | None:
    """Return the progress of the newest version that has an output; None when no version has one."""
    for version in range(newest, max(0, newest - LOOK_BACK), -1):
        content = kaggle.read_output(slug, version, "status.json")
        if content is None:
            continue
        try:
            status = json.loads(content)
            values = str(status["state"]), int(status["step"]), int(status["total_steps"]), str(status["reason"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise UserError(
                f"status.json of {slug} version {version} cannot be read. It must be the output of a run that"
                " jgpt pushed. Look at its page; push again, or name another --slug."
            ) from None
        return Progress(version, *values, _trained_hours(kaggle.read_output(slug, version, "metrics.jsonl") or b""))
    return None


def _trained_hours(metrics: bytes) -> float:
    """Return elapsed_seconds of the last whole line of metrics.jsonl, in hours."""
    for line in reversed(metrics.splitlines()):
        try:
            hours = float(json.loads(line)["elapsed_seconds"]) / 3600
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue
        if 0 <= hours < math.inf:  # not NaN: no comparison with it is true
            return hours
    return 0.0


def read_arguments(arguments: Sequence[str]) -> ConfigDict:
    """Return the config that the arguments of a kernel give on this machine."""
    argv = ["jgpt.train", *(AUTO.sub(r"\g<1>0", argument) for argument in arguments)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # ml_collections loads the file by load_module
            values(argv)
            keep_given_length(values.config, config_flags.get_override_values(values["config"]))
            return values.config
    except Exception as error:  # the user's file may raise anything
        raise UserError(
            f"the kernel was pushed with {' '.join(arguments)}, which cannot be read now: {error}. Fix the file, or"
            " name the config again, with its overrides: --config=FILE"
        ) from None


def write_next(base: Kernel, folder: Path, resumes: bool, most_hours: float = math.inf, run_hours: float = 0.0) -> Path:
    """Write the kernel of the next version after `base` into a folder of its own, and return the folder.

    With `resumes`, the output so far is its input, and it fails instead of starting from step 0 when that holds no run.
    The deadline becomes `most_hours` where it is later. A run that leaves its steps open gets `run_hours` for all of
    them, where its config gives no fewer.
    """
    arguments, kernels = list(base.arguments), base.kernels
    if resumes:
        arguments.append("--config.checkpoint.resume=must")
        kernels = kernels if base.slug in kernels else (*kernels, base.slug)
    config = read_arguments(base.arguments)
    if most_hours < (config.deadline_hours or machine_of(base.accelerator).deadline_hours):
        arguments.append(f"--config.deadline_hours={most_hours:.2f}")
    if run_hours and not config.optimizer.total_steps:
        hours = min(run_hours, config.optimizer.budget_hours or run_hours)
        arguments.append(f"--config.optimizer.budget_hours={hours:.2f}")
    write_folder(replace(base, arguments=tuple(arguments), kernels=kernels), folder / NEXT)
    return folder / NEXT


def is_finished(base: Kernel, progress: Progress) -> bool:
    """Tell whether a run has done all steps that its config asks for."""
    return progress.state == "finished" and read_arguments(base.arguments).optimizer.total_steps <= progress.step
