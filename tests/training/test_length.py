"""How long a run is: more steps for one whose learning rate fell already, and hours instead of steps."""

import json
import re
import shutil
import time
from itertools import count
from pathlib import Path
from typing import Any

import jax
import pytest
from runs import assert_same_run, metrics, status, stop_after

from jgpt.training import settle
from jgpt.training import start as start_module

MUON = "--config.optimizer.kind=muon"
WSD = ["--config.optimizer.schedule=wsd", "--config.optimizer.decay_fraction=0.5", "--config.checkpoint.keep_last=1"]
AUTO = ["--config.optimizer.total_steps=auto", "--config.optimizer.budget_hours=4"]


def steps(n: int) -> str:
    return f"--config.optimizer.total_steps={n}"


def saved(run_dir: Path) -> list[int]:
    return sorted(int(path.stem) for path in (run_dir / "checkpoints").glob("*.sha256"))


@pytest.mark.slow
def test_a_wsd_run_with_muon_given_more_steps_is_the_longer_run(command: Any, tiny: list[str], tmp_path: Path):
    """Bit for bit, though it was finished, and killed once more on the way."""
    run, longer = tmp_path / "run", tmp_path / "longer"
    assert command("train", *tiny, MUON, *WSD, steps(8), f"--config.out_dir={longer}").code == 0
    assert command("train", *tiny, MUON, *WSD).code == 0
    shorter, half = metrics(run), metrics(longer)[:3]
    assert shorter[:3] == half and shorter[3]["learning_rate"] == metrics(longer)[3]["learning_rate"]
    assert shorter[4]["learning_rate"] < metrics(longer)[4]["learning_rate"]
    assert 2 in saved(run) and 4 in saved(run)  # where the decay began, and the end
    with stop_after(1):
        result = command("train", *tiny, MUON, *WSD, steps(8))
    assert "going on from before the learning rate fell" in result.out and "(4) are deleted" in result.out
    assert "resuming from step 2 of 8" in result.out and 4 not in saved(run)
    assert command("train", *tiny, MUON, *WSD, steps(8)).code == 0
    assert_same_run(run, longer)


def test_a_wsd_run_with_no_checkpoint_before_its_decay_says_so(command: Any, tiny: list[str], tmp_path: Path):
    assert command("train", *tiny, *WSD).code == 0
    for step in {*saved(tmp_path / "run")} - {4}:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
        (tmp_path / "run" / "checkpoints" / f"{step}.sha256").unlink()
    result = command("train", *tiny, *WSD, steps(8))
    assert result.code == 0 and "no checkpoint from before that is left: it goes on from step 4" in result.out
    assert status(tmp_path / "run")["step"] == 8


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock of the measurement advance by ten minutes at each look: 400 s a step, 600 an evaluation."""
    now, ticks = time.monotonic(), count(0, 600)
    monkeypatch.setattr(settle, "clock", lambda: now + next(ticks))


@pytest.mark.slow
def test_hours_become_steps_once(command: Any, tiny: list[str], ticking: None, tmp_path: Path, monkeypatch: Any):
    """The number is in config.json; it stays after a kill, on other devices, and with other hours."""
    run = tmp_path / "run"
    with stop_after(1):
        result = command("train", *tiny, *AUTO)
    assert result.code == 0, result.err
    said = re.search(
        r"4h 00m hold \d+ steps: measured .* tokens/s .*\noptimizer.total_steps=(\d+): .* tokens, (\S+) epochs",
        result.out,
    )
    assert said, result.out
    n = int(said[1])
    assert 12 <= n <= 14  # 4 hours, less 3%, less about 4,400 s to start, in steps of 400 s and an evaluation for two
    assert json.loads((run / "config.json").read_text())["optimizer"]["total_steps"] == n == status(run)["total_steps"]
    with stop_after(1), monkeypatch.context() as patch:
        patch.setattr(start_module, "training_devices", lambda config: jax.local_devices()[:1])
        result = command("train", *tiny, *AUTO, "--config.optimizer.budget_hours=5")
    assert f"budget_hours=5: this run's {n} steps stay" in result.out and "measuring" not in result.out
    assert command("train", *tiny, *AUTO).code == 0
    assert status(run)["state"] == "finished" and metrics(run)[-1]["step"] == n
    assert metrics(run)[-1]["learning_rate"] < 2e-4  # the decay is over


def test_a_text_that_is_small_for_the_hours(command: Any, tiny: list[str], ticking: None):
    with stop_after(1):
        result = command("train", *tiny, *AUTO, "--config.optimizer.budget_hours=200")
    assert result.code == 0 and "the text is small for 200 hours: it is read" in result.out


def test_epochs_become_steps(command: Any, tiny: list[str], tmp_path: Path):
    """71 blocks of 16 tokens in batches of 4. Nothing is measured where there are no hours, and the fewer steps win."""
    auto = [*tiny, AUTO[0]]
    result = command("train", *auto, "--config.optimizer.budget_epochs=0.3")
    assert result.code == 0 and "measuring" not in result.out and "the text is small: " in result.out
    assert status(tmp_path / "run")["total_steps"] == 5
    again = command("train", *auto, "--config.optimizer.budget_epochs=0.6")
    assert again.code == 0 and "budget_epochs=0.6: this run's 5 steps stay" in again.out
    before = json.loads((tmp_path / "run" / "config.json").read_text())["optimizer"]
    assert (before["total_steps"], before["budget_epochs"]) == (5, 0.3)  # that of which the steps were settled
    few = command("train", *auto, "--config.optimizer.budget_epochs=0.1", f"--config.out_dir={tmp_path / 'few'}")
    assert few.code == 2 and "budget_epochs=0.1 of 71 sequences hold 1 steps, and 1 are for the warmup" in few.err


def test_hours_and_epochs_are_the_fewer_steps(command: Any, tiny: list[str], ticking: None, tmp_path: Path):
    result = command("train", *tiny, *AUTO, "--config.optimizer.budget_epochs=0.3")
    assert result.code == 0 and "4h 00m hold" in result.out and status(tmp_path / "run")["total_steps"] == 5


def test_hours_that_are_too_few(command: Any, tiny: list[str], ticking: None, tmp_path: Path):
    result = command("train", *tiny, *AUTO, "--config.optimizer.budget_hours=0.00001")
    assert (
        result.code == 2 and "budget_hours=1e-05 (0s) holds 0 steps of" in result.err and "Traceback" not in result.err
    )
    assert "as the start alone takes " in result.err
    assert not (tmp_path / "run" / "config.json").exists()
