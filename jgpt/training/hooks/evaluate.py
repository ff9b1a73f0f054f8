"""Every `eval.every_steps` and at the end: the loss on held-out text.

In the data path: beside the step, on the same devices.
"""

from jgpt.data.batches import Batch
from jgpt.parallel.evaluation import bits_per_byte
from jgpt.planning.remedies import EVALUATING
from jgpt.training.run import Run


def evaluation_due(run: Run) -> bool:
    """Tell whether this step is evaluated."""
    return run.is_done or run.step % run.config.eval.every_steps == 0


def evaluate_run(run: Run) -> dict[str, float]:
    """Return the loss on the validation blocks in nats per token, and in bits per byte."""
    run.val_loss, data = loss_on(run, run.val_blocks), run.data
    return {
        "val_loss": run.val_loss,
        "bits_per_byte": bits_per_byte(run.val_loss, data.val_targets, data.meta["val_bytes"]),
    }


def loss_on(run: Run, blocks: list[Batch]) -> float:
    """Return the loss of the present parameters on single sequences, in nats per token."""
    with run.status.during(EVALUATING):
        return run.parts.evaluate(run.state.params, run.frozen, blocks)
