"""How a training ended, for whoever called it from Python.

In the data path: after the loop; the metrics of the run directory in.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jgpt.run_dir.metrics_file import best_validation, read_metrics
from jgpt.training.status import Status


@dataclass(frozen=True)
class TrainResult:
    """How a training ended. Losses are in nats per token; None where there is no such record."""

    run_dir: Path
    step: int
    is_finished: bool  # all steps are done; else it was stopped, and the same call goes on
    last_loss: float | None  # of the training text
    last_val_loss: float | None
    best_val_loss: float | None
    best_val_step: int | None


def train_result(status: Status) -> TrainResult:
    """Return how the run of a status stands."""
    records = read_metrics(status.run_dir / "metrics.jsonl")
    best = best_validation(records) or {}
    return TrainResult(
        run_dir=status.run_dir,
        step=status.step,
        is_finished=status.step >= status.total_steps,
        last_loss=_last(records, "loss"),
        last_val_loss=_last(records, "val_loss"),
        best_val_loss=best.get("val_loss"),
        best_val_step=best.get("step"),
    )


def _last(records: list[dict[str, Any]], name: str) -> float | None:
    return next((record[name] for record in reversed(records) if record.get(name) is not None), None)
