"""After every step: has training diverged?

In the data path: beside the step. The numbers are those of the step before, read while the devices are busy.
"""

from jgpt.errors import TrainingDiverged
from jgpt.step.train_step import Numbers
from jgpt.training.run import Run

MAX_SKIPPED_IN_A_ROW = 50  # steps whose gradient is not finite: after so many, a smaller loss scale will not help


def check_health(run: Run, step: int, numbers: Numbers) -> None:
    """Raise TrainingDiverged where `step` was the last of too many skipped ones in a row."""
    values = run.parts.strategy.on_host(numbers)
    in_a_row = int(values["skipped_in_a_row"])
    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingDiverged(
            f"the gradient was not finite in {in_a_row} steps in a row, up to step {step} (loss {values['loss']:g},"
            f" loss scale {values['loss_scale']:g}): training has diverged. No parameter was changed by them, and"
            " the last checkpoint is good. Try a lower --config.optimizer.learning_rate, more warmup_steps, or"
            " --config.precision.compute=fp32."
        )
