"""Every `log_every_steps`: the numbers of a step into metrics.jsonl, its copies, and onto the terminal.

In the data path: beside the step. The numbers are read one step late, while the devices are busy.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple

from jgpt.parallel.hosts import is_first
from jgpt.run_dir.metrics_file import MetricsLog
from jgpt.step.train_step import Numbers
from jgpt.training.hooks.trackers import Trackers
from jgpt.training.progress import Progress, Throughput
from jgpt.training.run import Run


class Outputs(NamedTuple):
    """What process 0 writes to."""

    metrics: MetricsLog
    trackers: Trackers
    progress: Progress


class Log:
    """The metrics file, the progress line and the stopwatch of one process."""

    def __init__(
        self, run: Run, peak_flops: float | None, on_record: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """`peak_flops` is that of all devices together, None where it is not known; `on_record` gets each record."""
        self._on_record = on_record
        # A run that was killed before its first checkpoint starts from step 0, and its metrics with it.
        self._outputs = None
        if is_first():
            self._outputs = Outputs(
                MetricsLog(run.run_dir / "metrics.jsonl", run.step if run.resumed else -1),
                Trackers(run.run_dir, run.config),
                Progress(run.total_steps, run.step),
            )
        parts = run.parts
        self._throughput = Throughput(
            run.total_steps,
            run.step,
            tokens_per_step=parts.tokens_per_step,
            flops_per_token=parts.flops_per_token,
            peak_flops=peak_flops,
        )

    def due(self, run: Run) -> bool:
        """Tell whether the numbers of this step are reported."""
        return run.step % run.config.log_every_steps == 0

    def paused(self) -> AbstractContextManager[None]:
        """Leave the time of a block out of the speed: what is done in it is no training."""
        return self._throughput.pause()

    def restart(self, run: Run) -> None:
        """Measure speed from this step on: the first one compiled, and says nothing of the others."""
        self._throughput.restart(run.step)

    def measure(self, run: Run, numbers: Numbers) -> tuple[dict[str, Any], float | None]:
        """Fetch the numbers of this step, which waits for it; return its record, and the seconds to the end."""
        values = {name: number.item() for name, number in run.parts.strategy.on_host(numbers).items()}
        speed = self._throughput.measure(run.step)
        scales = run.parts.policy.scales_loss
        record = {
            "step": run.step,
            "tokens": run.tokens,
            "loss": values["loss"],
            "learning_rate": values["learning_rate"],
            "grad_norm": values["grad_norm"],
            "loss_scale": values["loss_scale"] if scales else None,
            "skipped_steps": values["skipped_steps"] if scales or values["skipped_steps"] else None,
            "tokens_per_second": speed.tokens_per_second or None,
            "mfu": speed.mfu,
        }
        return record, speed.eta_seconds

    def write(self, run: Run, record: Mapping[str, Any], eta_seconds: float | None = None) -> None:
        """Put a record into metrics.jsonl and its copies, and on the terminal, in process 0."""
        if self._outputs is None:
            return
        written = self._outputs.metrics.write({**record, "elapsed_seconds": run.elapsed_seconds})
        self._outputs.progress.log(record, eta_seconds)
        self._outputs.progress.update(run.step)
        with self.paused():
            self._outputs.trackers.write(written)
        if self._on_record is not None:
            self._on_record(written)

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._outputs is not None:
            self._outputs.progress.close()
            self._outputs.metrics.close()
            self._outputs.trackers.close(failed=kind is not None)
