"""Every `checkpoint.every_steps`, every `checkpoint.every_minutes`, and at the end: a checkpoint of a good step.

In the data path: from the state to the run directory. What a good step is: see `health.py`. Where the step that is due
is not good, the next good one is saved.
"""

import logging
import time
from itertools import islice
from typing import Any

import jax
import numpy as np

from jgpt.data.batches import Batch
from jgpt.errors import TrainingDiverged, UserError
from jgpt.parallel.hosts import is_first
from jgpt.planning.remedies import SAVING
from jgpt.run_dir.checkpoint import Checkpoints
from jgpt.run_dir.manifest import read_meta
from jgpt.step.state import tree_bytes
from jgpt.training.extend import decay_step
from jgpt.training.hooks.evaluate import loss_on
from jgpt.training.hooks.health import Health, out_of_range
from jgpt.training.run import Run

TRIED_SEQUENCES = 64  # of the next batch at most: the loss of what is about to be saved

log = logging.getLogger("jgpt")


class Save:
    """When the next checkpoint is due, whether the step is good enough for one, and what goes into it."""

    def __init__(self, run: Run, checkpoints: Checkpoints, health: Health) -> None:
        self._checkpoints, self._health = checkpoints, health
        self._decay_step = decay_step(run.config.optimizer)
        self.state_bytes = tree_bytes(run.state)
        self._last_step = run.step if run.resumed else -1
        self._last_time = time.monotonic()
        self._postponed = False  # a save is due since a step that was not good
        self._tried = -1, ""  # the step whose parameters were tried last, and what was wrong with their loss

    def due(self, run: Run) -> bool:
        """Tell whether a checkpoint is due by the number of steps, or because one before was not good."""
        planned = run.is_done or run.step % run.config.checkpoint.every_steps == 0 or run.step == self._decay_step
        return self._postponed or planned

    def due_by_clock(self, run: Run) -> bool:
        """Tell whether a checkpoint is due by the clock of process 0."""
        minutes = run.config.checkpoint.every_minutes
        return is_first() and minutes > 0 and time.monotonic() - self._last_time >= minutes * 60

    def seconds(self) -> float:
        """Return what stopping takes: the save that may be under way, and the last one."""
        return 2 * self._checkpoints.expected_seconds(self.state_bytes)

    def __call__(self, run: Run, leaving: bool = False) -> None:
        """Begin to save the state of this step, if it is good and not saved yet; training goes on meanwhile.

        `leaving`: this is the last chance, see `_trouble`. Raises TrainingDiverged as `_trouble` does.
        """
        if self._last_step == run.step:
            return
        if trouble := self._trouble(run, leaving):
            if not self._postponed or leaving:
                log.warning("step %d is not saved: %s. %s", run.step, trouble, self.newest())
            self._postponed = True
            return
        with run.status.during(SAVING):
            self._checkpoints.save(run.parts.strategy.to_save(run.state), self._meta(run))
        self._last_step, self._last_time, self._postponed = run.step, time.monotonic(), False
        run.status.write("running")

    def _trouble(self, run: Run, leaving: bool) -> str:
        """Say why the state of this step is not good enough to be saved, or "".

        When `leaving`, a step counts that was skipped (it changed no parameter), and no batch is tried: there may be no
        time. Raises TrainingDiverged where a parameter or a moment is out of range: no later step brings it back.
        """
        trouble = self._health.exploding or (self._health.skipped if not leaving else "")
        if trouble:
            return trouble
        wrong = out_of_range(*run.parts.strategy.to_inspect((run.state.params, run.state.opt_state)))
        if wrong:
            raise self.diverged(f"{wrong} at step {run.step}, and is not saved: training has diverged.")
        if not leaving:
            self._tried = run.step, self._health.too_high(self._try(run))
        return self._tried[1] if self._tried[0] == run.step else ""

    def _meta(self, run: Run) -> dict[str, Any]:
        """Return what a checkpoint carries beside the state, as JSON."""
        return {
            "step": run.step,
            "tokens": run.tokens,
            "elapsed_seconds": run.elapsed_seconds,
            "loss": self._health.loss,
            "lowest_loss": self._health.lowest_loss,
            "val_loss": run.val_loss,
            "train_sha256": run.data.meta["train_sha256"],
            "tokenizer_sha256": run.data.tokenizer.sha256,
            "devices": len(run.parts.strategy.devices),
            "scales_loss": run.parts.policy.scales_loss,
            "base": run.base,
            "stop_ids": list(run.stop_ids),
            "decay_begins": self._decay_step,
        }

    def saved(self, run: Run) -> bool:
        """Tell whether this very step is saved."""
        return self._last_step == run.step

    def wait(self) -> None:
        """Wait until what was saved is whole on disk."""
        self._checkpoints.wait()

    def newest(self) -> str:
        """Say which checkpoint is the newest, and how good it was; waits for the save under way."""
        self.wait()
        steps = self._checkpoints.steps()
        if not steps:
            return "No checkpoint was saved."
        try:
            loss = read_meta(self._checkpoints.directory, steps[-1]).get("loss")
        except UserError:
            loss = None
        quality = "" if loss is None else f", all of it finite, with the loss {loss:.4g}"
        return f"The newest checkpoint is that of step {steps[-1]}{quality}. The same command goes on from it."

    def diverged(self, reason: str) -> TrainingDiverged:
        """Return the error that ends a run, with the newest checkpoint and what to try."""
        return TrainingDiverged(
            f"{reason} {self.newest()} Try a lower --config.optimizer.learning_rate or weight_decay, more"
            " warmup_steps, or --config.precision.compute=fp32."
        )

    def _try(self, run: Run) -> float:
        """Return the loss of the present parameters on the beginning of the next batch.

        The loss of a step is that before its update, which says nothing of what is saved.
        """
        batch = run.batches.batch(run.step)
        sequences = (jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(batch.tokens)))
        learned = (block for block in sequences if block.weights is None or block.weights.any())
        return loss_on(run, [_unweighted(block) for block in islice(learned, TRIED_SEQUENCES)])


def _unweighted(block: Batch) -> Batch:
    """Return a sequence whose learned targets have the weight 1, as `evaluate` takes them."""
    return block if block.weights is None else block._replace(weights=(block.weights > 0).astype(np.float32))
