"""Every `checkpoint.every_steps`, every `checkpoint.every_minutes`, and at the end: a checkpoint.

In the data path: from the state to the run directory.
"""

import time

from jgpt.planning.remedies import SAVING
from jgpt.run_dir.checkpoint import Checkpoints
from jgpt.step.state import tree_bytes
from jgpt.training.extend import decay_step
from jgpt.training.run import Run


class Save:
    """When the next checkpoint is due, and what goes into it."""

    def __init__(self, run: Run, checkpoints: Checkpoints) -> None:
        self._checkpoints, self._decay_step = checkpoints, decay_step(run.config.optimizer)
        self.state_bytes = tree_bytes(run.state)
        self._last_step = run.step if run.resumed else -1
        self._last_time = time.monotonic()

    def due(self, run: Run) -> bool:
        """Tell whether a checkpoint is due, by steps or by the clock."""
        c = run.config.checkpoint
        by_clock = c.every_minutes > 0 and time.monotonic() - self._last_time >= c.every_minutes * 60
        return run.is_done or run.step % c.every_steps == 0 or run.step == self._decay_step or by_clock

    def seconds(self) -> float:
        """Return what stopping takes: the save that may be under way, and the last one."""
        return 2 * self._checkpoints.expected_seconds(self.state_bytes)

    def __call__(self, run: Run) -> None:
        """Begin to save the state of this step, if it is not saved yet; training goes on meanwhile."""
        if self._last_step == run.step:
            return
        with run.status.during(SAVING):
            self._checkpoints.save(
                run.parts.strategy.to_save(run.state),
                {
                    "step": run.step,
                    "tokens": run.tokens,
                    "elapsed_seconds": run.elapsed_seconds,
                    "val_loss": run.val_loss,
                    "train_sha256": run.data.meta["train_sha256"],
                    "devices": len(run.parts.strategy.devices),
                    "scales_loss": run.parts.policy.scales_loss,
                    "base": run.base,
                    "stop_ids": list(run.stop_ids),
                    "decay_begins": self._decay_step,
                },
            )
        self._last_step, self._last_time = run.step, time.monotonic()
        run.status.write("running")

    def wait(self) -> None:
        """Wait until what was saved is whole on disk."""
        self._checkpoints.wait()
