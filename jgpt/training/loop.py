"""The loop: a run in, the same run trained. What a step is, and what is done every so many steps, in this order.

In the data path: it dispatches a step and, while the devices are busy with it, looks at the numbers of the step before.
"""

import logging
import time

import jax

from jgpt.data.prefetch import Prefetcher
from jgpt.errors import UserError
from jgpt.parallel.hosts import Agreement, is_first
from jgpt.report.curves import LivePicture, write_curves
from jgpt.report.page import write_report
from jgpt.run_dir.checkpoint import SAVE_BYTES_PER_SECOND
from jgpt.step.train_step import Numbers
from jgpt.training.hooks.evaluate import evaluate_run, evaluation_due
from jgpt.training.hooks.health import Health
from jgpt.training.hooks.log import Log
from jgpt.training.hooks.sample import sample, sample_due
from jgpt.training.hooks.save import Save
from jgpt.training.run import Run
from jgpt.training.stop import Stop
from jgpt.waiting import waiting
from jgpt.wording import format_duration

SAVE = "save"  # what process 0 asks for when its clock says so
EXIT_SECONDS = 10.0  # what leaving takes beside the save: samples, plots, the interpreter's end

log = logging.getLogger("jgpt")


def loop(run: Run, metrics: Log, save: Save, health: Health, stop: Stop) -> None:
    """Train to the end, or until there is a reason to stop; save, draw, and say how the run ended."""
    if run.is_done:
        log.info(
            "this run is done: step %d of %d. To go on, raise --config.optimizer.total_steps", run.step, run.total_steps
        )
        return finish(run, save)
    _say_deadline(run, save)
    if run.step == 0:
        with waiting("compiling the evaluation"):
            first = evaluate_run(run)
        metrics.write(run, {"step": 0, "tokens": 0} | first)
    log.info("compiling the step")
    reason, unread = "", None  # the step whose numbers are not read yet
    first_step, longest, began = run.step + 1, 0.0, time.monotonic()
    agree, picture = Agreement(run.parts.strategy.devices), LivePicture()
    with Prefetcher(run.batch, run.step) as batches:
        while not run.is_done and not reason:
            if run.step + 1 == first_step:
                with waiting("compiling the step"):
                    numbers = run.advance(batches.next(run.step))
                    jax.block_until_ready(numbers)
                metrics.restart(run)
            else:
                numbers = run.advance(batches.next(run.step))
            if unread is not None:
                _check_health(run, save, health, *unread)  # while the devices are busy with the step just dispatched
            unread = run.step, numbers
            if run.step > first_step:
                longest = max(longest, time.monotonic() - began)  # of a step and what was done before it
            began = time.monotonic()
            wish = stop.reason(agree.steps * longest + save.seconds() + EXIT_SECONDS)
            asked = agree(wish or (SAVE if save.due_by_clock(run) else ""))
            reason = "" if asked == SAVE else asked

            reports, saves = metrics.due(run) or evaluation_due(run), bool(asked) or save.due(run)
            if reports or saves:
                if lost := run.status.why_lost():
                    raise UserError(lost)
                _check_health(run, save, health, *unread)
                unread = None
            if reports:
                _report(run, metrics, numbers, picture)
            with metrics.paused():
                if sample_due(run):
                    sample(run)
                if saves:
                    save(run, leaving=bool(reason))
                    agree.forget()
    finish(run, save, "" if run.is_done else reason)


def _check_health(run: Run, save: Save, health: Health, step: int, numbers: Numbers) -> None:
    """Raise TrainingDiverged where `step` was the last of too many in a row that were skipped or exploded."""
    trouble = health.read(run, step, numbers)
    if trouble:
        raise save.diverged(trouble)


def _report(run: Run, metrics: Log, numbers: Numbers, picture: LivePicture) -> None:
    """Report the numbers of this step, evaluated where that is due; draw the curves behind an evaluation."""
    record, eta_seconds = metrics.measure(run, numbers)
    evaluates = evaluation_due(run)
    if evaluates:
        with metrics.paused():
            record |= evaluate_run(run)
    metrics.write(run, record, eta_seconds)
    if evaluates:
        with metrics.paused():
            if is_first():
                picture.write(run.run_dir)


def finish(run: Run, save: Save, reason: str = "") -> None:
    """Save, draw, and say how the run ended and how it goes on; `reason` is why it stops before its end.

    Raises TrainingDiverged where the run is at its end, and its last step is not good enough to be saved.
    """
    save(run, leaving=True)
    save.wait()
    if not reason and not save.saved(run):
        raise save.diverged(f"training has diverged at the last step, {run.step}, which is not saved.")
    run.status.write("stopped" if reason else "finished", reason or "all steps are done")
    if is_first():
        write_curves(run.run_dir)
        write_report(run.run_dir)
    if reason:
        command = run.status.command
        log.info("stopped at step %d of %d: %s. To go on:\n  %s", run.step, run.total_steps, reason, command)
    else:
        log.info(
            "finished: %s\nThe whole run on one page: %s\nTo try the model:\n  %s",
            run.run_dir, run.run_dir / "report.html", run.status.try_command,
        )  # fmt: skip


def _say_deadline(run: Run, save: Save) -> None:
    if run.config.deadline_hours:
        log.info(
            "deadline: this will stop within %s, %s of them for saving (%.2f GB at %.0f MB/s, until a save was timed)",
            format_duration(run.config.deadline_hours * 3600), format_duration(save.seconds()),
            save.state_bytes / 1e9, SAVE_BYTES_PER_SECOND / 1e6,
        )  # fmt: skip
