"""How fast a run is and how far: the stopwatch, the progress line on the terminal.

In the data path: beside the step; the loop is the caller. Nothing here knows JAX.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from tqdm import tqdm

from jgpt.wording import format_count, format_duration

log = logging.getLogger(__name__)


class Speed(NamedTuple):
    """How fast the run is: `mfu` is None where the devices' peak is not known, `eta_seconds` before the first step."""

    tokens_per_second: float
    mfu: float | None
    eta_seconds: float | None


class Throughput:
    """A stopwatch for training alone: evaluation, sampling and checkpoints run under `pause()`.

    `flops_per_token` counts forward and backward pass; `peak_flops` is that of all devices together, None if unknown.
    """

    SMOOTHING = 0.7  # weight of the past in the rate behind the ETA

    def __init__(
        self,
        total_steps: int,
        step: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.total_steps, self.tokens_per_step = total_steps, tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._clock = clock
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measure from `step` on: the first step of a process compiles, and says nothing of the others."""
        self._step, self._since, self._paused = step, self._clock(), 0.0
        self._seconds_per_step: float | None = None
        self._training_seconds = self._paused_seconds = 0.0  # since the restart

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time of this block."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def measure(self, step: int) -> Speed:
        """Return the speed of the steps since the last call.

        The time to the end counts pauses as well, at their share of the time so far.
        """
        now, steps = self._clock(), step - self._step
        seconds = max(now - self._since - self._paused, 1e-9)
        self._training_seconds += seconds
        self._paused_seconds += self._paused
        self._step, self._since, self._paused = step, now, 0.0
        if steps:
            past = seconds / steps if self._seconds_per_step is None else self._seconds_per_step
            self._seconds_per_step = self.SMOOTHING * past + (1 - self.SMOOTHING) * seconds / steps
        eta = None
        if self._seconds_per_step is not None:
            eta = (
                (self.total_steps - step) * self._seconds_per_step * (1 + self._paused_seconds / self._training_seconds)
            )
        rate = steps * self.tokens_per_step / seconds
        return Speed(rate, self.flops_per_token * rate / self.peak_flops if self.peak_flops else None, eta)


class Progress:
    """The terminal: a line for each record, and below them a bar where stdout is a terminal."""

    def __init__(self, total_steps: int, first_step: int):
        self.total_steps = total_steps
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            file=sys.stdout,
            disable=None,  # None: shown on terminals alone
            leave=False,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}",
        )

    def update(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(step - self._bar.n)

    def log(self, record: Mapping[str, Any], eta_seconds: float | None = None) -> None:
        """Log the record, with the keys of metrics.jsonl, as one line."""
        if eta_seconds is not None:
            self._bar.set_postfix_str(f"ETA {format_duration(eta_seconds)}", refresh=False)
        log.info("%s", format_line(record, self.total_steps, eta_seconds))

    def close(self) -> None:
        self._bar.close()


def format_line(record: Mapping[str, Any], total_steps: int, eta_seconds: float | None = None) -> str:
    """Put a record of metrics.jsonl in columns, those that it has.

    >>> format_line({"step": 120, "loss": 2.34561, "learning_rate": 9.9e-4, "grad_norm": 0.83, "mfu": 0.31}, 1000, 252)
    'step  120/1000  loss  2.3456  lr 9.9e-04  grad  0.83  mfu  31%  ETA 4m 12s'
    >>> format_line({"step": 100, "val_loss": 2.41, "bits_per_byte": 1.021}, 1000)
    'step  100/1000  val   2.4100 (1.021 bits/byte)'
    """
    has = {key: value for key, value in record.items() if value is not None}
    parts = [f"step {has['step']:{len(str(total_steps))}}/{total_steps}"]
    if "loss" in has:
        parts.append(f"loss {has['loss']:7.4f}")
    if "val_loss" in has:
        parts.append(f"val  {has['val_loss']:7.4f}")
        if "bits_per_byte" in has:
            parts[-1] += f" ({has['bits_per_byte']:.3f} bits/byte)"
    if "learning_rate" in has:
        parts.append(f"lr {has['learning_rate']:.1e}")
    if "grad_norm" in has:
        parts.append(f"grad {has['grad_norm']:5.2f}")
    if "loss_scale" in has:
        parts.append(f"scale {has['loss_scale']:<5.0f}")
    if "skipped_steps" in has:
        parts.append(f"skipped {has['skipped_steps']}")
    if "tokens_per_second" in has:
        parts.append(f"{format_count(has['tokens_per_second']):>6} tok/s")
    if "mfu" in has:
        parts.append(f"mfu {has['mfu']:4.0%}")
    if eta_seconds is not None:
        parts.append(f"ETA {format_duration(eta_seconds)}")
    return "  ".join(parts)
