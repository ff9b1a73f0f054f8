"""What the tests of whole runs share: how a run is read from its directory, compared, and stopped."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from jgpt.training.stop import Stop

OF_THE_RUN = ("step", "tokens", "loss", "val_loss", "bits_per_byte", "grad_norm", "learning_rate", "loss_scale")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in OF_THE_RUN if key in line} for line in lines]


def status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def assert_close(a: Path, b: Path, rtol: float, steps: int | None = None) -> None:
    """Assert that two runs had the same losses and gradients, up to rounding."""
    for key in ("loss", "val_loss", "grad_norm"):
        x, y = ([line[key] for line in metrics(run)[:steps] if key in line] for run in (a, b))
        np.testing.assert_allclose(x, y, rtol=rtol)


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that every number of every step, the samples, and the last state are the same, bit for bit."""
    assert metrics(a) == metrics(b)
    assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()
    step = str(metrics(a)[-1]["step"])
    for item in ("params", "training"):
        trees = [ocp.StandardCheckpointer().restore(run / "checkpoints" / step / item) for run in (a, b)]
        for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def stop_after(step: int) -> Any:
    """Return a patch that stops a run as a signal would, after so many steps of this process."""
    reasons = iter([""] * (step - 1) + ["test"])
    return mock.patch.object(Stop, "reason", lambda self, margin=0.0: next(reasons))
