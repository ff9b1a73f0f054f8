"""How a run stands: status.json, and what to say when it fails.

In the data path: beside the loop, from the first state to the end.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ml_collections import ConfigDict

from jgpt.errors import OutOfMemory, UserError, is_disk_full, storage_trouble
from jgpt.hardware.memory import shortage
from jgpt.parallel.build import Parts
from jgpt.parallel.hosts import is_first, own_devices
from jgpt.planning.remedies import PLACING, TRAINING, explain
from jgpt.run_dir.identity import why_lost
from jgpt.run_dir.status_file import write_status


class Status:
    """The step of a run, what it is doing, and status.json, which says so to whoever looks in from outside."""

    def __init__(self, run_dir: Path, total_steps: int, command: str, try_command: str = "") -> None:
        """`command` is what makes the run go on, `try_command` what tries its model."""
        self.run_dir, self.total_steps, self.command, self.try_command = run_dir, total_steps, command, try_command
        self.step = 0
        self.activity = PLACING  # for the message when memory runs out
        self._began = False  # the run directory is this run's

    def write(self, state: str, reason: str = "") -> None:
        """Write status.json, in process 0; `state` is running, finished, stopped or failed."""
        if not is_first():
            return
        self._began = True
        write_status(
            self.run_dir,
            state,
            step=self.step,
            total_steps=self.total_steps,
            reason=reason,
            command=self.command,
            try_command=self.try_command,
        )

    def why_lost(self) -> str:
        """Say why nothing may be written into the run directory any more, in process 0 of a run that trains; or ""."""
        return why_lost(self.run_dir) if self._began else ""

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Say what is done in this block; training goes on behind it."""
        self.activity = activity
        yield
        self.activity = TRAINING


def explain_shortage(error: BaseException, status: Status, activity: str, config: ConfigDict, parts: Parts) -> str:
    """Say what did not fit in memory, and what would; "" where an error has another reason."""
    lacking = shortage(error, own_devices(parts.strategy.devices)[0])
    on_host = isinstance(error, MemoryError)
    return lacking and explain(lacking, activity, on_host, config, parts, status.command)


@contextmanager
def failures_explained(status: Status, config: ConfigDict, parts: Parts) -> Iterator[None]:
    """Write a failure of this block to status.json, and turn one of memory into OutOfMemory with what to change."""
    try:
        yield
    except BaseException as error:
        message = explain_shortage(error, status, status.activity, config, parts)
        shown = OutOfMemory(message) if message else error
        if is_disk_full(error):
            shown = UserError(storage_trouble(error))
        if isinstance(error, OSError | UserError) and (lost := status.why_lost()):
            raise UserError(lost) from error  # and no word into what may be another run's
        first_line = (str(shown).splitlines() or [""])[0]
        with suppress(OSError):  # on a full disk: what went wrong first is what the user must see
            status.write("failed", f"{type(shown).__name__}: {first_line}")
        if shown is error:
            raise
        raise shown from error
