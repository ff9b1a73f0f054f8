"""One training run in several sessions on Kaggle: push, wait, push the next one, until it is done or out of hours.

Beside the data path: the verb `chain` of `python -m jgpt.kaggle`. It keeps no state of its own, and reads all from
Kaggle and from the kernel's folder. So it can be interrupted: started again, it waits for the session that runs.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jgpt.cli.terminal import write
from jgpt.errors import UserError
from jgpt.kaggle.laptop.answers import Status
from jgpt.kaggle.laptop.kernel import Kernel
from jgpt.kaggle.laptop.progress import Progress, is_finished, last_progress, write_next
from jgpt.kaggle.session.machines import machine_of

if TYPE_CHECKING:
    from jgpt.kaggle.laptop.client import Kaggle

LEAST_HOURS = 0.5  # a shorter session is not worth the minutes that its start and end take
SPARE_HOURS = 0.25  # of quota beside the training: Kaggle counts a session's first and last minutes too
LAST_LINES = 20  # of the log of a run that failed


@dataclass
class Chain:
    """A run, the kernel that started it, and how long it may train."""

    kaggle: "Kaggle"
    base: Kernel
    folder: Path
    hours: float  # of training, in all sessions together
    poll_seconds: float

    def run(self) -> None:
        """Push and wait until the steps are done, or the hours or the week's quota are used up.

        Raises UserError, with the reason and the end of the log, when a session failed.
        """
        version, before = self.kaggle.newest_version(self.base.slug), None
        while True:
            if version:
                ended_before = self.kaggle.status(self.base.slug, version).ended
                status = wait_for_end(self.kaggle, self.base.slug, version, self.poll_seconds)
                self.check_session(version, status, ended_before)
                progress = last_progress(self.kaggle, self.base.slug, version)
                self.report(version, progress)
                if progress is not None and is_finished(self.base, progress):
                    say(f"finished. To have the model here: python -m jgpt.kaggle pull --slug {self.base.slug}")
                    return
                self.check_run(version, progress, before, may_be_lost=ended_before and status.state != "COMPLETE")
                before = progress
            left = self.hours_left(before)
            if left is None:
                return
            version = self.push(before, left)

    def push(self, progress: Progress | None, hours: float) -> int:
        """Push the next version and return its number."""
        resumes = progress is not None and progress.step > 0
        folder = write_next(self.base, self.folder, resumes, hours, self.hours_for_steps())
        pushed = self.kaggle.push(self.base.slug, folder)
        where = f"continues from step {progress.step:,}" if progress and resumes else "starts from step 0"
        say(f"version {pushed.version}: pushed, {where}. {pushed.url}")
        for note in pushed.notes:
            say(note)
        return pushed.version

    def report(self, version: int, progress: Progress | None) -> None:
        """Print how far a version came."""
        if progress is None:
            say(f"version {version} left no output, and no version before it did")
        elif progress.version < version:
            say(f"version {version} left no output: going back to {progress}")
        else:
            say(str(progress))

    def hours_left(self, progress: Progress | None) -> float | None:
        """Return the hours that the next session may train. Print why and return None when there are too few."""
        trained = progress.trained_hours if progress else 0.0
        left = self.hours - trained
        if left < LEAST_HOURS:
            say(f"stopping here: {trained:.1f} of --hours={self.hours:g} are trained. To train longer, raise --hours")
            return None
        machine = machine_of(self.base.accelerator)
        quota = self.kaggle.quota(machine.unit) if self.base.accelerator else None
        if quota is None:
            return left
        if quota.left < LEAST_HOURS + SPARE_HOURS:
            say(f"stopping here. {machine.unit} hours: {quota}. Then repeat the same command")
            return None
        return min(left, quota.left - SPARE_HOURS)

    def hours_for_steps(self) -> float:
        """Return the hours that sessions can use: the last one is not pushed where it would be too short."""
        longest = machine_of(self.base.accelerator).deadline_hours
        last = self.hours % longest
        return self.hours - last if self.hours > longest and last < LEAST_HOURS else self.hours

    def check_session(self, version: int, status: Status, ended_before: bool) -> None:
        """Raise UserError when a session failed, or when someone cancelled it while we waited."""
        if status.state == "ERROR":
            raise UserError(self.failure(version, f"Kaggle says: {status.message or 'no reason'}"))
        timed_out = "exceeded" in status.message  # "... exceeded the max allowed execution duration"
        if status.state == "CANCEL_ACKNOWLEDGED" and not ended_before and not timed_out:
            raise UserError(
                f"version {version} of {self.base.slug} was cancelled, so the chain ends. To continue from its"
                " output, repeat the same command."
            )

    def check_run(self, version: int, progress: Progress | None, before: Progress | None, may_be_lost: bool) -> None:
        """Raise UserError when another session would fail in the same way, or make no progress."""
        if progress is None and not may_be_lost:  # it may cost twelve hours again: the user decides
            raise UserError(self.failure(version, "it left no status.json"))
        if progress is None:
            return
        if progress.version == version and progress.state == "failed":
            raise UserError(self.failure(version, progress.reason))
        if before is not None and progress.step <= before.step:
            raise UserError(self.failure(version, f"it came no further than step {before.step:,}, where it started"))

    def failure(self, version: int, reason: str) -> str:
        """Return an error's text: the reason, the end of the log, and what to do."""
        tail = self.kaggle.log_lines(self.base.slug, version)[-LAST_LINES:]
        shown = "".join(f"\n    {line}" for line in tail) or "\n    (empty)"
        return (
            f"version {version} of {self.base.slug} failed: {reason.strip()}\nThe end of its log:{shown}\nFix what it"
            f" names. Then: python -m jgpt.kaggle resume --slug {self.base.slug} (with --config and overrides, if they"
            " changed), and start the chain again."
        )


def wait_for_end(kaggle: "Kaggle", slug: str, version: int, poll_seconds: float) -> Status:
    """Ask for the status of a version until its session has ended; print each change."""
    before = ""
    while True:
        status = kaggle.status(slug, version)
        if status.state != before:
            say(f"version {version}: {status.state}" + (f" ({status.message})" if status.message else ""))
        if status.ended:
            return status
        before = status.state
        time.sleep(poll_seconds)


def say(line: str) -> None:
    """Print a line with the time of day."""
    write(f"{time.strftime('%H:%M')}  {line}\n")
