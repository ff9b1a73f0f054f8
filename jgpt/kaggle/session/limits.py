"""The limits of Kaggle's machine: a session ends after 12 hours (a TPU's after 9), and 20 GB of its folder are kept.

Beside the data path: `jgpt.train` adapts its config to the machine first. On other machines nothing changes.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from jgpt.kaggle.session.machines import this_machine
from jgpt.kaggle.session.paths import on_kaggle, scratch_dir, working_dir
from jgpt.run_dir.disk import bytes_below

LEAST_HOURS = 0.25  # in a session that seems to be older: time for some steps and a checkpoint
KEPT_GB = 19.5  # of the 20 GB, as a filesystem takes a little more than its files hold

log = logging.getLogger("jgpt")


def fit_to_kaggle(config: ConfigDict) -> ConfigDict:
    """Return the config with the limits of Kaggle's machine in keys that were not set; unchanged on other machines.

    `deadline_hours` becomes 11 (on a TPU 8.25) minus the age of the session, and so does the `budget_hours` of a run
    that leaves its steps open. Where the run directory is in the working folder, `checkpoint.disk_gb` becomes 19.5
    minus the size of other files there, and token files go to scratch. Raises UserError for a deadline that comes after
    the end of the session.
    """
    if not on_kaggle():
        return config
    config, machine = config.copy_and_resolve_references(), this_machine()
    machine.check_deadline(config.deadline_hours)
    if not config.deadline_hours:
        age = session_hours()
        config.deadline_hours = round(max(machine.deadline_hours - age, LEAST_HOURS), 2)
        log.info(
            "deadline_hours=%g: Kaggle kills a session after %g hours, this one is %.2f hours old, and the last %g"
            " minutes are for packing and uploading",
            config.deadline_hours, machine.session_hours, age, 60 * (machine.session_hours - machine.deadline_hours),
        )  # fmt: skip
    config = with_budget(config, config.deadline_hours)
    run_dir, working = Path(config.out_dir).expanduser().resolve(), working_dir().resolve()
    if run_dir.is_relative_to(working):
        budget, others = config.checkpoint.disk_gb or KEPT_GB, (bytes_below(working) - bytes_below(run_dir)) / 1e9
        config.checkpoint.disk_gb = max(budget - round(others, 2), 0.01)
        if others >= 0.01:
            log.info("checkpoint.disk_gb=%.2f: other files in %s take %.2f GB", budget - others, working, others)
        config.data.cache_dir = config.data.cache_dir or str(scratch_dir() / "jgpt" / "tokens" / run_dir.name)
    return config.lock()


def with_budget(config: ConfigDict, hours: float) -> ConfigDict:
    """Return a config that leaves its steps open with `hours` for them, where it has none; else unchanged."""
    if config.optimizer.total_steps or config.optimizer.budget_hours:
        return config
    config = config.copy_and_resolve_references()
    config.optimizer.budget_hours = hours
    return config


def session_hours() -> float:
    """Return the age of the session in hours: the age of its oldest process among our parent processes.

    On Kaggle that is the notebook that runs the script or the cell. The container's first process does not count:
    Kaggle may have started it long before the session.
    """
    try:
        return (float(Path("/proc/uptime").read_text().split()[0]) - min(_start_times())) / 3600
    except (OSError, ValueError):  # not Linux
        return 0.0


def _start_times() -> Iterator[float]:
    """Yield the start times of this process, its parent and so on, as long as they belong to the session.

    In seconds after the machine started (man 5 proc).
    """
    pid = os.getpid()
    while pid == os.getpid() or (pid > 1 and b"KAGGLE_KERNEL_RUN_TYPE=" in Path(f"/proc/{pid}/environ").read_bytes()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may have spaces
        yield int(fields[19]) / os.sysconf("SC_CLK_TCK")
        pid = int(fields[1])
