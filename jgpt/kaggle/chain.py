"""One training run across as many sessions on Kaggle as it takes: push, wait, go on, until done or out of hours.

Beside the data path: the verb `chain` of `python -m jgpt.kaggle`. All that it knows it reads from Kaggle and from the
kernel's folder, each time: interrupted and started again, it finds the session that runs and waits on.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jgpt.errors import UserError
from jgpt.kaggle.kernel import Kernel
from jgpt.kaggle.progress import Progress, is_finished, last_progress, write_next

if TYPE_CHECKING:
    from jgpt.kaggle.client import Kaggle, Status

LEAST_HOURS = 0.5  # less is not worth the minutes that a session takes to begin and to end
SPARE_HOURS = 0.25  # what the quota has to hold beside the training: Kaggle counts a session's first and last minutes
LAST_LINES = 20  # of the log of a run that failed


@dataclass
class Chain:
    """A run, the kernel that began it, and how long to go on."""

    kaggle: "Kaggle"
    base: Kernel
    folder: Path
    hours: float  # of training, in all sessions together
    poll_seconds: float

    def run(self) -> None:
        """Go on until the steps are done, or the hours or the week's quota are spent.

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
        goes_on = progress is not None and progress.step > 0
        folder = write_next(self.base, self.folder, goes_on, hours)
        pushed = self.kaggle.push(self.base.slug, folder)
        where = f"goes on from step {progress.step:,}" if progress and goes_on else "begins"
        say(f"version {pushed.version}: pushed, {where}. {pushed.url}")
        for note in pushed.notes:
            say(note)
        return pushed.version

    def report(self, version: int, progress: Progress | None) -> None:
        """Say what a version came to."""
        if progress is None:
            say(f"version {version} left no output, nor did one before it")
        elif progress.version < version:
            say(f"version {version} left no output: going back to {progress}")
        else:
            say(str(progress))

    def hours_left(self, progress: Progress | None) -> float | None:
        """Return the hours that the next session may train; None, and say why, when there are too few."""
        trained = progress.trained_hours if progress else 0.0
        left = self.hours - trained
        if left < LEAST_HOURS:
            say(
                f"stopping here: {trained:.1f} of --hours={self.hours:g} are trained. More: the command with more hours"
            )
            return None
        quota = self.kaggle.quota() if self.base.accelerator else None
        if quota is None:
            return left
        if quota.left < LEAST_HOURS + SPARE_HOURS:
            say(f"stopping here. GPU hours: {quota}. Then the same command goes on")
            return None
        return min(left, quota.left - SPARE_HOURS)

    def check_session(self, version: int, status: "Status", ended_before: bool) -> None:
        """Raise UserError when a session failed, or when someone cancelled it while it was waited for."""
        if status.state == "ERROR":
            raise UserError(self.failure(version, f"Kaggle says: {status.message or 'no reason'}"))
        timed_out = "exceeded" in status.message  # "... exceeded the max allowed execution duration"
        if status.state == "CANCEL_ACKNOWLEDGED" and not ended_before and not timed_out:
            raise UserError(
                f"version {version} of {self.base.slug} was cancelled. The chain ends with it; to go on from what it"
                " left, start the same command again."
            )

    def check_run(self, version: int, progress: Progress | None, before: Progress | None, may_be_lost: bool) -> None:
        """Raise UserError when another session would fail in the same way, or lead nowhere."""
        if progress is None and not may_be_lost:  # twelve hours for nothing: not again before someone has looked
            raise UserError(self.failure(version, "it left no status.json"))
        if progress is None:
            return
        if progress.version == version and progress.state == "failed":
            raise UserError(self.failure(version, progress.reason))
        if before is not None and progress.step <= before.step:
            raise UserError(self.failure(version, f"it came no further than step {before.step:,}, where it began"))

    def failure(self, version: int, reason: str) -> str:
        """Return an error's text: the reason, the end of the log, and what to do."""
        tail = self.kaggle.log_lines(self.base.slug, version)[-LAST_LINES:]
        shown = "".join(f"\n    {line}" for line in tail) or "\n    (empty)"
        return (
            f"version {version} of {self.base.slug} failed: {reason.strip()}\nThe end of its log:{shown}\nMend what it"
            f" names. Then: python -m jgpt.kaggle resume --slug {self.base.slug} (with --config and overrides, if they"
            " changed), and the chain again."
        )


def wait_for_end(kaggle: "Kaggle", slug: str, version: int, poll_seconds: float) -> "Status":
    """Ask for the status of a version until its session has ended; say each change."""
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
    print(f"{time.strftime('%H:%M')}  {line}", flush=True)
