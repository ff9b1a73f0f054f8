"""A wsd run that is given more steps goes on from before its decay, as if it had them from the start.

In the data path: between the checkpoints and `run.py`, which restores one.
"""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from jgpt.errors import UserError
from jgpt.run_dir.checkpoint import Checkpoints
from jgpt.run_dir.manifest import read_meta
from jgpt.step.optimizer import decay_begins

log = logging.getLogger("jgpt")


def decay_step(optimizer: ConfigDict) -> int | None:
    """Return the step whose checkpoint is kept, because a longer run goes on from it; None for the cosine."""
    return decay_begins(optimizer) if optimizer.schedule == "wsd" else None


def pass_over_decayed(checkpoints: Checkpoints, optimizer: ConfigDict) -> None:
    """Pass over the checkpoints of an earlier decay, where the decay now begins later; say what that means."""
    now = decay_step(optimizer)
    if now is None:
        return
    steps = checkpoints.steps()
    decayed = [step for step in steps if _decay_of(checkpoints.directory, step) < min(step, now)]
    if not decayed:
        return
    if decayed == steps:
        log.warning(
            "the learning rate of this run has fallen already, and no checkpoint from before that is left: it goes on"
            " from step %d, and rises to its peak again", steps[-1],
        )  # fmt: skip
        return
    log.info(
        "more steps: going on from before the learning rate fell. Checkpoints from after that (%s) are deleted when the"
        " next one is saved. To keep the finished model, stop now and copy %s", ", ".join(map(str, decayed)),
        checkpoints.directory / str(decayed[-1]),
    )  # fmt: skip
    checkpoints.pass_over(decayed)


def _decay_of(directory: Path, step: int) -> int:
    """Return the step at which the decay of the schedule began that a checkpoint was trained with; its own where none.

    A checkpoint that cannot be read is judged by whoever restores it.
    """
    try:
        began = read_meta(directory, step).get("decay_begins")
    except UserError:
        return step
    return began if isinstance(began, int) else step
