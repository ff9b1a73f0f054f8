"""After every step: is training sound, or has it diverged? Whether a step may be saved follows from that.

In the data path: beside the step. The numbers are those of the step before, read while the devices are busy.

A step is **good** when
- its gradient is finite, and so are all moments, and all parameters in fp16 (none is above 65504);
- its loss is at most `MARGIN` nats above the lowest of the last `WINDOW` steps, and not as high as a guess among all
  tokens gives (ln V), unless that is less than `NOISE` above the lowest.
Only good steps are saved (`save.py`), so that a run that diverges keeps the checkpoints from before. After
`MAX_IN_A_ROW` steps in a row that are not good, it is given up.
"""

import math
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp

from jgpt.step.train_step import Numbers
from jgpt.training.run import Run

MARGIN = 3.0  # nats: a perplexity 20 times as high
NOISE = 1.0  # nats by which small batches of the same text differ
WINDOW = 100  # steps; more than MAX_IN_A_ROW, so that the lowest loss is from before
LARGEST = float(jnp.finfo(jnp.float16).max)  # of a parameter: a T4 computes in fp16, and could not load the model
FINITE = float(jnp.finfo(jnp.float32).max)
MAX_IN_A_ROW = 50  # steps: a smaller loss scale and the next batches will not help


class Health:
    """The losses of the last steps, and what they say."""

    def __init__(self, vocab_size: int, lowest_loss: float | None = None) -> None:
        """`lowest_loss` is that of the last steps before this process, where the text is still the same."""
        self._guessing = math.log(vocab_size)
        self._losses = deque[float]([] if lowest_loss is None else [lowest_loss], maxlen=WINDOW)
        self._in_a_row = 0
        self.loss: float | None = None  # of the last step that was read
        self.exploding = self.skipped = ""  # what is wrong with it

    @property
    def lowest_loss(self) -> float | None:
        """The lowest of the last losses."""
        return min(self._losses, default=None)

    def too_high(self, loss: float) -> str:
        """Say what is wrong with a loss, or ""."""
        if not math.isfinite(loss):
            return f"the loss is {loss:g}"
        if not self._losses:
            return ""
        lowest = min(self._losses)
        good = loss <= lowest + MARGIN and (loss < self._guessing or loss <= lowest + NOISE)
        return "" if good else f"the loss is {loss:.4g}, and was {lowest:.4g} within the last {WINDOW} steps"

    def read(self, run: Run, step: int, numbers: Numbers) -> str:
        """Read the numbers of a step; return why training has diverged, or ""."""
        values = run.parts.strategy.on_host(numbers)
        self.loss, skipped_in_a_row = float(values["loss"]), int(values["skipped_in_a_row"])
        self.exploding = self.too_high(self.loss)
        self.skipped = "the gradient is not finite" if skipped_in_a_row else ""
        if math.isfinite(self.loss):
            self._losses.append(self.loss)
        self._in_a_row = self._in_a_row + 1 if self.exploding or self.skipped else 0
        if skipped_in_a_row >= MAX_IN_A_ROW:
            return (
                f"the gradient was not finite in {skipped_in_a_row} steps in a row, up to step {step} (loss"
                f" {self.loss:g}, loss scale {values['loss_scale']:g}): training has diverged. No parameter was changed"
                " by them."
            )
        if self._in_a_row >= MAX_IN_A_ROW:
            reason = self.exploding or self.skipped
            return f"{reason}, and so it went for {self._in_a_row} steps, up to step {step}: training has diverged."
        return ""


def out_of_range(params: Any, opt_state: Any) -> str:
    """Say which parameter or moment, on the devices, holds NaN or infinity, or a value that fp16 has not; or ""."""
    for kind, tree in (("parameter", params), ("moment", opt_state)):
        found = [(path, _largest(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
        for path, largest in found:  # all are on their way before the first one is waited for
            if not float(largest) <= (LARGEST if kind == "parameter" else FINITE):
                return f"the {kind} {jax.tree_util.keystr(path)} holds {float(largest):g}"
    return ""


@jax.jit
def _largest(x: jax.Array) -> jax.Array:
    """Return the largest magnitude in an array, NaN where it holds NaN."""
    return jnp.max(jnp.abs(x)).astype(jnp.float32)
